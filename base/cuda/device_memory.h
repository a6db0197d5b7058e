// The memory of a GPU behind the seam of device_memory.h.
#pragma once
#include <vector>

#include "base/device_memory.h"

namespace prehoc {

// Of the device that is current when Allocate() is called. Allocate() waits for the zeroing; Free waits for the device.
class CudaDeviceMemory final : public DeviceMemory {
 public:
  using DeviceMemory::DeviceMemory;
  bool host_accessible() const override { return false; }
  Status Read(const void* from, size_t size, void* to) const override;
  Status Write(const void* from, size_t size, void* to) const override;
  struct Range {
    const std::byte* begin = nullptr;
    size_t size = 0;
    bool Has(const void* at) const {
      const auto* const byte = static_cast<const std::byte*>(at);
      return byte >= begin && byte < begin + size;
    }
  };
  // The buffer of this in which `at` lies; empty if there is none.
  Range RangeOf(const void* at) const;
  bool Owns(const void* at) const { return RangeOf(at).size > 0; }

 private:
  Result<std::byte*> DoAllocate(size_t size) override;
  void DoFree(std::byte* data, size_t size) override;
  mutable Mutex ranges_mutex_;
  std::vector<Range> ranges_ PREHOC_GUARDED_BY(ranges_mutex_);  // few: a sequence is one
};

}  // namespace prehoc
