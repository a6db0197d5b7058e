// append and gather: rows written, rows copied.
#include <algorithm>
#include <cstring>

#include "base/units.h"
#include "kernels/for_tasks.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {

Status Append(const AppendParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const AppendTask& task = params.tasks[static_cast<size_t>(index)];
    const int64_t d = params.head_dim;
    for (int64_t t = 0; t < task.count; ++t) {
      for (int64_t c = 0; c < d; ++c) {
        task.rows[(2 * t) * d + c] = FloatToHalf(task.k[t * task.stride + c]);
        task.rows[(2 * t + 1) * d + c] = FloatToHalf(task.v[t * task.stride + c]);
      }
    }
  });
  return {};
}

Status Gather(const GatherParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  constexpr int64_t kRowsPerTask = 64;  // a few microseconds of copying
  const auto rows = static_cast<int64_t>(params.rows.size());
  const size_t row_bytes = size_t{2} * sizeof(Half) * static_cast<size_t>(params.head_dim);
  ForTasks(launch, CeilDiv(rows, kRowsPerTask), [&](int64_t index) {
    const int64_t end = std::min(rows, (index + 1) * kRowsPerTask);
    for (int64_t i = index * kRowsPerTask; i < end; ++i) {
      const RowCopy& copy = params.rows[static_cast<size_t>(i)];
      std::memcpy(copy.to, copy.from, row_bytes);
    }
  });
  return {};
}

}  // namespace prehoc::reference
