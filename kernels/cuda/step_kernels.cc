// The step kernels' entries: streams are cudaStream_t there, and void* to who knows no CUDA.
#include "kernels/cuda/device_kernels.h"

namespace prehoc::cuda {
namespace {
template <class Params, Status (*kEntry)(const Params&, cudaStream_t)>
Status On(const Params& params, void* stream) {
  return kEntry(params, static_cast<cudaStream_t>(stream));
}
}  // namespace

const step::StepKernels& DeviceStepKernels() {
  static constexpr step::StepKernels kTable{.name = "cuda",
                                            .append = On<AppendParams, Append>,
                                            .gate = On<GateParams, Gate>,
                                            .select = On<SelectParams, Select>,
                                            .resolve = On<ResolveParams, Resolve>,
                                            .attend = On<AttendParams, Attend>,
                                            .choose = On<ChooseParams, Choose>,
                                            .refresh = On<RefreshParams, Refresh>,
                                            .land = On<RefreshParams, Land>,
                                            .adopt = On<AdoptParams, Adopt>,
                                            .gather = On<GatherParams, Gather>,
                                            .select_workspace = SelectWorkspaceBytes,
                                            .choose_workspace = ChooseWorkspaceBytes,
                                            .attend_workspace = AttendWorkspaceBytes};
  return kTable;
}

}  // namespace prehoc::cuda
