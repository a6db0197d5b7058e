#include "base/cuda/host_registrar.h"

#include "base/cuda/error.h"
#include "base/units.h"

namespace prehoc {

Status CudaHostRegistrar::Register(std::byte* data, size_t size) {
  const Status status = CudaStatus(cudaHostRegister(data, size, cudaHostRegisterPortable | cudaHostRegisterMapped),
                                   PREHOC_CUDA_HERE(cudaHostRegister));
  if (!status.ok()) {
    return status.WithContext("pinning " + FormatBytes(static_cast<double>(size)) +
                              " of host memory (lower the host budget, or raise the limit of locked memory)");
  }
  void* seen = nullptr;
  const Status mapped = CudaStatus(cudaHostGetDevicePointer(&seen, data, 0), PREHOC_CUDA_HERE(cudaHostGetDevicePointer));
  if (mapped.ok() && seen == data) return {};
  Unregister(data);
  if (!mapped.ok()) return mapped;
  return {StatusCode::kUnsupported, "this device sees pinned host memory at another address than the host does"};
}

void CudaHostRegistrar::Unregister(std::byte* data) { CountCudaError(cudaHostUnregister(data)); }

}  // namespace prehoc
