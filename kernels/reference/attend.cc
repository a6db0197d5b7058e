// attend and prefill: softmax over exact logits, then the weighted sum of V.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/for_tasks.h"
#include "kernels/reference/half_rows.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double Logit(const float* q, const Half* row, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(q[c]) * HalfToFloat(row[c]);
  return sum / std::sqrt(static_cast<double>(d));
}

// LSE as an answer has it: NaN as soon as a logit is NaN or +inf.
double LogSumExp(const std::vector<double>& z) {
  double most = -kInfinity;
  for (const double x : z) {
    if (std::isnan(x) || x == kInfinity) return kNan;
    most = std::max(most, x);
  }
  if (most == -kInfinity) return most;
  double sum = 0;
  for (const double x : z) sum += std::exp(x - most);
  return most + std::log(sum);
}

// Attention of one query over `rows` (a pointer each); writes out [d] and returns the LSE.
double AttendRows(const float* q, const std::vector<const Half*>& rows, int64_t d, float* out) {
  std::vector<double> z(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) z[i] = Logit(q, rows[i], d);
  const double lse = LogSumExp(z);
  std::vector<double> sum(static_cast<size_t>(d), std::isnan(lse) ? kNan : 0);
  for (size_t i = 0; i < rows.size() && std::isfinite(lse); ++i) {
    const double weight = std::exp(z[i] - lse);
    for (int64_t c = 0; c < d; ++c) sum[static_cast<size_t>(c)] += weight * HalfToFloat(rows[i][d + c]);
  }
  for (int64_t c = 0; c < d; ++c) out[c] = static_cast<float>(sum[static_cast<size_t>(c)]);
  return lse;
}
}  // namespace

Status Attend(const AttendParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const AttendTask& task = params.tasks[static_cast<size_t>(index)];
    const int64_t d = params.head_dim;
    const HalfRows rows(task.runs, params.head_dim);
    for (int64_t h = 0; h < params.group; ++h) {
      task.lse[h] = static_cast<float>(AttendRows(task.q + h * d, rows.rows(), d, task.out + h * d));
    }
  });
  return {};
}

Status Prefill(const PrefillParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  if (params.queries == 0) return {};
  const int64_t d = params.head_dim;
  for (const PrefillTask& task : params.tasks) {
    const HalfRows held(task.runs, params.head_dim);
    const std::vector<const Half*>& rows = held.rows();
    ForTasks(launch, params.queries, [&](int64_t t) {
      const int64_t last = params.first + t;
      const int64_t start = task.start != nullptr ? task.start[t] : 0;
      const int64_t sinks = std::min<int64_t>(params.sinks, start);  // those before the window; the rest lie in it
      std::vector<const Half*> seen(rows.begin(), rows.begin() + sinks);
      seen.insert(seen.end(), rows.begin() + start, rows.begin() + last + 1);
      for (int64_t h = 0; h < params.group; ++h) {
        AttendRows(task.q + t * task.q_stride + h * d, seen, d, task.out + t * task.out_stride + h * d);
      }
    });
  }
  return {};
}

}  // namespace prehoc::reference
