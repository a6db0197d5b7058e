// The memory seam of the device tier: allocations under one hard byte budget.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>

#include "base/mutex.h"
#include "base/result.h"

namespace prehoc {

class DeviceMemory;

// Owns one allocation; gives it back when it dies. Moves, does not copy, empty once moved from.
class [[nodiscard]] DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer() { Reset(); }

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  template <class T>
  T* as() const { return reinterpret_cast<T*>(data_); }
  void Reset();

 private:
  friend class DeviceMemory;
  DeviceBuffer(DeviceMemory* memory, std::byte* data, size_t size)
      : memory_(memory), data_(data), size_(size) {}
  DeviceMemory* memory_ = nullptr;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out memory of the device until `budget` is reached; never a byte more. Safe from any thread.
// Outlives its buffers.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t budget) : budget_(budget) {}
  virtual ~DeviceMemory() = default;

  // At least `size` bytes, aligned to 256, zeroed. Returns kOutOfSpace (budget, naming `tag`, or device).
  Result<DeviceBuffer> Allocate(size_t size, std::string_view tag);

  size_t budget() const { return budget_; }
  size_t used() const;
  size_t peak() const;  // the largest used() ever seen: proves the budget was kept

  // Whether host code may read and write the memory where it lies. If not, only kernels, Read() and Write() touch it.
  virtual bool host_accessible() const { return true; }
  // Copies `size` bytes at `from`, of a buffer of this, to host memory `to`, and waits. The work that wrote them is finished
  // (a kernel whose results were waited for). Returns kCuda if the device failed.
  virtual Status Read(const void* from, size_t size, void* to) const;
  // The other way: `size` bytes of host memory at `from` are at `to`, in a buffer of this, when it returns. No work that is enqueued touches them.
  virtual Status Write(const void* from, size_t size, void* to) const;

 private:
  friend class DeviceBuffer;
  virtual Result<std::byte*> DoAllocate(size_t size) = 0;
  virtual void DoFree(std::byte* data, size_t size) = 0;
  void Free(std::byte* data, size_t size);

  const size_t budget_;
  mutable Mutex mutex_;
  size_t used_ PREHOC_GUARDED_BY(mutex_) = 0;
  size_t peak_ PREHOC_GUARDED_BY(mutex_) = 0;
};

// Host memory in the place of a GPU's: the CPU build's device tier.
class HostDeviceMemory final : public DeviceMemory {
 public:
  using DeviceMemory::DeviceMemory;

 private:
  Result<std::byte*> DoAllocate(size_t size) override;
  void DoFree(std::byte* data, size_t size) override;
};

}  // namespace prehoc
