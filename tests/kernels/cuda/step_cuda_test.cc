// The device's step kernels, by the stories that every backend must pass.
#include "tests/kernels/cuda/cuda_kernel_test.h"
#include "tests/kernels/step_stories.h"

namespace prehoc {
namespace {

struct CudaWorld {
  template <class T>
  using Array = CudaArray<T>;
  static constexpr CudaPlace kHostMemory = CudaPlace::kPinned;
  static constexpr int32_t kMostTasks = 1000;
  const step::StepKernels& kernels() const { return cuda::DeviceStepKernels(); }
  void* stream() const { return cuda_stream; }
  void Run(const Status& status) const {
    ASSERT_OK(status);
    ASSERT_OK(CudaStatus(cudaStreamSynchronize(cuda_stream), "run"));
  }
  cudaStream_t cuda_stream;
};

class CudaStepTest : public CudaKernelTest {
 protected:
  CudaWorld world() const { return {stream()}; }
};
PREHOC_STEP_STORIES(CudaStepTest)

}  // namespace
}  // namespace prehoc
