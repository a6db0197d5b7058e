// choose told once more, straight from its contract and too simple to be wrong: sets, and masses added up from scratch.
#pragma once
#include <cstdint>
#include <set>
#include <vector>

#include "kernels/function_table.h"

namespace prehoc {

// A dropped mass below this may count as 0, or as not yet 0.
inline constexpr double kVanishing = 1e-30;

struct ChooseModel {
  std::vector<int32_t> chosen;
  std::vector<double> lse_all;   // [group]
  std::vector<double> score;     // [n], of the middle
  bool met = true;
  // The smallest step between two different scores, between a score and log_theta, and between a dropped mass and
  // target_drop that decided something: below fp32 rounding another order is as good.
  double margin = 0;
};
ChooseModel RunChooseModel(const ChooseTask& task, int32_t group);

// LSE of head h over what is in sight and kept (`kept` true), or in sight and not kept, of z + sign * err.
double MassOf(const ChooseTask& task, int32_t h, const std::vector<int32_t>& chosen, bool kept, double sign);
// U / (U + L) of head h.
double DroppedBound(const ChooseTask& task, int32_t h, const std::vector<int32_t>& chosen);

}  // namespace prehoc
