#include "base/cuda/device_memory.h"

#include <algorithm>

#include "base/cuda/error.h"

namespace prehoc {

Result<std::byte*> CudaDeviceMemory::DoAllocate(size_t size) {
  void* data = nullptr;
  PREHOC_CUDA_TRY(cudaMalloc(&data, size));
  Status status = CudaStatus(cudaMemset(data, 0, size), PREHOC_CUDA_HERE(cudaMemset));
  // The zeroing runs on the default stream; other streams of ours do not wait for that one.
  if (status.ok()) status = CudaStatus(cudaStreamSynchronize(cudaStreamLegacy), PREHOC_CUDA_HERE(cudaStreamSynchronize));
  if (status.ok()) {
    MutexLock lock(ranges_mutex_);
    ranges_.push_back({static_cast<const std::byte*>(data), size});
    return static_cast<std::byte*>(data);
  }
  CountCudaError(cudaFree(data));
  return status;
}

void CudaDeviceMemory::DoFree(std::byte* data, size_t) {
  {
    MutexLock lock(ranges_mutex_);
    std::erase_if(ranges_, [&](const Range& range) { return range.begin == data; });
  }
  CountCudaError(cudaFree(data));
}

Status CudaDeviceMemory::Read(const void* from, size_t size, void* to) const {
  PREHOC_CUDA_TRY(cudaMemcpy(to, from, size, cudaMemcpyDeviceToHost));
  return {};
}

Status CudaDeviceMemory::Write(const void* from, size_t size, void* to) const {
  PREHOC_CUDA_TRY(cudaMemcpy(to, from, size, cudaMemcpyHostToDevice));
  // From pageable memory the call may return before the bytes are there, and streams of ours do not wait for the default one.
  PREHOC_CUDA_TRY(cudaStreamSynchronize(cudaStreamLegacy));
  return {};
}

CudaDeviceMemory::Range CudaDeviceMemory::RangeOf(const void* at) const {
  MutexLock lock(ranges_mutex_);
  const auto found = std::find_if(ranges_.begin(), ranges_.end(), [&](const Range& range) { return range.Has(at); });
  return found != ranges_.end() ? *found : Range{};
}

}  // namespace prehoc
