#include "integrations/reference/engine/simd_level.h"

#include "base/check.h"
#include "base/cpu_features.h"
#include "integrations/reference/engine/kernel_table.h"

namespace prehoc::reference {
namespace {

bool CpuHas(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPlain: return true;
    case SimdLevel::kAvx2: return CpuHasAvx2();
    case SimdLevel::kAvx512: return CpuHasAvx512();
  }
  return false;
}

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
