// append and gather: rows written, rows copied.
#include <algorithm>
#include <cstring>
#include <vector>

#include "base/units.h"
#include "kernels/for_tasks.h"
#include "kernels/reference/reference.h"
#include "kernels/row_codec.h"
#include "kernels/validate.h"

namespace prehoc::reference {

Status Append(const AppendParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const AppendTask& task = params.tasks[static_cast<size_t>(index)];
    const int64_t d = params.head_dim;
    std::vector<Half> row(static_cast<size_t>(2 * d));
    std::vector<std::byte> narrow(RowBytes(params.format, params.head_dim));
    auto* to = static_cast<std::byte*>(task.rows);
    const size_t bytes = RowBytes(task.widened ? RowFormat::kF16 : params.format, params.head_dim);
    for (int64_t t = 0; t < task.count; ++t, to += bytes) {
      std::transform(task.k + t * task.stride, task.k + t * task.stride + d, row.begin(), FloatToHalf);
      std::transform(task.v + t * task.stride, task.v + t * task.stride + d, row.begin() + d, FloatToHalf);
      NarrowRow(row.data(), params.format, params.head_dim, narrow.data());
      if (task.widened) WidenRow(narrow.data(), params.format, params.head_dim, row.data());
      std::memcpy(to, task.widened ? static_cast<const void*>(row.data()) : narrow.data(), bytes);
    }
  });
  return {};
}

Status Gather(const GatherParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  constexpr int64_t kRowsPerTask = 64;  // a few microseconds of copying
  const auto rows = static_cast<int64_t>(params.rows.size());
  ForTasks(launch, CeilDiv(rows, kRowsPerTask), [&](int64_t index) {
    const int64_t end = std::min(rows, (index + 1) * kRowsPerTask);
    for (int64_t i = index * kRowsPerTask; i < end; ++i) {
      const RowCopy& copy = params.rows[static_cast<size_t>(i)];
      WidenRow(copy.from, params.format, params.head_dim, copy.to);
    }
  });
  return {};
}

}  // namespace prehoc::reference
