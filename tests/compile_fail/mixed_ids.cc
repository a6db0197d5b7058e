// A layer where a head was meant.
#include "base/ids.h"

int HeadOf(prehoc::KvHeadId head) { return head.value(); }

int Use() {
#ifdef PREHOC_MUST_NOT_COMPILE
  return HeadOf(prehoc::LayerId(1));
#else
  return HeadOf(prehoc::KvHeadId(1));
#endif
}
