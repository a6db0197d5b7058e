#include "integrations/reference/cuda/device_ops.h"

#include <algorithm>
#include <type_traits>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#ifdef PREHOC_SM90
#include "integrations/reference/cuda/matrix_sm90.h"
#endif

namespace prehoc::reference {
namespace {
using cuda::Check;
using cuda::kAllLanes;
using cuda::kWarp;
using cuda::LaunchKernel;
using cuda::LetLaterWorkLaunch;
using cuda::RowType;
using cuda::WaitForEarlierWork;
template <RowType R>
using Number = cuda::Number<R>;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
// Of all threads of a block of kThreads; `shared` has kWarps floats.
__device__ inline float BlockSum(float x, float* shared) {
  x = WarpSum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  __syncthreads();
  return sum;
}
__device__ inline float Silu(float x) { return x / (1.0f + __expf(-x)); }

// --- vector -----------------------------------------------------------------------------------------------------------------------------
struct VectorArgs {
  const uint4* weights;
  const float* x;
  const float* norm;
  const float* bias;
  float* y;
  float eps;
  int32_t rows, cols;
  int32_t gate_rows;  // rows to the ups; 0 = not gated
  bool add;
};
// q, k and v of a token, rotated and written apart; y is not used.
struct RotatedArgs : VectorArgs {
  const float *cos, *sin;
  float *q, *q_before, *k, *v;
  int32_t half;         // of a head
  int32_t heads, keys;  // q heads; q and k heads
  bool interleaved;
};

template <RowType R>
__device__ inline float Dot8(const uint4& w, const float4& x0, const float4& x1, float sum) {
  const float2 a = Number<R>::Unpack(w.x), b = Number<R>::Unpack(w.y), c = Number<R>::Unpack(w.z), d = Number<R>::Unpack(w.w);
  sum = fmaf(a.x, x0.x, fmaf(a.y, x0.y, sum));
  sum = fmaf(b.x, x0.z, fmaf(b.y, x0.w, sum));
  sum = fmaf(c.x, x1.x, fmaf(c.y, x1.y, sum));
  return fmaf(d.x, x1.z, fmaf(d.y, x1.w, sum));
}

// Loads of a lane that are on their way at once.
constexpr int kDepth = 16;

// The vector in shared memory, normalised: two planes of 4 of each 8 channels, so that neighbouring lanes read neighbouring words.
__device__ inline void LoadVector(const VectorArgs& args, float4* x) {
  __shared__ float parts[kWarps];
  const int words = args.cols / 8;
  float square = 0;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const float4 a = reinterpret_cast<const float4*>(args.x)[2 * i], b = reinterpret_cast<const float4*>(args.x)[2 * i + 1];
    square += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    x[i] = a;
    x[words + i] = b;
  }
  if (args.norm == nullptr) {
    __syncthreads();
    return;
  }
  const float scale = 1.0f / sqrtf(BlockSum(square, parts) / static_cast<float>(args.cols) + args.eps);
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(args.norm) + 2 * i), b = __ldg(reinterpret_cast<const float4*>(args.norm) + 2 * i + 1);
    const float4 p = x[i], q = x[words + i];
    x[i] = {a.x * (p.x * scale), a.y * (p.y * scale), a.z * (p.z * scale), a.w * (p.w * scale)};
    x[words + i] = {b.x * (q.x * scale), b.y * (q.y * scale), b.z * (q.z * scale), b.w * (q.w * scale)};
  }
  __syncthreads();
}

// Rotated, warps take items instead of rows: 2p and 2p + 1 are the rows of pair p, counted over all heads, so that a block has both. It keeps
// the sums of all its rounds and waits for its warps once; then each thread rotates one pair.
constexpr int kPairs = kWarps / 2;              // of a round
constexpr int kMostRounds = kThreads / kPairs;  // of a block
__device__ inline int RowOf(const VectorArgs&, int item) { return item; }
__device__ inline int RowOf(const RotatedArgs& args, int item) {
  const int pair = item / 2;
  return args.interleaved ? item : pair + (pair / args.half + item % 2) * args.half;
}
// The weights of an item: those of its row, or (part 1 of a gated product) of the up that goes with it.
template <class Args>
__device__ inline const uint4* RowAt(const Args& args, int item, int part) {
  return args.weights + (int64_t{RowOf(args, item)} + int64_t{part} * args.gate_rows) * (args.cols / 8);
}
__device__ inline int PairOfThread() { return (threadIdx.x / kPairs * gridDim.x + blockIdx.x) * kPairs + threadIdx.x % kPairs; }

// Cosine and sine, where a pair has them.
__device__ inline float2 TurnOf(const RotatedArgs& args, int pair) {
  const int c = pair % args.half;
  return pair < args.keys * args.half ? float2{args.cos[c], args.sin[c]} : float2{};
}
__device__ inline void WriteRotated(const RotatedArgs& args, int pair, float x, float y, float2 turn) {
  const int h = pair / args.half, c = pair % args.half, d = 2 * args.half;
  const int one = args.interleaved ? 2 * c : c, two = args.interleaved ? one + 1 : one + args.half;
  float* const to = h < args.heads ? args.q + h * d : h < args.keys ? args.k + (h - args.heads) * d : args.v + (h - args.keys) * d;
  if (h < args.heads && args.q_before != nullptr) {
    float* const before = args.q_before + h * d;
    before[one] = x, before[two] = y;
  }
  float a = x, b = y;
  if (h < args.keys) a = x * turn.x - y * turn.y, b = y * turn.x + x * turn.y;
  to[one] = a, to[two] = b;
}

// A warp takes a row at a time, all warps together all rows. The weights of the first row are asked for before the work before this
// kernel is done: nothing writes them.
template <RowType R, bool kGated, class Args>
__global__ void __launch_bounds__(kThreads, 2) VectorKernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(16) float4 x[];  // [2, cols / 8]
  constexpr bool kRotated = std::is_same_v<Args, RotatedArgs>;
  [[maybe_unused]] __shared__ float sums[kRotated ? kMostRounds * kWarps : 1];  // [rounds, warps]
  constexpr int kParts = kGated ? 2 : 1;
  constexpr int kLoads = kDepth / kParts;
  const int lane = threadIdx.x % kWarp, warp = blockIdx.x * kWarps + threadIdx.x / kWarp, warps = gridDim.x * kWarps;
  const int words = args.cols / 8;
  uint4 w[kParts][kLoads];
  const auto load = [&](int item, int from) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint4* const weights = RowAt(args, item, part);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = from + i * kWarp;
        w[part][i] = at < words ? __ldcs(weights + at) : uint4{0, 0, 0, 0};
      }
    }
  };
  LetLaterWorkLaunch();
  if (warp < args.rows) load(warp, lane);
  WaitForEarlierWork();
  [[maybe_unused]] float2 turn{};  // of this thread's pair: there long before the sums
  if constexpr (kRotated) turn = TurnOf(args, PairOfThread());
  LoadVector(args, x);
  [[maybe_unused]] int kept = threadIdx.x / kWarp;
  for (int item = warp; item < args.rows; item += warps) {
    float sum[kParts] = {};
    for (int from = lane; from < words; from += kLoads * kWarp) {
      // What comes next, of this row or of the next, is asked for as soon as its place is free.
      const bool more = from + kLoads * kWarp < words;
      const int next_item = more ? item : item + warps, next_from = more ? from + kLoads * kWarp : lane;
      const bool exists = next_item < args.rows;
      const uint4* next[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) next[part] = RowAt(args, exists ? next_item : 0, part) + next_from;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = from + i * kWarp;
        if (at < words) {
          const float4 x0 = x[at], x1 = x[words + at];
#pragma unroll
          for (int part = 0; part < kParts; ++part) sum[part] = Dot8<R>(w[part][i], x0, x1, sum[part]);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          w[part][i] = exists && next_from + i * kWarp < words ? __ldcs(next[part] + i * kWarp) : uint4{0, 0, 0, 0};
        }
      }
    }
    // A lane without words has loaded nothing of the next row in its loop.
    if (lane >= words && item + warps < args.rows) load(item + warps, lane);
#pragma unroll
    for (int part = 0; part < kParts; ++part) sum[part] = WarpSum(sum[part]);
    if (lane != 0) continue;
    float y = kGated ? Silu(sum[0]) * sum[kParts - 1] : sum[0];
    const int row = RowOf(args, item);
    if (args.bias != nullptr) y += args.bias[row];
    if constexpr (kRotated) {
      sums[kept] = y, kept += kWarps;
    } else {
      args.y[row] = args.add ? args.y[row] + y : y;
    }
  }
  if constexpr (kRotated) {
    __syncthreads();
    const int pair = PairOfThread();
    if (pair < args.rows / 2) WriteRotated(args, pair, sums[2 * threadIdx.x], sums[2 * threadIdx.x + 1], turn);
  }
}

// --- matrix -----------------------------------------------------------------------------------------------------------------------------
struct MatrixArgs {
  const uint16_t* weights;
  const float* x;
  const float* bias;
  float* y;
  int32_t tokens, rows, cols;
  bool add;
};
// A block makes 128 x 128 outputs, a warp 64 x 32 of them. Three slices of the operands are on their way or in use; activations become
// numbers of the weights' type as they are loaded from shared memory.
constexpr int kTile = 128, kDeep = 32, kStages = 3;
constexpr int kXStride = kDeep + 8, kWStride = kDeep + 8;  // of rows: fragments meet no bank twice
constexpr int kMatrixThreads = 256;

struct MatrixTiles {
  float x[kStages][kTile][kXStride];
  uint16_t weights[kStages][kTile][kWStride];
};

// 16 bytes, or zeros, behind the work of the block.
__device__ inline void AskFor(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from),
               "r"(there ? 16 : 0) : "memory");
}

template <RowType R, bool kSplit>
__global__ void __launch_bounds__(kMatrixThreads, 2) MatrixKernel(const __grid_constant__ MatrixArgs args) {
  extern __shared__ __align__(16) char shared[];
  MatrixTiles& tiles = *reinterpret_cast<MatrixTiles*>(shared);
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, j = lane % 4;
  const int token0 = blockIdx.x * kTile, row0 = blockIdx.y * kTile, t0 = warp % 2 * 64, n0 = warp / 2 * 32;
  const auto ask = [&](int k, int stage) {
    if (k < args.cols) {
#pragma unroll
      for (int i = threadIdx.x; i < kTile * kDeep / 4; i += kMatrixThreads) {
        const int t = i / (kDeep / 4), c = i % (kDeep / 4) * 4;
        const bool there = token0 + t < args.tokens && k + c < args.cols;
        AskFor(&tiles.x[stage][t][c], args.x + (there ? int64_t{token0 + t} * args.cols + k + c : 0), there);
      }
#pragma unroll
      for (int i = threadIdx.x; i < kTile * kDeep / 8; i += kMatrixThreads) {
        const int n = i / (kDeep / 8), c = i % (kDeep / 8) * 8;
        const bool there = row0 + n < args.rows && k + c < args.cols;
        AskFor(&tiles.weights[stage][n][c], args.weights + (there ? int64_t{row0 + n} * args.cols + k + c : 0), there);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  float sum[4][4][4] = {};
  ask(0, 0);
  ask(kDeep, 1);
  int stage = 0;
  for (int k = 0; k < args.cols; k += kDeep) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();  // the slice is there, and all have used up the one that is overwritten now
    ask(k + 2 * kDeep, (stage + 2) % kStages);
#pragma unroll
    for (int c = 0; c < kDeep; c += 16) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint16_t* const from = &tiles.weights[stage][n0 + 16 * n + lane % 8 + lane / 16 * 8][c + lane / 8 % 2 * 8];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[n][0]), "=r"(b[n][1]), "=r"(b[n][2]), "=r"(b[n][3]) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t most[4];
        [[maybe_unused]] uint32_t rest[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = *reinterpret_cast<const float2*>(&tiles.x[stage][t0 + 16 * m + g + i % 2 * 8][c + 2 * j + i / 2 * 8]);
          if constexpr (kSplit) {
            cuda::SplitPair<R>(x.x, x.y, &most[i], &rest[i]);
          } else {
            most[i] = Number<R>::Pack(x.x, x.y);
          }
        }
        if constexpr (kSplit) {
#pragma unroll
          for (int n = 0; n < 4; ++n) Number<R>::Mma(sum[m][n], rest[0], rest[1], rest[2], rest[3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) Number<R>::Mma(sum[m][n], most[0], most[1], most[2], most[3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
    stage = (stage + 1) % kStages;
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + t0 + 16 * m + g + 8 * (i / 2), row = row0 + n0 + 8 * n + 2 * j + i % 2;
        if (token >= args.tokens || row >= args.rows) continue;
        float* const y = args.y + int64_t{token} * args.rows + row;
        const float value = sum[m][n][i] + (args.bias != nullptr ? args.bias[row] : 0.0f);
        *y = args.add ? *y + value : value;
      }
    }
  }
}

// --- small ones -------------------------------------------------------------------------------------------------------------------------
struct NormArgs {
  const float* x;
  const float* weight;
  float* y;
  float eps;
  int32_t cols;
};
constexpr int kHeld = 8;  // words of a row that a thread keeps
constexpr int32_t kMostHeld = kHeld * kThreads * 4;
// A block takes a row; one that threads can hold is read once.
template <bool HOLDS>
__global__ void __launch_bounds__(kThreads) NormKernel(const __grid_constant__ NormArgs args) {
  __shared__ float parts[kWarps];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const float* const x = args.x + int64_t{blockIdx.x} * args.cols;
  float* const y = args.y + int64_t{blockIdx.x} * args.cols;
  float square = 0;
  if constexpr (HOLDS) {
    const int words = args.cols / 4;
    float4 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at >= words) break;
      held[i] = reinterpret_cast<const float4*>(x)[at];
      square += (held[i].x * held[i].x + held[i].y * held[i].y) + (held[i].z * held[i].z + held[i].w * held[i].w);
    }
    const float scale = 1.0f / sqrtf(BlockSum(square, parts) / static_cast<float>(args.cols) + args.eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at >= words) break;
      const float4 w = __ldg(reinterpret_cast<const float4*>(args.weight) + at);
      reinterpret_cast<float4*>(y)[at] = {w.x * (held[i].x * scale), w.y * (held[i].y * scale), w.z * (held[i].z * scale), w.w * (held[i].w * scale)};
    }
  } else {
    for (int i = threadIdx.x; i < args.cols; i += kThreads) square += x[i] * x[i];
    const float scale = 1.0f / sqrtf(BlockSum(square, parts) / static_cast<float>(args.cols) + args.eps);
    for (int i = threadIdx.x; i < args.cols; i += kThreads) y[i] = args.weight[i] * (x[i] * scale);
  }
}

constexpr int kMostHeadDim = 256;
// A block takes one head of one token: q heads first, then k, then v.
__global__ void __launch_bounds__(kThreads) RotateKernel(const __grid_constant__ RotateParams args) {
  __shared__ float head[kMostHeadDim];
  __shared__ float parts[kWarps];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int d = args.head_dim, h = blockIdx.x, c = threadIdx.x;
  const int64_t token = blockIdx.y;
  const bool is_q = h < args.heads, is_k = !is_q && h < args.heads + args.kv_heads;
  float x = c < d ? args.qkv[(token * (args.heads + 2 * args.kv_heads) + h) * d + c] : 0.0f;
  if (!is_q && !is_k) {
    if (c < d) args.v[(token * args.kv_heads + h - args.heads - args.kv_heads) * d + c] = x;
    return;
  }
  const float* const norm = is_q ? args.q_norm : args.k_norm;
  if (norm != nullptr) {
    const float scale = 1.0f / sqrtf(BlockSum(x * x, parts) / static_cast<float>(d) + args.eps);
    if (c < d) x = norm[c] * (x * scale);
  }
  if (c < d) head[c] = x;
  __syncthreads();
  if (c >= d) return;
  float* const to = is_q ? args.q + (token * args.heads + h) * d : args.k + (token * args.kv_heads + h - args.heads) * d;
  if (is_q && args.q_before != nullptr) args.q_before[(token * args.heads + h) * d + c] = x;
  const int half = d / 2, pair = args.interleaved ? c / 2 : c % half;
  const bool second = args.interleaved ? c % 2 == 1 : c >= half;
  const float other = head[args.interleaved ? c ^ 1 : (second ? c - half : c + half)];
  const float cos = args.cos[token * half + pair], sin = args.sin[token * half + pair];
  to[c] = second ? x * cos + other * sin : x * cos - other * sin;
}

// Rotation alone, four pairs of channels to a thread.
__global__ void __launch_bounds__(kThreads) RotateWideKernel(const __grid_constant__ RotateParams args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int d = args.head_dim, half = d / 2, words = half / 4, all = args.heads + 2 * args.kv_heads, keys = args.heads + args.kv_heads;
  const int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (item >= int64_t{args.tokens} * all * words) return;
  const int pair = static_cast<int>(item % words) * 4;
  const int64_t token = item / words / all;
  const int h = static_cast<int>(item / words % all);
  // Where the first and the second words lie: of the pairs (i, i + half), or (interleaved) four pairs in a row.
  const int one = args.interleaved ? 2 * pair : pair, two = args.interleaved ? one + 4 : one + half;
  const float* const from = args.qkv + (token * all + h) * d;
  const float4 x = *reinterpret_cast<const float4*>(from + one), y = *reinterpret_cast<const float4*>(from + two);
  float* const to = h < args.heads ? args.q + (token * args.heads + h) * d
                    : h < keys     ? args.k + (token * args.kv_heads + h - args.heads) * d
                                   : args.v + (token * args.kv_heads + h - keys) * d;
  if (h < args.heads && args.q_before != nullptr) {
    float* const before = args.q_before + (token * args.heads + h) * d;
    *reinterpret_cast<float4*>(before + one) = x, *reinterpret_cast<float4*>(before + two) = y;
  }
  float4 a = x, b = y;
  if (h < keys) {
    const float4 cos = *reinterpret_cast<const float4*>(args.cos + token * half + pair), sin = *reinterpret_cast<const float4*>(args.sin + token * half + pair);
    if (args.interleaved) {
      a = {x.x * cos.x - x.y * sin.x, x.y * cos.x + x.x * sin.x, x.z * cos.y - x.w * sin.y, x.w * cos.y + x.z * sin.y};
      b = {y.x * cos.z - y.y * sin.z, y.y * cos.z + y.x * sin.z, y.z * cos.w - y.w * sin.w, y.w * cos.w + y.z * sin.w};
    } else {
      a = {x.x * cos.x - y.x * sin.x, x.y * cos.y - y.y * sin.y, x.z * cos.z - y.z * sin.z, x.w * cos.w - y.w * sin.w};
      b = {y.x * cos.x + x.x * sin.x, y.y * cos.y + x.y * sin.y, y.z * cos.z + x.z * sin.z, y.w * cos.w + x.w * sin.w};
    }
  }
  *reinterpret_cast<float4*>(to + one) = a, *reinterpret_cast<float4*>(to + two) = b;
}

struct GateArgs {
  const float* gate_up;
  float* y;
  int32_t width;
};
// WORDS: four channels to a thread.
template <bool WORDS>
__global__ void __launch_bounds__(kThreads) GateKernel(const __grid_constant__ GateArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const float* const from = args.gate_up + int64_t{blockIdx.y} * 2 * args.width;
  float* const to = args.y + int64_t{blockIdx.y} * args.width;
  const int i = (blockIdx.x * kThreads + threadIdx.x) * (WORDS ? 4 : 1);
  if (i >= args.width) return;
  if constexpr (WORDS) {
    const float4 gate = *reinterpret_cast<const float4*>(from + i), up = *reinterpret_cast<const float4*>(from + args.width + i);
    *reinterpret_cast<float4*>(to + i) = {Silu(gate.x) * up.x, Silu(gate.y) * up.y, Silu(gate.z) * up.z, Silu(gate.w) * up.w};
  } else {
    to[i] = Silu(from[i]) * from[args.width + i];
  }
}

struct EmbedArgs {
  const uint16_t* embedding;
  const int32_t* tokens;
  float* y;
  int32_t cols;
};
template <RowType R>
__global__ void __launch_bounds__(kThreads) EmbedKernel(const __grid_constant__ EmbedArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const uint16_t* const row = args.embedding + int64_t{args.tokens[blockIdx.x]} * args.cols;
  for (int i = threadIdx.x; i < args.cols; i += kThreads) args.y[int64_t{blockIdx.x} * args.cols + i] = Number<R>::Value(row[i]);
}

dim3 Grid(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

constexpr int32_t kMostCols = 24576;
Check CheckVector(const char* name, const VectorProduct& p) {
  return Check(name).That(p.rows >= 0, "rows", p.rows, "use 0 or more")
      .That(p.cols >= 8 && p.cols % 8 == 0 && p.cols <= kMostCols, "cols", p.cols, "use a multiple of 8 up to 24576");
}
VectorArgs ArgsOf(const VectorProduct& p) {
  return {static_cast<const uint4*>(p.weights), p.x, p.norm, p.bias, p.y, p.eps, p.rows, p.cols, p.gated ? p.rows : 0, p.add};
}
int64_t BlocksOf(const VectorProduct& p, const cuda::DeviceLimits& limits) {
  return std::min<int64_t>(CeilDiv(p.rows, kWarps), int64_t{2} * limits.multiprocessors);
}
// All products ask for the same cache beside shared memory: what an MLP of common size needs. A change of its size waits for a multiprocessor to be
// empty, so that the next product's weights would not be on their way before. After a kernel that took all shared memory they would have the least
// cache, and all of Llama-3.1-8B's weights would take 3.84 ms instead of 3.75, a step of 128K with two clocks 6.45 instead of 6.32.
cuda::Shape VectorShape(int64_t blocks, const VectorProduct& p) {
  constexpr int32_t kUsualCols = 14336;
  const auto bytes_of = [](int32_t cols) { return static_cast<size_t>(cols) * sizeof(float); };
  return {.grid = Grid(blocks), .threads = kThreads, .shared_bytes = bytes_of(p.cols), .most_shared_bytes = bytes_of(kMostCols), .keeps_l1 = true,
          .usual_shared_bytes = bytes_of(kUsualCols)};
}
}  // namespace

Status MultiplyVector(const VectorProduct& p, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(CheckVector("vector product", p).Take());
  if (p.rows == 0) return {};
  PREHOC_ASSIGN_OR_RETURN(const cuda::DeviceLimits limits, cuda::CurrentLimits());
  const cuda::Shape shape = VectorShape(BlocksOf(p, limits), p);
  const VectorArgs args = ArgsOf(p);
  const bool f16 = p.type == DeviceNumber::kF16;
  if (p.gated) {
    return LaunchKernel(f16 ? VectorKernel<RowType::kF16, true, VectorArgs> : VectorKernel<RowType::kBF16, true, VectorArgs>, "vector product", args, shape,
                        stream);
  }
  return LaunchKernel(f16 ? VectorKernel<RowType::kF16, false, VectorArgs> : VectorKernel<RowType::kBF16, false, VectorArgs>, "vector product", args, shape,
                      stream);
}

Status MultiplyRotated(const VectorProduct& p, const RotateParams& r, cudaStream_t stream) {
  const int64_t heads = int64_t{r.heads} + 2 * int64_t{r.kv_heads};
  PREHOC_RETURN_IF_ERROR(CheckVector("rotated product", p).That(!p.add, "add", p.add, "use MultiplyVector and RotateHeads")
                             .That(!p.gated, "gated", p.gated, "use MultiplyVector and RotateHeads")
                             .That(r.q_norm == nullptr, "q_norm", 1, "use MultiplyVector and RotateHeads for heads with a norm")
                             .That(r.k_norm == nullptr, "k_norm", 1, "use MultiplyVector and RotateHeads for heads with a norm")
                             .That(r.tokens == 1, "tokens", r.tokens, "use 1")
                             .That(r.heads >= 0, "heads", r.heads, "use 0 or more")
                             .That(r.kv_heads >= 0, "kv_heads", r.kv_heads, "use 0 or more")
                             .That(r.head_dim > 0 && r.head_dim % 2 == 0, "head_dim", r.head_dim, "use an even number")
                             .That(p.rows == heads * r.head_dim, "rows", p.rows, "use (heads + 2 kv_heads) * head_dim").Take());
  if (p.rows == 0) return {};
  PREHOC_ASSIGN_OR_RETURN(const cuda::DeviceLimits limits, cuda::CurrentLimits());
  // More blocks than run at once, where these would have more rounds than they can keep.
  const int64_t blocks = std::max(BlocksOf(p, limits), CeilDiv(p.rows, kMostRounds * kWarps));
  const RotatedArgs args{ArgsOf(p), r.cos, r.sin, r.q, r.q_before, r.k, r.v, r.head_dim / 2, r.heads, r.heads + r.kv_heads, r.interleaved};
  return LaunchKernel(p.type == DeviceNumber::kF16 ? VectorKernel<RowType::kF16, false, RotatedArgs> : VectorKernel<RowType::kBF16, false, RotatedArgs>,
                      "rotated product", args, VectorShape(blocks, p), stream);
}

Status MultiplyMatrix(const MatrixProduct& p, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("matrix product").That(p.tokens >= 0 && p.rows >= 0, "tokens", p.tokens, "use 0 or more")
                             .That(p.cols >= 8 && p.cols % 8 == 0, "cols", p.cols, "use a multiple of 8").Take());
  if (p.tokens == 0 || p.rows == 0) return {};
#ifdef PREHOC_SM90
  PREHOC_ASSIGN_OR_RETURN(const cuda::DeviceLimits limits, cuda::CurrentLimits());
  if (p.workspace != nullptr && limits.major == 9) return sm90::MultiplyMatrix(p, stream);
#endif
  const MatrixArgs args{static_cast<const uint16_t*>(p.weights), p.x, p.bias, p.y, p.tokens, p.rows, p.cols, p.add};
  // Neighbouring blocks share weights, which are more than activations.
  const cuda::Shape shape{.grid = Grid(CeilDiv(p.tokens, kTile), CeilDiv(p.rows, kTile)), .threads = kMatrixThreads, .shared_bytes = sizeof(MatrixTiles)};
  const bool f16 = p.type == DeviceNumber::kF16;
  if (p.precision == PromptPrecision::kHalf) {
    return LaunchKernel(f16 ? MatrixKernel<RowType::kF16, false> : MatrixKernel<RowType::kBF16, false>, "matrix product", args, shape, stream);
  }
  return LaunchKernel(f16 ? MatrixKernel<RowType::kF16, true> : MatrixKernel<RowType::kBF16, true>, "matrix product", args, shape, stream);
}

Status NormRows(const float* x, const float* weight, float eps, float* y, int32_t tokens, int32_t cols, cudaStream_t stream) {
  if (tokens == 0) return {};
  const bool holds = cols % 4 == 0 && cols <= kMostHeld;
  return LaunchKernel(holds ? NormKernel<true> : NormKernel<false>, "norm", NormArgs{x, weight, y, eps, cols},
                      {.grid = Grid(tokens), .threads = kThreads}, stream);
}

Status RotateHeads(const RotateParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("rope").That(params.head_dim > 0 && params.head_dim <= kMostHeadDim && params.head_dim % 2 == 0, "head_dim",
                                            params.head_dim, "use an even number up to 256").Take());
  if (params.tokens == 0) return {};
  if (params.q_norm == nullptr && params.k_norm == nullptr && params.head_dim % 8 == 0) {
    const int64_t items = int64_t{params.tokens} * (params.heads + 2 * params.kv_heads) * (params.head_dim / 8);
    return LaunchKernel(RotateWideKernel, "rope", params, {.grid = Grid(CeilDiv(items, kThreads)), .threads = kThreads}, stream);
  }
  return LaunchKernel(RotateKernel, "rope", params,
                      {.grid = Grid(params.heads + 2 * params.kv_heads, params.tokens), .threads = kThreads}, stream);
}

Status GateRows(const float* gate_up, float* y, int32_t tokens, int32_t width, cudaStream_t stream) {
  if (tokens == 0) return {};
  const bool words = width % 4 == 0;
  return LaunchKernel(words ? GateKernel<true> : GateKernel<false>, "silu", GateArgs{gate_up, y, width},
                      {.grid = Grid(CeilDiv(width, kThreads * (words ? 4 : 1)), tokens), .threads = kThreads}, stream);
}

Status EmbedTokens(const void* embedding, DeviceNumber type, const int32_t* tokens, float* y, int32_t count, int32_t cols, cudaStream_t stream) {
  if (count == 0) return {};
  const EmbedArgs args{static_cast<const uint16_t*>(embedding), tokens, y, cols};
  return LaunchKernel(type == DeviceNumber::kF16 ? EmbedKernel<RowType::kF16> : EmbedKernel<RowType::kBF16>, "embedding", args,
                      {.grid = Grid(count), .threads = kThreads}, stream);
}

}  // namespace prehoc::reference
