// Definitions of LaunchBars(), for bars_*.cu.
#pragma once
#include "kernels/cuda/select_bars.cuh"
#include "kernels/cuda/select_launch.h"

namespace prehoc::cuda {

template <int D>
Status LaunchBars(int bits, const SelectArgs& args, int blocks, cudaStream_t stream) {
  return Dispatch<2, 4, 8>(bits, [&](auto b) { return LaunchWay<BarSelector<D, b()>>("select", args, blocks, stream); });
}

#define PREHOC_INSTANTIATE_BARS(D) template Status LaunchBars<D>(int, const SelectArgs&, int, cudaStream_t)

}  // namespace prehoc::cuda
