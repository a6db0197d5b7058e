// What every CPU backend checks before it writes anything: kInvalid or kUnsupported, naming task, field and value.
// O(tasks), and O(queries) for prefill with `start`. Internal to kernels/ and its backends.
#pragma once
#include "kernels/function_table.h"

namespace prehoc {

Status Validate(const AppendParams& params);
Status Validate(const EncodeParams& params);
Status Validate(const GateParams& params);
Status Validate(const ScanParams& params);
Status Validate(const ScoreParams& params);
Status Validate(const ScorePagesParams& params);
Status Validate(const ChooseParams& params);
Status Validate(const TopKParams& params);
Status Validate(const GatherParams& params);
Status Validate(const AttendParams& params);
Status Validate(const PrefillParams& params);

// Rows of all runs together.
int64_t RowCount(std::span<const RowRun> runs);

}  // namespace prehoc
