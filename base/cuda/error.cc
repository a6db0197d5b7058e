#include "base/cuda/error.h"

#include <atomic>
#include <string>

#include "base/cuda/faults.h"

namespace prehoc {
namespace {
std::atomic<int64_t> unreported{0};
std::atomic<int64_t> calls_made{0}, failing_call{0};  // see faults.h
}  // namespace

int64_t FailNthCudaCall(int64_t n) {
  failing_call = 0;
  const int64_t made = calls_made.exchange(0);
  failing_call = n;
  return made;
}

Status CudaStatus(cudaError_t error, const char* what) {
#ifdef PREHOC_TEST_POINTS
  if (calls_made.fetch_add(1) + 1 == failing_call.load()) error = cudaErrorLaunchFailure;
#endif
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
