// Causal attention of many queries, in fp32: tiles of queries and keys in shared memory, one pass with a running maximum.
#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/run_kernels.h"

namespace prehoc::cuda {
namespace {

constexpr int kThreads = 256;      // 16 x 16: thread (y, x) has queries 4 y .. 4 y + 3, keys x and x + 16, channels x + 16 i
constexpr int kQueryTile = 64, kKeyTile = 32;
constexpr int kRows = 4;

struct PrefillArgs {
  const RunPrefillTask* tasks;
  int32_t queries, first, sinks, group;
  float scale;
};

template <int D>
struct Tiles {
  // One float more a row: lanes that read down a column meet no bank twice.
  float q[kQueryTile][D + 1];
  float k[kKeyTile][D + 1];
  float v[kKeyTile][D + 1];
  float p[kQueryTile][kKeyTile + 1];
  int32_t start[kQueryTile];
  int32_t least_start;
};

__device__ inline float Over16(float x, bool sum) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, x, offset);
    x = sum ? x + other : fmaxf(x, other);
  }
  return x;
}

template <int D>
__device__ void LoadQueries(const PrefillArgs& args, const RunPrefillTask& task, int head, int begin, Tiles<D>& tiles) {
  for (int i = threadIdx.x; i < kQueryTile * D; i += kThreads) {
    const int t = i / D, c = i % D;
    tiles.q[t][c] = begin + t < args.queries ? task.q[(begin + t) * task.q_stride + int64_t{head} * D + c] * args.scale : 0.0f;
  }
  if (threadIdx.x == 0) tiles.least_start = 0x7fffffff;
  __syncthreads();
  if (threadIdx.x < kQueryTile && begin + static_cast<int>(threadIdx.x) < args.queries) {
    const int32_t start = task.start != nullptr ? task.start[begin + threadIdx.x] : 0;
    tiles.start[threadIdx.x] = start;
    atomicMin(&tiles.least_start, start);
  }
  __syncthreads();
}

template <int D>
__device__ void LoadKeys(const RunPrefillTask& task, int key, int keys, Tiles<D>& tiles) {
  for (int i = threadIdx.x; i < kKeyTile * D; i += kThreads) {
    const int j = i / D, c = i % D;
    const bool there = key + j < keys;
    const Half* const row = task.rows + int64_t{key + j} * 2 * D;
    tiles.k[j][c] = there ? __half2float(__ushort_as_half(row[c])) : 0.0f;
    tiles.v[j][c] = there ? __half2float(__ushort_as_half(row[D + c])) : 0.0f;
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads) PrefillKernel(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(16) char shared[];
  Tiles<D>& tiles = *reinterpret_cast<Tiles<D>*>(shared);
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RunPrefillTask task = args.tasks[blockIdx.y];
  const int head = blockIdx.z, x = threadIdx.x % 16, y = threadIdx.x / 16;
  // The last queries see most: they begin first.
  const int begin = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kQueryTile;
  const int end = min(begin + kQueryTile, args.queries), keys = args.first + end;
  LoadQueries(args, task, head, begin, tiles);
  float out[kRows][D / 16] = {}, most[kRows], sum[kRows] = {};
  for (float& m : most) m = -Infinity();
  for (int key = 0; key < keys; key += kKeyTile) {
    if (key >= args.sinks && key + kKeyTile <= tiles.least_start) continue;  // nobody sees it
    __syncthreads();
    LoadKeys(task, key, keys, tiles);
    __syncthreads();
    float z[kRows][2] = {};
#pragma unroll 8
    for (int c = 0; c < D; ++c) {
      const float k0 = tiles.k[x][c], k1 = tiles.k[x + 16][c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float q = tiles.q[y * kRows + r][c];
        z[r][0] += q * k0;
        z[r][1] += q * k1;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int t = y * kRows + r, last = args.first + begin + t;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int position = key + x + 16 * j;
        const bool seen = begin + t < args.queries && position <= last && (position < args.sinks || position >= tiles.start[t]);
        if (!seen) z[r][j] = -Infinity();
      }
      const float now = fmaxf(most[r], Over16(fmaxf(z[r][0], z[r][1]), false));
      const float keep = most[r] == -Infinity() ? 0.0f : expf(most[r] - now);
      float p[2];
      for (int j = 0; j < 2; ++j) {
        p[j] = z[r][j] == -Infinity() ? 0.0f : expf(z[r][j] - now);
        tiles.p[t][x + 16 * j] = p[j];
      }
      sum[r] = sum[r] * keep + Over16(p[0] + p[1], true);
      most[r] = now;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) out[r][i] *= keep;
    }
    __syncwarp();  // a query's weights are written and read by the same 16 lanes
#pragma unroll 4
    for (int j = 0; j < kKeyTile; ++j) {
      float v[D / 16];
#pragma unroll
      for (int i = 0; i < D / 16; ++i) v[i] = tiles.v[j][x + 16 * i];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float p = tiles.p[y * kRows + r][j];
        // A weight of 0 takes nothing, not even from an infinite value.
#pragma unroll
        for (int i = 0; i < D / 16; ++i) out[r][i] += p != 0.0f ? p * v[i] : 0.0f;
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int t = begin + y * kRows + r;
    if (t >= args.queries) continue;
    float* const to = task.out + t * task.out_stride + int64_t{head} * D;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) to[x + 16 * i] = sum[r] == 0.0f ? 0.0f : out[r][i] / sum[r];
  }
}
}  // namespace

Status PrefillRuns(const RunPrefillParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("prefill").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group)
                             .That(params.first >= 0 && params.queries >= 0, "first", params.first, "use 0 or more").Take());
  if (params.num_tasks == 0 || params.queries == 0) return {};
  const PrefillArgs args{params.tasks, params.queries, params.first, params.sinks, params.group,
                         1.0f / std::sqrt(static_cast<float>(params.head_dim))};
  const dim3 grid(static_cast<unsigned>(CeilDiv(params.queries, kQueryTile)), static_cast<unsigned>(params.num_tasks),
                  static_cast<unsigned>(params.group));
  return DispatchHeadDim(params.head_dim, [&](auto d) {
    return LaunchKernel(PrefillKernel<d()>, "prefill", args, {.grid = grid, .threads = kThreads, .shared_bytes = sizeof(Tiles<d()>)}, stream);
  });
}

}  // namespace prehoc::cuda
