// gate, score and score_pages: dot products.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/for_tasks.h"
#include "kernels/reference/half_rows.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {
namespace {

double Dot(const float* a, const float* b, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(a[c]) * b[c];
  return sum;
}

double DotKey(const float* q, const Half* k, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(q[c]) * HalfToFloat(k[c]);
  return sum;
}

float Cosine(const float* a, const float* b, int64_t d) {
  const double norms = std::sqrt(Dot(a, a, d)) * std::sqrt(Dot(b, b, d));
  if (!(norms > 0) || !std::isfinite(norms)) return -2;
  return static_cast<float>(std::clamp(Dot(a, b, d) / norms, -1.0, 1.0));
}

float PageBound(const float* q, const Half* lo, const Half* hi, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) {
    const double a = static_cast<double>(q[c]) * HalfToFloat(lo[c]);
    const double b = static_cast<double>(q[c]) * HalfToFloat(hi[c]);
    // NaN (0 * inf) must reach the sum, and std::max would lose it.
    sum += std::isnan(a) || std::isnan(b) ? std::numeric_limits<double>::quiet_NaN() : std::max(a, b);
  }
  const auto bound = static_cast<float>(sum / std::sqrt(static_cast<double>(d)));
  return std::isfinite(bound) ? bound : std::numeric_limits<float>::infinity();
}

float Spread(const GateTask& task, int64_t h, int64_t d) {
  double sum = 0;
  for (int64_t c = 0; c < d; ++c) {
    const double moved = static_cast<double>(task.q[h * d + c]) - task.anchor[h * d + c];
    sum += static_cast<double>(task.variance[c]) * moved * moved;
  }
  const auto spread = static_cast<float>(std::sqrt(sum / static_cast<double>(d)));
  return std::isfinite(spread) ? spread : std::numeric_limits<float>::infinity();
}
}  // namespace

Status Gate(const GateParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const GateTask& task = params.tasks[static_cast<size_t>(index)];
    const int64_t d = params.head_dim;
    float least = 1;
    for (int64_t h = 0; h < params.group; ++h) least = std::min(least, Cosine(task.q + h * d, task.anchor + h * d, d));
    if (task.cosine != nullptr) *task.cosine = least;
    for (int64_t h = 0; h < params.group && task.spread != nullptr; ++h) task.spread[h] = Spread(task, h, d);
  });
  return {};
}

Status Score(const ScoreParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const ScoreTask& task = params.tasks[static_cast<size_t>(index)];
    const int64_t d = params.head_dim;
    const double root = std::sqrt(static_cast<double>(d));
    const HalfRows rows(task.runs, params.head_dim);
    int64_t at = 0;
    for (const Half* row : rows.rows()) {
      for (int64_t h = 0; h < params.group; ++h) task.z[h * task.z_stride + at] = static_cast<float>(DotKey(task.q + h * d, row, d) / root);
      ++at;
    }
  });
  return {};
}

Status ScorePages(const ScorePagesParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const ScorePagesTask& task = params.tasks[static_cast<size_t>(index)];
    const int64_t d = params.head_dim;
    for (int64_t h = 0; h < params.group; ++h) {
      for (int64_t p = 0; p < task.pages; ++p) {
        task.z[h * task.z_stride + p] = PageBound(task.q + h * d, task.lo + p * d, task.hi + p * d, d);
      }
    }
  });
  return {};
}

}  // namespace prehoc::reference
