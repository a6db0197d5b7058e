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
// In files of their own: a block for each task; select_bars.cuh.
template <int D>
Status LaunchAlone(int bits, const SelectArgs& args, cudaStream_t stream);
template <int D>
Status LaunchBars(int bits, const SelectArgs& args, int blocks, cudaStream_t stream);

}  // namespace prehoc::cuda
