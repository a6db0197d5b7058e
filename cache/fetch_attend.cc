// The second half of the fast clock: what is attended to and is not on the device is fetched, then attended to, then counted.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
// Bounds come from fp32 logits; this much is allowed in the log domain for their rounding.
constexpr double kLogSlack = 1e-3;

// Share of the mass outside, from the log-sum-exp outside and inside.
double ShareOutside(double lse_out, double lse_in) {
  return lse_out == -std::numeric_limits<double>::infinity() ? 0 : 1 / (1 + std::exp(lse_in - lse_out));
}
}  // namespace

// What `index` attends to at this step, as positions.
void Sequence::Impl::NoteAttended(FastStep& s, size_t index) {
  Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  const UnitStep& now = s.units[index];
  AttendedSet& set = unit.attended;
  set.everything = now.way == Way::kEverything;
  set.sinks = s.rule.cut_sinks ? 0 : s.rule.sinks;
  set.lo = s.rule.lo;
  set.n = s.n;
  set.left = s.n - s.rule.local;
  set.middle.clear();
  set.unread = -1;
  unit.selected = now.way == Way::kSelect || now.way == Way::kSelectOnce || (now.way == Way::kEverything && !now.met);
  if (set.everything) return;
  const bool inherits = now.way == Way::kInherit;
  if (inherits && s.rule.local_held && unit.has_choice) set.left = unit.local_left;
  const std::vector<int32_t>& from = inherits ? unit.chosen : now.chosen;
  auto begin = from.begin();
  if (inherits && s.rule.filter_each_step) begin = std::lower_bound(begin, from.end(), s.rule.lo);
  // cis.clip = visible: what still lies in the local window is attended to there.
  set.middle.assign(begin, std::lower_bound(begin, from.end(), set.left));
}

Status Sequence::Impl::Fetch(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  ScopedTimer timer(*cache->resources.clock, &step_report.times.fetch);
  TraceScope trace(tracer(), "fetch");
  trace.Say("layer", s.layer);
  for (size_t i = 0; i < layer.units.size(); ++i) {
    if (!s.units[i].attended) NoteAttended(s, i);
  }
  if (complete()) return {};
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    HeadState& head = layer.heads[static_cast<size_t>(h)];
    s.missing.clear();
    for (size_t i = 0; i < layer.units.size(); ++i) {
      UnitStep& now = s.units[i];
      const Unit& unit = layer.units[i];
      if (unit.kv_head != h || now.attended || unit.attended.everything) continue;
      for (const int32_t position : unit.attended.middle) {
        if (position >= ring_begin || head.residency.IsResident(position)) continue;
        s.missing.push_back(position);
        ++now.missed;
      }
    }
    if (s.missing.empty()) continue;
    std::sort(s.missing.begin(), s.missing.end());
    s.missing.erase(std::unique(s.missing.begin(), s.missing.end()), s.missing.end());
    PREHOC_RETURN_IF_ERROR(MakeRoom(s.layer, h, static_cast<int32_t>(s.missing.size()), s.missing));
    PREHOC_ASSIGN_OR_RETURN(const int64_t landed, BringIn(s.layer, h, *s.blocks, s.missing));
    for (size_t m = static_cast<size_t>(landed); m < s.missing.size(); ++m) {
      PREHOC_ASSIGN_OR_RETURN(const std::byte* row, s.blocks->Row(s.missing[m], h));
      s.direct[static_cast<size_t>(h)].emplace_back(s.missing[m], row);
    }
    const auto fetched = static_cast<int64_t>(s.missing.size());
    int64_t from_store = 0;
    for (const int32_t position : s.missing) from_store += s.blocks->FromStore(position);
    step_report.rows_in_step += fetched;
    ++step_report.triples_in_step;
    step_report.rows_disk += from_store;
    step_report.rows_host += fetched - from_store;
    step_report.rows_device -= fetched;  // Account() counts every attended row there first
    step_report.bytes_from_host += fetched * static_cast<int64_t>(geometry().stored_row_bytes());
  }
  return {};
}

Status Sequence::Impl::AttendUnits(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  {
    ScopedTimer timer(*cache->resources.clock, &step_report.times.plan);
    for (size_t i = 0; i < layer.units.size(); ++i) {
      if (s.units[i].attended) continue;
      PREHOC_RETURN_IF_ERROR(layer.units[i].attended.everything ? CollectEverything(s, i) : CollectRuns(s, i));
    }
  }
  ScopedTimer timer(*cache->resources.clock, &step_report.times.attend);
  TraceScope trace(tracer(), "attend");
  trace.Say("layer", s.layer);
  const int64_t dim = geometry().head_dim;
  s.attend.clear();
  for (size_t i = 0; i < layer.units.size(); ++i) {
    const Unit& unit = layer.units[i];
    UnitStep& now = s.units[i];
    if (now.attended) continue;
    now.attended = true;
    s.attend.push_back({.q = s.in.q + unit.first_head * dim, .runs = now.runs, .out = s.in.out + unit.first_head * dim,
                        .lse = now.lse.data()});
    step_report.bytes_attended += unit.attended.size() * static_cast<int64_t>(geometry().row_bytes());
  }
  if (s.attend.empty()) return {};
  return kernels().attend({.tasks = s.attend, .group = layer.units.front().heads, .head_dim = geometry().head_dim},
                          cache->launch());
}

// Neighbours that lie together become one run.
Status Sequence::Impl::CollectRuns(FastStep& s, size_t index) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  const Unit& unit = layer.units[index];
  HeadState& head = layer.heads[static_cast<size_t>(unit.kv_head)];
  const auto& direct = s.direct[static_cast<size_t>(unit.kv_head)];
  std::vector<RowRun>& runs = s.units[index].runs;
  runs.clear();
  const auto push = [&](const void* row, RowFormat format) {
    const auto bytes = static_cast<int64_t>(RowBytes(format, geometry().head_dim));
    if (!runs.empty() && runs.back().format == format && static_cast<const std::byte*>(runs.back().rows) + runs.back().count * bytes == row) {
      ++runs.back().count;
    } else {
      runs.push_back({row, 1, format});
    }
  };
  const AttendedSet& set = unit.attended;
  const auto own_sinks = static_cast<int32_t>(std::min<int64_t>(set.sinks, ring_begin));
  if (own_sinks > 0) runs.push_back({head.sinks, own_sinks});
  if (own_sinks < set.sinks) PushRing(head, own_sinks, set.sinks, &runs);
  for (const int32_t position : set.middle) {
    const int32_t slot = position < ring_begin ? head.residency.SlotOf(position) : -1;
    if (slot >= 0) head.residency.Use(slot, s.u);
    if (const Half* row = slot >= 0 ? head.slots + slot * static_cast<int64_t>(row_halfs()) : RowOnDevice(head, position); row != nullptr) {
      push(row, RowFormat::kF16);
      continue;
    }
    const auto found = std::lower_bound(direct.begin(), direct.end(), std::pair<int32_t, const std::byte*>{position, nullptr});
    PREHOC_CHECK(found != direct.end() && found->first == position);
    push(found->second, geometry().rows);
  }
  PushRing(head, set.left, set.n, &runs);
  return {};
}

Result<Sequence::Impl::FarRows> Sequence::Impl::SightRuns(const FastStep& s, int32_t kv_head, LayerBlocks& blocks,
                                                          std::vector<RowRun>* runs) const {
  const HeadState& head = layers[static_cast<size_t>(s.layer)].heads[static_cast<size_t>(kv_head)];
  const int64_t size = geometry().chunk_tokens;
  FarRows far;
  const auto collect = [&](int64_t begin, int64_t end) -> Status {
    for (int64_t at = begin; at < std::min(end, ring_begin);) {
      const int64_t stop = std::min({(at / size + 1) * size, end, ring_begin});
      PREHOC_ASSIGN_OR_RETURN(const std::byte* rows, blocks.Row(at, kv_head));
      runs->push_back({rows, static_cast<int32_t>(stop - at), geometry().rows});
      (blocks.FromStore(at) ? far.store : far.host) += stop - at;
      at = stop;
    }
    PushRing(head, std::max(begin, ring_begin), end, runs);
    return {};
  };
  const int32_t kept_sinks = s.rule.cut_sinks ? 0 : s.rule.sinks;
  const bool cut = s.rule.lo > kept_sinks;
  PREHOC_RETURN_IF_ERROR(collect(0, cut ? kept_sinks : s.n));
  if (cut) PREHOC_RETURN_IF_ERROR(collect(s.rule.lo, s.n));
  return far;
}

Status Sequence::Impl::CollectEverything(FastStep& s, size_t index) {
  const Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  std::vector<RowRun>& runs = s.units[index].runs;
  runs.clear();
  PREHOC_ASSIGN_OR_RETURN(const FarRows far, SightRuns(s, unit.kv_head, *s.blocks, &runs));
  step_report.rows_host += far.host;
  step_report.rows_disk += far.store;
  step_report.rows_device -= far.host + far.store;  // Account() counts every attended row there first
  step_report.bytes_from_host += (far.host + far.store) * static_cast<int64_t>(geometry().stored_row_bytes());
  return {};
}

void Sequence::Impl::Account(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  const bool candidates = s.rule.residents_only && !complete() && s.rule.scorer == Scorer::kExact;
  for (size_t i = 0; i < layer.units.size(); ++i) {
    const UnitStep& now = s.units[i];
    const AttendedSet& set = layer.units[i].attended;
    step_report.rows_device += set.size();
    if (s.rule.attend_all) {
      ++step_report.dense_triples;
      continue;
    }
    ++step_report.triples;
    step_report.attended += set.size();
    if (s.rule.scorer == Scorer::kNone) continue;  // nothing to choose, nothing to inherit
    const bool looked = now.way == Way::kSelect || now.way == Way::kSelectOnce || !now.met;
    // Choosing among candidates is no retrieval; the scan that made them is.
    if (looked && (!candidates || PoolIsDue(s))) ++step_report.retrievals;
    if (now.way == Way::kInherit) ++step_report.inherited;
    if (now.way == Way::kBorrow) ++step_report.borrowed;
    if (!s.rule.middle_only) AccountMass(s, i);
  }
  if (s.blocks) step_report.bytes_from_disk += s.blocks->loaded() * static_cast<int64_t>(geometry().block_bytes());
}

// What the step knows of its dropped mass: from its own scan, or from the last one, with its age.
void Sequence::Impl::AccountMass(FastStep& s, size_t index) {
  Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  const UnitStep& now = s.units[index];
  const bool bounded = s.rule.bound != BoundKind::kNone;
  UnitSketch& bounds = cache->options.selector.BoundInForce() == BoundKind::kStatistical ? step_report.dropped_bound_statistical
                                                                                         : step_report.dropped_bound;
  const bool certified = s.rule.certified && now.way == Way::kInherit;
  for (int32_t h = 0; h < unit.heads; ++h) {
    const auto at = static_cast<size_t>(h);
    if (now.way == Way::kEverything) {
      unit.dropped[at] = unit.dropped_bound[at] = 0;
    } else if (now.way != Way::kInherit) {
      unit.dropped[at] = static_cast<float>(ShareOutside(now.lse_out[at], now.lse[at]));
      unit.dropped_bound[at] =
          bounded ? static_cast<float>(DroppedMassBound(now.lse[at], now.lse_out_bound[at] + kLogSlack)) : -1.0f;
    } else if (!certified) {
      unit.dropped_bound[at] = -1;  // a bound says nothing about a later query
    }
    const int64_t age = now.way == Way::kInherit ? s.u - unit.chosen_at : 0;
    step_report.dropped_estimated.Add(unit.dropped[at]);
    step_report.estimate_age_mean += (static_cast<double>(age) - step_report.estimate_age_mean) /
                                     static_cast<double>(step_report.dropped_estimated.count());
    if (unit.dropped_bound[at] >= 0) bounds.Add(unit.dropped_bound[at]);
  }
}

}  // namespace prehoc
