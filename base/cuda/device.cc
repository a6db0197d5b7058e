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
  CudaDevice found;
  static_cast<void>(cudaDriverGetVersion(&found.driver_version));
  static_cast<void>(cudaRuntimeGetVersion(&found.runtime_version));
  if (found.driver_version == 0) return {StatusCode::kNotFound, "no CUDA driver; install the NVIDIA driver"};
  if (found.driver_version / 1000 < found.runtime_version / 1000) {
    return {StatusCode::kUnsupported, "the driver supports CUDA " + std::to_string(found.driver_version / 1000) +
                                          ", this program needs " + std::to_string(found.runtime_version / 1000) +
                                          "; update the NVIDIA driver"};
  }
  if (CudaDeviceCount() == 0) return {StatusCode::kNotFound, "no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"};
  cudaDeviceProp properties{};
  PREHOC_CUDA_TRY(cudaGetDevice(&found.ordinal));
  PREHOC_CUDA_TRY(cudaGetDeviceProperties(&properties, found.ordinal));
  found.name = properties.name;
  found.major = properties.major;
  found.minor = properties.minor;
  found.multiprocessors = properties.multiProcessorCount;
  found.memory_bytes = properties.totalGlobalMem;
  found.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
  found.block_shared_bytes = properties.sharedMemPerBlockOptin;
  if (found.major < 8) {
    return {StatusCode::kUnsupported, found.name + " has compute capability " + std::to_string(found.major) + "." +
                                          std::to_string(found.minor) + "; 8.0 or newer is needed"};
  }
  return found;
}

}  // namespace prehoc
