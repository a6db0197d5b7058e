#include "base/cuda/device_memory.h"

#include "base/cuda/error.h"

namespace prehoc {

Result<std::byte*> CudaDeviceMemory::DoAllocate(size_t size) {
  void* data = nullptr;
  PREHOC_CUDA_TRY(cudaMalloc(&data, size));
  Status status = CudaStatus(cudaMemset(data, 0, size), PREHOC_CUDA_HERE(cudaMemset));
  // The zeroing runs on the default stream; other streams of ours do not wait for that one.
  if (status.ok()) status = CudaStatus(cudaStreamSynchronize(cudaStreamLegacy), PREHOC_CUDA_HERE(cudaStreamSynchronize));
  if (status.ok()) return static_cast<std::byte*>(data);
  CountCudaError(cudaFree(data));
  return status;
}

void CudaDeviceMemory::DoFree(std::byte* data, size_t) { CountCudaError(cudaFree(data)); }

}  // namespace prehoc
