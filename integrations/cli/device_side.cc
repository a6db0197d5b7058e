#include "integrations/cli/device_side.h"

#include <utility>

#ifdef PREHOC_CUDA
#include "base/cuda/device.h"
#include "base/cuda/device_memory.h"
#include "base/cuda/host_registrar.h"
#include "integrations/reference/cuda/cuda_decoder.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/kernel_table.h"
#include "transfer/cuda_transfer_engine.h"
#endif

namespace prehoc::cli {

DeviceSide CpuSide(uint64_t device_budget, const KernelTable* kernels) {
  DeviceSide side;
  side.memory = std::make_unique<HostDeviceMemory>(device_budget);
  side.kernels = kernels;
  return side;
}

#ifdef PREHOC_CUDA
Result<DeviceSide> CudaSide(uint64_t device_budget, PromptPrecision prompt_precision) {
  PREHOC_RETURN_IF_ERROR(CurrentCudaDevice().status());
  DeviceSide side;
  side.registrar = std::make_unique<CudaHostRegistrar>();
  auto memory = std::make_unique<CudaDeviceMemory>(device_budget);
  PREHOC_ASSIGN_OR_RETURN(auto made, cuda::DeviceKernels::Create(memory.get(), {.prompt_precision = prompt_precision}));
  side.memory = std::move(memory);
  const std::shared_ptr<const cuda::DeviceKernels> kernels = std::move(made);
  side.kernels_state = kernels;
  side.kernels = &cuda::DeviceKernels::Table();
  side.stream = kernels->launch_stream();
  side.step_kernels = &cuda::DeviceStepKernels();
  PREHOC_ASSIGN_OR_RETURN(const CudaTransferEngine::Calibration calibration, CudaTransferEngine::Calibrate(SteadyClock::Get()));
  PREHOC_ASSIGN_OR_RETURN(side.transfer, CudaTransferEngine::Create(calibration.options));
  side.make_decoder = reference::MakeCudaDecoder;
  side.visit_counters = [kernels](const CounterVisitor& visit) { kernels->VisitCounters(visit); };
  return side;
}
#else
Result<DeviceSide> CudaSide(uint64_t, PromptPrecision) {
  return {StatusCode::kUnsupported, "this build has no CUDA; use --device cpu, or a build with -DPREHOC_ENABLE_CUDA=ON"};
}
#endif

}  // namespace prehoc::cli
