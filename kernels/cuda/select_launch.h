// The variants of scan and select by head_dim; each is compiled in its own file of inst/. Internal to kernels/cuda.
#pragma once
#include "kernels/cuda/launch.h"

namespace prehoc::cuda {

struct ScanArgs;
struct SelectArgs;

// Requires bits 2, 4 or 8.
template <int D>
Status LaunchScan(int bits, const ScanArgs& args, dim3 grid, cudaStream_t stream);
template <int D>
Status LaunchSelect(int bits, const SelectArgs& args, int blocks, cudaStream_t stream);
// select_bars.cuh, in files of its own.
template <int D>
Status LaunchBars(int bits, const SelectArgs& args, int blocks, cudaStream_t stream);

}  // namespace prehoc::cuda
