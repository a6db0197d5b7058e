#include <array>
#include <atomic>

#include "kernels/cuda/launch.h"

namespace prehoc::cuda {

Result<DeviceLimits> CurrentLimits() {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int64_t>, kDevices> known{};  // multiprocessors << 32 | shared bytes
  int device = 0;
  PREHOC_CUDA_TRY(cudaGetDevice(&device));
  std::atomic<int64_t>* const slot = device < kDevices ? &known[static_cast<size_t>(device)] : nullptr;
  const int64_t packed = slot != nullptr ? slot->load(std::memory_order_relaxed) : 0;
  if (packed != 0) return DeviceLimits{static_cast<int>(packed >> 32), static_cast<int>(packed & 0xffffffff)};
  DeviceLimits limits;
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&limits.block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (slot != nullptr) slot->store(int64_t{limits.multiprocessors} << 32 | limits.block_shared_bytes, std::memory_order_relaxed);
  return limits;
}

}  // namespace prehoc::cuda
