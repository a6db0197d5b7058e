// The exact truth on sampled steps: what a step really dropped, and what that did to its output. Reads every key and value;
// excluded from all figures but its own.
#include <algorithm>
#include <cmath>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
// Rounding of fp32 logits on both sides; a bound that lies further below the truth is a bug.
constexpr double kTolerance = 1e-4;

double RelativeError(const float* found, const float* exact, int64_t dim) {
  double difference = 0, norm = 0;
  for (int64_t c = 0; c < dim; ++c) {
    const double d = static_cast<double>(found[c]) - exact[c];
    difference += d * d;
    norm += static_cast<double>(exact[c]) * exact[c];
  }
  return norm > 0 ? std::sqrt(difference / norm) : (difference > 0 ? 1 : 0);
}
}  // namespace

bool Sequence::Impl::AuditDue() const {
  const int64_t every = cache->options.audit_every;
  return every > 0 && (step - 1) % every == 0;
}

Status Sequence::Impl::Audit(FastStep& s) {
  if (s.rule.attend_all) return {};  // nothing was dropped
  ScopedTimer timer(*cache->resources.clock, &step_report.times.audit);
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  LayerBlocks blocks(cache->host.get(), geometry(), layer.blocks, BlockUse::kStream);
  const int64_t dim = geometry().head_dim;
  if (s.layer == 0) ++step_report.audited_steps;

  for (const Unit& unit : layer.units) {
    std::vector<RowRun> runs;
    PREHOC_RETURN_IF_ERROR(SightRuns(s, unit.kv_head, blocks, &runs).status());
    // Positions in the order of the runs.
    const int32_t kept_sinks = s.rule.cut_sinks ? 0 : s.rule.sinks;
    const int32_t gap = std::max(0, s.rule.lo - kept_sinks);
    const int64_t num = s.n - gap;
    std::vector<float> logits(static_cast<size_t>(unit.heads * num));
    std::vector<float> exact(static_cast<size_t>(unit.heads * dim)), lse(static_cast<size_t>(unit.heads));
    const float* q = s.in.q + unit.first_head * dim;
    const ScoreTask score{.q = q, .runs = runs, .z = logits.data(), .z_stride = num};
    const AttendTask attend{.q = q, .runs = runs, .out = exact.data(), .lse = lse.data()};
    PREHOC_RETURN_IF_ERROR(kernels().score({.tasks = {&score, 1}, .group = unit.heads, .head_dim = geometry().head_dim}, cache->launch()));
    PREHOC_RETURN_IF_ERROR(kernels().attend({.tasks = {&attend, 1}, .group = unit.heads, .head_dim = geometry().head_dim}, cache->launch()));

    const std::vector<int32_t> attended = unit.attended.Positions();
    for (int32_t h = 0; h < unit.heads; ++h) {
      const auto at = static_cast<size_t>(h);
      const float* of_head = logits.data() + h * num;
      double dropped = 0;
      size_t next = 0;
      for (int64_t i = 0; i < num; ++i) {
        const int64_t position = i < kept_sinks ? i : i + gap;
        while (next < attended.size() && attended[next] < position) ++next;
        if (next < attended.size() && attended[next] == position) continue;
        dropped += std::exp(static_cast<double>(of_head[i]) - lse[at]);
      }
      step_report.dropped_audited.Add(dropped);
      if (s.rule.scorer != Scorer::kNone) step_report.estimate_error.Add(std::abs(dropped - unit.dropped[at]));
      if (unit.dropped_bound[at] >= 0 && dropped > unit.dropped_bound[at] + kTolerance) ++step_report.bound_violations;
      step_report.output_error.Add(
          std::min(1.0, RelativeError(s.in.out + (unit.first_head + h) * dim, exact.data() + h * dim, dim)));
    }
  }
  return {};
}

}  // namespace prehoc
