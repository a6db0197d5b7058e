// append, score and gather over lists of rows.
#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/run_kernels.h"

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
  const int d = args.head_dim;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < int64_t{task.count} * d; i += int64_t{gridDim.x} * kThreads) {
    const int64_t t = i / d, c = i % d;
    task.rows[t * 2 * d + c] = __half_as_ushort(__float2half_rn(task.k[t * task.stride + c]));
    task.rows[t * 2 * d + d + c] = __half_as_ushort(__float2half_rn(task.v[t * task.stride + c]));
  }
}

struct ScoreRunsArgs {
  const RunScoreTask* tasks;
  int32_t group, head_dim;
  float scale;
};
// The row at `index` of the task, by the last run that begins at or before it.
__device__ inline const Half* RowAt(const RunScoreTask& task, int32_t index, int d) {
  int low = 0, high = task.num_runs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (task.runs[middle].first <= index) low = middle;
    else high = middle - 1;
  }
  const DeviceRun run = task.runs[low];
  return run.rows + int64_t{index - run.first} * 2 * d;
}
// A warp takes a row at a time; a lane holds the products of its channels for each head.
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
    const auto* const key = reinterpret_cast<const __half2*>(RowAt(task, index, d));
    float dot[kScoreHeads] = {};
    for (int c = lane; c < d / 2; c += kWarp) {
      const float2 k = __half22float2(key[c]);
#pragma unroll
      for (int h = 0; h < kScoreHeads; ++h) {
        if (h < heads) dot[h] += q[h * d + 2 * c] * k.x + q[h * d + 2 * c + 1] * k.y;
      }
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
    reinterpret_cast<uint4*>(move.to)[i % args.words] = __ldcs(reinterpret_cast<const uint4*>(move.from) + i % args.words);
  }
}

Check& RowsOf(Check& check, int32_t d) {
  return check.That(d >= 16 && d <= kMostHeadDim && d % 16 == 0, "head_dim", d, "use a multiple of 16 up to 256", StatusCode::kUnsupported);
}
}  // namespace

Status AppendRuns(const RunAppendTask* tasks, int32_t num_tasks, int32_t max_count, int32_t head_dim, cudaStream_t stream) {
  Check check("append");
  PREHOC_RETURN_IF_ERROR(RowsOf(check.Tasks(tasks, num_tasks), head_dim).Take());
  if (num_tasks == 0 || max_count <= 0) return {};
  const AppendRunsArgs args{tasks, head_dim};
  const auto blocks = std::min<int64_t>(CeilDiv(int64_t{max_count} * head_dim, kThreads), 256);
  return LaunchKernel(AppendRunsKernel, "append", args,
                      {.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(num_tasks)), .threads = kThreads}, stream);
}

Status ScoreRuns(const RunScoreTask* tasks, int32_t num_tasks, int32_t max_total, int32_t group, int32_t head_dim, cudaStream_t stream) {
  Check check("score");
  PREHOC_RETURN_IF_ERROR(RowsOf(check.Tasks(tasks, num_tasks).Group(group), head_dim).Take());
  if (num_tasks == 0 || max_total <= 0) return {};
  const ScoreRunsArgs args{tasks, group, head_dim, 1.0f / std::sqrt(static_cast<float>(head_dim))};
  const dim3 grid(static_cast<unsigned>(CeilDiv(max_total, kScoreRows)), static_cast<unsigned>(num_tasks),
                  static_cast<unsigned>(CeilDiv(group, kScoreHeads)));
  return LaunchKernel(ScoreRunsKernel, "score", args, {.grid = grid, .threads = kThreads}, stream);
}

Status MoveRows(const RowMove* moves, int32_t count, int32_t head_dim, cudaStream_t stream) {
  Check check("gather");
  PREHOC_RETURN_IF_ERROR(RowsOf(check, head_dim).Take());
  if (count <= 0) return {};
  const MoveArgs args{moves, count, head_dim / 4};
  const auto blocks = std::min<int64_t>(CeilDiv(int64_t{count} * args.words, kThreads), 264);
  return LaunchKernel(MoveKernel, "gather", args, {.grid = dim3(static_cast<unsigned>(blocks)), .threads = kThreads}, stream);
}

}  // namespace prehoc::cuda
