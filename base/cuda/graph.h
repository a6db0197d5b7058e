// A CUDA graph as a value: work that was captured once and is launched as a whole.
#pragma once
#include <cuda_runtime_api.h>

#include <utility>

#include "base/cuda/error.h"
#include "base/cuda/stream.h"
#include "base/result.h"

namespace prehoc {

// Owns an executable graph. Moves, does not copy, empty once moved from. It may still run when it dies.
class [[nodiscard]] CudaGraph {
 public:
  // What `enqueue` (a Status()) puts on `stream`, and on streams that wait for it and that it waits for. Nothing runs yet. Returns its error, or
  // kCuda; the stream is as before then.
  template <class Fn>
  static Result<CudaGraph> Capture(const CudaStream& stream, Fn&& enqueue) {
    Status enqueued = CudaStatus(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), PREHOC_CUDA_HERE(cudaStreamBeginCapture));
    if (enqueued.ok()) enqueued = enqueue();
    cudaGraph_t graph = nullptr;
    const Status ended = CudaStatus(cudaStreamEndCapture(stream.get(), &graph), PREHOC_CUDA_HERE(cudaStreamEndCapture));
    if (!enqueued.ok() || !ended.ok()) {
      if (graph != nullptr) CountCudaError(cudaGraphDestroy(graph));
      return enqueued.ok() ? ended : enqueued;
    }
    return Instantiate(graph);
  }
  CudaGraph(CudaGraph&& other) noexcept : run_(std::exchange(other.run_, nullptr)) {}
  CudaGraph& operator=(CudaGraph&& other) noexcept {
    std::swap(run_, other.run_);
    return *this;
  }
  ~CudaGraph();

  Status Launch(const CudaStream& stream) const;

 private:
  explicit CudaGraph(cudaGraphExec_t run) : run_(run) {}
  static Result<CudaGraph> Instantiate(cudaGraph_t graph);  // takes it
  cudaGraphExec_t run_ = nullptr;
};

}  // namespace prehoc
