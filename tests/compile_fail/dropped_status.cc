// An error that nobody looks at.
#include "base/status.h"

prehoc::Status Fail() { return {prehoc::StatusCode::kIoError, "lost"}; }

void Use() {
#ifdef PREHOC_MUST_NOT_COMPILE
  Fail();
#else
  Fail().IgnoreError();
#endif
}
