#include "bench/gpu/synthetic.h"

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"

namespace prehoc {
namespace {
using cuda::LaunchKernel;
constexpr int kThreads = 256;

__device__ inline uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
__device__ inline float Uniform(uint64_t bits) { return (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f; }
__device__ inline float Normal(uint64_t seed, uint64_t index) {
  const uint64_t a = Mix(seed ^ Mix(2 * index)), b = Mix(seed ^ Mix(2 * index + 1));
  return sqrtf(-2 * __logf(Uniform(a))) * __cosf(6.2831853f * Uniform(b));
}

struct HalfArgs {
  uint16_t* to;
  int64_t count;
  float scale;
  uint64_t seed;
};
__global__ void FillHalfKernel(const __grid_constant__ HalfArgs args) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.count; i += int64_t{gridDim.x} * kThreads) {
    args.to[i] = __half_as_ushort(__float2half_rn(args.scale * Normal(args.seed, static_cast<uint64_t>(i))));
  }
}
struct FloatArgs {
  float* to;
  int64_t count;
  float mean, scale;
  uint64_t seed;
};
__global__ void FillFloatKernel(const __grid_constant__ FloatArgs args) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.count; i += int64_t{gridDim.x} * kThreads) {
    args.to[i] = args.mean + args.scale * Normal(args.seed, static_cast<uint64_t>(i));
  }
}
struct KeyArgs {
  Half* rows;
  int64_t first, count;
  int32_t head_dim;
  uint64_t seed;
};
__global__ void KeyKernel(const __grid_constant__ KeyArgs args) {
  const int64_t d = args.head_dim, all = args.count * 2 * d;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / (2 * d), c = i % (2 * d);
    const float x = Normal(args.seed, static_cast<uint64_t>(args.first * 2 * d + i));
    const float factor = c < d ? __expf(0.5f * Normal(~args.seed, static_cast<uint64_t>(args.first + row))) : 1.0f;
    args.rows[i] = __half_as_ushort(__float2half_rn(factor * x));
  }
}
struct QueryArgs {
  float* q;
  int32_t steps, units, unit_floats;
  QueryStatistics statistics;
  uint64_t seed;
};
__global__ void QueryKernel(const __grid_constant__ QueryArgs args) {
  const int64_t floats = int64_t{args.units} * args.unit_floats;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= floats) return;
  const QueryStatistics& s = args.statistics;
  const float share = s.least + (s.most - s.least) * Uniform(Mix(args.seed ^ static_cast<uint64_t>(i / args.unit_floats)));
  const float stays = Normal(args.seed + 1, static_cast<uint64_t>(i));
  float moves = Normal(args.seed + 2, static_cast<uint64_t>(i));
  for (int t = 0; t < args.steps; ++t) {
    args.q[t * floats + i] = s.scale * (sqrtf(share) * stays + sqrtf(1 - share) * moves);
    moves = s.memory * moves + sqrtf(1 - s.memory * s.memory) * Normal(args.seed + 3, static_cast<uint64_t>(t * floats + i));
  }
}
struct AdvanceArgs {
  const float* q;
  int32_t steps;
  int64_t floats;
  float* now;
  int32_t* step;
  int32_t* n;
};
__global__ void CopyQueriesKernel(const __grid_constant__ AdvanceArgs args) {
  cuda::WaitForEarlierWork();
  const float* const from = args.q + int64_t{*args.step % args.steps} * args.floats;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.floats; i += int64_t{gridDim.x} * kThreads) args.now[i] = from[i];
}
__global__ void CountKernel(const __grid_constant__ AdvanceArgs args) {
  cuda::WaitForEarlierWork();
  *args.step += 1;
  *args.n += 1;
}
constexpr cuda::Shape kWhole{.grid = dim3(2048), .threads = kThreads};
}  // namespace

Status FillNormal(uint16_t* to, int64_t count, float scale, uint64_t seed, cudaStream_t stream) {
  return LaunchKernel(FillHalfKernel, "fill", HalfArgs{to, count, scale, seed}, kWhole, stream);
}
Status FillNormal(float* to, int64_t count, float mean, float scale, uint64_t seed, cudaStream_t stream) {
  return LaunchKernel(FillFloatKernel, "fill", FloatArgs{to, count, mean, scale, seed}, kWhole, stream);
}
Status MakeKeys(Half* rows, int64_t first, int64_t count, int32_t head_dim, uint64_t seed, cudaStream_t stream) {
  return LaunchKernel(KeyKernel, "keys", KeyArgs{rows, first, count, head_dim, seed}, kWhole, stream);
}
Status MakeQueries(float* q, int32_t steps, int32_t units, int32_t unit_floats, const QueryStatistics& statistics, uint64_t seed, cudaStream_t stream) {
  const int64_t blocks = (int64_t{units} * unit_floats + kThreads - 1) / kThreads;
  return LaunchKernel(QueryKernel, "queries", QueryArgs{q, steps, units, unit_floats, statistics, seed},
                      {.grid = dim3(static_cast<unsigned>(blocks)), .threads = kThreads}, stream);
}
Status Advance(const float* q, int32_t steps, int64_t floats, float* now, int32_t* step, int32_t* n, cudaStream_t stream) {
  const AdvanceArgs args{q, steps, floats, now, step, n};
  PREHOC_RETURN_IF_ERROR(LaunchKernel(CopyQueriesKernel, "advance", args, {.grid = dim3(128), .threads = kThreads}, stream));
  return LaunchKernel(CountKernel, "advance", args, {.grid = dim3(1), .threads = 1}, stream);
}

}  // namespace prehoc
