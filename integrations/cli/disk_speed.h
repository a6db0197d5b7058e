// How fast a directory's disk writes and reads, past the page cache.
#pragma once
#include <cstdint>
#include <string>

#include "base/clock.h"
#include "base/executor.h"
#include "base/result.h"

namespace prehoc::cli {

struct DiskSpeed {
  bool direct = false;        // O_DIRECT; without it the figures are those of memory
  double write_rate = 0;      // [bytes/s] one writer, synced at the end
  double read_rate = 0;       // [bytes/s] all threads of the executor, 1 MiB at a time
  uint64_t free_bytes = 0;    // of the file system, before
  std::string file_system;    // "ext4", "xfs", ... or its number
};

// Writes `bytes` (a multiple of 1 MiB) of random data to a nameless file in `directory`, which exists, and reads them
// back, comparing each block. Nothing stays. kOutOfSpace if less than twice `bytes` is free, kIoError, kCorrupt if
// what came back is not what was written.
Result<DiskSpeed> MeasureDisk(const std::string& directory, uint64_t bytes, Executor& executor, const Clock& clock);

}  // namespace prehoc::cli
