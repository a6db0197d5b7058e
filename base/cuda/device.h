// What the current device is and has.
#pragma once
#include <cstdint>
#include <string>

#include "base/result.h"

namespace prehoc {

struct CudaDevice {
  int ordinal = 0;
  std::string name;
  int major = 0, minor = 0;        // compute capability
  int multiprocessors = 0;
  size_t memory_bytes = 0;
  size_t l2_bytes = 0;
  size_t block_shared_bytes = 0;   // the most that one block may ask for
  int driver_version = 0;          // 13000 = 13.0, as the driver supports
  int runtime_version = 0;         // as this program was built
};

// Devices that this process sees: 0 without a driver or a device, and no error then.
int CudaDeviceCount();
// kNotFound without a device, naming what is missing; kUnsupported below compute capability 8.0 or with a driver older than the
// runtime that this program was built with; kCuda if a query fails.
Result<CudaDevice> CurrentCudaDevice();

}  // namespace prehoc
