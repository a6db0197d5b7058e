// The rows of prefill on their way between the device and host memory, behind the kernels: the copy engines move them, no multiprocessor waits.
//
//   to the host    kernels write rows to a set on the device; a copy behind them takes them to host memory. Two sets: one fills while the
//                  other leaves. Until a set has left, Find() gives the device's copy of what lies in it.
//   from the host  the rows before a piece come to one of two buffers, those of each task one after the other, while the kernels read the other.
//
// Not safe for two threads; DeviceKernels calls under its lock. Kernels run on the stream given to Create().
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/cuda/device_memory.h"
#include "base/cuda/stream.h"
#include "base/half.h"
#include "base/result.h"
#include "kernels/function_table.h"

namespace prehoc::cuda {

class PrefillRows {
 public:
  // Both outlive this. Rows in `memory` are read in the order of the kernels. Returns kCuda.
  static Result<PrefillRows> Create(const CudaDeviceMemory* memory, cudaStream_t kernels);

  // --- to the host ---
  // Room on the device for `bytes` of new rows; waits if two sets are on their way. What is given out before Send() is of this set.
  Status BeginSet(size_t bytes);
  // The place of the next `bytes` of the set, which go to `host`. With `joins` they may go in one copy with those before, if they follow them
  // there, too: only within one block, as a copy may not cross from one registration of host memory into the next.
  std::byte* Add(std::byte* host, size_t bytes, bool joins);
  // After the kernels that write the set were enqueued: the copies follow them.
  Status Send();
  // Where `size` bytes at `host`, or as many of them as lie together there, are on the device; null: they are in host memory (or will never
  // be given by this), as far as `size` then says.
  const std::byte* Find(const std::byte* host, size_t* size) const;
  // Waits until all sets but the last `but` have left.
  Status Arrive(int32_t but);

  // --- from the host ---
  struct Rows {
    const std::byte* data = nullptr;  // of task 0
    size_t pitch = 0;                 // [bytes] to the next task's
  };
  // Positions [0, rows) of every task, each of `row` bytes, for kernels enqueued from here on: what was read ahead, and copies of the rest.
  // Used() follows those kernels.
  Result<Rows> Gather(std::span<const std::span<const RowRun>> tasks, int64_t rows, size_t row);
  // Rows of 8 bits of a Gather(), as fp16 rows, for the kernels enqueued from here on; until the next call.
  Result<Rows> Widen(const Rows& gathered, size_t num_tasks, int64_t rows, int32_t head_dim, RowFormat format);
  Status Used();
  // Begins to copy positions [0, rows) for a Gather() of `total`.
  Status ReadAhead(std::span<const std::span<const RowRun>> tasks, int64_t rows, int64_t total, size_t row);

  // Waits until nothing is under way, and forgets all of it.
  Status Stop();
  // Gives the device's memory back. Requires that nothing is under way: Stop().
  void Release();
  size_t held_bytes() const;
  int64_t copied_bytes() const { return copied_; }  // to the host and from there

 private:
  struct Part {
    std::byte* host = nullptr;
    size_t at = 0, size = 0;  // in the set
  };
  struct Set {
    std::optional<CudaBytes> bytes;
    std::vector<Part> parts;  // by host address, once sent
    size_t used = 0;
    bool sent = false;
    std::optional<CudaEvent> written, left;
  };
  struct Buffer {
    std::optional<CudaBytes> bytes;
    std::optional<CudaEvent> filled, used;
  };
  PrefillRows(const CudaDeviceMemory* memory, cudaStream_t kernels, CudaStream out, CudaStream in)
      : memory_(memory), kernels_(kernels), out_(std::move(out)), in_(std::move(in)) {}
  Status Leave(Set& set);
  Status MakeRoom(Buffer& buffer, size_t size);
  // Copies positions [from, to) to a buffer: what is on the device in the order of the kernels, the rest on `in_`.
  Status Copy(std::span<const std::span<const RowRun>> tasks, int64_t from, int64_t to, size_t row, size_t pitch, std::byte* data);
  bool WasReadAhead(std::span<const std::span<const RowRun>> tasks, size_t pitch) const;

  const CudaDeviceMemory* memory_ = nullptr;
  cudaStream_t kernels_ = nullptr;
  CudaStream out_, in_;
  Set sets_[2];
  int filling_ = 0;  // the set of the next append
  Buffer buffers_[2];
  int reading_ = 0;  // the buffer of the last Gather()
  // What the other buffer holds, or will: the runs of each task as far as they were read.
  std::vector<std::vector<RowRun>> ahead_;
  int64_t ahead_rows_ = 0;
  std::optional<CudaBytes> wide_;  // of Widen(): kernels use it in their order
  size_t ahead_pitch_ = 0;
  int64_t copied_ = 0;
};

}  // namespace prehoc::cuda
