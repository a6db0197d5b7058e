#include "base/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace prehoc {
namespace {
// clang 14 has no name for F16C.
bool CpuHasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
}  // namespace

bool CpuHasAvx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && CpuHasF16c();
}

bool CpuHasAvx512() {
  return CpuHasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace prehoc
#else
namespace prehoc {
bool CpuHasAvx2() { return false; }
bool CpuHasAvx512() { return false; }
}  // namespace prehoc
#endif
