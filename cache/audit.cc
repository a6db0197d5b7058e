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

// What needs no scores.
AuditedUnit Sequence::Impl::Audited(const FastStep& s, size_t index) const {
  const Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  const int64_t dim = geometry().head_dim;
  AuditedUnit result;
  result.step = s.u;
  result.layer = s.layer;
  result.kv_head = unit.kv_head;
  result.first_head = unit.first_head;
  result.heads = unit.heads;
  result.n = s.n;
  result.q = s.in.q + unit.first_head * dim;
  if (s.in.q_pre_rope) result.q_pre_rope = s.in.q_pre_rope + unit.first_head * dim;
  result.cut_begin = s.rule.cut_sinks ? 0 : s.rule.sinks;
  result.cut_end = std::max(s.rule.lo, result.cut_begin);
  result.sinks = unit.attended.sinks;
  result.left = unit.attended.left;
  result.scanned = unit.selected;
  result.age = unit.selected || !unit.has_choice ? 0 : s.u - unit.chosen_at;
  return result;
}

Status Sequence::Impl::Audit(FastStep& s) {
  ScopedTimer timer(*cache->resources.clock, &step_report.times.audit);
  TraceScope trace(tracer(), "audit");
  trace.Say("layer", s.layer);
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  if (s.rule.attend_all) {  // nothing was dropped
    for (size_t i = 0; observer && i < layer.units.size(); ++i) observer->OnUnit(Audited(s, i));
    return {};
  }
  LayerBlocks blocks(cache->host.get(), geometry(), layer.blocks, BlockUse::kStream);
  const int64_t dim = geometry().head_dim;
  const bool statistical = cache->options.selector.BoundInForce() == BoundKind::kStatistical;
  const bool estimates = s.rule.scorer != Scorer::kNone && !s.rule.middle_only;
  step_report.audited_steps = 1;  // of one step; its first layers may be dense

  for (size_t index = 0; index < layer.units.size(); ++index) {
    const Unit& unit = layer.units[index];
    std::vector<RowRun> runs;
    PREHOC_RETURN_IF_ERROR(SightRuns(s, unit.kv_head, blocks, &runs).status());
    // Positions in the order of the runs.
    AuditedUnit audited = Audited(s, index);
    const int32_t gap = audited.cut_end - audited.cut_begin;
    const int64_t num = s.n - gap;
    std::vector<float> logits(static_cast<size_t>(unit.heads * num));
    std::vector<float> exact(static_cast<size_t>(unit.heads * dim)), lse(static_cast<size_t>(unit.heads));
    std::vector<double> dropped(static_cast<size_t>(unit.heads)), error(static_cast<size_t>(unit.heads));
    const float* q = s.in.q + unit.first_head * dim;
    const ScoreTask score{.q = q, .runs = runs, .z = logits.data(), .z_stride = num};
    const AttendTask attend{.q = q, .runs = runs, .out = exact.data(), .lse = lse.data()};
    PREHOC_RETURN_IF_ERROR(kernels().score({.tasks = {&score, 1}, .group = unit.heads, .head_dim = geometry().head_dim}, cache->launch()));
    PREHOC_RETURN_IF_ERROR(kernels().attend({.tasks = {&attend, 1}, .group = unit.heads, .head_dim = geometry().head_dim}, cache->launch()));

    const std::vector<int32_t> attended = unit.attended.Positions();
    for (int32_t h = 0; h < unit.heads; ++h) {
      const auto at = static_cast<size_t>(h);
      const float* of_head = logits.data() + h * num;
      size_t next = 0;
      for (int64_t i = 0; i < num; ++i) {
        const int64_t position = i < audited.cut_begin ? i : i + gap;
        while (next < attended.size() && attended[next] < position) ++next;
        if (next < attended.size() && attended[next] == position) continue;
        dropped[at] += std::exp(static_cast<double>(of_head[i]) - lse[at]);
      }
      error[at] = RelativeError(s.in.out + (unit.first_head + h) * dim, exact.data() + h * dim, dim);
      step_report.dropped_audited.Add(dropped[at]);
      if (estimates) step_report.estimate_error.Add(std::abs(dropped[at] - unit.dropped[at]));
      const bool violated = unit.dropped_bound[at] >= 0 && dropped[at] > unit.dropped_bound[at] + kTolerance;
      if (statistical) {
        step_report.statistical_checked += unit.dropped_bound[at] >= 0 && !unit.attended.everything;
        step_report.statistical_violations += violated;
      } else {
        step_report.bound_violations += violated;
      }
      step_report.output_error.Add(std::min(1.0, error[at]));
    }
    if (!observer) continue;
    audited.logits = logits;
    audited.lse = lse;
    audited.attended = attended;
    audited.dropped = dropped;
    audited.output_error = error;
    if (estimates) audited.estimate = unit.dropped;
    const std::vector<float> nothing(static_cast<size_t>(unit.heads), -1);
    audited.bound = statistical ? nothing : unit.dropped_bound;
    if (statistical) audited.bound_statistical = unit.dropped_bound;
    observer->OnUnit(audited);
  }
  return {};
}

}  // namespace prehoc
