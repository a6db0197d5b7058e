#include "base/cuda/graph.h"

namespace prehoc {

Result<CudaGraph> CudaGraph::Instantiate(cudaGraph_t graph) {
  cudaGraphExec_t run = nullptr;
  const Status made = CudaStatus(cudaGraphInstantiate(&run, graph, 0), PREHOC_CUDA_HERE(cudaGraphInstantiate));
  CountCudaError(cudaGraphDestroy(graph));
  PREHOC_RETURN_IF_ERROR(made);
  return CudaGraph(run);
}

CudaGraph::~CudaGraph() {
  if (run_ != nullptr) CountCudaError(cudaGraphExecDestroy(run_));
}

Status CudaGraph::Launch(const CudaStream& stream) const {
  PREHOC_CUDA_TRY(cudaGraphLaunch(run_, stream.get()));
  return {};
}

}  // namespace prehoc
