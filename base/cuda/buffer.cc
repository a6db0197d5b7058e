#include "base/cuda/buffer.h"

#include <algorithm>
#include <string>

#include "base/cuda/error.h"

namespace prehoc {

Result<CudaBytes> CudaBytes::Create(CudaPlace place, size_t size) {
  void* data = nullptr;
  const size_t bytes = std::max<size_t>(size, 1);
  const Status status = place == CudaPlace::kDevice
                            ? CudaStatus(cudaMalloc(&data, bytes), PREHOC_CUDA_HERE(cudaMalloc))
                            : CudaStatus(cudaHostAlloc(&data, bytes, cudaHostAllocDefault), PREHOC_CUDA_HERE(cudaHostAlloc));
  if (!status.ok()) return status.WithContext(std::to_string(size) + " bytes");
  return CudaBytes(place, static_cast<std::byte*>(data), size);
}

CudaBytes::~CudaBytes() {
  if (data_ == nullptr) return;
  CountCudaError(place_ == CudaPlace::kDevice ? cudaFree(data_) : cudaFreeHost(data_));
}

}  // namespace prehoc
