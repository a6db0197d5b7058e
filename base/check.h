// PREHOC_CHECK: for our own bugs only, out of reach of any caller's input. Aborts with file and line.
#pragma once

namespace prehoc {
[[noreturn]] void CheckFailed(const char* file, int line, const char* what);
}  // namespace prehoc

#define PREHOC_CHECK(cond) \
  ((cond) ? static_cast<void>(0) : ::prehoc::CheckFailed(__FILE__, __LINE__, #cond))

#ifdef NDEBUG
#define PREHOC_DCHECK(cond) static_cast<void>(sizeof(!(cond)))
#else
#define PREHOC_DCHECK(cond) PREHOC_CHECK(cond)
#endif
