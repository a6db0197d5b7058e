#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace prehoc {
// The one place that writes: the process is about to end because of a bug of ours.
void CheckFailed(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: prehoc bug: check failed: %s\n", file, line, what);
  std::abort();
}
}  // namespace prehoc
