// The table entries of the vector backends over one set of inner loops: check, split, run, merge.
// Work is split by the shapes of a call alone, never by the number of threads: results repeat bit for bit on any executor.
#pragma once
#include "kernels/cpu/vector_ops.h"
#include "kernels/function_table.h"

namespace prehoc::cpu {

Status Append(const VectorOps& ops, const AppendParams& params, const Launch& launch);
Status Encode(const VectorOps& ops, const EncodeParams& params, const Launch& launch);
Status Gate(const VectorOps& ops, const GateParams& params, const Launch& launch);
Status Scan(const VectorOps& ops, const ScanParams& params, const Launch& launch);
Status Score(const VectorOps& ops, const ScoreParams& params, const Launch& launch);
Status ScorePages(const VectorOps& ops, const ScorePagesParams& params, const Launch& launch);
Status Choose(const VectorOps& ops, const ChooseParams& params, const Launch& launch);
Status TopK(const VectorOps& ops, const TopKParams& params, const Launch& launch);
Status Gather(const VectorOps& ops, const GatherParams& params, const Launch& launch);
Status Attend(const VectorOps& ops, const AttendParams& params, const Launch& launch);
Status Prefill(const VectorOps& ops, const PrefillParams& params, const Launch& launch);

}  // namespace prehoc::cpu
