// A value, and the reason why there may be none, that nobody looks at.
#include "base/result.h"

prehoc::Result<int> Make() { return 1; }

int Use() {
#ifdef PREHOC_MUST_NOT_COMPILE
  Make();
  return 0;
#else
  return Make().value();
#endif
}
