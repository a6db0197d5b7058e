// Definitions of LaunchAlone(), for alone_*.cu.
#pragma once
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/select_launch.h"

namespace prehoc::cuda {

template <class WAY>
__global__ void __launch_bounds__(kAloneThreads, kAloneBlocks) AloneKernel(const __grid_constant__ SelectArgs args) {
  GateTask gate;
  if (args.gate.tasks != nullptr) gate = args.gate.tasks[blockIdx.x];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  if (args.gate.tasks != nullptr) {
    RunGate<kAloneThreads>(gate, args.gate);
    __syncthreads();
  }
  WAY way(args, 1);
  way.Run(static_cast<int>(blockIdx.x));
}
template <class WAY>
Status LaunchAloneAs(const char* name, const SelectArgs& args, cudaStream_t stream) {
  const Shape shape{.grid = dim3(static_cast<unsigned>(args.num_tasks)), .threads = kAloneThreads, .shared_bytes = WAY::SharedBytes(args)};
  return LaunchKernel(AloneKernel<WAY>, name, args, shape, stream);
}
template <int D>
Status LaunchAlone(int bits, const SelectArgs& args, cudaStream_t stream) {
  return Dispatch<2, 4, 8>(bits, [&](auto b) { return LaunchAloneAs<Selector<D, b(), kAloneThreads>>("select", args, stream); });
}

#define PREHOC_INSTANTIATE_ALONE(D) template Status LaunchAlone<D>(int, const SelectArgs&, cudaStream_t)

}  // namespace prehoc::cuda
