#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/for_tasks.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {

Status TopK(const TopKParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const TopKTask& task = params.tasks[static_cast<size_t>(index)];
    std::vector<int32_t> ranked(static_cast<size_t>(task.hi - task.lo));
    std::iota(ranked.begin(), ranked.end(), task.lo);
    const auto score = [&](int32_t i) {
      return std::isnan(task.score[i]) ? -std::numeric_limits<float>::infinity() : task.score[i];
    };
    std::stable_sort(ranked.begin(), ranked.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });
    ranked.resize(std::min(ranked.size(), static_cast<size_t>(task.k)));
    std::sort(ranked.begin(), ranked.end());
    std::copy(ranked.begin(), ranked.end(), task.chosen);
    *task.count = static_cast<int32_t>(ranked.size());
  });
  return {};
}

}  // namespace prehoc::reference
