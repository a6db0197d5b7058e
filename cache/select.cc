// How a head looks and chooses: logits of everything in sight, then the best k (docs/selectors/cis.md, tc.md).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/half.h"
#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();

GroupRule GroupRuleOf(CisOptions::GqaSet set) {
  switch (set) {
    case CisOptions::GqaSet::kMeanWeight: return GroupRule::kMeanWeight;
    case CisOptions::GqaSet::kMaxLogit: return GroupRule::kMaxLogit;
    case CisOptions::GqaSet::kMaxWeight:
    case CisOptions::GqaSet::kPerQueryHead: return GroupRule::kMaxWeight;
  }
  return GroupRule::kMaxWeight;
}

// True if the kernel that chooses also bounds what it leaves: unless it aims at an estimate, which knows no errors.
bool BoundsWhileChoosing(const StepRule& rule) {
  return rule.bound != BoundKind::kNone && (rule.target_is_bound || rule.target_drop < 0);
}

// Pages become their positions.
void ExpandPages(int32_t page, std::vector<int32_t>* chosen) {
  const size_t pages = chosen->size();
  chosen->resize(pages * static_cast<size_t>(page));
  for (size_t p = pages; p-- > 0;) {
    const auto first = chosen->begin() + static_cast<std::ptrdiff_t>(p * static_cast<size_t>(page));
    std::iota(first, first + page, (*chosen)[p] * page);
  }
}

bool Chooses(const UnitStep& unit) { return unit.way == Way::kSelect || unit.way == Way::kSelectOnce; }
}  // namespace

Status Sequence::Impl::Select(FastStep& s) {
  const bool any = std::any_of(s.units.begin(), s.units.end(), Chooses);
  if (!any) return {};
  TraceScope trace(tracer(), "select");
  trace.Say("layer", s.layer);
  {
    ScopedTimer timer(*cache->resources.clock, &step_report.times.score);
    PREHOC_RETURN_IF_ERROR(Score(s));
  }
  ScopedTimer timer(*cache->resources.clock, &step_report.times.choose);
  PREHOC_RETURN_IF_ERROR(Choose(s, /*plain=*/false));
  std::vector<Unit>& units = layers[static_cast<size_t>(s.layer)].units;
  for (size_t i = 0; i < units.size(); ++i) {
    UnitStep& now = s.units[i];
    if (now.way == Way::kSelect) Keep(s, i);
    if (!Chooses(now)) continue;
    if (!now.met) now.way = Way::kEverything, step_report.widened_dense += s.u > 0;
  }
  // The step that selects may attend to the set before dilation.
  if (s.rule.dilate_later && s.u > 0) PREHOC_RETURN_IF_ERROR(Choose(s, /*plain=*/true));
  return {};
}

// Logits of everything in sight, for the units that select: from codes, page bounds or the keys themselves.
Status Sequence::Impl::Score(FastStep& s) {
  if (s.rule.page > 0) return ScorePages(s);
  if (s.rule.scorer == Scorer::kLabels) return ScoreByLabels(s);
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  const int64_t dim = geometry().head_dim;
  const int64_t size = geometry().chunk_tokens;
  const int32_t group = layer.units.front().heads;
  const auto key_bytes = static_cast<int64_t>(geometry().row_bytes() / 2);
  const bool residents_only = s.rule.residents_only && !complete() && !PoolIsDue(s);
  s.scan.clear();
  s.pages.clear();
  s.score.clear();
  // Room for the runs of every task; their addresses must not change.
  s.score_runs.resize(layer.units.size() * 2);
  for (auto& runs : s.score_runs) runs.clear();
  int64_t coded = 0;
  if (s.rule.scorer == Scorer::kCodes || s.rule.scorer == Scorer::kPages) coded = std::min<int64_t>(layer.coded, s.n);
  if (s.rule.residents_only && PoolIsDue(s)) coded = 0;  // a refresh looks at the keys themselves
  if (s.rule.scorer == Scorer::kPages) {
    s.page_scores.resize(layer.units.size() * static_cast<size_t>(group) * static_cast<size_t>(coded / 16));
  }
  const bool statistical = cache->options.selector.BoundInForce() == BoundKind::kStatistical;
  const int64_t coded_groups = coded / cache->options.codes.group_tokens;
  const size_t dithered = statistical ? layer.units.size() * static_cast<size_t>(group * coded_groups) : 0;
  for (std::vector<float>* of_blocks : {&s.variance, &s.bias, &s.proven}) of_blocks->resize(dithered);

  for (size_t i = 0; i < layer.units.size(); ++i) {
    Unit& unit = layer.units[i];
    if (!Chooses(s.units[i])) continue;
    HeadState& head = layer.heads[static_cast<size_t>(unit.kv_head)];
    const float* q = s.in.q + unit.first_head * dim;
    float* logits = z(unit.first_head);
    float* errors = err(unit.first_head);
    if (errors) {
      for (int32_t h = 0; h < unit.heads; ++h) std::fill_n(errors + h * layout.stride, s.n, 0.0f);
    }
    if (residents_only && coded == 0) {
      PREHOC_RETURN_IF_ERROR(ScoreResidents(s, i));
      continue;
    }
    const auto score = [&](std::vector<RowRun>& runs, int64_t begin, int64_t end) -> Status {
      if (begin >= end) return {};
      if (begin >= ring_begin) {
        PushRing(head, begin, end, &runs);
      } else {
        for (int64_t at = begin; at < end; at = (at / size + 1) * size) {
          PREHOC_ASSIGN_OR_RETURN(const std::byte* rows, s.blocks->Row(at, unit.kv_head));
          runs.push_back({rows, static_cast<int32_t>(std::min((at / size + 1) * size, end) - at), geometry().rows});
        }
        step_report.bytes_from_host += std::max<int64_t>(0, end - begin - ResidentCount(head)) * static_cast<int64_t>(geometry().stored_row_bytes() / 2);
      }
      s.score.push_back({.q = q, .runs = runs, .z = logits + begin, .z_stride = layout.stride});
      step_report.bytes_exact_keys += (end - begin) * key_bytes;
      return {};
    };
    if (coded == 0) {
      // What PSAW has cut away is not read.
      const bool cut = s.rule.lo > s.rule.sinks;
      PREHOC_RETURN_IF_ERROR(score(s.score_runs[2 * i], 0, cut ? s.rule.sinks : s.n));
      if (cut) PREHOC_RETURN_IF_ERROR(score(s.score_runs[2 * i + 1], s.rule.lo, s.n));
      continue;
    }
    if (s.rule.scorer == Scorer::kPages) {
      float* bounds = s.page_scores.data() + i * static_cast<size_t>(group) * static_cast<size_t>(coded / 16);
      s.pages.push_back({.q = q, .lo = head.page_lo, .hi = head.page_hi, .pages = static_cast<int32_t>(coded / 16),
                         .z = bounds, .z_stride = coded / 16});
      step_report.bytes_codes += coded / 16 * static_cast<int64_t>(geometry().row_bytes());
    } else {
      const auto groups = static_cast<int32_t>(coded_groups);
      s.scan.push_back({.q = q, .blocks = head.codes, .groups = groups, .z = logits, .err = errors, .z_stride = layout.stride,
                        .seed = SeedOf(s.layer, unit.kv_head)});
      if (statistical) {
        s.scan.back().variance = s.variance.data() + i * static_cast<size_t>(group * coded_groups);
        s.scan.back().bias = s.bias.data() + i * static_cast<size_t>(group * coded_groups);
      }
      step_report.bytes_codes +=
          groups * static_cast<int64_t>(kernels().code_block_bytes(cache->options.codes, geometry().head_dim));
    }
  }
  const Launch launch = cache->launch();
  if (!s.scan.empty()) {
    PREHOC_RETURN_IF_ERROR(kernels().scan(
        {.tasks = s.scan, .format = cache->options.codes, .group = group, .head_dim = geometry().head_dim}, launch));
    if (statistical) AllowForDither(s);
  }
  if (!s.pages.empty()) {
    PREHOC_RETURN_IF_ERROR(kernels().score_pages({.tasks = s.pages, .group = group, .head_dim = geometry().head_dim}, launch));
    SpreadPageScores(s, coded);
  }
  // Sinks, local window and what has no codes yet are on the device: exact, and without error.
  for (size_t i = 0; i < layer.units.size() && coded > 0; ++i) {
    Unit& unit = layer.units[i];
    if (!Chooses(s.units[i])) continue;
    HeadState& head = layer.heads[static_cast<size_t>(unit.kv_head)];
    const float* q = s.in.q + unit.first_head * dim;
    const auto exact = [&](std::vector<RowRun>& runs, int64_t begin, int64_t end) {
      s.score.push_back({.q = q, .runs = runs, .z = z(unit.first_head) + begin, .z_stride = layout.stride});
      step_report.bytes_exact_keys += (end - begin) * key_bytes;
      for (int32_t h = 0; h < unit.heads && err_; ++h) {
        std::fill_n(err(unit.first_head + h) + begin, end - begin, 0.0f);
      }
    };
    const int64_t tail = std::max(std::min<int64_t>(coded, s.n - s.rule.local), ring_begin);
    if (s.rule.sinks > 0 && tail >= s.rule.sinks) {
      s.score_runs[2 * i].push_back({head.sinks, s.rule.sinks});
      exact(s.score_runs[2 * i], 0, s.rule.sinks);
    }
    if (tail < s.n) {
      PushRing(head, tail, s.n, &s.score_runs[2 * i + 1]);
      exact(s.score_runs[2 * i + 1], tail, s.n);
    }
  }
  if (!s.score.empty()) {
    PREHOC_RETURN_IF_ERROR(kernels().score({.tasks = s.score, .group = group, .head_dim = geometry().head_dim}, launch));
  }
  if (s.rule.half_logits) RoundLogits(s);
  return {};
}

// Error bounds at a confidence in the place of proven ones, wherever they are smaller. The codes decide what is chosen, so (with
// bound.scope = head) all errors of a head must hold at once, to both sides: what is kept is bounded from below. With set they
// only widen a choice to max_dropped_mass, and SetBoundOutside() says what is reported.
void Sequence::Impl::AllowForDither(FastStep& s) {
  const int32_t group = layers[static_cast<size_t>(s.layer)].units.front().heads;
  const int64_t in_group = cache->options.codes.group_tokens;
  const SelectorOptions& options = cache->options.selector;
  for (const ScanTask& task : s.scan) {
    const int64_t errors_at_once = options.bound_scope == SelectorOptions::BoundScope::kHead ? 2 * task.groups * in_group : 1;
    const StatisticalLseBound bound(options.bound_confidence, errors_at_once);
    for (int64_t h = 0; h < group; ++h) {
      for (int64_t g = 0; g < task.groups; ++g) {
        const float most = bound.Error(task.variance[h * task.groups + g]);
        float* errors = task.err + h * task.z_stride + g * in_group;
        s.proven[static_cast<size_t>(task.variance - s.variance.data() + h * task.groups + g)] = *std::max_element(errors, errors + in_group);
        for (int64_t t = 0; t < in_group; ++t) errors[t] = std::min(errors[t], most);
      }
    }
  }
}

// Shared candidates between refreshes: what is not on the device is not looked at.
Status Sequence::Impl::ScoreResidents(FastStep& s, size_t index) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  Unit& unit = layer.units[index];
  HeadState& head = layer.heads[static_cast<size_t>(unit.kv_head)];
  const int64_t dim = geometry().head_dim;
  const std::span<const int32_t> slotted = head.residency.positions();
  std::vector<RowRun>& runs = s.score_runs[2 * index];
  std::vector<int32_t> where;
  for (int32_t i = 0; i < std::min<int64_t>(s.rule.sinks, ring_begin); ++i) {
    runs.push_back({head.sinks + i * 2 * dim, 1});
    where.push_back(i);
  }
  for (const int32_t position : slotted) {
    if (position < s.rule.sinks || position >= ring_begin) continue;
    runs.push_back({head.slots + head.residency.SlotOf(position) * 2 * dim, 1});
    where.push_back(position);
  }
  PushRing(head, ring_begin, s.n, &runs);
  for (int64_t i = ring_begin; i < s.n; ++i) where.push_back(static_cast<int32_t>(i));

  std::vector<float> compact(static_cast<size_t>(unit.heads) * where.size());
  const ScoreTask task{.q = s.in.q + unit.first_head * dim, .runs = runs, .z = compact.data(),
                       .z_stride = static_cast<int64_t>(where.size())};
  PREHOC_RETURN_IF_ERROR(
      kernels().score({.tasks = {&task, 1}, .group = unit.heads, .head_dim = geometry().head_dim}, cache->launch()));
  for (int32_t h = 0; h < unit.heads; ++h) {
    float* logits = z(unit.first_head + h);
    std::fill_n(logits, s.n, -kInfinity);
    for (size_t i = 0; i < where.size(); ++i) logits[where[i]] = compact[static_cast<size_t>(h) * where.size() + i];
  }
  step_report.bytes_exact_keys += static_cast<int64_t>(where.size() * geometry().row_bytes() / 2);
  runs.clear();
  return {};
}

// Where whole pages are chosen, z[h, page] holds their bounds: no key is read. One pass over the bounds of a KV head
// serves all of its query heads, whether or not they choose together.
Status Sequence::Impl::ScorePages(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  PREHOC_DCHECK(std::all_of(s.units.begin(), s.units.end(), Chooses));  // no rule by pages has a gate
  const int32_t pages = (s.n - s.rule.local) / s.rule.page;
  PREHOC_CHECK(int64_t{pages} * s.rule.page <= layer.coded);
  s.pages.clear();
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    const HeadState& head = layer.heads[static_cast<size_t>(h)];
    const int32_t first_head = h * geometry().group();
    s.pages.push_back({.q = s.in.q + int64_t{first_head} * geometry().head_dim, .lo = head.page_lo, .hi = head.page_hi,
                       .pages = pages, .z = z(first_head), .z_stride = layout.stride});
    step_report.bytes_codes += pages * static_cast<int64_t>(geometry().row_bytes());
  }
  return kernels().score_pages({.tasks = s.pages, .group = geometry().group(), .head_dim = geometry().head_dim},
                               cache->launch());
}

void Sequence::Impl::SpreadPageScores(FastStep& s, int64_t coded) {
  const auto pages = static_cast<size_t>(coded / 16);
  for (const ScorePagesTask& task : s.pages) {
    const auto first_head = static_cast<int32_t>((task.q - s.in.q) / geometry().head_dim);
    const int32_t heads = layers[static_cast<size_t>(s.layer)].units.front().heads;
    for (int32_t h = 0; h < heads; ++h) {
      for (size_t p = 0; p < pages; ++p) {
        std::fill_n(z(first_head + h) + p * 16, 16, task.z[static_cast<size_t>(h) * pages + p]);
      }
    }
  }
}

void Sequence::Impl::RoundLogits(FastStep& s) {
  for (size_t i = 0; i < s.units.size(); ++i) {
    const Unit& unit = layers[static_cast<size_t>(s.layer)].units[i];
    for (int32_t h = 0; h < unit.heads; ++h) {
      float* logits = z(unit.first_head + h);
      std::transform(logits, logits + s.n, logits, [](float x) { return HalfToFloat(FloatToHalf(x)); });
    }
  }
}

Status Sequence::Impl::Choose(FastStep& s, bool plain) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  if (s.rule.residents_only && !plain) PREHOC_RETURN_IF_ERROR(RefreshCandidates(s));
  s.choose.clear();
  // At u = 0 nothing is resident yet: what is chosen there is what the slow clock starts with.
  const bool pools = s.u == 0 || selector().Residency().turns();
  const bool by_residency = !complete() && (s.rule.residents_only || (s.rule.theta > 0 && s.u > 0));
  for (size_t i = 0; i < layer.units.size(); ++i) {
    Unit& unit = layer.units[i];
    UnitStep& now = s.units[i];
    if (!Chooses(now)) continue;
    ChooseTask task = ChooseTaskFor(s, i);
    if (plain) task.dilate_m = task.dilate_r = 0;
    if (by_residency) {
      task.resident = layer.heads[static_cast<size_t>(unit.kv_head)].residency.resident_bits();
      task.log_theta = s.rule.residents_only ? kInfinity : static_cast<float>(std::log(unit.ThetaNow(s.rule)));
    }
    if (unit.pooled && pools && !s.rule.residents_only && !plain) {
      task.pooled = unit.pooled;
      task.pool_reset = unit.pool_restart;
      if (unit.pool_restart) unit.pooled_scans = 0;
      unit.pool_restart = false;
      ++unit.pooled_scans;
    }
    now.chosen.resize(static_cast<size_t>(task.max_chosen()));
    task.chosen = now.chosen.data();
    s.choose.push_back(task);
  }
  PREHOC_RETURN_IF_ERROR(kernels().choose({.tasks = s.choose, .group = layer.units.front().heads}, cache->launch()));
  for (UnitStep& now : s.units) {
    if (!Chooses(now)) continue;
    now.chosen.resize(static_cast<size_t>(now.chosen_count));
    if (s.rule.page > 0) ExpandPages(s.rule.page, &now.chosen);
    now.met = now.met_byte != 0 || !s.rule.target_is_bound;
  }
  const bool of_set = s.rule.bound == BoundKind::kStatistical && cache->options.selector.bound_scope == SelectorOptions::BoundScope::kSet &&
                      !s.variance.empty();
  const bool bounds_to_come = s.rule.bound != BoundKind::kNone && (of_set || !BoundsWhileChoosing(s.rule));
  for (size_t i = 0; i < layer.units.size() && bounds_to_come; ++i) {
    UnitStep& now = s.units[i];
    for (int32_t h = 0; h < layer.units[i].heads && Chooses(now); ++h) {
      const int32_t end = s.n - s.rule.local;
      const double bound = of_set ? SetBoundOutside(s, i, h, end, now.chosen) : LseOutside(s, i, h, end, now.chosen);
      now.lse_out_bound[static_cast<size_t>(h)] = static_cast<float>(bound);
    }
  }
  return s.rule.clip_visible && !plain && s.rule.dilate_m > 0 ? AddVisibleNeighbours(s) : OkStatus();
}

// cis.clip = visible: neighbours of the first ranks that lie in the local window stay chosen when the window moves on.
Status Sequence::Impl::AddVisibleNeighbours(FastStep& s) {
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  std::vector<std::vector<int32_t>> ranked(layer.units.size());
  for (size_t i = 0; i < layer.units.size(); ++i) {
    UnitStep& now = s.units[i];
    if (!Chooses(now)) continue;
    UnitStep unused = now;  // only the positions are wanted
    s.choose.assign(1, ChooseTaskFor(s, i));
    ChooseTask& task = s.choose.front();
    task.k = std::min(s.rule.dilate_m, s.rule.k);
    task.dilate_m = task.dilate_r = 0;
    std::vector<int32_t> top(static_cast<size_t>(task.max_chosen()));
    int32_t num = 0;
    task.chosen = top.data();
    task.count = &num;
    task.lse_all = unused.lse_all.data();
    task.lse_out = unused.lse_out.data();
    PREHOC_RETURN_IF_ERROR(kernels().choose({.tasks = s.choose, .group = layer.units.front().heads}, cache->launch()));
    const int32_t hi = s.n - s.rule.local;
    int32_t reach = hi;  // neighbours end here
    for (int32_t rank = 0; rank < num; ++rank) reach = std::max(reach, top[static_cast<size_t>(rank)] + s.rule.dilate_r + 1);
    for (int32_t position = hi; position < std::min(reach, s.n); ++position) {
      const bool near = std::any_of(top.begin(), top.begin() + num,
                                    [&](int32_t p) { return position - p <= s.rule.dilate_r; });
      if (near) now.chosen.push_back(position);
    }
  }
  return {};
}

ChooseTask Sequence::Impl::ChooseTaskFor(FastStep& s, size_t index) {
  const Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  UnitStep& now = s.units[index];
  ChooseTask task;
  task.z = z(unit.first_head);
  task.err = BoundsWhileChoosing(s.rule) ? err(unit.first_head) : nullptr;
  task.z_stride = layout.stride;
  task.n = s.n;
  task.sinks = s.rule.cut_sinks ? 0 : s.rule.sinks;
  task.lo = s.rule.lo;
  task.hi = s.n - s.rule.local;
  task.k = s.rule.k;
  task.cap = s.rule.cap;
  if (s.rule.middle_only) {
    task.sinks = 0;
    task.n = task.hi;
  }
  if (s.rule.page > 0) {  // logits are those of pages
    for (int32_t* bound : {&task.n, &task.lo, &task.hi, &task.k, &task.cap}) *bound /= s.rule.page;
  }
  task.target_drop = static_cast<float>(s.rule.target_drop);
  task.dilate_m = s.rule.dilate_m;
  task.dilate_r = s.rule.dilate_r;
  task.exact_budget = s.rule.exact_budget;
  task.rule = GroupRuleOf(s.rule.gqa_set);
  task.count = &now.chosen_count;
  task.lse_all = now.lse_all.data();
  task.lse_out = now.lse_out.data();
  task.lse_out_bound = BoundsWhileChoosing(s.rule) ? now.lse_out_bound.data() : nullptr;
  task.met = &now.met_byte;
  return task;
}

// The choice becomes the one in force.
void Sequence::Impl::Keep(FastStep& s, size_t index) {
  Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  UnitStep& now = s.units[index];
  const auto dim = static_cast<size_t>(geometry().head_dim);
  const auto of_unit = [&](const float* q) { return q + static_cast<size_t>(unit.first_head) * dim; };
  const size_t size = static_cast<size_t>(unit.heads) * dim;
  unit.has_choice = false;  // until it is whole
  unit.chosen_at = s.u;
  unit.local_left = s.n - s.rule.local;
  unit.anchor.assign(of_unit(s.in.q), of_unit(s.in.q) + size);
  if (s.rule.pre_rope && s.in.q_pre_rope) unit.anchor_pre.assign(of_unit(s.in.q_pre_rope), of_unit(s.in.q_pre_rope) + size);
  unit.chosen.assign(now.chosen.begin(), now.chosen.end());
  // What the choice leaves out; attention to it will know better (AccountMass), unless this is u = 0, where none follows.
  for (size_t h = 0; h < unit.dropped.size(); ++h) {
    unit.dropped[h] = std::exp(std::min(0.0f, now.lse_out[h] - now.lse_all[h]));
  }
  // A certificate speaks of the rows that can be outside while the choice lasts: dropped now, or leaving the window later.
  const bool certified = cache->options.selector.cis.gate == CisOptions::Gate::kCertified;
  if (certified) {
    unit.lse_dropped.assign(static_cast<size_t>(unit.heads), 0);
    const int32_t leaving = s.rule.local_held ? 0 : std::min(cache->options.selector.cis.block - 1, s.rule.local);
    for (int32_t h = 0; h < unit.heads; ++h) {
      unit.lse_dropped[static_cast<size_t>(h)] = LseOutside(s, index, h, s.n - s.rule.local + leaving, unit.chosen);
    }
  }
  unit.has_choice = true;
}

// Over what is in sight and not chosen, up to `end`; local positions before `end` count as outside. +inf if a logit or its
// error is not known: then so is the sum.
double Sequence::Impl::LseOutside(const FastStep& s, size_t index, int32_t h, int32_t end,
                                  std::span<const int32_t> chosen) const {
  const Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  const float* logits = z(unit.first_head + h);
  const float* errors = err(unit.first_head + h);
  double most = -std::numeric_limits<double>::infinity();
  double sum = 0;
  size_t next = 0;
  for (int32_t i = s.rule.lo; i < end; ++i) {
    while (next < chosen.size() && chosen[next] < i) ++next;
    if (next < chosen.size() && chosen[next] == i) continue;
    const double value = static_cast<double>(logits[i]) + (errors ? errors[i] : 0.0f);
    if (std::isnan(value) || value == kInfinity) return kInfinity;
    if (value > most) sum = sum * std::exp(most - value), most = value;
    if (value > -std::numeric_limits<double>::infinity()) sum += std::exp(value - most);
  }
  return sum > 0 ? most + std::log(sum) : -std::numeric_limits<double>::infinity();
}

// The statistical bound of what is outside, over blocks, whose dithers are independent. Positions as in LseOutside(); exact logits
// (error 0) make blocks of no variance. Near the choice is what looks no better than the best that is outside, give or take two
// standard deviations.
double Sequence::Impl::SetBoundOutside(FastStep& s, size_t index, int32_t h, int32_t end, std::span<const int32_t> chosen) const {
  const Unit& unit = layers[static_cast<size_t>(s.layer)].units[index];
  const float* logits = z(unit.first_head + h);
  const float* errors = err(unit.first_head + h);
  const auto in_block = static_cast<int32_t>(cache->options.codes.group_tokens);
  const size_t groups = s.variance.size() / s.units.size() / static_cast<size_t>(unit.heads);
  const size_t of_head = (index * static_cast<size_t>(unit.heads) + static_cast<size_t>(h)) * groups;
  s.outside.assign(static_cast<size_t>(std::max(0, end - s.rule.lo)), 1);
  for (const int32_t position : chosen) {
    if (position >= s.rule.lo && position < end) s.outside[static_cast<size_t>(position - s.rule.lo)] = 0;
  }
  float best = -kInfinity;  // of what is outside
  for (int32_t i = s.rule.lo; i < end; ++i) {
    if (std::isnan(logits[i]) || logits[i] == kInfinity) return kInfinity;
    if (s.outside[static_cast<size_t>(i - s.rule.lo)]) best = std::max(best, logits[i]);
  }
  s.blocks_outside.clear();
  for (int32_t begin = s.rule.lo, stop; begin < end; begin = stop) {
    const auto block = static_cast<size_t>(begin / in_block);
    stop = std::min((begin / in_block + 1) * in_block, end);
    const float top = std::min(*std::max_element(logits + begin, logits + stop), best);
    if (top == -kInfinity) continue;
    const bool coded = block < groups;
    const float near = coded ? best + 2 * std::sqrt(s.variance[of_head + block]) : -kInfinity;
    double outside = 0, close = 0;
    for (int32_t i = begin; i < stop; ++i) {
      const bool out = s.outside[static_cast<size_t>(i - s.rule.lo)] != 0;
      if (errors[i] == 0) {
        if (out) s.blocks_outside.push_back({.lse = logits[i]});
        continue;
      }
      if (!coded) return kInfinity;
      if (!out && !(logits[i] <= near)) continue;
      const double weight = std::exp(static_cast<double>(logits[i]) - top);
      close += weight;
      if (out) outside += weight;
    }
    if (close == 0) continue;
    const double base = static_cast<double>(top) + s.bias[of_head + block];
    s.blocks_outside.push_back({.lse = base + std::log(outside), .lse_near = base + std::log(close),
                                .variance = s.variance[of_head + block], .proven = s.proven[of_head + block]});
  }
  return StatisticalLseBound(cache->options.selector.bound_confidence).OverBlocks(s.blocks_outside);
}

// The positions [begin, end) of the ring, in at most two runs.
void Sequence::Impl::PushRing(const HeadState& head, int64_t begin, int64_t end, std::vector<RowRun>* runs) const {
  while (begin < end) {
    const int64_t run = std::min<int64_t>(layout.ring - begin % layout.ring, end - begin);
    runs->push_back({head.ring + begin % layout.ring * static_cast<int64_t>(row_halfs()), static_cast<int32_t>(run)});
    begin += run;
  }
}

int64_t Sequence::Impl::ResidentCount(const HeadState& head) const {
  return visible() - ring_begin + head.residency.held() + std::min<int64_t>(sinks, ring_begin);
}

// Shared candidates: a turn of the slow clock comes before the choice, on scores of everything.
bool Sequence::Impl::PoolIsDue(const FastStep& s) const {
  const ResidencyRule residency = selector().Residency();
  if (residency.factor <= 0 || complete()) return false;
  return s.u % residency.refresh == 0 || layers[static_cast<size_t>(s.layer)].units.front().pooled_scans == 0;
}

Status Sequence::Impl::RefreshCandidates(FastStep& s) {
  if (!PoolIsDue(s)) return {};
  LayerState& layer = layers[static_cast<size_t>(s.layer)];
  const ResidencyRule residency = selector().Residency();
  s.choose.clear();
  for (size_t i = 0; i < layer.units.size(); ++i) {
    Unit& unit = layer.units[i];
    ChooseTask task = ChooseTaskFor(s, i);
    task.k = task.cap = 0;
    task.target_drop = -1;
    task.pooled = unit.pooled;
    task.pool_reset = unit.pooled_scans % std::max(1, residency.pool) == 0;
    s.units[i].chosen.resize(static_cast<size_t>(task.max_chosen()));
    task.chosen = s.units[i].chosen.data();
    ++unit.pooled_scans;
    s.choose.push_back(task);
  }
  PREHOC_RETURN_IF_ERROR(kernels().choose({.tasks = s.choose, .group = layer.units.front().heads}, cache->launch()));
  const bool initial = layer.units.front().pooled_scans == 1;
  return Refresh(s.layer, AllHeads(), initial ? 0 : residency.lag);
}

}  // namespace prehoc
