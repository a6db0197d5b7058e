// The entries of kernels/step_kernels.h on a CUDA device, and scan alone. Every entry: enqueues on `stream` and returns at once; allocates nothing; can
// be captured in a CUDA graph; leaves nothing enqueued when it returns an error. Returns kInvalid or kUnsupported, naming field and value, for
// shapes that it does not take; kCuda if the launch fails. head_dim is 64, 96, 128 or 256; any group from 1 to 256. Rows are fp16 or bf16: K[head_dim],
// then V[head_dim].
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "base/half.h"
#include "base/result.h"
#include "kernels/function_table.h"
#include "kernels/step_kernels.h"

namespace prehoc::cuda {

using step::RowType;
using step::HostRows;
using step::AppendTask;
using step::AppendParams;
using step::GateTask;
using step::GateParams;
using step::ScanSource;
using step::ChooseRule;
using step::ChooseTask;
using step::SelectTask;
using step::ChooseParams;
using step::SelectBy;
using step::SelectParams;
using step::AttendTask;
using step::AttendParams;
using step::ResidencyState;
using step::ResolveTask;
using step::ResolveParams;
using step::RefreshTask;
using step::RefreshParams;
using step::SpareSlots;
using step::AdoptTask;
using step::AdoptParams;
using step::GatherTask;
using step::GatherParams;

const step::StepKernels& DeviceStepKernels();  // streams are cudaStream_t

Status Append(const AppendParams& params, cudaStream_t stream);
Status Gate(const GateParams& params, cudaStream_t stream);
Status CheckGate(const GateParams& params);  // as Gate() does

// Logits alone.
struct ScanTask {
  ScanSource source;
  float* z = nullptr;    // [group] rows, `z_stride` floats apart, a multiple of 4
  float* err = nullptr;  // as z, or null; the arithmetic adds 2^-7 of SUM |q_c| step_c and 2^-14 of SUM |q_c| (|lo_c| + levels step_c)
  int64_t z_stride = 0;
};
struct ScanParams {
  const ScanTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t max_n = 0;
  CodeFormat format;  // bits 2, 4 or 8
  RowType type = RowType::kF16;
  int32_t group = 0, head_dim = 0;
};
// A length outside [0, max_n] writes nothing but z[0] = NaN in every head.
Status Scan(const ScanParams& params, cudaStream_t stream);

// Of the current device; kCuda without one.
Result<size_t> ChooseWorkspaceBytes(const ChooseParams& params);
Result<size_t> SelectWorkspaceBytes(const SelectParams& params);
// The blocks of one task wait for each other inside the launch (a cooperative one).
Status Choose(const ChooseParams& params, cudaStream_t stream);
Status Select(const SelectParams& params, cudaStream_t stream);

Result<size_t> AttendWorkspaceBytes(const AttendParams& params);
Status Attend(const AttendParams& params, cudaStream_t stream);

Status Resolve(const ResolveParams& params, cudaStream_t stream);
Status Refresh(const RefreshParams& params, cudaStream_t stream);
Status Land(const RefreshParams& params, cudaStream_t stream);
Status Adopt(const AdoptParams& params, cudaStream_t stream);
Status Gather(const GatherParams& params, cudaStream_t stream);

}  // namespace prehoc::cuda
