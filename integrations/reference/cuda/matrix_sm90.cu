// y = W x for many tokens on the tensor cores of compute capability 9.0: products of a whole warp group, whose operands the copy engine of the
// multiprocessor (TMA) brings. Activations were made sums of two numbers of the weights' type before, or one. Compiled for sm_90a alone.
//
//   a block: 128 tokens x 256 rows; one warp asks for slices of 64 columns, two warp groups multiply 64 x 256 each; three or four slices
//   are on their way or in use. Each slice of weights meets both parts of the activations.
#include <algorithm>

#include "base/units.h"
#include "integrations/reference/cuda/matrix_sm90.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sm90.cuh"

namespace prehoc::reference::sm90 {
namespace {
using namespace cuda::sm90;  // NOLINT(google-build-using-namespace): one file's helpers
using cuda::LaunchKernel;
using cuda::LetLaterWorkLaunch;
using cuda::RowType;
using cuda::SharedAddress;
using cuda::WaitForEarlierWork;

constexpr int kTokens = 128, kRows = 256, kDeep = 64;
constexpr int kLineBytes = kDeep * 2;  // of a token or row in a slice: what the swizzle of 128 bytes takes
constexpr int kGroups = 2, kGroupThreads = 128, kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kXBytes = kTokens * kLineBytes, kWBytes = kRows * kLineBytes;
constexpr int kTogether = 16;  // tiles of tokens that neighbouring blocks share weights over
template <bool kSplit>
struct Plan {
  static constexpr int kXParts = kSplit ? 2 : 1, kStages = kSplit ? 3 : 4, kStageBytes = kXParts * kXBytes + kWBytes;
  static constexpr size_t kShared = size_t{kStages} * kStageBytes + 1024 + 128;
};

struct Args {
  CUtensorMap x;        // [tokens, cols]; split: [2 tokens, cols], most, then rest
  CUtensorMap weights;  // [rows, cols]
  const float* bias;
  float* y;
  int32_t tokens, rows, cols;
  bool add;
};

// d [64, 256] += a [64, 16] b [256, 16]^T, behind the threads of the warp group.
template <RowType R>
__device__ inline void Multiply(float (&d)[128], uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PREHOC_WGMMA(type) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, 1, 1, 1, 0, 0;" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
        "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
        "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
        "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
        "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
        "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
        "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
        "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
        "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
        "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
        "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) \
      : "l"(a), "l"(b))
  if constexpr (R == RowType::kF16) {
    PREHOC_WGMMA("f16");
  } else {
    PREHOC_WGMMA("bf16");
  }
#undef PREHOC_WGMMA
#endif
}

template <RowType R, bool kSplit>
__global__ void __launch_bounds__(kThreads, 1) WideKernel(const __grid_constant__ Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = Plan<kSplit>::kStages, kStageBytes = Plan<kSplit>::kStageBytes, kXAll = Plan<kSplit>::kXParts * kXBytes;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = (SharedAddress(shared) + 1023) / 1024 * 1024;
  const uint32_t full = base + kStages * kStageBytes, empty = full + kStages * 8;
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads, lane = static_cast<int>(threadIdx.x) % 32;
  // Blocks that run at once share the operands of a few tiles each way.
  const int row_tiles = (args.rows + kRows - 1) / kRows, token_tiles = (args.tokens + kTokens - 1) / kTokens;
  const int first = static_cast<int>(blockIdx.x) / (kTogether * row_tiles) * kTogether, wide = min(kTogether, token_tiles - first);
  const int within = static_cast<int>(blockIdx.x) - first * row_tiles;
  const int token0 = (first + within % wide) * kTokens, row0 = within / wide * kRows;
  const int slices = (args.cols + kDeep - 1) / kDeep;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) Init(full + s * 8, 1), Init(empty + s * 8, kGroups * kGroupThreads / 32);
    InitDone();
  }
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  __syncthreads();
  if (group == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != kGroups * kGroupThreads) return;
    for (int k = 0; k < slices; ++k) {
      const int s = k % kStages;
      if (k >= kStages) Await(empty + s * 8, (k / kStages - 1) % 2);
      const uint32_t at = base + s * kStageBytes, barrier = full + s * 8;
      Expect(barrier, kStageBytes);
      Bring(at, &args.x, k * kDeep, token0, barrier);
      if constexpr (kSplit) Bring(at + kXBytes, &args.x, k * kDeep, args.tokens + token0, barrier);
      Bring(at + kXAll, &args.weights, k * kDeep, row0, barrier);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float d[128] = {};
  for (int k = 0; k < slices; ++k) {
    const int s = k % kStages;
    Await(full + s * 8, k / kStages % 2);
    const uint32_t most = base + s * kStageBytes + group * 64 * kLineBytes, weights = base + s * kStageBytes + kXAll;
    BeginProducts();
#pragma unroll
    for (int c = 0; c < kDeep; c += 16) {
      if constexpr (kSplit) Multiply<R>(d, Matrix(most + kXBytes + c * 2), Matrix(weights + c * 2));
      Multiply<R>(d, Matrix(most + c * 2), Matrix(weights + c * 2));
    }
    CommitProducts();
    WaitForProducts<1>();
    if (k > 0 && lane == 0) Arrive(empty + (k - 1) % kStages * 8);  // all but this slice are used up
  }
  WaitForProducts<0>();
#pragma unroll
  for (float& x : d) asm volatile("" : "+f"(x)::"memory");  // nothing reads it before
  const int token = token0 + group * 64 + static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16 + lane / 4, col = row0 + lane % 4 * 2;
  const bool pairs = args.rows % 2 == 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (token + 8 * r >= args.tokens) continue;
    float* const y = args.y + int64_t{token + 8 * r} * args.rows;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const int at = col + n * 8;
      float2 value = {d[n * 4 + 2 * r], d[n * 4 + 2 * r + 1]};
      if (args.bias != nullptr && at < args.rows) value.x += args.bias[at];
      if (args.bias != nullptr && at + 1 < args.rows) value.y += args.bias[at + 1];
      if (pairs && at < args.rows) {
        float2* const to = reinterpret_cast<float2*>(y + at);
        if (args.add) value.x += to->x, value.y += to->y;
        *to = value;
      } else if (!pairs) {
        if (at < args.rows) y[at] = args.add ? y[at] + value.x : value.x;
        if (at + 1 < args.rows) y[at + 1] = args.add ? y[at + 1] + value.y : value.y;
      }
    }
  }
#endif
}

struct SplitArgs {
  const float4* x;
  uint4 *most, *rest;  // rest: where they are split
  int64_t words;  // of 8 numbers
};
constexpr int kSplitThreads = 256;
template <RowType R, bool kSplit>
__global__ void __launch_bounds__(kSplitThreads) SplitKernel(const __grid_constant__ SplitArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  for (int64_t i = int64_t{blockIdx.x} * kSplitThreads + threadIdx.x; i < args.words; i += int64_t{gridDim.x} * kSplitThreads) {
    const float4 a = args.x[2 * i], b = args.x[2 * i + 1];
    uint4 most, rest;
    cuda::SplitPair<R>(a.x, a.y, &most.x, &rest.x);
    cuda::SplitPair<R>(a.z, a.w, &most.y, &rest.y);
    cuda::SplitPair<R>(b.x, b.y, &most.z, &rest.z);
    cuda::SplitPair<R>(b.z, b.w, &most.w, &rest.w);
    args.most[i] = most;
    if (kSplit) args.rest[i] = rest;
  }
}

Status MakeMatrixMap(const void* data, DeviceNumber type, int64_t rows, int64_t cols, int box, CUtensorMap* map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)}, strides[] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t boxes[] = {kDeep, static_cast<cuuint32_t>(box)};
  const auto numbers = type == DeviceNumber::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const Status status = MakeMap(numbers, 2, data, sizes, strides, boxes, map);
  return status.ok() ? status : status.WithContext("matrix product");
}

template <RowType R, bool kSplit>
Status MultiplyAs(const MatrixProduct& p, cudaStream_t stream) {
  const int64_t words = int64_t{p.tokens} * p.cols / 8;
  auto* const most = static_cast<uint4*>(p.workspace);
  const SplitArgs split{reinterpret_cast<const float4*>(p.x), most, most + words, words};
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(CeilDiv(words, kSplitThreads), 132 * 16));
  PREHOC_RETURN_IF_ERROR(LaunchKernel(SplitKernel<R, kSplit>, "split", split, {.grid = dim3(blocks), .threads = kSplitThreads}, stream));
  Args args{.bias = p.bias, .y = p.y, .tokens = p.tokens, .rows = p.rows, .cols = p.cols, .add = p.add};
  PREHOC_RETURN_IF_ERROR(MakeMatrixMap(p.workspace, p.type, int64_t{Plan<kSplit>::kXParts} * p.tokens, p.cols, kTokens, &args.x));
  PREHOC_RETURN_IF_ERROR(MakeMatrixMap(p.weights, p.type, p.rows, p.cols, kRows, &args.weights));
  const auto tiles = static_cast<unsigned>(CeilDiv(p.tokens, kTokens) * CeilDiv(p.rows, kRows));
  return LaunchKernel(WideKernel<R, kSplit>, "matrix product", args,
                      {.grid = dim3(tiles), .threads = kThreads, .shared_bytes = Plan<kSplit>::kShared}, stream);
}
}  // namespace

Status MultiplyMatrix(const MatrixProduct& p, cudaStream_t stream) {
  const bool f16 = p.type == DeviceNumber::kF16;
  if (p.precision == PromptPrecision::kHalf) {
    return f16 ? MultiplyAs<RowType::kF16, false>(p, stream) : MultiplyAs<RowType::kBF16, false>(p, stream);
  }
  return f16 ? MultiplyAs<RowType::kF16, true>(p, stream) : MultiplyAs<RowType::kBF16, true>(p, stream);
}

}  // namespace prehoc::reference::sm90
