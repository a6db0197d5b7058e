// Attention with rows of 8 bits in host memory, which attend_narrow.cu compiles by itself.
#pragma once
#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/launch.h"

namespace prehoc::cuda {

// D 64, 96, 128 or 256; H 4 or 8. kCuda.
template <int D, int H>
Status AttendNarrow(const AttendArgs& args, const Shape& shape, cudaStream_t stream);

}  // namespace prehoc::cuda
