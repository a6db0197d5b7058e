#include "integrations/cli/gpu_speed.h"

#include <cstring>
#include <vector>

#include "base/rng.h"
#include "base/units.h"

#ifdef PREHOC_CUDA
#include <cuda_runtime_api.h>

#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/host_registrar.h"
#include "transfer/cuda_transfer_engine.h"
#include "transfer/host_arena.h"
#endif

namespace prehoc::cli {

#ifdef PREHOC_CUDA
namespace {
constexpr size_t kChunkBytes = kMiB, kRowBytes = 512;

}  // namespace

bool GpuIsThere() { return CurrentCudaDevice().ok(); }

Result<GpuSpeed> MeasureGpu(uint64_t bytes, Executor& executor, const Clock& clock) {
  PREHOC_ASSIGN_OR_RETURN(const CudaDevice device, CurrentCudaDevice());
  GpuSpeed speed{.name = device.name, .major = device.major, .minor = device.minor, .driver_version = device.driver_version,
                 .memory_bytes = device.memory_bytes};
  PREHOC_ASSIGN_OR_RETURN(const CudaTransferEngine::Calibration calibration, CudaTransferEngine::Calibrate(clock));
  speed.pieces = calibration.rates;
  speed.copy_engine_bytes = calibration.options.copy_engine_bytes;
  PREHOC_ASSIGN_OR_RETURN(auto engine, CudaTransferEngine::Create(calibration.options));
  size_t free_bytes = 0, all_bytes = 0;
  PREHOC_CUDA_TRY(cudaMemGetInfo(&free_bytes, &all_bytes));
  speed.free_bytes = free_bytes;

  CudaHostRegistrar registrar;
  HostArena::Options options;
  options.block_bytes = kChunkBytes;
  options.budget = options.extent_bytes = bytes;
  options.registrar = &registrar;
  const int64_t start = clock.NowNanos();
  PREHOC_ASSIGN_OR_RETURN(const auto arena, HostArena::Create(options, &executor));
  speed.pin_rate = static_cast<double>(bytes) / clock.SecondsSince(start);

  PREHOC_ASSIGN_OR_RETURN(const CudaBytes memory, CudaBytes::Create(CudaPlace::kDevice, bytes));
  std::vector<TransferPiece> up, down, rows;
  Rng rng(1);
  const size_t chunks = bytes / kChunkBytes;
  for (size_t i = 0; i < chunks; ++i) {
    PREHOC_ASSIGN_OR_RETURN(const BlockId block, arena->Allocate());
    std::byte* const host = arena->block(block).data();
    std::byte* const there = memory.data() + i * kChunkBytes;
    for (size_t at = 0; at < kChunkBytes; at += sizeof(uint64_t)) {
      const uint64_t word = rng.Next();
      std::memcpy(host + at, &word, sizeof(word));
    }
    up.push_back({host, there, kChunkBytes});
    down.push_back({there, host, kChunkBytes});
    for (size_t at = 0; at < kChunkBytes; at += 4 * kRowBytes) {  // every fourth row, in no order
      rows.push_back({host + at + rng.Below(4) * kRowBytes, there + at, kRowBytes});
    }
  }
  rng.Shuffle(rows);
  PREHOC_ASSIGN_OR_RETURN(speed.to_device_rate, MeasureRate(*engine, up, clock));
  PREHOC_ASSIGN_OR_RETURN(speed.to_host_rate, MeasureRate(*engine, down, clock));
  PREHOC_ASSIGN_OR_RETURN(speed.row_rate, MeasureRate(*engine, rows, clock));
  speed.rows_per_second = speed.row_rate / kRowBytes;
  return speed;
}
#else
bool GpuIsThere() { return false; }

Result<GpuSpeed> MeasureGpu(uint64_t, Executor&, const Clock&) {
  return {StatusCode::kUnsupported, "this build has no CUDA (-DPREHOC_ENABLE_CUDA=ON makes one)"};
}
#endif

}  // namespace prehoc::cli
