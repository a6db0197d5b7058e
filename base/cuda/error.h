// CUDA errors as a Status that names the call.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/status.h"

namespace prehoc {

// OK, or kCuda with `what` (the call), the name of the error and its sentence; a lack of memory is kOutOfSpace. Clears the
// thread's last error, so that the next check does not blame the wrong line.
Status CudaStatus(cudaError_t error, const char* what);

// For destructors, which have nobody to tell: counts and clears an error. The count is that of the process.
void CountCudaError(cudaError_t error);
int64_t UnreportedCudaErrors();

#define PREHOC_CUDA_STRINGIZE_INNER(x) #x
#define PREHOC_CUDA_STRINGIZE(x) PREHOC_CUDA_STRINGIZE_INNER(x)
#define PREHOC_CUDA_HERE(call) __FILE__ ":" PREHOC_CUDA_STRINGIZE(__LINE__) " " #call
#define PREHOC_CUDA_TRY(call) PREHOC_RETURN_IF_ERROR(::prehoc::CudaStatus((call), PREHOC_CUDA_HERE(call)))

}  // namespace prehoc
