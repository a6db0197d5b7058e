// Definitions of LaunchBars(), for bars_*.cu.
#pragma once
#include "kernels/cuda/select_bars.cuh"
#include "kernels/cuda/select_launch.h"

namespace prehoc::cuda {

template <int D>
Status LaunchBars(int bits, const SelectArgs& args, int blocks, cudaStream_t stream) {
  return Dispatch<2, 4, 8>(bits, [&](auto b) {
    const Shape shape{.grid = dim3(static_cast<unsigned>(blocks)), .threads = kSelectThreads,
                      .shared_bytes = BarSelector<D, b()>::SharedBytes(args), .cluster = args.cluster ? args.team_blocks : 1,
                      .cooperative = Cooperates(args)};
    return LaunchKernel(BarKernel<D, b()>, "select", args, shape, stream);
  });
}

#define PREHOC_INSTANTIATE_BARS(D) template Status LaunchBars<D>(int, const SelectArgs&, int, cudaStream_t)

}  // namespace prehoc::cuda
