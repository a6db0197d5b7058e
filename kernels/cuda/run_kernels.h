// Kernels over lists of rows: what the function table needs beside device_kernels.h. Rows of fp16, or of another format where a call names one;
// tasks and what they point to as there.
// For kernels/cuda, and for transfers of rows.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/half.h"
#include "base/precision.h"
#include "base/status.h"
#include "kernels/function_table.h"

namespace prehoc::cuda {

// Rows that lie together, with how many rows of the task come before them.
struct DeviceRun {
  const void* rows = nullptr;
  int32_t first = 0, count = 0;
  bool stored = false;  // of the call's format; else of fp16
};

// Each enqueues on `stream` and returns at once: kInvalid or kUnsupported (shapes), kCuda (launch).

// fp32 K and V become rows.
struct RunAppendTask {
  const float *k = nullptr, *v = nullptr;  // [count] vectors, `stride` floats apart
  int64_t stride = 0;
  void* rows = nullptr;                    // [count] rows
  int32_t count = 0;
  bool widened = false;                    // fp16 rows, of what those of the format stand for
};
Status AppendRuns(const RunAppendTask* tasks, int32_t num_tasks, int32_t max_count, int32_t head_dim, cudaStream_t stream,
                  RowFormat format = RowFormat::kF16);

struct RunEncodeTask {
  const void* rows = nullptr;  // [group_tokens] rows
  std::byte* block = nullptr;
  Half *page_lo = nullptr, *page_hi = nullptr;
};
Status EncodeRuns(const RunEncodeTask* tasks, int32_t num_tasks, const CodeFormat& format, int32_t head_dim, cudaStream_t stream,
                  RowFormat rows = RowFormat::kF16);

// Exact logits.
struct RunScoreTask {
  const float* q = nullptr;         // [group, head_dim]
  const DeviceRun* runs = nullptr;  // [num_runs]
  int32_t num_runs = 0, total = 0;  // rows of all runs
  float* z = nullptr;               // [group] rows of `total`, `z_stride` floats apart
  int64_t z_stride = 0;
};
Status ScoreRuns(const RunScoreTask* tasks, int32_t num_tasks, int32_t max_total, int32_t group, int32_t head_dim, cudaStream_t stream,
                 RowFormat stored = RowFormat::kF16);

// Rows of `format` become fp16 rows.
struct RowMove {
  const void* from = nullptr;
  Half* to = nullptr;
};
Status MoveRows(const RowMove* moves, int32_t count, int32_t head_dim, cudaStream_t stream, RowFormat format = RowFormat::kF16);
// The same of `num` tasks with `rows` rows each, which lie together, each task's `from_pitch` and `to_pitch` bytes after the one before.
Status WidenTasks(const std::byte* from, size_t from_pitch, std::byte* to, size_t to_pitch, int32_t num, int64_t rows, int32_t head_dim, RowFormat format,
                  cudaStream_t stream);

// Pieces of device memory that lie evenly: `height` of `width` bytes, each so many bytes after the one before; all are multiples of 16.
struct EvenPieces {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  int64_t from_pitch = 0, to_pitch = 0, width = 0;
  int32_t height = 0;
};
// By all multiprocessors: a copy engine would put them behind copies over the link.
Status CopyPieces(std::span<const EvenPieces> pieces, cudaStream_t stream);

// Causal attention of many queries, as PrefillTask of function_table.h, over rows that lie together.
struct RunPrefillTask {
  const float* q = nullptr;    // [queries] rows of [group, head_dim], `q_stride` floats apart
  int64_t q_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
  const Half* rows = nullptr;  // [first + queries, 2, head_dim]
  const int32_t* start = nullptr;  // [queries] or null
};
struct RunPrefillParams {
  const RunPrefillTask* tasks = nullptr;
  int32_t num_tasks = 0, queries = 0, first = 0, sinks = 0, group = 0, head_dim = 0;
  // Where the tasks' rows lie, for host code: those of task i at rows + i * pitch (halves, a multiple of 8). Or null; then no kernel that must
  // know it runs.
  const Half* rows = nullptr;
  int64_t pitch = 0;
  PromptPrecision precision = PromptPrecision::kSplit;  // of queries and weights
};
Status PrefillRuns(const RunPrefillParams& params, cudaStream_t stream);

}  // namespace prehoc::cuda
