// A plain number where an id was meant.
#include "base/ids.h"

int SlotOf(prehoc::SlotId slot) { return slot.value(); }

int Use() {
#ifdef PREHOC_MUST_NOT_COMPILE
  return SlotOf(7);
#else
  return SlotOf(prehoc::SlotId(7));
#endif
}
