// Causal attention of many queries: tiles of queries and keys in shared memory, one pass with a running maximum.
//
// On the tensor cores queries and weights are sums of two halves of fp16 (errors of some 2^-21), or one (2^-12): a warp takes 16 queries, and what
// it needs of the next keys arrives while it multiplies. A product with an infinite or NaN number shows in the output; such a tile is computed again in
// fp32 by the plain way, in which a weight of 0 takes nothing.
#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefill.cuh"
#ifdef PREHOC_SM90
#include "kernels/cuda/prefill_sm90.h"
#endif

namespace prehoc::cuda {
namespace {

template <int D>
struct Tiles {
  using S = PrefillShape<D>;
  uint16_t q[2][S::kQueries][S::kStride];     // most, rest
  uint16_t kv[2][2][S::kKeys][S::kStride];    // of two tiles: keys, values
};

// Asks for the rows of a tile; those from `keys` on are zero.
template <int D>
__device__ void AskForKeys(const RunPrefillTask& task, int key, int keys, uint16_t (&to)[2][PrefillShape<D>::kKeys][PrefillShape<D>::kStride]) {
  using S = PrefillShape<D>;
  constexpr int kPieces = D / 8;  // of 16 bytes, of a key or a value
  for (int i = threadIdx.x; i < S::kKeys * 2 * kPieces; i += S::kThreads) {
    const int row = i / (2 * kPieces), piece = i % (2 * kPieces), half = piece / kPieces;
    const bool there = key + row < keys;
    const Half* const from = task.rows + (there ? int64_t{key + row} * 2 * D + piece * 8 : 0);
    CopyAsync16(SharedAddress(&to[half][row][piece % kPieces * 8]), from, there);
  }
  CommitCopies();
}

template <int D, PromptPrecision P>
__global__ void __launch_bounds__(PrefillShape<D>::kThreads, 1) PrefillKernel(const __grid_constant__ PrefillArgs args) {
  using S = PrefillShape<D>;
  using Fp16 = Number<RowType::kF16>;
  constexpr bool kSplit = P == PromptPrecision::kSplit;
  extern __shared__ __align__(16) char shared[];
  __shared__ int32_t starts[S::kQueries];
  __shared__ int32_t least_start, any_odd;
  Tiles<D>& tiles = *reinterpret_cast<Tiles<D>*>(shared);
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RunPrefillTask task = args.tasks[blockIdx.y];
  const int head = blockIdx.z, lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp, g = lane / 4, j = lane % 4;
  // The last queries see most: they begin first.
  const int begin = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * S::kQueries;
  const int keys = args.first + min(begin + S::kQueries, args.queries);
  if (threadIdx.x == 0) least_start = 0x7fffffff, any_odd = 0;
  __syncthreads();
  for (int t = static_cast<int>(threadIdx.x); t < S::kQueries; t += S::kThreads) {
    starts[t] = task.start != nullptr && begin + t < args.queries ? task.start[begin + t] : 0;
    if (begin + t < args.queries) atomicMin(&least_start, starts[t]);
  }
  // exp(x) as 2^(x log2 e): the factor goes into the queries.
  for (int i = static_cast<int>(threadIdx.x); i < S::kQueries * D / 2; i += S::kThreads) {
    const int t = i / (D / 2), c = i % (D / 2) * 2;
    float2 q{};
    if (begin + t < args.queries) q = *reinterpret_cast<const float2*>(task.q + (begin + t) * task.q_stride + int64_t{head} * D + c);
    const float by = args.scale * kLog2E;
    SplitPair<RowType::kF16>(q.x * by, q.y * by, reinterpret_cast<uint32_t*>(&tiles.q[0][t][c]), reinterpret_cast<uint32_t*>(&tiles.q[1][t][c]));
  }
  __syncthreads();
  const int32_t least = least_start;
  const auto after = [&](int key) {  // the next tile that somebody sees
    do key += S::kKeys;
    while (key < keys && key >= args.sinks && key + S::kKeys <= least);
    return key;
  };
  float out[D / 8][4] = {}, most[2] = {-Infinity(), -Infinity()}, sum[2] = {};
  const int query = warp * 16 + g;  // and query + 8
  const int32_t last[2] = {args.first + begin + query, args.first + begin + query + 8}, start[2] = {starts[query], starts[query + 8]};
  int key = after(-S::kKeys), stage = 0;
  if (key < keys) AskForKeys<D>(task, key, keys, tiles.kv[0]);
  for (; key < keys; stage ^= 1) {
    const int next = after(key);
    if (next < keys) {
      AskForKeys<D>(task, next, keys, tiles.kv[stage ^ 1]);
      WaitForCopies<1>();
    } else {
      WaitForCopies<0>();
    }
    __syncthreads();
    const auto& k_tile = tiles.kv[stage][0];
    const auto& v_tile = tiles.kv[stage][1];
    float z[S::kKeys / 8][4] = {};
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      uint32_t q_most[4];
      [[maybe_unused]] uint32_t q_rest[4];
      const int row = warp * 16 + lane % 16, col = c + lane / 16 * 8;
      LoadMatrices(SharedAddress(&tiles.q[0][row][col]), q_most);
      if constexpr (kSplit) LoadMatrices(SharedAddress(&tiles.q[1][row][col]), q_rest);
#pragma unroll
      for (int n = 0; n < S::kKeys; n += 16) {
        uint32_t b[4];
        LoadMatrices(SharedAddress(&k_tile[n + lane % 8 + lane / 16 * 8][c + lane / 8 % 2 * 8]), b);
        if constexpr (kSplit) {
          Fp16::Mma(z[n / 8], q_rest[0], q_rest[1], q_rest[2], q_rest[3], b[0], b[1]);
          Fp16::Mma(z[n / 8 + 1], q_rest[0], q_rest[1], q_rest[2], q_rest[3], b[2], b[3]);
        }
        Fp16::Mma(z[n / 8], q_most[0], q_most[1], q_most[2], q_most[3], b[0], b[1]);
        Fp16::Mma(z[n / 8 + 1], q_most[0], q_most[1], q_most[2], q_most[3], b[2], b[3]);
      }
    }
    // Of a tile that everybody sees nothing is hidden.
    const bool whole = key + S::kKeys <= args.first + begin + 1 && (key + S::kKeys <= args.sinks || task.start == nullptr);
    if (!whole) {
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!Seen(args, key + n * 8 + 2 * j + e % 2, last[e / 2], start[e / 2])) z[n][e] = -Infinity();
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = most[r];
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) now = fmaxf(now, fmaxf(z[n][2 * r], z[n][2 * r + 1]));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
      const float from = now == -Infinity() ? 0.0f : now, keep = Exp2(most[r] - from);
      most[r] = now;
      float part = 0;
#pragma unroll
      for (int n = 0; n < S::kKeys / 8; ++n) {
        z[n][2 * r] = Exp2(z[n][2 * r] - from), z[n][2 * r + 1] = Exp2(z[n][2 * r + 1] - from);
        part += z[n][2 * r] + z[n][2 * r + 1];
      }
      sum[r] = sum[r] * keep + part;  // of this lane's keys
#pragma unroll
      for (int n = 0; n < D / 8; ++n) out[n][2 * r] *= keep, out[n][2 * r + 1] *= keep;
    }
#pragma unroll
    for (int n = 0; n < S::kKeys; n += 16) {
      uint32_t p_most[4], p_rest[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&from)[4] = z[n / 8 + i / 2];
        SplitPair<RowType::kF16>(from[2 * (i % 2)], from[2 * (i % 2) + 1], &p_most[i], &p_rest[i]);
      }
#pragma unroll
      for (int c = 0; c < D; c += 16) {
        uint32_t b[4];
        LoadTransposed(SharedAddress(&v_tile[n + lane % 16][c + lane / 16 * 8]), b);
        if constexpr (kSplit) {
          Fp16::Mma(out[c / 8], p_rest[0], p_rest[1], p_rest[2], p_rest[3], b[0], b[1]);
          Fp16::Mma(out[c / 8 + 1], p_rest[0], p_rest[1], p_rest[2], p_rest[3], b[2], b[3]);
        }
        Fp16::Mma(out[c / 8], p_most[0], p_most[1], p_most[2], p_most[3], b[0], b[1]);
        Fp16::Mma(out[c / 8 + 1], p_most[0], p_most[1], p_most[2], p_most[3], b[2], b[3]);
      }
    }
    __syncthreads();  // all have read the tile that is overwritten next
    key = next;
  }
  const bool odd = StoreTwo<D>(args, task, head, begin + query, j, sum, [&](int n, int i) { return out[n][i]; });
  if (odd) any_odd = 1;
  __syncthreads();
  if (any_odd == 0) return;
  for (int from = 0; from < S::kQueries; from += S::kPlainQueries) {
    PlainTile<D>(args, task, head, begin + from, starts + from, least, *reinterpret_cast<PlainTiles<D>*>(shared));
  }
}
}  // namespace

Status PrefillRuns(const RunPrefillParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("prefill").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group)
                             .That(params.first >= 0 && params.queries >= 0, "first", params.first, "use 0 or more").Take());
  if (params.num_tasks == 0 || params.queries == 0) return {};
  const PrefillArgs args{params.tasks, params.queries, params.first, params.sinks, params.group,
                         1.0f / std::sqrt(static_cast<float>(params.head_dim))};
#ifdef PREHOC_SM90
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  if (limits.major == 9 && params.rows != nullptr && sm90::TakesPrefill(params.head_dim)) return sm90::PrefillRuns(params, args, stream);
#endif
  return DispatchHeadDim(params.head_dim, [&](auto d) {
    constexpr int D = d();
    using S = PrefillShape<D>;
    const dim3 grid(static_cast<unsigned>(CeilDiv(params.queries, S::kQueries)), static_cast<unsigned>(params.num_tasks),
                    static_cast<unsigned>(params.group));
    constexpr size_t kShared = std::max(sizeof(Tiles<D>), sizeof(PlainTiles<D>));
    return DispatchPrecision(params.precision, [&]<PromptPrecision P>(std::integral_constant<PromptPrecision, P>) {
      return LaunchKernel(PrefillKernel<D, P>, "prefill", args, {.grid = grid, .threads = S::kThreads, .shared_bytes = kShared}, stream);
    });
  });
}

}  // namespace prehoc::cuda
