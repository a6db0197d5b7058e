// The seam through which host memory is made readable by a device where it lies.
#pragma once
#include <cstddef>

#include "base/status.h"

namespace prehoc {

// Pins ranges of host memory for a device. Safe from any thread. Outlives what it registered.
class HostRegistrar {
 public:
  virtual ~HostRegistrar() = default;
  // [data, data + size): touched memory, page-aligned, disjoint from what is registered. From then on kernels read and write it at the
  // same address. Returns kOutOfSpace or kCuda (the system refuses to pin so much), with nothing registered.
  virtual Status Register(std::byte* data, size_t size) = 0;
  // `data` as given to Register(); no work of the device that touches the range is under way.
  virtual void Unregister(std::byte* data) = 0;
};

}  // namespace prehoc
