// The fast clock: one token in one layer. What a step attends to may jump anywhere, within this step.
#include <algorithm>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
Way WayOfFailure(const StepRule& rule) {
  switch (rule.fail) {
    case CisOptions::OnFail::kDense: return Way::kEverything;
    case CisOptions::OnFail::kReselectOnce: return Way::kSelectOnce;
    case CisOptions::OnFail::kReselect: return Way::kSelect;
  }
  return Way::kSelect;
}

// Steps since the choice was made; -1: there is none.
int64_t AgeOf(const FastStep& s, const Unit& unit) { return unit.has_choice ? s.u - unit.chosen_at : -1; }
}  // namespace

void FastStep::Reset(int32_t of_layer, const std::vector<Unit>& of_units, size_t kv_heads) {
  layer = of_layer;
  blocks.reset();
  units.resize(of_units.size());
  direct.resize(kv_heads);
  for (auto& list : direct) list.clear();
  for (size_t i = 0; i < of_units.size(); ++i) {
    UnitStep& unit = units[i];
    const auto heads = static_cast<size_t>(of_units[i].heads);
    unit.way = Way::kSelect;
    unit.attended = false;
    unit.met = true;
    unit.missed = 0;
    unit.chosen_count = 0;
    unit.lse.assign(heads, 0);
    unit.lse_all.assign(heads, 0);
    unit.lse_out.assign(heads, 0);
    unit.lse_out_bound.assign(heads, 0);
  }
}

Status Sequence::Impl::Attend(int32_t layer_index, const LayerInput& in) {
  if (device_step != nullptr) PREHOC_RETURN_IF_ERROR(LeaveSteps());
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const Clock& clock = *cache->resources.clock;
  FastStep& s = *scratch;
  s.Reset(layer_index, layer.units, layer.heads.size());
  s.u = step;
  s.n = static_cast<int32_t>(visible());
  s.in = in;
  s.rule = RuleAt(layer_index, step);
  {
    ScopedTimer timer(clock, &step_report.times.append);
    TraceScope trace(tracer(), "append");
    trace.Say("layer", layer_index);
    PREHOC_RETURN_IF_ERROR(EnsureTails(layer, visible()));
    PREHOC_RETURN_IF_ERROR(AppendRows(layer_index, in, first, 1));
    s.blocks.emplace(cache->host.get(), geometry(), layer.blocks, BlockUse::kKeep);
    PREHOC_RETURN_IF_ERROR(IndexRows(layer_index, *s.blocks, visible()));
    PREHOC_RETURN_IF_ERROR(LabelRows(layer_index, *s.blocks, visible()));
    PREHOC_RETURN_IF_ERROR(AddKeysToSummaries(layer_index, *s.blocks, first, visible()));
  }

  Gate(s);                                          // who keeps its last choice
  PREHOC_RETURN_IF_ERROR(CheckCertificates(s));     // ... and can prove it (only where the gate is a bound)
  MarkBorrowers(s);                                 // ... or takes that of another head or layer
  PREHOC_RETURN_IF_ERROR(Select(s));                // the others look at everything, and choose
  TakeBorrowed(s);
  PREHOC_RETURN_IF_ERROR(Fetch(s));                 // what is attended to and is not on the device
  PREHOC_RETURN_IF_ERROR(AttendUnits(s));
  Account(s);
  if (AuditDue()) PREHOC_RETURN_IF_ERROR(Audit(s));
  s.blocks.reset();
  ++next_layer;
  return {};
}

// The last prompt token's attention is prefill's; here it only chooses, so that the next steps can inherit.
Status Sequence::Impl::FirstSelection(int32_t layer_index, const float* q, const float* q_pre) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  FastStep& s = *scratch;
  s.Reset(layer_index, layer.units, layer.heads.size());
  s.u = 0;
  s.n = static_cast<int32_t>(visible());
  s.in = {};
  s.in.q = q;
  s.in.q_pre_rope = q_pre;
  s.rule = RuleAt(layer_index, 0);
  for (Unit& unit : layer.units) {
    unit.has_choice = false;
    unit.chosen.clear();
    unit.pool_restart = true;
  }
  if (layer_index == 0) layer_source.clear();  // of an earlier prompt
  if (s.rule.attend_all || s.rule.scorer == Scorer::kNone) return {};
  s.blocks.emplace(cache->host.get(), geometry(), layer.blocks, BlockUse::kKeep);
  if (s.rule.borrows) PREHOC_RETURN_IF_ERROR(FindSources(s));
  PREHOC_RETURN_IF_ERROR(Select(s));
  if (s.rule.borrows && layer_index + 1 == geometry().layers) FindLayerSources();
  s.blocks.reset();
  step_report.first_selections += static_cast<int64_t>(layer.units.size());
  // What choosing cost at u = 0 belongs to prefill.
  step_report.bytes_codes = step_report.bytes_exact_keys = 0;
  step_report.bytes_from_host = step_report.bytes_from_disk = 0;
  step_report.times.score = step_report.times.choose = step_report.times.fetch = 0;
  return {};
}

// --- gate -----------------------------------------------------------------------------------------------------------

void Sequence::Impl::Gate(FastStep& s) {
  std::vector<Unit>& units = layers[static_cast<size_t>(s.layer)].units;
  ScopedTimer timer(*cache->resources.clock, &step_report.times.gate);
  TraceScope trace(tracer(), "gate");
  trace.Say("layer", s.layer);
  for (size_t i = 0; i < units.size(); ++i) {
    units[i].cosine = -2;
    if (s.rule.attend_all) s.units[i].way = Way::kEverything;
    if (!s.rule.attend_all && s.rule.scorer == Scorer::kNone) s.units[i].way = Way::kInherit;
  }
  if (s.rule.attend_all || s.rule.scorer == Scorer::kNone) return;

  if (s.rule.by_mass) return GateByMass(s);
  // One task per query head where their cosines are averaged, else one per unit.
  const bool mean = s.rule.scope == CisOptions::GateScope::kGroupMean;
  const int64_t dim = geometry().head_dim;
  const float* q = s.rule.pre_rope && s.in.q_pre_rope ? s.in.q_pre_rope : s.in.q;
  s.gate.clear();
  s.cosines.assign(static_cast<size_t>(geometry().heads), -2);
  const int32_t group = mean ? 1 : units.front().heads;
  for (const Unit& unit : units) {
    // Where the answer does not depend on it, no cosine is computed.
    const bool needed = !MustSelect(s.rule, AgeOf(s, unit)) && !s.rule.certified && s.rule.tau > -1 && s.rule.tau < 1;
    if (!needed) continue;
    const std::vector<float>& anchor = s.rule.pre_rope ? unit.anchor_pre : unit.anchor;
    for (int32_t h = 0; h < unit.heads; h += group) {
      s.gate.push_back({.q = q + (unit.first_head + h) * dim,
                        .anchor = anchor.data() + h * dim,
                        .cosine = &s.cosines[static_cast<size_t>(unit.first_head + h)]});
    }
    step_report.bytes_gate += unit.heads * dim * static_cast<int64_t>(2 * sizeof(float));
  }
  if (!s.gate.empty()) {
    const Status status = kernels().gate({.tasks = s.gate, .group = group, .head_dim = geometry().head_dim}, cache->launch());
    PREHOC_CHECK(status.ok());  // shapes are ours
  }

  const auto cosine_of = [&](const Unit& unit) {
    float least = 2, sum = 0;
    for (int32_t h = 0; h < unit.heads; h += group) {
      const float cosine = s.cosines[static_cast<size_t>(unit.first_head + h)];
      least = std::min(least, cosine);
      sum += cosine;
    }
    return mean && least > -2 ? sum / static_cast<float>(unit.heads) : least;
  };
  float layer_cosine = 2;
  for (const Unit& unit : units) {
    if (unit.has_choice) layer_cosine = std::min(layer_cosine, cosine_of(unit));
  }
  for (size_t i = 0; i < units.size(); ++i) {
    Unit& unit = units[i];
    const int64_t age = AgeOf(s, unit);
    if (MustSelect(s.rule, age)) continue;
    const bool whole_layer = s.rule.scope == CisOptions::GateScope::kLayer;
    const bool whole_group = s.rule.scope == CisOptions::GateScope::kKvHead || mean;
    float cosine = whole_layer ? layer_cosine : cosine_of(unit);
    if (whole_group && unit.heads < geometry().group()) cosine = GroupCosine(units, unit.kv_head, mean, cosine_of);
    unit.cosine = cosine;
    s.units[i].way = Inherits(s.rule, cosine, age) ? Way::kInherit : WayOfFailure(s.rule);
  }
}

// A choice is kept while no query head of its unit is expected to miss more than epsilon by it.
void Sequence::Impl::GateByMass(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  const int64_t dim = geometry().head_dim;
  s.gate.clear();
  s.spreads.assign(static_cast<size_t>(geometry().heads), 0);
  for (const Unit& unit : layer.units) {
    if (MustSelect(s.rule, AgeOf(s, unit))) continue;
    s.gate.push_back({.q = s.in.q + unit.first_head * dim, .anchor = unit.anchor.data(), .cosine = nullptr,
                      .variance = layer.heads[static_cast<size_t>(unit.kv_head)].variance.values(),
                      .spread = &s.spreads[static_cast<size_t>(unit.first_head)]});
    step_report.bytes_gate += (2 * unit.heads + 1) * dim * static_cast<int64_t>(sizeof(float));
  }
  if (s.gate.empty()) return;
  const Status status =
      kernels().gate({.tasks = s.gate, .group = layer.units.front().heads, .head_dim = geometry().head_dim}, cache->launch());
  PREHOC_CHECK(status.ok());  // shapes are ours
  for (size_t i = 0; i < layer.units.size(); ++i) {
    const Unit& unit = layer.units[i];
    if (MustSelect(s.rule, AgeOf(s, unit))) continue;
    bool keep = true;  // NaN fails
    for (int32_t h = 0; h < unit.heads; ++h) {
      keep = keep && ExpectedMiss(unit.dropped[static_cast<size_t>(h)], s.spreads[static_cast<size_t>(unit.first_head + h)]) <= s.rule.epsilon;
    }
    s.units[i].way = keep ? Way::kInherit : WayOfFailure(s.rule);
  }
}

float Sequence::Impl::GroupCosine(const std::vector<Unit>& units, int32_t kv_head, bool mean,
                                  const std::function<float(const Unit&)>& cosine_of) const {
  float least = 2, sum = 0;
  int32_t num = 0;
  for (const Unit& unit : units) {
    if (unit.kv_head != kv_head || !unit.has_choice) continue;
    const float cosine = cosine_of(unit);
    least = std::min(least, cosine);
    sum += cosine;
    ++num;
  }
  return mean && least > -2 && num > 0 ? sum / static_cast<float>(num) : least;
}

// With the certified gate a choice is kept if what it can have lost is at most delta_max (selector/certificate.h). The bound needs the
// log-sum-exp of the kept rows under the new query: they are attended to first, and again with others if that was too much.
Status Sequence::Impl::CheckCertificates(FastStep& s) {
  if (!s.rule.certified || !s.rule.may_inherit) return {};
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  PREHOC_RETURN_IF_ERROR(Fetch(s));
  PREHOC_RETURN_IF_ERROR(AttendUnits(s));
  const auto dim = static_cast<size_t>(geometry().head_dim);
  for (size_t i = 0; i < layer.units.size(); ++i) {
    Unit& unit = layer.units[i];
    UnitStep& now = s.units[i];
    if (now.way != Way::kInherit || !now.attended) continue;
    double worst = 0;
    for (int32_t h = 0; h < unit.heads; ++h) {
      const auto at = static_cast<size_t>(h);
      const double u_dropped = DroppedLseBound(
          unit.lse_dropped[at], layer.heads[static_cast<size_t>(unit.kv_head)].ball, std::span(unit.anchor).subspan(at * dim, dim),
          {s.in.q + static_cast<size_t>(unit.first_head + h) * dim, dim});
      unit.dropped_bound[at] = static_cast<float>(DroppedMassBound(now.lse[at], u_dropped));
      worst = std::max(worst, static_cast<double>(unit.dropped_bound[at]));
    }
    step_report.bytes_gate += unit.heads * static_cast<int64_t>(dim * 2 * sizeof(float));
    if (worst <= s.rule.delta_max) continue;
    now.attended = false;
    now.way = WayOfFailure(s.rule);
  }
  return {};
}

}  // namespace prehoc
