// The gate of one task, by a block of kThreads.
#pragma once
#include "kernels/cuda/common.cuh"

namespace prehoc::cuda {

struct GateArgs {
  const GateTask* tasks;
  int32_t group, head_dim;
  float tau;
  int32_t max_age;
};
inline GateArgs GateArgsOf(const GateParams& params) { return {params.tasks, params.group, params.head_dim, params.tau, params.max_age}; }

// A warp takes a head at a time. fp64, as the reference: a cosine near tau decides.
template <int kThreads>
__device__ inline void RunGate(const GateTask& task, const GateArgs& args) {
  __shared__ float least[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t age = threadIdx.x == 0 && task.age != nullptr ? *task.age : 0;
  float mine = 1;
  for (int h = warp; h < args.group; h += kThreads / kWarp) {
    double dot = 0, q_square = 0, anchor_square = 0;
    for (int c = lane; c < args.head_dim; c += kWarp) {
      const double x = task.q[h * args.head_dim + c], y = task.anchor[h * args.head_dim + c];
      dot += x * y, q_square += x * x, anchor_square += y * y;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      dot += __shfl_xor_sync(kAllLanes, dot, offset);
      q_square += __shfl_xor_sync(kAllLanes, q_square, offset);
      anchor_square += __shfl_xor_sync(kAllLanes, anchor_square, offset);
    }
    const double norms = sqrt(q_square) * sqrt(anchor_square);
    float cosine = -2;
    if (norms > 0 && norms <= 1.7976931348623157e308) cosine = static_cast<float>(fmin(1.0, fmax(-1.0, dot / norms)));
    mine = fminf(mine, cosine);
  }
  if (lane == 0) least[warp] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / kWarp; ++w) mine = fminf(mine, least[w]);
  if (task.cosine != nullptr) *task.cosine = mine;
  if (task.hold != nullptr) *task.hold = mine > args.tau && (task.age == nullptr || age < args.max_age) ? 1 : 0;
}

}  // namespace prehoc::cuda
