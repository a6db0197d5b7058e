// The function table of kernels/function_table.h filled with CUDA: rows, codes, logits and pooled scores lie in GPU memory, the rest
// of a task (queries, outputs, lists) in host memory, from where it is staged. So the cache runs on it as it is.
//
//   tasks (host) --one copy--> device --> kernels on one stream --> results in pinned memory --wait--> where the tasks want them
//
// Device pointers are those that the given memory owns. Rows may also lie in pinned host memory: kernels read them where they are.
//   append        rows on the device by a kernel, rows in host memory by the CPU's table; K and V in host memory. With on_device all rows by
//                 a kernel, those of host memory then by the copy engine, behind the call (enqueues only; prefill_rows.h)
//   encode        rows anywhere, blocks on the device. Waits, unless all rows are those of an append that are on their way
//   gate          the CPU's table: its operands are in host memory, and few
//   scan          blocks and z on the device; err too, if given. Enqueues only
//   score         rows anywhere, z on the device (enqueues only) or in host memory (waits)
//   choose        z and pooled on the device. Waits
//   top_k         scores on the device, or (the CPU's table over a copy of what is not) anywhere. Waits
//   gather        from anywhere to the device. Waits, so that the sources may go
//   attend        rows anywhere; the rows of one task that are in one kind of memory lie whole rows apart. Waits
//   prefill       rows anywhere; unless those of a task lie together on the device, copied to scratch there first, or ahead (read_ahead) by
//                 the copy engine while another prefill runs. Waits; with on_device enqueues only
//   follow        an event of the other stream before what comes. Enqueues only
// Refused with kUnsupported, naming task and field: score_pages; dithered codes and codes of 3 bits (scan), variance (scan), spread is
// the CPU's; target_drop, exact_budget, lse_out_bound and err (choose); a head_dim other than 64, 96, 128, 256.
#pragma once
#include <memory>

#include "base/counters.h"
#include "base/cuda/device_memory.h"
#include "base/precision.h"
#include "base/result.h"
#include "kernels/function_table.h"

namespace prehoc::cuda {

// The stream and the staging memory behind the table. Safe from any thread; calls take turns.
class DeviceKernels {
 public:
  struct Options {
    PromptPrecision prompt_precision = PromptPrecision::kSplit;  // of prefill's queries and weights
  };
  // `memory` outlives this. Returns kNotFound or kUnsupported (CurrentCudaDevice()), kCuda, kOutOfSpace.
  static Result<std::unique_ptr<DeviceKernels>> Create(const CudaDeviceMemory* memory, const Options& options);
  static Result<std::unique_ptr<DeviceKernels>> Create(const CudaDeviceMemory* memory) { return Create(memory, {}); }
  ~DeviceKernels();

  // One table for all; which DeviceKernels a call uses is said by Launch::stream = launch_stream().
  static const KernelTable& Table();
  void* launch_stream() const;

  // kernels.{launches, waits, staged_bytes, copied_bytes, scratch_bytes}: copied = rows of prefill, by the copy engine.
  // What the budget of the device memory does not hold is scratch_bytes.
  void VisitCounters(const CounterVisitor& visit) const;

  struct Impl;

 private:
  explicit DeviceKernels(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace prehoc::cuda
