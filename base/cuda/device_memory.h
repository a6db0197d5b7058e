// The memory of a GPU behind the seam of device_memory.h.
#pragma once
#include "base/device_memory.h"

namespace prehoc {

// Of the device that is current when Allocate() is called. Allocate() waits for the zeroing; Free waits for the device.
class CudaDeviceMemory final : public DeviceMemory {
 public:
  using DeviceMemory::DeviceMemory;

 private:
  Result<std::byte*> DoAllocate(size_t size) override;
  void DoFree(std::byte* data, size_t size) override;
};

}  // namespace prehoc
