// What benchmarks do with errors: say which program failed and why, and end. Host compilers only.
#pragma once
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "base/result.h"
#include "base/status.h"

namespace prehoc {

[[noreturn]] inline void Fail(const Status& status) {
  std::fprintf(stderr, "%s: %s\n", program_invocation_short_name, status.ToString().c_str());
  std::exit(1);
}
inline void OrExit(const Status& status) {
  if (!status.ok()) Fail(status);
}
template <class T>
T OrExit(Result<T> result) {
  if (!result.ok()) Fail(result.status());
  return std::move(result).value();
}

}  // namespace prehoc
