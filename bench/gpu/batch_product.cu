#include "bench/gpu/batch_product.h"

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"

namespace prehoc {
namespace {
using cuda::kAllLanes;
using cuda::kWarp;
using cuda::LaunchKernel;
using F16 = cuda::Number<cuda::RowType::kF16>;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRows = 32;    // of weights a block takes, in two tiles of 16
constexpr int kTokens = 8;   // columns of a product of the tensor cores
constexpr int kDeep = 32;    // channels of a step: 16 bytes of a row for each of 4 lanes
constexpr int kSteps = 4;    // on their way at once: the registers of a step are asked for anew as soon as it is multiplied

struct ProductArgs {
  const uint16_t* weights;
  const uint16_t* x;
  const float* x_float;
  float* y;
  uint16_t* y_half;
  int32_t tokens, rows, cols;
  bool add;
};
__device__ inline float Silu(float x) { return x / (1.0f + __expf(-x)); }

// 8 warps share 32 rows, each with an eighth of the channels. Weights are the rows of the product, tokens its columns; which channel stands
// at which place of a step does not matter as long as both sides agree, so a lane takes 8 neighbours.
template <bool kGated, bool kFloat>
__global__ void __launch_bounds__(kThreads, 2) ProductKernel(const __grid_constant__ ProductArgs args) {
  __shared__ float sums[kWarps][kTokens][kRows + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, j = lane % 4;
  const int first_row = blockIdx.x * (kGated ? kRows / 2 : kRows);
  const int steps = args.cols / kDeep, begin = steps * warp / kWarps, end = steps * (warp + 1) / kWarps;
  // Row r of the four of a lane is 8 (r % 2) further down its tile, and tile r / 2.
  const uint4* const row0 = reinterpret_cast<const uint4*>(args.weights + int64_t{first_row + g} * args.cols) + j;
  const int64_t half = int64_t{args.cols}, tile_words = (kGated ? int64_t{args.rows} : 16) * args.cols / 8;
  uint4 w[kSteps][4], x[kSteps];
  const auto load = [&](int s, int step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) w[s][r] = step < end ? __ldcs(row0 + (r / 2 * tile_words + r % 2 * half + step * (kDeep / 8))) : uint4{0, 0, 0, 0};
  };
  const auto load_x = [&](int s, int step) {
    x[s] = {0, 0, 0, 0};
    if (step >= end || g >= args.tokens) return;
    const int64_t at = int64_t{g} * args.cols + step * kDeep + 8 * j;
    if (!kFloat) {
      x[s] = *reinterpret_cast<const uint4*>(args.x + at);
      return;
    }
    const float4 a = *reinterpret_cast<const float4*>(args.x_float + at), b = *reinterpret_cast<const float4*>(args.x_float + at + 4);
    x[s] = {F16::Pack(a.x, a.y), F16::Pack(a.z, a.w), F16::Pack(b.x, b.y), F16::Pack(b.z, b.w)};
  };
  cuda::LetLaterWorkLaunch();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) load(s, begin + s);  // nothing writes weights
  cuda::WaitForEarlierWork();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) load_x(s, begin + s);
  float sum[2][4] = {};
#pragma unroll 1
  for (int step = begin; step < end; step += kSteps) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const uint4 a = w[s][2 * tile], b = w[s][2 * tile + 1];
        F16::Mma(sum[tile], a.x, b.x, a.y, b.y, x[s].x, x[s].y);
        F16::Mma(sum[tile], a.z, b.z, a.w, b.w, x[s].z, x[s].w);
      }
      load(s, step + kSteps + s);
      load_x(s, step + kSteps + s);
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[warp][2 * j + i % 2][tile * 16 + g + i / 2 * 8] = sum[tile][i];
  }
  __syncthreads();
  const int token = threadIdx.x / kRows, row = threadIdx.x % kRows;
  static_assert(kThreads == kTokens * kRows, "a thread writes one number");
  const auto total = [&](int r) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w][token][r];
    return all;
  };
  if (token >= args.tokens || (kGated && row >= kRows / 2)) return;
  const float y = kGated ? Silu(total(row)) * total(row + kRows / 2) : total(row);
  const int64_t at = int64_t{token} * args.rows + first_row + row;
  if (args.y_half != nullptr) args.y_half[at] = F16::Bits(y);
  else args.y[at] = args.add ? args.y[at] + y : y;
}

struct NormArgs {
  const float* x;
  const float* weight;
  uint16_t* y;
  float eps;
  int32_t cols;
};
constexpr int kNormThreads = 1024;
__global__ void __launch_bounds__(kNormThreads) NormKernel(const __grid_constant__ NormArgs args) {
  __shared__ float parts[kNormThreads / kWarp];
  cuda::LetLaterWorkLaunch();
  cuda::WaitForEarlierWork();
  const float4* const x = reinterpret_cast<const float4*>(args.x + int64_t{blockIdx.x} * args.cols);
  float square = 0;
  for (int i = threadIdx.x; i < args.cols / 4; i += kNormThreads) {
    const float4 v = x[i];
    square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) square += __shfl_xor_sync(kAllLanes, square, offset);
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = square;
  __syncthreads();
  float all = 0;
  for (const float part : parts) all += part;
  const float scale = 1.0f / sqrtf(all / static_cast<float>(args.cols) + args.eps);
  for (int i = threadIdx.x; i < args.cols / 4; i += kNormThreads) {
    const float4 v = x[i], w = reinterpret_cast<const float4*>(args.weight)[i];
    reinterpret_cast<uint2*>(args.y + int64_t{blockIdx.x} * args.cols)[i] = {F16::Pack(w.x * (v.x * scale), w.y * (v.y * scale)),
                                                                            F16::Pack(w.z * (v.z * scale), w.w * (v.w * scale))};
  }
}
}  // namespace

Status MultiplyBatch(const BatchProduct& p, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(cuda::Check("batch product").That(p.tokens >= 1 && p.tokens <= kTokens, "tokens", p.tokens, "use 1 to 8")
                             .That(p.rows >= kRows && p.rows % kRows == 0, "rows", p.rows, "use a multiple of 32")
                             .That(p.cols >= kDeep && p.cols % kDeep == 0, "cols", p.cols, "use a multiple of 32").Take());
  const ProductArgs args{p.weights, p.x, p.x_float, p.y, p.y_half, p.tokens, p.rows, p.cols, p.add};
  const int blocks = p.rows / (p.gated ? kRows / 2 : kRows);
  const cuda::Shape shape{.grid = dim3(static_cast<unsigned>(blocks)), .threads = kThreads, .keeps_l1 = true};
  const bool from_float = p.x == nullptr;
  return LaunchKernel(p.gated ? (from_float ? ProductKernel<true, true> : ProductKernel<true, false>)
                              : (from_float ? ProductKernel<false, true> : ProductKernel<false, false>), "batch product", args, shape, stream);
}
Status NormBatch(const float* x, const float* weight, float eps, uint16_t* y, int32_t tokens, int32_t cols, cudaStream_t stream) {
  return LaunchKernel(NormKernel, "norm", NormArgs{x, weight, y, eps, cols}, {.grid = dim3(static_cast<unsigned>(tokens)), .threads = kNormThreads}, stream);
}

}  // namespace prehoc
