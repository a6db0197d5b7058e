#include "base/cuda/stream.h"

#include "base/cuda/error.h"

namespace prehoc {

Result<CudaStream> CudaStream::Create() {
  cudaStream_t stream = nullptr;
  PREHOC_CUDA_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return CudaStream(stream);
}
CudaStream::~CudaStream() {
  if (stream_ != nullptr) CountCudaError(cudaStreamDestroy(stream_));
}
Status CudaStream::Synchronize() const {
  PREHOC_CUDA_TRY(cudaStreamSynchronize(stream_));
  return {};
}

Result<CudaEvent> CudaEvent::Create(Timing timing) {
  cudaEvent_t event = nullptr;
  PREHOC_CUDA_TRY(cudaEventCreateWithFlags(&event, timing == Timing::kOn ? cudaEventDefault : cudaEventDisableTiming));
  return CudaEvent(event);
}
CudaEvent::~CudaEvent() {
  if (event_ != nullptr) CountCudaError(cudaEventDestroy(event_));
}
Status CudaEvent::Record(cudaStream_t stream) const {
  PREHOC_CUDA_TRY(cudaEventRecord(event_, stream));
  return {};
}
Status CudaEvent::Before(cudaStream_t stream) const {
  PREHOC_CUDA_TRY(cudaStreamWaitEvent(stream, event_, 0));
  return {};
}
Status CudaEvent::Synchronize() const {
  PREHOC_CUDA_TRY(cudaEventSynchronize(event_));
  return {};
}
Result<bool> CudaEvent::Done() const {
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  PREHOC_RETURN_IF_ERROR(CudaStatus(error, PREHOC_CUDA_HERE(cudaEventQuery(event_))));
  return true;
}
Result<float> CudaEvent::MillisecondsSince(const CudaEvent& start) const {
  float milliseconds = 0;
  PREHOC_CUDA_TRY(cudaEventElapsedTime(&milliseconds, start.event_, event_));
  return milliseconds;
}

}  // namespace prehoc
