#include "kernels/function_table.h"

#include <algorithm>

#include "kernels/cpu/cpu_kernels.h"

namespace prehoc {

#ifndef PREHOC_VECTOR_KERNELS
const KernelTable* Avx2Kernels() { return nullptr; }
const KernelTable* Avx512Kernels() { return nullptr; }
#endif

int32_t ChooseTask::max_chosen() const {
  const int64_t middle = std::max<int64_t>(0, int64_t{hi} - lo);
  const int64_t wanted = std::clamp<int64_t>(k, 0, middle);
  int64_t most = wanted;
  if (!exact_budget) {
    const int64_t dilated = std::clamp<int64_t>(dilate_m, 0, wanted);
    if (dilated > 0 && dilate_r >= middle / dilated) return static_cast<int32_t>(middle);  // before the product overflows
    if (dilated > 0) most += 2 * dilated * std::max(dilate_r, 0);
  }
  if (target_drop >= 0) most = std::max<int64_t>(most, cap);
  return static_cast<int32_t>(std::min(most, middle));
}

const KernelTable& BestCpuKernels() {
  if (const KernelTable* kernels = Avx512Kernels()) return *kernels;
  if (const KernelTable* kernels = Avx2Kernels()) return *kernels;
  return ReferenceKernels();
}

const KernelTable* FindKernels(std::string_view name) {
  for (const KernelTable* kernels : {&ReferenceKernels(), Avx2Kernels(), Avx512Kernels()}) {
    if (kernels != nullptr && kernels->name == name) return kernels;
  }
  return nullptr;
}

}  // namespace prehoc
