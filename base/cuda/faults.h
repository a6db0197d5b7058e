// The seam of injected faults: every call of ours into CUDA whose failure matters passes its result through CudaStatus() of error.h.
#pragma once
#include <cstdint>

namespace prehoc {

// Only in builds with test points: the n-th result from now on (1 = the next) is reported as cudaErrorLaunchFailure, whatever the call did;
// 0 = none. Returns how many were reported since this was last called. Process-wide: for one test at a time.
int64_t FailNthCudaCall(int64_t n);

}  // namespace prehoc
