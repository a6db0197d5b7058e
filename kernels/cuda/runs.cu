// append, score and gather over lists of rows.
#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/run_kernels.h"
#include "kernels/cuda/stored_rows.cuh"

namespace prehoc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kScoreRows = 64;   // rows of a block
constexpr int kScoreHeads = 8;   // query heads of a block
constexpr int kMostHeadDim = 256;

struct AppendRunsArgs {
  const RunAppendTask* tasks;
  int32_t head_dim;
};
__global__ void __launch_bounds__(kThreads) AppendRunsKernel(const __grid_constant__ AppendRunsArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RunAppendTask task = args.tasks[blockIdx.y];
  auto* const rows = static_cast<Half*>(task.rows);
  // Four channels at a time.
  const int d = args.head_dim, words = d / 4;
  const bool aligned = (reinterpret_cast<uintptr_t>(task.k) | reinterpret_cast<uintptr_t>(task.v)) % sizeof(float4) == 0 && task.stride % 4 == 0;
  const auto load = [&](const float* from) { return aligned ? *reinterpret_cast<const float4*>(from) : float4{from[0], from[1], from[2], from[3]}; };
  const auto pack = [](const float4& x) { return uint2{Number<RowType::kF16>::Pack(x.x, x.y), Number<RowType::kF16>::Pack(x.z, x.w)}; };
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < int64_t{task.count} * words; i += int64_t{gridDim.x} * kThreads) {
    const int t = static_cast<int>(i / words), c = static_cast<int>(i % words) * 4;
    const float4 k = load(task.k + t * task.stride + c), v = load(task.v + t * task.stride + c);
    Half* const row = rows + int64_t{t} * 2 * d + c;
    *reinterpret_cast<uint2*>(row) = pack(k);
    *reinterpret_cast<uint2*>(row + d) = pack(v);
  }
}

struct AppendNarrowArgs {
  const RunAppendTask* tasks;
  RowShape shape;
};
// Rows of 8 bits, or what they stand for: a warp takes the channels that share a scale.
__global__ void __launch_bounds__(kThreads) AppendNarrowKernel(const __grid_constant__ AppendNarrowArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RunAppendTask task = args.tasks[blockIdx.y];
  const int d = args.shape.head_dim, lane = threadIdx.x % kWarp, parts = (d + kScaledChannels - 1) / kScaledChannels;
  const int64_t all = int64_t{task.count} * 2 * parts;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp; i < all; i += int64_t{gridDim.x} * kWarps) {
    const int64_t t = i / (2 * parts);
    const int half = static_cast<int>(i % (2 * parts)) / parts, c = static_cast<int>(i % parts) * kScaledChannels;
    const float x = c + lane < d ? (half == 0 ? task.k : task.v)[t * task.stride + c + lane] : 0.0f;
    std::byte* const stored = task.widened ? nullptr : static_cast<std::byte*>(task.rows) + t * args.shape.bytes;
    NarrowChannels(__float2half_rn(x), args.shape, half, c, lane, stored, task.widened ? static_cast<Half*>(task.rows) + t * 2 * d : nullptr);
  }
}

struct ScoreRunsArgs {
  const RunScoreTask* tasks;
  int32_t group, head_dim;
  float scale;
  RowShape stored;
};
// The run of the row at `index` of the task: the last one that begins at or before it.
__device__ inline DeviceRun RunOf(const RunScoreTask& task, int32_t index) {
  int low = 0, high = task.num_runs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (task.runs[middle].first <= index) low = middle;
    else high = middle - 1;
  }
  return task.runs[low];
}
// A warp takes a row at a time; a lane holds the products of its channels for each head. kNarrow: some rows are of 8 bits.
template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) ScoreRunsKernel(const __grid_constant__ ScoreRunsArgs args) {
  __shared__ float q[kScoreHeads * kMostHeadDim];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RunScoreTask task = args.tasks[blockIdx.y];
  const int d = args.head_dim, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_head = blockIdx.z * kScoreHeads, heads = min(kScoreHeads, args.group - first_head);
  const int begin = blockIdx.x * kScoreRows, end = min(begin + kScoreRows, task.total);
  if (begin >= end) return;
  for (int i = threadIdx.x; i < heads * d; i += kThreads) q[i] = task.q[first_head * d + i];
  __syncthreads();
  for (int index = begin + warp; index < end; index += kWarps) {
    const DeviceRun run = RunOf(task, index);
    const int64_t at = index - run.first;
    float dot[kScoreHeads] = {};
    const auto add = [&](int c, float2 k) {  // channels 2 c and the next
#pragma unroll
      for (int h = 0; h < kScoreHeads; ++h) {
        if (h < heads) dot[h] += q[h * d + 2 * c] * k.x + q[h * d + 2 * c + 1] * k.y;
      }
    };
    if (kNarrow && run.stored) {
      const std::byte* const row = static_cast<const std::byte*>(run.rows) + at * args.stored.bytes;
      for (int p = lane; p < d / 8; p += kWarp) {
        const uint4 piece = Widened(LoadNarrow(row, args.stored, p), args.stored);
        const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) add(4 * p + i, __half22float2(*reinterpret_cast<const __half2*>(&pairs[i])));
      }
    } else {
      const auto* const key = reinterpret_cast<const __half2*>(static_cast<const Half*>(run.rows) + at * 2 * d);
      for (int c = lane; c < d / 2; c += kWarp) add(c, __half22float2(key[c]));
    }
#pragma unroll
    for (int h = 0; h < kScoreHeads; ++h) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) dot[h] += __shfl_xor_sync(kAllLanes, dot[h], offset);
      if (h < heads && lane == h) task.z[(first_head + h) * task.z_stride + index] = dot[h] * args.scale;
    }
  }
}

struct MoveArgs {
  const RowMove* moves;
  int32_t count, words;  // 16-byte words of a row
};
__global__ void __launch_bounds__(kThreads) MoveKernel(const __grid_constant__ MoveArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int64_t words = int64_t{args.count} * args.words;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += int64_t{gridDim.x} * kThreads) {
    const RowMove move = args.moves[i / args.words];
    reinterpret_cast<uint4*>(move.to)[i % args.words] = __ldcs(static_cast<const uint4*>(move.from) + i % args.words);
  }
}

struct WidenArgs {
  const RowMove* moves;
  int32_t count;
  RowShape shape;
};
// The same with rows of 8 bits.
__global__ void __launch_bounds__(kThreads) WidenKernel(const __grid_constant__ WidenArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int pieces = args.shape.head_dim / 4;
  const int64_t all = int64_t{args.count} * pieces;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < all; i += int64_t{gridDim.x} * kThreads) {
    const RowMove move = args.moves[i / pieces];
    const int p = static_cast<int>(i % pieces);
    reinterpret_cast<uint4*>(move.to)[p] = Widened(LoadNarrow(static_cast<const std::byte*>(move.from), args.shape, p), args.shape);
  }
}

struct WidenTasksArgs {
  const std::byte* from;
  std::byte* to;
  size_t from_pitch, to_pitch;
  int64_t rows;
  RowShape shape;
};
__global__ void __launch_bounds__(kThreads) WidenTasksKernel(const __grid_constant__ WidenTasksArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int pieces = args.shape.head_dim / 4;
  const std::byte* const from = args.from + blockIdx.y * args.from_pitch;
  auto* const to = reinterpret_cast<uint4*>(args.to + blockIdx.y * args.to_pitch);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.rows * pieces; i += int64_t{gridDim.x} * kThreads) {
    to[i] = Widened(LoadNarrow(from + i / pieces * args.shape.bytes, args.shape, static_cast<int>(i % pieces)), args.shape);
  }
}

Check& RowsOf(Check& check, int32_t d) {
  return check.That(d >= 16 && d <= kMostHeadDim && d % 16 == 0, "head_dim", d, "use a multiple of 16 up to 256", StatusCode::kUnsupported);
}
}  // namespace

Status AppendRuns(const RunAppendTask* tasks, int32_t num_tasks, int32_t max_count, int32_t head_dim, cudaStream_t stream, RowFormat format) {
  Check check("append");
  PREHOC_RETURN_IF_ERROR(RowsOf(check.Tasks(tasks, num_tasks).Rows("format", format), head_dim).Take());
  if (num_tasks == 0 || max_count <= 0) return {};
  const int64_t of_block = int64_t{kThreads} * (format == RowFormat::kF16 ? 8 : 1);  // channels
  const auto blocks = std::min<int64_t>(CeilDiv(int64_t{max_count} * head_dim, of_block), 256);
  const Shape shape{.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(num_tasks)), .threads = kThreads};
  return format == RowFormat::kF16 ? LaunchKernel(AppendRunsKernel, "append", AppendRunsArgs{tasks, head_dim}, shape, stream)
                                   : LaunchKernel(AppendNarrowKernel, "append", AppendNarrowArgs{tasks, RowShapeOf(format, head_dim)}, shape, stream);
}

Status ScoreRuns(const RunScoreTask* tasks, int32_t num_tasks, int32_t max_total, int32_t group, int32_t head_dim, cudaStream_t stream,
                 RowFormat stored) {
  Check check("score");
  PREHOC_RETURN_IF_ERROR(RowsOf(check.Tasks(tasks, num_tasks).Group(group).Rows("stored", stored), head_dim).Take());
  if (num_tasks == 0 || max_total <= 0) return {};
  const ScoreRunsArgs args{tasks, group, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim)), RowShapeOf(stored, head_dim)};
  const dim3 grid(static_cast<unsigned>(CeilDiv(max_total, kScoreRows)), static_cast<unsigned>(num_tasks),
                  static_cast<unsigned>(CeilDiv(group, kScoreHeads)));
  const Shape shape{.grid = grid, .threads = kThreads};
  return stored == RowFormat::kF16 ? LaunchKernel(ScoreRunsKernel<false>, "score", args, shape, stream)
                                   : LaunchKernel(ScoreRunsKernel<true>, "score", args, shape, stream);
}

Status MoveRows(const RowMove* moves, int32_t count, int32_t head_dim, cudaStream_t stream, RowFormat format) {
  Check check("gather");
  PREHOC_RETURN_IF_ERROR(RowsOf(check.Rows("format", format), head_dim).Take());
  if (count <= 0) return {};
  const int words = head_dim / 4;  // of 16 bytes, of the rows that are written
  const Shape shape{.grid = dim3(static_cast<unsigned>(std::min<int64_t>(CeilDiv(int64_t{count} * words, kThreads), 264))), .threads = kThreads};
  return format == RowFormat::kF16 ? LaunchKernel(MoveKernel, "gather", MoveArgs{moves, count, words}, shape, stream)
                                   : LaunchKernel(WidenKernel, "gather", WidenArgs{moves, count, RowShapeOf(format, head_dim)}, shape, stream);
}

Status WidenTasks(const std::byte* from, size_t from_pitch, std::byte* to, size_t to_pitch, int32_t num, int64_t rows, int32_t head_dim, RowFormat format,
                  cudaStream_t stream) {
  Check check("widen");
  PREHOC_RETURN_IF_ERROR(RowsOf(check.Rows("format", format).Count(num), head_dim).Take());
  if (num == 0 || rows <= 0) return {};
  const auto blocks = std::min<int64_t>(CeilDiv(rows * head_dim / 4, kThreads), 264);
  return LaunchKernel(WidenTasksKernel, "widen", WidenTasksArgs{from, to, from_pitch, to_pitch, rows, RowShapeOf(format, head_dim)},
                      {.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(num)), .threads = kThreads}, stream);
}

}  // namespace prehoc::cuda
