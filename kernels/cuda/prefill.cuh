// What the kernels of prefill share: their arguments, what a query sees, and the plain way in fp32.
#pragma once
#include <type_traits>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/run_kernels.h"

namespace prehoc::cuda {

// The plain way: 16 lanes take kRows queries, keys x and x + 16, channels x + 16 i.
constexpr int kKeyTile = 32;
constexpr int kRows = 4;

template <int D>
struct PrefillShape {
  static constexpr int kWarps = D == 256 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kPlainQueries = kThreads / 16 * kRows;
  static constexpr int kKeys = D == 256 ? 32 : 64;
  static constexpr int kStride = D + 8;  // halves of a row: eight rows meet no bank twice
  static_assert(kQueries % kPlainQueries == 0);
};

struct PrefillArgs {
  const RunPrefillTask* tasks;
  int32_t queries, first, sinks, group;
  float scale;
};

template <class F>
Status DispatchPrecision(PromptPrecision precision, const F& f) {
  if (precision == PromptPrecision::kHalf) return f(std::integral_constant<PromptPrecision, PromptPrecision::kHalf>());
  return f(std::integral_constant<PromptPrecision, PromptPrecision::kSplit>());
}

template <int D>
struct PlainTiles {
  // One float more a row: lanes that read down a column meet no bank twice.
  float q[PrefillShape<D>::kPlainQueries][D + 1];
  float k[kKeyTile][D + 1];
  float v[kKeyTile][D + 1];
  float p[PrefillShape<D>::kPlainQueries][kKeyTile + 1];
};
__device__ inline float Over16(float x, bool sum) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, x, offset);
    x = sum ? x + other : fmaxf(x, other);
  }
  return x;
}

__device__ inline bool Seen(const PrefillArgs& args, int32_t position, int32_t last, int32_t start) {
  return position <= last && (position < args.sinks || position >= start);
}

// Results of queries `first` and first + 8, of which a lane has channels 8 n + 2 j and the one after as at(n, 0 and 1), then at(n, 2 and 3), and its share of the
// sums of weights. True if one is not finite.
template <int D, class At>
__device__ inline bool StoreTwo(const PrefillArgs& args, const RunPrefillTask& task, int head, int first, int j, float (&sum)[2], const At& at) {
  bool odd = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
    sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    const float by = sum[r] == 0.0f ? 0.0f : 1 / sum[r];
    const int t = first + 8 * r;
    if (t >= args.queries) continue;
    float* const to = task.out + t * task.out_stride + int64_t{head} * D + 2 * j;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const float2 y = {at(n, 2 * r) * by, at(n, 2 * r + 1) * by};
      odd = odd || !isfinite(y.x) || !isfinite(y.y);
      *reinterpret_cast<float2*>(to + 8 * n) = y;
    }
  }
  return odd;
}

// Queries [begin, begin + kPlainQueries) of `head` in fp32.
template <int D>
__device__ void PlainTile(const PrefillArgs& args, const RunPrefillTask& task, int head, int begin, const int32_t* starts, int32_t least_start,
                          PlainTiles<D>& tiles) {
  using S = PrefillShape<D>;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int keys = args.first + min(begin + S::kPlainQueries, args.queries);
  __syncthreads();
  for (int i = threadIdx.x; i < S::kPlainQueries * D; i += S::kThreads) {
    const int t = i / D, c = i % D;
    tiles.q[t][c] = begin + t < args.queries ? task.q[(begin + t) * task.q_stride + int64_t{head} * D + c] * args.scale : 0.0f;
  }
  float out[kRows][D / 16] = {}, most[kRows], sum[kRows] = {};
  for (float& m : most) m = -Infinity();
  for (int key = 0; key < keys; key += kKeyTile) {
    if (key >= args.sinks && key + kKeyTile <= least_start) continue;  // nobody sees it
    __syncthreads();
    for (int i = threadIdx.x; i < kKeyTile * D; i += S::kThreads) {
      const int j = i / D, c = i % D;
      const bool there = key + j < keys;
      const Half* const row = task.rows + int64_t{key + j} * 2 * D;
      tiles.k[j][c] = there ? __half2float(__ushort_as_half(row[c])) : 0.0f;
      tiles.v[j][c] = there ? __half2float(__ushort_as_half(row[D + c])) : 0.0f;
    }
    __syncthreads();
    float z[kRows][2] = {};
#pragma unroll 4
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
      const int t = y * kRows + r;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool seen = begin + t < args.queries && Seen(args, key + x + 16 * j, args.first + begin + t, starts[t]);
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
#pragma unroll 1
    for (int j = 0; j < kKeyTile; ++j) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float p = tiles.p[y * kRows + r][j];
        // A weight of 0 takes nothing, not even from an infinite value.
#pragma unroll
        for (int i = 0; i < D / 16; ++i) out[r][i] += p != 0.0f ? p * tiles.v[j][x + 16 * i] : 0.0f;
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

}  // namespace prehoc::cuda
