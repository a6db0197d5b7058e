#include "base/cuda/device.h"

#include "base/cuda/error.h"

namespace prehoc {

int CudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  static_cast<void>(cudaGetLastError());
  return 0;
}

Result<CudaDevice> CurrentCudaDevice() {
  CudaDevice device;
  static_cast<void>(cudaDriverGetVersion(&device.driver_version));
  static_cast<void>(cudaRuntimeGetVersion(&device.runtime_version));
  if (device.driver_version == 0) return {StatusCode::kNotFound, "no CUDA driver; install the NVIDIA driver"};
  if (device.driver_version / 1000 < device.runtime_version / 1000) {
    return {StatusCode::kUnsupported, "the driver supports CUDA " + std::to_string(device.driver_version / 1000) +
                                          ", this program needs " + std::to_string(device.runtime_version / 1000) +
                                          "; update the NVIDIA driver"};
  }
  if (CudaDeviceCount() == 0) return {StatusCode::kNotFound, "no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"};
  cudaDeviceProp properties{};
  PREHOC_CUDA_TRY(cudaGetDevice(&device.ordinal));
  PREHOC_CUDA_TRY(cudaGetDeviceProperties(&properties, device.ordinal));
  device.name = properties.name;
  device.major = properties.major;
  device.minor = properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.memory_bytes = properties.totalGlobalMem;
  device.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  device.block_shared_bytes = properties.sharedMemPerBlockOptin;
  if (device.major < 8) {
    return {StatusCode::kUnsupported, device.name + " has compute capability " + std::to_string(device.major) + "." +
                                          std::to_string(device.minor) + "; 8.0 or newer is needed"};
  }
  return device;
}

}  // namespace prehoc
