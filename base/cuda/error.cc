#include "base/cuda/error.h"

#include <atomic>
#include <string>

namespace prehoc {
namespace {
std::atomic<int64_t> unreported{0};
}

Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  static_cast<void>(cudaGetLastError());
  const StatusCode code = error == cudaErrorMemoryAllocation ? StatusCode::kOutOfSpace : StatusCode::kCuda;
  return {code, std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error)};
}

void CountCudaError(cudaError_t error) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  unreported.fetch_add(1, std::memory_order_relaxed);
}

int64_t UnreportedCudaErrors() { return unreported.load(std::memory_order_relaxed); }

}  // namespace prehoc
