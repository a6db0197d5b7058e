// Causal attention of many queries on the tensor cores of compute capability 9.0: products of a whole warp group, keys and values brought by the
// copy engine of the multiprocessor (TMA). Queries and weights are sums of two halves of fp16 or one, as in prefill.cu. Compiled for sm_90a alone.
//
//   a block: 128 queries of a head; two warp groups take 64 each, over tiles of 128 keys, of which two or three are on their way or in use. One
//   group multiplies while the other weighs: nothing but the tiles that both read holds them together. Within a group, the products of a tile's
//   weights with its values run while the next tile's logits become weights.
#include <algorithm>

#include "base/units.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefill.cuh"
#include "kernels/cuda/prefill_sm90.h"
#include "kernels/cuda/sm90.cuh"

namespace prehoc::cuda::sm90 {
namespace {

constexpr int kQueries = 128, kKeys = 128, kThreads = 256;
constexpr int kLine = 64;                          // halves of a line in shared memory
constexpr int kSlab = 128 * kLine * 2;             // [bytes] 128 lines

// Shared memory: queries (most; rest), tiles of keys, tiles of values, barriers.
template <int D, PromptPrecision P>
struct Plan {
  static constexpr int kPart = D / kLine * kSlab;  // queries (one half of the sum), keys, or values of a tile
  static constexpr bool kSplit = P == PromptPrecision::kSplit;
  static constexpr int kQParts = kSplit ? 2 : 1;
  static constexpr int kStages = kSplit ? 2 : 3;
  static constexpr int kKeyTiles = kQParts * kPart, kValueTiles = kKeyTiles + kStages * kPart, kBarriers = kValueTiles + kStages * kPart;
  static constexpr int kBarrierBytes = 4 * kStages * 8;
  static constexpr size_t kShared = std::max(size_t{kBarriers} + kBarrierBytes, sizeof(PlainTiles<D>)) + 1024;
  static_assert(kShared <= 232448, "a block of compute capability 9.0 has that much");
  static_assert(PrefillShape<D>::kThreads == kThreads && PrefillShape<D>::kQueries == kQueries, "the plain way takes the same block");
};

struct Args {
  CUtensorMap rows;  // [tasks, keys, 2 D]
  PrefillArgs prefill;
};

// Products of a warp group: d [64, 128] or [64, 64], bound as the constraint `bind` says, and what follows it in the instruction; then its
// operands.
#define PREHOC_WGMMA_128(bind, rest, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
      "}, " rest ";" \
      : bind(d[0]), bind(d[1]), bind(d[2]), bind(d[3]), bind(d[4]), bind(d[5]), bind(d[6]), bind(d[7]), \
        bind(d[8]), bind(d[9]), bind(d[10]), bind(d[11]), bind(d[12]), bind(d[13]), bind(d[14]), bind(d[15]), \
        bind(d[16]), bind(d[17]), bind(d[18]), bind(d[19]), bind(d[20]), bind(d[21]), bind(d[22]), bind(d[23]), \
        bind(d[24]), bind(d[25]), bind(d[26]), bind(d[27]), bind(d[28]), bind(d[29]), bind(d[30]), bind(d[31]), \
        bind(d[32]), bind(d[33]), bind(d[34]), bind(d[35]), bind(d[36]), bind(d[37]), bind(d[38]), bind(d[39]), \
        bind(d[40]), bind(d[41]), bind(d[42]), bind(d[43]), bind(d[44]), bind(d[45]), bind(d[46]), bind(d[47]), \
        bind(d[48]), bind(d[49]), bind(d[50]), bind(d[51]), bind(d[52]), bind(d[53]), bind(d[54]), bind(d[55]), \
        bind(d[56]), bind(d[57]), bind(d[58]), bind(d[59]), bind(d[60]), bind(d[61]), bind(d[62]), bind(d[63]) \
      : __VA_ARGS__)
#define PREHOC_WGMMA_64(bind, rest, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, " rest ";" \
      : bind(d[0]), bind(d[1]), bind(d[2]), bind(d[3]), bind(d[4]), bind(d[5]), bind(d[6]), bind(d[7]), \
        bind(d[8]), bind(d[9]), bind(d[10]), bind(d[11]), bind(d[12]), bind(d[13]), bind(d[14]), bind(d[15]), \
        bind(d[16]), bind(d[17]), bind(d[18]), bind(d[19]), bind(d[20]), bind(d[21]), bind(d[22]), bind(d[23]), \
        bind(d[24]), bind(d[25]), bind(d[26]), bind(d[27]), bind(d[28]), bind(d[29]), bind(d[30]), bind(d[31]) \
      : __VA_ARGS__)

// d [64, 128] = a [64, 16] b [128, 16]^T.
__device__ inline void BeginKeys(float (&d)[64], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  PREHOC_WGMMA_128("=f", "%64, %65, 0, 1, 1, 0, 0", "l"(a), "l"(b));
#endif
}
// d += likewise.
__device__ inline void AddKeys(float (&d)[64], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  PREHOC_WGMMA_128("+f", "%64, %65, 1, 1, 1, 0, 0", "l"(a), "l"(b));
#endif
}
// d [64, D] += a [64, 16] b [16, D].
__device__ inline void MultiplyValues(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  PREHOC_WGMMA_128("+f", "{%64, %65, %66, %67}, %68, 1, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
__device__ inline void MultiplyValues(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  PREHOC_WGMMA_64("+f", "{%32, %33, %34, %35}, %36, 1, 1, 1, 1", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
#undef PREHOC_WGMMA_128
#undef PREHOC_WGMMA_64

// Nothing that reads d moves before this.
template <int N>
__device__ inline void Settle(float (&d)[N]) {
#pragma unroll
  for (float& x : d) asm volatile("" : "+f"(x)::"memory");
}

template <int D, PromptPrecision P>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ Args all) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using L = Plan<D, P>;
  constexpr int kStages = L::kStages, kPart = L::kPart;
  const PrefillArgs& args = all.prefill;
  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t starts[kQueries];
  __shared__ int32_t least_start, any_odd;
  const uint32_t address = SharedAddress(shared), base = (address + 1023) / 1024 * 1024;
  char* const aligned = shared + (base - address);
  const uint32_t k_tiles = base + L::kKeyTiles, v_tiles = base + L::kValueTiles, barriers = base + L::kBarriers;
  // Of the keys or values of a stage: whether they are there; whether they are used up.
  const auto full = [&](int stage, int values) { return barriers + static_cast<uint32_t>(stage * 2 + values) * 8; };
  const auto empty = [&](int stage, int values) { return full(stage + kStages, values); };
  const int head = blockIdx.z, lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp, g = lane / 4, j = lane % 4;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      for (const int values : {0, 1}) Init(full(s, values), 1), Init(empty(s, values), kThreads / kWarp);
    }
    InitDone();
    least_start = 0x7fffffff, any_odd = 0;
  }
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  __syncthreads();
  const RunPrefillTask task = args.tasks[blockIdx.y];
  // The last queries see most: they begin first.
  const int begin = (static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)) * kQueries;
  const int keys = args.first + min(begin + kQueries, args.queries);
  for (int t = static_cast<int>(threadIdx.x); t < kQueries; t += kThreads) {
    starts[t] = task.start != nullptr && begin + t < args.queries ? task.start[begin + t] : 0;
    if (begin + t < args.queries) atomicMin(&least_start, starts[t]);
  }
  // exp(x) as 2^(x log2 e): the factor goes into the queries. 16-byte words of a line lie as TMA would have put them.
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * D / 8; i += kThreads) {
    const int t = i / (D / 8), c = i % (D / 8) * 8, word = c % kLine / 8;
    const float by = args.scale * kLog2E;
    uint4 most{}, rest{};
    if (begin + t < args.queries) {
      const float4* const q = reinterpret_cast<const float4*>(task.q + (begin + t) * task.q_stride + int64_t{head} * D + c);
      const float4 a = q[0], b = q[1];
      SplitPair<RowType::kF16>(a.x * by, a.y * by, &most.x, &rest.x);
      SplitPair<RowType::kF16>(a.z * by, a.w * by, &most.y, &rest.y);
      SplitPair<RowType::kF16>(b.x * by, b.y * by, &most.z, &rest.z);
      SplitPair<RowType::kF16>(b.z * by, b.w * by, &most.w, &rest.w);
    }
    char* const to = aligned + c / kLine * kSlab + t * kLine * 2 + (word ^ (t % 8)) * 16;
    *reinterpret_cast<uint4*>(to) = most;
    if constexpr (L::kSplit) *reinterpret_cast<uint4*>(to + kPart) = rest;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int32_t least = least_start;
  const auto after = [&](int key) {  // the next tile that somebody sees
    do key += kKeys;
    while (key < keys && key >= args.sinks && key + kKeys <= least);
    return key;
  };
  const auto ask = [&](int key, int stage, int values) {
    const uint32_t to = (values ? v_tiles : k_tiles) + static_cast<uint32_t>(stage * kPart);
    Expect(full(stage, values), kPart);
    for (int slab = 0; slab < D / kLine; ++slab) {
      Bring(to + static_cast<uint32_t>(slab * kSlab), &all.rows, values * D + slab * kLine, key, static_cast<int>(blockIdx.y), full(stage, values));
    }
  };
  const bool asks = threadIdx.x == 0;
  float out[D / 2] = {}, most[2] = {-Infinity(), -Infinity()}, sum[2] = {};
  const int query = warp * 16 + g;  // and query + 8
  const int32_t last[2] = {args.first + begin + query, args.first + begin + query + 8}, start[2] = {starts[query], starts[query + 8]};
  const uint32_t q_most = base + static_cast<uint32_t>(warp / 4 * 64 * kLine * 2);
  [[maybe_unused]] const uint32_t q_rest = q_most + kPart;
  uint32_t p_most[kKeys / 16][4], p_rest[L::kSplit ? kKeys / 16 : 1][4];
  // z = queries times the keys of a tile, and out += weights times the values of one: behind the threads.
  const auto multiply_keys = [&](float(&z)[64], int stage) {
    const uint32_t tile = k_tiles + static_cast<uint32_t>(stage * kPart);
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      const uint32_t at = static_cast<uint32_t>(c / kLine * kSlab + c % kLine * 2);
      if constexpr (L::kSplit) {
        if (c == 0) BeginKeys(z, Matrix(q_rest + at), Matrix(tile + at));
        if (c > 0) AddKeys(z, Matrix(q_rest + at), Matrix(tile + at));
        AddKeys(z, Matrix(q_most + at), Matrix(tile + at));
      } else {
        if (c == 0) BeginKeys(z, Matrix(q_most + at), Matrix(tile + at));
        if (c > 0) AddKeys(z, Matrix(q_most + at), Matrix(tile + at));
      }
    }
    CommitProducts();
  };
  const auto multiply_values = [&](int stage) {
    const uint32_t tile = v_tiles + static_cast<uint32_t>(stage * kPart);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      const uint64_t values = Matrix(tile + static_cast<uint32_t>(n * 16 * kLine * 2), D > kLine ? kSlab : 16);
      if constexpr (L::kSplit) MultiplyValues(out, p_rest[n], values);
      MultiplyValues(out, p_most[n], values);
    }
    CommitProducts();
  };
  // The logits z of the tile at `key` become weights; `keep`: what sums and results so far are worth beside them.
  const auto weigh = [&](float(&z)[64], int key, float(&keep)[2]) {
    // Of a tile that everybody sees nothing is hidden.
    const bool whole = key + kKeys <= args.first + begin + 1 && (key + kKeys <= args.sinks || task.start == nullptr);
    if (!whole) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!Seen(args, key + n * 8 + 2 * j + e % 2, last[e / 2], start[e / 2])) z[n * 4 + e] = -Infinity();
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float now = most[r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) now = fmaxf(now, fmaxf(z[n * 4 + 2 * r], z[n * 4 + 2 * r + 1]));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
      const float from = now == -Infinity() ? 0.0f : now;
      keep[r] = Exp2(most[r] - from);
      most[r] = now;
      float part = 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        z[n * 4 + 2 * r] = Exp2(z[n * 4 + 2 * r] - from), z[n * 4 + 2 * r + 1] = Exp2(z[n * 4 + 2 * r + 1] - from);
        part += z[n * 4 + 2 * r] + z[n * 4 + 2 * r + 1];
      }
      sum[r] = sum[r] * keep[r] + part;  // of this lane's keys
    }
  };
  // Weights as operands of the next products with values.
  const auto pack = [&](const float(&z)[64]) {
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int from = (2 * n + i / 2) * 4 + 2 * (i % 2);
        if constexpr (L::kSplit) {
          SplitPair<RowType::kF16>(z[from], z[from + 1], &p_most[n][i], &p_rest[n][i]);
        } else {
          p_most[n][i] = Number<RowType::kF16>::Pack(z[from], z[from + 1]);
        }
      }
    }
  };
  // The last query sees its own key: there is a tile.
  int key = after(-kKeys), next = after(key), ahead = key, tile = 0;
  for (int s = 0; s < kStages; ++s) {
    if (asks && ahead < keys) ask(ahead, s, 0), ask(ahead, s, 1);
    ahead = after(ahead);
  }
  {
    float z[64], keep[2];
    Await(full(0, 0), 0);
    BeginProducts();
    multiply_keys(z, 0);
    WaitForProducts<0>();
    Settle(z);
    if (lane == 0) Arrive(empty(0, 0));
    weigh(z, key, keep);
    pack(z);
  }
  while (next < keys) {
    key = next, next = after(key), ++tile;
    const int stage = tile % kStages, before = (tile - 1) % kStages, turn = (tile - 1) / kStages % 2;
    const bool asks_ahead = asks && ahead < keys;
    float z[64], keep[2];
    Await(full(before, 1), turn);
    Await(full(stage, 0), tile / kStages % 2);
    BeginProducts();
    multiply_keys(z, stage);
    multiply_values(before);
    // The other group is less than a tile behind: it has multiplied the keys of the tile before, and soon its values.
    if (asks_ahead) {
      Await(empty(before, 0), turn);
      ask(ahead, before, 0);
    }
    WaitForProducts<1>();
    Settle(z);
    if (lane == 0) Arrive(empty(stage, 0));
    weigh(z, key, keep);
    WaitForProducts<0>();
    Settle(out);
    if (lane == 0) Arrive(empty(before, 1));
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n * 4 + e] *= keep[e / 2];
    }
    pack(z);
    if (asks_ahead) {
      Await(empty(before, 1), turn);
      ask(ahead, before, 1);
    }
    ahead = after(ahead);
  }
  Await(full(tile % kStages, 1), tile / kStages % 2);
  BeginProducts();
  multiply_values(tile % kStages);
  WaitForProducts<0>();
  Settle(out);
  const bool odd = StoreTwo<D>(args, task, head, begin + query, j, sum, [&](int n, int i) { return out[n * 4 + i]; });
  if (odd) any_odd = 1;
  __syncthreads();
  if (any_odd == 0) return;
  using S = PrefillShape<D>;
  for (int from = 0; from < kQueries; from += S::kPlainQueries) {
    PlainTile<D>(args, task, head, begin + from, starts + from, least, *reinterpret_cast<PlainTiles<D>*>(aligned));
  }
#endif
}

template <int D>
Status Launch(const RunPrefillParams& params, const PrefillArgs& prefill, cudaStream_t stream) {
  Args args{.prefill = prefill};
  const auto keys = static_cast<cuuint64_t>(params.first) + static_cast<cuuint64_t>(params.queries);
  const cuuint64_t sizes[] = {2 * D, keys, static_cast<cuuint64_t>(params.num_tasks)};
  const cuuint64_t row = 2 * D * sizeof(Half);
  const cuuint64_t strides[] = {row, params.num_tasks > 1 ? static_cast<cuuint64_t>(params.pitch) * sizeof(Half) : row * keys};
  const cuuint32_t box[] = {kLine, kKeys, 1};
  const Status made = MakeMap(CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, params.rows, sizes, strides, box, &args.rows);
  if (!made.ok()) return made.WithContext("prefill");
  const dim3 grid(static_cast<unsigned>(CeilDiv(params.queries, kQueries)), static_cast<unsigned>(params.num_tasks), static_cast<unsigned>(params.group));
  return DispatchPrecision(params.precision, [&]<PromptPrecision P>(std::integral_constant<PromptPrecision, P>) {
    return LaunchKernel(PrefillKernel<D, P>, "prefill", args, {.grid = grid, .threads = kThreads, .shared_bytes = Plan<D, P>::kShared}, stream);
  });
}
}  // namespace

bool TakesPrefill(int32_t head_dim) { return head_dim == 64 || head_dim == 128; }
Status PrefillRuns(const RunPrefillParams& params, const PrefillArgs& args, cudaStream_t stream) {
  return params.head_dim == 64 ? Launch<64>(params, args, stream) : Launch<128>(params, args, stream);
}

}  // namespace prehoc::cuda::sm90
