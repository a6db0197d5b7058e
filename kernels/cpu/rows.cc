// append, gather, gate, score_pages: calls that split into tasks or ranges of rows as they are.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/units.h"
#include "kernels/cpu/drivers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/split.h"
#include "kernels/validate.h"

namespace prehoc::cpu {

Status Append(const VectorOps& ops, const AppendParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  int64_t rows = 0;
  for (const AppendTask& task : params.tasks) rows += task.count;
  ForParts(launch, rows >= kRowsWorthAThread, static_cast<int64_t>(params.tasks.size()), [&](int64_t i) {
    ops.append(params.tasks[static_cast<size_t>(i)], params.format, params.head_dim);
  });
  return {};
}

Status Gather(const VectorOps& ops, const GatherParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const auto rows = static_cast<int64_t>(params.rows.size());
  constexpr int64_t kPart = 128;
  ForParts(launch, rows >= 2 * kPart, CeilDiv(rows, kPart), [&](int64_t i) {
    ops.copy_rows(params.rows.data() + i * kPart, std::min(kPart, rows - i * kPart), params.format, params.head_dim);
  });
  return {};
}

Status Gate(const VectorOps& ops, const GateParams& params, const Launch&) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  // A few hundred multiplications a task: less than waking a thread.
  for (const GateTask& task : params.tasks) {
    if (task.cosine != nullptr) *task.cosine = ops.min_cosine(task.q, task.anchor, params.group, params.head_dim);
    if (task.spread == nullptr) continue;
    const int64_t d = params.head_dim;
    for (int64_t h = 0; h < params.group; ++h) {
      double sum = 0;
      for (int64_t c = 0; c < d; ++c) {
        const double moved = static_cast<double>(task.q[h * d + c]) - task.anchor[h * d + c];
        sum += static_cast<double>(task.variance[c]) * moved * moved;
      }
      const auto spread = static_cast<float>(std::sqrt(sum / static_cast<double>(d)));
      task.spread[h] = std::isfinite(spread) ? spread : std::numeric_limits<float>::infinity();
    }
  }
  return {};
}

Status ScorePages(const VectorOps& ops, const ScorePagesParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const auto count = static_cast<int64_t>(params.tasks.size());
  const int64_t q_floats = int64_t{params.group} * params.head_dim;
  int64_t most = 0, pages = 0;
  for (const ScorePagesTask& task : params.tasks) {
    most = std::max<int64_t>(most, task.pages);
    pages += task.pages;
  }
  if (pages == 0) return {};
  static thread_local Scratch<float> scratch;
  float* scaled = scratch.Get(static_cast<size_t>(count * q_floats));
  const float scale = 1 / std::sqrt(static_cast<float>(params.head_dim));
  for (int64_t i = 0; i < count; ++i) {
    const ScorePagesTask& task = params.tasks[static_cast<size_t>(i)];
    if (task.pages > 0) ScaleTo(task.q, scale, q_floats, scaled + i * q_floats);
  }
  constexpr int64_t kPart = 256;  // pages
  const int64_t parts = CeilDiv(most, kPart);
  ForParts(launch, pages >= 2 * kPart, count * parts, [&](int64_t i) {
    const ScorePagesTask& task = params.tasks[static_cast<size_t>(i / parts)];
    const int64_t first = i % parts * kPart, n = std::min<int64_t>(kPart, task.pages - first);
    if (n <= 0) return;
    const int64_t at = first * params.head_dim;
    ops.score_pages(scaled + i / parts * q_floats, task.lo + at, task.hi + at, static_cast<int32_t>(n), task.z + first,
                    task.z_stride, params.group, params.head_dim);
  });
  return {};
}

}  // namespace prehoc::cpu
