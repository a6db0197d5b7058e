// A DeviceMemory that runs out at the n-th allocation, over any implementation.
#pragma once
#include <map>

#include "base/device_memory.h"
#include "base/mutex.h"

namespace prehoc {

// Without faults it only forwards: same budget, same bytes. Safe from any thread. Its buffers die before it.
class FaultyDeviceMemory final : public DeviceMemory {
 public:
  explicit FaultyDeviceMemory(DeviceMemory* base) : DeviceMemory(base->budget()), base_(base) {}

  // The n-th allocation from now on, and `more` after it, find no memory on the device, whatever the budget says.
  void RunOutAt(int nth, int more = 0) {
    MutexLock lock(fault_mutex_);
    fail_from_ = allocations_ + nth;
    fail_to_ = fail_from_ + more;
  }
  // The next `num` reads and writes by the host fail.
  void FailCopies(int num) {
    MutexLock lock(fault_mutex_);
    failing_copies_ = num;
  }
  Status Read(const void* from, size_t size, void* to) const override {
    PREHOC_RETURN_IF_ERROR(Copy());
    return base_->Read(from, size, to);
  }
  Status Write(const void* from, size_t size, void* to) const override {
    PREHOC_RETURN_IF_ERROR(Copy());
    return base_->Write(from, size, to);
  }
  bool host_accessible() const override { return base_->host_accessible(); }
  // Allocations that were within the budget.
  int allocations() const {
    MutexLock lock(fault_mutex_);
    return allocations_;
  }

 private:
  Result<std::byte*> DoAllocate(size_t size) override {
    {
      MutexLock lock(fault_mutex_);
      ++allocations_;
      if (allocations_ >= fail_from_ && allocations_ <= fail_to_) {
        return {StatusCode::kOutOfSpace, "the device ran out of memory on request"};
      }
    }
    PREHOC_ASSIGN_OR_RETURN(DeviceBuffer buffer, base_->Allocate(size, "below the fault decorator"));
    std::byte* const data = buffer.data();
    MutexLock lock(fault_mutex_);
    buffers_.emplace(data, std::move(buffer));
    return data;
  }
  void DoFree(std::byte* data, size_t) override {
    DeviceBuffer freed;
    MutexLock lock(fault_mutex_);
    const auto found = buffers_.find(data);
    freed = std::move(found->second);
    buffers_.erase(found);
  }

  Status Copy() const {
    MutexLock lock(fault_mutex_);
    if (failing_copies_ == 0) return {};
    --failing_copies_;
    return {StatusCode::kCuda, "a copy failed on request"};
  }

  DeviceMemory* const base_;
  mutable Mutex fault_mutex_;
  int allocations_ PREHOC_GUARDED_BY(fault_mutex_) = 0;
  int fail_from_ PREHOC_GUARDED_BY(fault_mutex_) = 0;
  int fail_to_ PREHOC_GUARDED_BY(fault_mutex_) = -1;
  mutable int failing_copies_ PREHOC_GUARDED_BY(fault_mutex_) = 0;
  std::map<std::byte*, DeviceBuffer> buffers_ PREHOC_GUARDED_BY(fault_mutex_);
};

}  // namespace prehoc
