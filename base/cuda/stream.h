// Streams and events as values. Each belongs to the device that was current when it was made.
#pragma once
#include <cuda_runtime_api.h>

#include <utility>

#include "base/result.h"

namespace prehoc {

// Owns a non-blocking stream. Moves, does not copy, empty once moved from. Its work may still run when it dies.
class [[nodiscard]] CudaStream {
 public:
  static Result<CudaStream> Create();
  CudaStream(CudaStream&& other) noexcept : stream_(std::exchange(other.stream_, nullptr)) {}
  CudaStream& operator=(CudaStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  ~CudaStream();

  cudaStream_t get() const { return stream_; }
  // Waits until all enqueued work is done. Returns kCuda with an error of that work, too.
  Status Synchronize() const;

 private:
  explicit CudaStream(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream_ = nullptr;
};

// Owns an event.
class [[nodiscard]] CudaEvent {
 public:
  enum class Timing { kOff, kOn };
  static Result<CudaEvent> Create(Timing timing = Timing::kOff);
  CudaEvent(CudaEvent&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  CudaEvent& operator=(CudaEvent&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~CudaEvent();

  cudaEvent_t get() const { return event_; }
  Status Record(cudaStream_t stream) const;
  // Work enqueued on `stream` from now on starts after this event.
  Status Before(cudaStream_t stream) const;
  Status Synchronize() const;
  // Whether the work before the event is done. Never waits.
  Result<bool> Done() const;
  // Milliseconds from `start` to this; both recorded with timing, and done.
  Result<float> MillisecondsSince(const CudaEvent& start) const;

 private:
  explicit CudaEvent(cudaEvent_t event) : event_(event) {}
  cudaEvent_t event_ = nullptr;
};

}  // namespace prehoc
