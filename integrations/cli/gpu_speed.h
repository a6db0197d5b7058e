// How fast a GPU is reached through the transfer engine, and how fast memory is pinned.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "base/result.h"
#include "transfer/transfer_speed.h"

namespace prehoc::cli {

struct GpuSpeed {
  std::string name;
  int major = 0, minor = 0;        // compute capability
  int driver_version = 0;          // 13000 = 13.0, as the driver supports
  uint64_t memory_bytes = 0, free_bytes = 0;
  double pin_rate = 0;             // [bytes/s] host memory mapped, touched and pinned
  double to_device_rate = 0, to_host_rate = 0;  // [bytes/s] pieces of 1 MiB by the copy engine
  std::vector<PieceRate> pieces;   // to the device, by piece size: the copy engine and the gather kernel
  uint64_t copy_engine_bytes = 0;  // from which on the transfer engine takes the first
  double row_rate = 0, rows_per_second = 0;     // [bytes/s] rows of 512 bytes all over the pinned memory, through the transfer engine
};

// Whether --device cuda has a GPU to run on.
bool GpuIsThere();

// With `bytes` (a multiple of 1 MiB) of host memory, and as much on the first GPU. kUnsupported in a build without CUDA; kNotFound without a
// device; kUnsupported if it or its driver is too old; kCuda or kOutOfSpace.
Result<GpuSpeed> MeasureGpu(uint64_t bytes, Executor& executor, const Clock& clock);

}  // namespace prehoc::cli
