// Every kernel in loops that anyone can believe: fp64 throughout, fp16 rows and codes as they are stored. The truth that the
// vector and CUDA backends are held against, and what runs on a CPU without AVX2. Internal to kernels/.
#pragma once
#include "kernels/function_table.h"

namespace prehoc::reference {

size_t CodeBlockBytes(const CodeFormat& format, int32_t head_dim);
Status Append(const AppendParams& params, const Launch& launch);
Status Encode(const EncodeParams& params, const Launch& launch);
Status Gate(const GateParams& params, const Launch& launch);
Status Scan(const ScanParams& params, const Launch& launch);
Status Score(const ScoreParams& params, const Launch& launch);
Status ScorePages(const ScorePagesParams& params, const Launch& launch);
Status Choose(const ChooseParams& params, const Launch& launch);
Status TopK(const TopKParams& params, const Launch& launch);
Status Gather(const GatherParams& params, const Launch& launch);
Status Attend(const AttendParams& params, const Launch& launch);
Status Prefill(const PrefillParams& params, const Launch& launch);

}  // namespace prehoc::reference
