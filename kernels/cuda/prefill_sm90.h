// PrefillRuns() on compute capability 9.0. Internal to kernels/cuda.
#pragma once
#include "kernels/cuda/run_kernels.h"

namespace prehoc::cuda {
struct PrefillArgs;
namespace sm90 {

bool TakesPrefill(int32_t head_dim);
// As there, for such a head_dim, with `rows`, and not nothing. Shapes were checked.
Status PrefillRuns(const RunPrefillParams& params, const PrefillArgs& args, cudaStream_t stream);

}  // namespace sm90
}  // namespace prehoc::cuda
