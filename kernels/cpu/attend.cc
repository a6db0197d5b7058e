// attend and score over runs: parts of rows, merged by log-sum-exp in the order of the rows.
#include <cmath>
#include <limits>

#include "kernels/cpu/drivers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/split.h"
#include "kernels/validate.h"

namespace prehoc::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309417;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Tasks>
int64_t TotalRows(const Tasks& tasks) {
  int64_t rows = 0;
  for (const auto& task : tasks) rows += RowCount(task.runs);
  return rows;
}

// Queries of all tasks, scaled: [tasks, group, head_dim].
template <class Tasks>
void ScaleQueries(const Tasks& tasks, float scale, int64_t q_floats, float* to) {
  for (size_t t = 0; t < tasks.size(); ++t) {
    if (!tasks[t].runs.empty() && tasks[t].q != nullptr) {
      ScaleTo(tasks[t].q, scale, q_floats, to + static_cast<int64_t>(t) * q_floats);
    }
  }
}

// The parts of one task, from `first` to `last`; outputs are [parts, ...].
struct PartialResults {
  float* acc;  // [parts, group, head_dim]
  float* top;  // [parts, group]
  float* sum;  // [parts, group]
};

void MergeHead(const PartialResults& partial, size_t first, size_t last, int64_t h, int64_t group, int64_t d, float* out,
               float* lse) {
  float top = -kInfinity;
  for (size_t p = first; p < last; ++p) {
    const float part_top = partial.top[static_cast<int64_t>(p) * group + h];
    if (part_top > top) top = part_top;
  }
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) out[c] = 0;
  for (size_t p = first; p < last; ++p) {
    const int64_t at = static_cast<int64_t>(p) * group + h;
    const float weight = std::exp2(partial.top[at] - top);
    sum += static_cast<double>(weight) * partial.sum[at];
    const float* acc = partial.acc + at * d;
    for (int64_t c = 0; c < d; ++c) out[c] += weight * acc[c];
  }
  // No weight at all (every logit is -inf) gives 0, as no row does; NaN stays.
  const float inverse = sum == 0 ? 0.0f : static_cast<float>(1 / sum);
  for (int64_t c = 0; c < d; ++c) out[c] *= inverse;
  *lse = sum == 0 ? -kInfinity : static_cast<float>((top + std::log2(sum)) * kLn2);
}

}  // namespace

Status Attend(const VectorOps& ops, const AttendParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const int64_t group = params.group, d = params.head_dim, q_floats = group * d;
  const int64_t rows = TotalRows(params.tasks);
  static thread_local std::vector<RowPart> parts_of_thread;
  static thread_local Scratch<float> scratch;
  std::vector<RowPart>& parts = parts_of_thread;  // a body runs on other threads, where the name means another vector
  SplitRows(params.tasks, rows, parts);

  const auto n = static_cast<int64_t>(parts.size()), tasks = static_cast<int64_t>(params.tasks.size());
  float* q = scratch.Get(static_cast<size_t>((tasks + n) * q_floats + 2 * n * group));
  PartialResults partial{q + tasks * q_floats, nullptr, nullptr};
  partial.top = partial.acc + n * q_floats;
  partial.sum = partial.top + n * group;
  ScaleQueries(params.tasks, kLog2E / std::sqrt(static_cast<float>(d)), q_floats, q);

  ForParts(launch, rows >= 2 * kRowsWorthAThread, n, [&](int64_t i) {
    const RowPart& part = parts[static_cast<size_t>(i)];
    ops.attend({.q = q + part.task * q_floats, .from = part.from, .count = part.count, .acc = partial.acc + i * q_floats,
                .top = partial.top + i * group, .sum = partial.sum + i * group},
               params.group, params.head_dim);
  });

  size_t first = 0;
  for (int32_t t = 0; t < tasks; ++t) {
    size_t last = first;
    while (last < parts.size() && parts[last].task == t) ++last;
    const AttendTask& task = params.tasks[static_cast<size_t>(t)];
    for (int64_t h = 0; h < group; ++h) MergeHead(partial, first, last, h, group, d, task.out + h * d, task.lse + h);
    first = last;
  }
  return {};
}

Status Score(const VectorOps& ops, const ScoreParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const int64_t q_floats = int64_t{params.group} * params.head_dim;
  const int64_t rows = TotalRows(params.tasks);
  static thread_local std::vector<RowPart> parts_of_thread;
  static thread_local Scratch<float> scratch;
  std::vector<RowPart>& parts = parts_of_thread;
  SplitRows(params.tasks, rows, parts);
  float* q = scratch.Get(params.tasks.size() * static_cast<size_t>(q_floats));
  ScaleQueries(params.tasks, 1 / std::sqrt(static_cast<float>(params.head_dim)), q_floats, q);
  ForParts(launch, rows >= 2 * kRowsWorthAThread, static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const RowPart& part = parts[static_cast<size_t>(i)];
    const ScoreTask& task = params.tasks[static_cast<size_t>(part.task)];
    ops.score({.q = q + part.task * q_floats, .from = part.from, .count = part.count, .z = task.z + part.first,
               .z_stride = task.z_stride},
              params.group, params.head_dim);
  });
  return {};
}

}  // namespace prehoc::cpu
