// Definitions of select_launch.h, for inst/.
#pragma once
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/select_launch.h"

namespace prehoc::cuda {

template <int D>
Status LaunchScan(int bits, const ScanArgs& args, dim3 grid, cudaStream_t stream) {
  return Dispatch<2, 4, 8>(bits, [&](auto b) {
    return LaunchKernel(ScanKernel<D, b()>, "scan", args, {.grid = grid, .threads = kScanThreads}, stream);
  });
}
template <int D>
Status LaunchSelect(int bits, const SelectArgs& args, int blocks, cudaStream_t stream) {
  return Dispatch<2, 4, 8>(bits, [&](auto b) { return LaunchWay<Selector<D, b()>>("select", args, blocks, stream); });
}

#define PREHOC_INSTANTIATE_SELECT(D)                                                 \
  template Status LaunchScan<D>(int, const ScanArgs&, dim3, cudaStream_t);           \
  template Status LaunchSelect<D>(int, const SelectArgs&, int, cudaStream_t)

}  // namespace prehoc::cuda
