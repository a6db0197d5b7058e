#include "integrations/reference/engine/kernel_table.h"

#if defined(__x86_64__)
#include "integrations/reference/engine/kernels_x86.h"

namespace prehoc::reference {
const EngineKernels* Avx512EngineKernels() {
  static constexpr EngineKernels kTable = MakeTable(SimdLevel::kAvx512);
  return &kTable;
}
}  // namespace prehoc::reference
#else
namespace prehoc::reference {
const EngineKernels* Avx512EngineKernels() { return nullptr; }
}  // namespace prehoc::reference
#endif
