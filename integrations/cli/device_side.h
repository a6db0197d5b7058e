// What --device decides: where the device tier lies, which kernels run on it, and where the model's layers do.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "base/counters.h"
#include "base/device_memory.h"
#include "base/host_registrar.h"
#include "base/precision.h"
#include "base/result.h"
#include "integrations/reference/engine/token_decoder.h"
#include "kernels/function_table.h"
#include "kernels/step_kernels.h"
#include "transfer/transfer_engine.h"

namespace prehoc::cli {

struct DeviceSide {
  std::unique_ptr<HostRegistrar> registrar;     // null on the CPU
  std::unique_ptr<DeviceMemory> memory;
  std::shared_ptr<const void> kernels_state;    // keeps `stream` alive
  const KernelTable* kernels = nullptr;         // null = BestCpuKernels()
  void* stream = nullptr;
  const step::StepKernels* step_kernels = nullptr;  // null on the CPU
  std::unique_ptr<TransferEngine> transfer;     // null = on the executor
  reference::MakeDecoder make_decoder;          // empty on the CPU
  std::function<void(const CounterVisitor&)> visit_counters = [](const CounterVisitor&) {};
};

// Host memory in the place of a GPU's, and `kernels`.
DeviceSide CpuSide(uint64_t device_budget, const KernelTable* kernels);
// Of the first GPU. kUnsupported in a build without CUDA; kNotFound without a device; both say what to do.
Result<DeviceSide> CudaSide(uint64_t device_budget, PromptPrecision prompt_precision);

}  // namespace prehoc::cli
