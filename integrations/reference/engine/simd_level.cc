#include "integrations/reference/engine/simd_level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "base/check.h"
#include "integrations/reference/engine/kernel_table.h"

namespace prehoc::reference {
namespace {

#if defined(__x86_64__)
// clang 14 has no name for F16C.
bool CpuHasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

// The compiler's check includes that the operating system saves the wide registers.
bool CpuHas(SimdLevel level) {
  __builtin_cpu_init();
  switch (level) {
    case SimdLevel::kPlain: return true;
    case SimdLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && CpuHasF16c();
    case SimdLevel::kAvx512:
      return CpuHas(SimdLevel::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
  }
  return false;
}
#else
bool CpuHas(SimdLevel level) { return level == SimdLevel::kPlain; }
#endif

const EngineKernels* TableOf(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPlain: return PlainEngineKernels();
    case SimdLevel::kAvx2: return Avx2EngineKernels();
    case SimdLevel::kAvx512: return Avx512EngineKernels();
  }
  return nullptr;
}

}  // namespace

std::string_view SimdLevelName(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPlain: return "plain";
    case SimdLevel::kAvx2: return "avx2";
    case SimdLevel::kAvx512: return "avx512";
  }
  return "?";
}

bool SimdLevelAvailable(SimdLevel level) { return CpuHas(level) && TableOf(level) != nullptr; }

SimdLevel BestSimdLevel() {
  static const SimdLevel best = [] {
    for (const SimdLevel level : {SimdLevel::kAvx512, SimdLevel::kAvx2}) {
      if (SimdLevelAvailable(level)) return level;
    }
    return SimdLevel::kPlain;
  }();
  return best;
}

const EngineKernels& KernelsFor(SimdLevel level) {
  PREHOC_CHECK(SimdLevelAvailable(level));
  return *TableOf(level);
}

}  // namespace prehoc::reference
