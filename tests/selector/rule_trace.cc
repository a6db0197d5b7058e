#include "tests/selector/rule_trace.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/half.h"

namespace prehoc {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
}

RuleTrace::RuleTrace(const SelectorOptions& options, const ReferenceShape& shape, bool all_resident)
    : selector_(std::move(Selector::Create(options)).value()), shape_(shape), all_resident_(all_resident) {
  const int32_t together = selector_->ChoosesPerQueryHead() ? 1 : shape.group;
  for (int32_t first = 0; first < shape.heads(); first += together) {
    Head head;
    head.first = first;
    head.count = together;
    head.kv_head = first / shape.group;
    heads_.push_back(head);
  }
}

RuleTrace::Mask RuleTrace::Sight() const {
  Mask mask(static_cast<size_t>(n_), true);
  for (int32_t i = rule_.cut_sinks ? 0 : rule_.sinks; i < rule_.lo; ++i) mask[static_cast<size_t>(i)] = false;
  return mask;
}

RuleTrace::Mask RuleTrace::Base(int32_t local_left) const {
  Mask mask = Sight();
  for (int32_t i = rule_.cut_sinks ? 0 : rule_.sinks; i < local_left; ++i) mask[static_cast<size_t>(i)] = false;
  return mask;
}

double RuleTrace::Z(int32_t head, int32_t i) const {
  const double z = in_->z[static_cast<size_t>(head) * static_cast<size_t>(n_) + static_cast<size_t>(i)];
  return rule_.half_logits ? HalfToFloat(FloatToHalf(static_cast<float>(z))) : z;
}

double RuleTrace::Rankable(int32_t head, int32_t i) const {
  if (!rule_.middle_only) return Z(head, i);
  return in_->scores[static_cast<size_t>(head) * static_cast<size_t>(n_) + static_cast<size_t>(i)];
}

double RuleTrace::Lse(int32_t head, const Mask& of, double errors) const {
  double sum = 0;  // logits of these tests are small: no maximum to take out
  for (int32_t i = 0; i < n_; ++i) {
    if (!of[static_cast<size_t>(i)]) continue;
    const size_t at = static_cast<size_t>(head) * static_cast<size_t>(n_) + static_cast<size_t>(i);
    sum += std::exp(Z(head, i) + (in_->err.empty() ? 0 : errors * in_->err[at]));
  }
  return std::log(sum);
}

double RuleTrace::Cosine(const Head& head, int32_t h) const {
  const std::span<const float> q = rule_.pre_rope ? in_->q_pre : in_->q;
  const std::vector<float>& anchor = rule_.pre_rope ? head.anchor_pre : head.anchor;
  const auto dim = static_cast<size_t>(shape_.head_dim);
  double ab = 0, aa = 0, bb = 0;
  for (size_t c = 0; c < dim; ++c) {
    const double a = anchor[static_cast<size_t>(h) * dim + c];
    const double b = q[static_cast<size_t>(head.first + h) * dim + c];
    ab += a * b, aa += a * a, bb += b * b;
  }
  return aa > 0 && bb > 0 ? std::clamp(ab / std::sqrt(aa * bb), -1.0, 1.0) : -2;
}

double RuleTrace::Gate(const Head& asking) const {
  using Scope = CisOptions::GateScope;
  std::vector<double> cosines;
  for (const Head& head : heads_) {
    const bool counts = rule_.scope == Scope::kLayer        ? true
                        : rule_.scope == Scope::kQueryHead ? &head == &asking
                                                           : head.kv_head == asking.kv_head;
    for (int32_t h = 0; counts && head.chosen_at >= 0 && h < head.count; ++h) cosines.push_back(Cosine(head, h));
  }
  double result = *std::min_element(cosines.begin(), cosines.end());
  if (rule_.scope == Scope::kGroupMean && result > -2) {
    result = 0;
    for (const double cosine : cosines) result += cosine / static_cast<double>(cosines.size());
  }
  for (int32_t h = 0; rule_.gate_batch && !in_->batch.empty() && h < asking.count; ++h) {
    result = std::min(result, in_->batch[static_cast<size_t>(asking.first + h)]);
  }
  return result;
}

double RuleTrace::Score(const Head& head, int32_t i, const std::vector<double>& lse) const {
  double most = -kInfinity, sum = 0;
  for (int32_t h = 0; h < head.count; ++h) {
    const bool raw = rule_.gqa_set == CisOptions::GqaSet::kMaxLogit;
    const double value = Rankable(head.first + h, i) - (raw ? 0 : lse[static_cast<size_t>(h)]);
    most = std::max(most, value);
    sum += std::exp(value);
  }
  return rule_.gqa_set == CisOptions::GqaSet::kMeanWeight ? sum : most;
}

std::vector<double> RuleTrace::Bounds(const Head& head, const Mask& kept) const {
  const auto dim = static_cast<size_t>(shape_.head_dim);
  std::vector<double> bounds;
  for (int32_t h = 0; h < head.count; ++h) {
    const auto at = static_cast<size_t>(h);
    const double u = DroppedLseBound(head.lse_dropped[at], in_->balls[static_cast<size_t>(head.kv_head)],
                                     std::span(head.anchor).subspan(at * dim, dim),
                                     in_->q.subspan(static_cast<size_t>(head.first + h) * dim, dim));
    bounds.push_back(DroppedMassBound(Lse(head.first + h, kept), u));
  }
  return bounds;
}

RuleTrace::Mask RuleTrace::Inherited(const Head& head) const {
  Mask mask = Base(rule_.local_held ? std::max(head.local_left, rule_.lo) : n_ - rule_.local);
  for (const int32_t i : head.middle) {
    if (!rule_.filter_each_step || i >= rule_.lo) mask[static_cast<size_t>(i)] = true;
  }
  return mask;
}

bool RuleTrace::Resident(const Head& head, int32_t i) const {
  const auto at = static_cast<size_t>(i);
  return all_resident_ || at >= head.resident.size() || head.resident[at];
}

bool RuleTrace::Refresh(Head* head) {
  const ResidencyRule residency = selector_->Residency();
  if (head->due >= 0 && in_->step >= head->due) head->resident = head->coming, head->due = -1;
  const bool first = head->pool.empty();
  if (!first && in_->step % residency.refresh != 0) return false;
  std::vector<double> lse, scores(static_cast<size_t>(n_), -kInfinity);
  for (int32_t h = 0; h < head->count; ++h) lse.push_back(Lse(head->first + h, Sight()));
  for (int32_t i = rule_.lo; i < n_ - rule_.local; ++i) scores[static_cast<size_t>(i)] = Score(*head, i, lse);
  head->pool.push_back(scores);
  if (static_cast<int32_t>(head->pool.size()) > residency.pool) head->pool.pop_front();

  std::vector<std::pair<double, int32_t>> order;
  for (int32_t i = rule_.lo; i < n_ - rule_.local; ++i) {
    double most = -kInfinity;
    for (const auto& scan : head->pool) {
      if (static_cast<size_t>(i) < scan.size()) most = std::max(most, scan[static_cast<size_t>(i)]);
    }
    order.emplace_back(-most, i);
  }
  std::sort(order.begin(), order.end());
  const Budget& budget = selector_->options().budget;
  const int32_t rows = budget.mass > 0 ? budget.MiddleCap(n_) : budget.MiddleK(n_);
  order.resize(std::min(order.size(), static_cast<size_t>(residency.factor * rows)));
  Mask wanted(static_cast<size_t>(n_ - rule_.local), false);  // the local window, and what follows, stays
  for (const auto& [score, i] : order) wanted[static_cast<size_t>(i)] = true;
  if (first || residency.lag == 0) {
    head->resident = wanted;
  } else {
    head->coming = wanted;
    head->due = in_->step + residency.lag;
  }
  return true;
}

// The choice after dilation; `plain`: before it.
RuleTrace::Mask RuleTrace::Choose(Head* head, bool* retrieval, Mask* plain) const {
  const int32_t hi = n_ - rule_.local;
  const bool scans = !rule_.residents_only || *retrieval;
  *retrieval = scans;
  Mask scored = Sight();
  for (int32_t i = rule_.lo; i < hi; ++i) {
    if (!scans && !Resident(*head, i)) scored[static_cast<size_t>(i)] = false;
  }
  std::vector<double> lse;
  for (int32_t h = 0; h < head->count; ++h) {
    double middle = 0;
    for (int32_t i = rule_.lo; rule_.middle_only && i < hi; ++i) middle += std::exp(Rankable(head->first + h, i));
    lse.push_back(rule_.middle_only ? std::log(middle) : Lse(head->first + h, scored));
  }
  std::vector<std::pair<double, int32_t>> order;
  for (int32_t i = rule_.lo; i < hi; ++i) {
    if (!rule_.residents_only || Resident(*head, i)) order.emplace_back(-Score(*head, i, lse), i);
  }
  std::sort(order.begin(), order.end());

  Mask mask = Base(hi);
  const auto good_enough = [&] {
    Mask rest = scored;
    for (size_t i = 0; i < rest.size(); ++i) rest[i] = rest[i] && !mask[i];
    const double e = rule_.target_is_bound ? 1 : 0;
    for (int32_t h = head->first; h < head->first + head->count; ++h) {
      const double out = std::exp(Lse(h, rest, e)), kept = std::exp(Lse(h, mask, -e));
      if (out / (out + kept) > rule_.target_drop) return false;
    }
    return true;
  };
  const size_t least = std::min(order.size(), static_cast<size_t>(rule_.k));
  const size_t most = rule_.target_drop < 0 ? least : std::max(least, std::min(order.size(), static_cast<size_t>(rule_.cap)));
  size_t count = 0;
  for (; count < least; ++count) mask[static_cast<size_t>(order[count].second)] = true;
  while (count < most && !good_enough()) mask[static_cast<size_t>(order[count++].second)] = true;
  *plain = mask;

  if (rule_.exact_budget) mask = Base(hi);
  int32_t left = rule_.k;  // of the exact budget
  const auto add = [&](int32_t i, int32_t end) {
    if (i < rule_.lo || i >= end || mask[static_cast<size_t>(i)]) return;
    if (rule_.exact_budget && i < hi && left-- <= 0) return;
    mask[static_cast<size_t>(i)] = true;
  };
  Mask beyond(static_cast<size_t>(n_), false);  // local positions that the set holds of its own
  for (size_t rank = 0; rank < (rule_.exact_budget ? order.size() : count) && (!rule_.exact_budget || left > 0); ++rank) {
    const int32_t p = order[rank].second;
    add(p, hi);
    for (int32_t j = 1; static_cast<int32_t>(rank) < rule_.dilate_m && j <= rule_.dilate_r; ++j) {
      for (const int32_t neighbour : {p - j, p + j}) {
        add(neighbour, hi);
        if (rule_.clip_visible && neighbour >= hi && neighbour < n_) beyond[static_cast<size_t>(neighbour)] = true;
      }
    }
  }
  head->middle.clear();
  for (int32_t i = rule_.lo; i < n_; ++i) {
    if (i < hi ? mask[static_cast<size_t>(i)] : beyond[static_cast<size_t>(i)]) head->middle.push_back(i);
  }
  return mask;
}

void RuleTrace::Keep(Head* head, const Mask& chosen) const {
  const auto dim = static_cast<size_t>(shape_.head_dim);
  const auto slice = [&](std::span<const float> q) {
    const auto part = q.subspan(static_cast<size_t>(head->first) * dim, static_cast<size_t>(head->count) * dim);
    return std::vector<float>(part.begin(), part.end());
  };
  head->chosen_at = in_->step;
  head->local_left = n_ - rule_.local;
  head->anchor = slice(in_->q);
  if (!in_->q_pre.empty()) head->anchor_pre = slice(in_->q_pre);
  // Dropped now, or leaving the window before the block ends (the whole window is no less).
  const int32_t steps = rule_.local_held ? 0 : std::min(rule_.local, selector_->options().cis.block - 1);
  Mask outside = Sight();
  for (size_t i = 0; i < outside.size(); ++i) outside[i] = outside[i] && !chosen[i];
  for (int32_t i = n_ - rule_.local; i < n_ - rule_.local + steps; ++i) outside[static_cast<size_t>(i)] = true;
  head->lse_dropped.clear();
  for (int32_t h = 0; h < head->count; ++h) head->lse_dropped.push_back(Lse(head->first + h, outside, 1));
}

// What the heads would choose for the prompt's last queries tells who borrows from whom.
void RuleTrace::MapHeads() {
  const ReferenceInput* const now = in_;
  const auto count = static_cast<int32_t>(heads_.size());
  std::vector<int64_t> common(heads_.size() * heads_.size(), 0);
  for (const ReferenceRow& row : now->rows) {
    ReferenceInput input;
    input.n = row.n;
    input.scores = row.scores;
    in_ = &input;
    n_ = static_cast<int32_t>(row.n);
    std::vector<Head> heads(heads_);
    for (Head& head : heads) {
      bool retrieval = false;
      Mask plain;
      Choose(&head, &retrieval, &plain);
    }
    for (size_t i = 0; i < heads.size(); ++i) {
      for (size_t j = 0; j < i; ++j) common[i * heads.size() + j] += InCommon(heads[i].middle, heads[j].middle);
    }
  }
  in_ = now;
  n_ = static_cast<int32_t>(now->n);
  source_ = GreedyBorrowMap(common, count, Borrowers(selector_->options().hshare.heads, count));
}

ReferenceDecision RuleTrace::Step(const ReferenceInput& in) {
  in_ = &in;
  n_ = static_cast<int32_t>(in.n);
  rule_ = selector_->Rule({.layer = shape_.layer, .layers = shape_.layers, .step = in.step, .n = in.n});
  const auto num = static_cast<size_t>(shape_.heads());
  ReferenceDecision decision{std::vector<std::vector<int32_t>>(num), std::vector<bool>(num), std::vector<double>(num),
                             std::vector<double>(num, -1)};
  const bool chooses = !rule_.attend_all && rule_.scorer != Scorer::kNone;
  if (in.step == 0) {
    source_.clear();
    if (rule_.borrows) MapHeads();
  }
  std::vector<double> gates;
  for (const Head& head : heads_) gates.push_back(chooses && head.chosen_at >= 0 ? Gate(head) : -2);

  for (size_t u = 0; u < heads_.size(); ++u) {
    Head& head = heads_[u];
    Mask attended = rule_.attend_all ? Sight() : Base(n_ - rule_.local);
    bool retrieval = false;
    std::vector<double> bounds;
    if (chooses) {
      const int64_t age = head.chosen_at < 0 ? -1 : in.step - head.chosen_at;
      const bool must = MustSelect(rule_, age);
      bool keeps = Inherits(rule_, static_cast<float>(gates[u]), age);
      if (keeps && rule_.certified) {
        bounds = Bounds(head, Inherited(head));
        keeps = *std::max_element(bounds.begin(), bounds.end()) <= rule_.delta_max;
      }
      if (!keeps) bounds.clear();
      if (keeps) {
        attended = Inherited(head);
      } else if (!must && rule_.fail == CisOptions::OnFail::kDense) {
        attended = Sight();
      } else {
        if (rule_.residents_only) retrieval = Refresh(&head);
        const std::vector<int32_t> before = head.middle;
        Mask plain, chosen;
        const size_t lender = rule_.borrows && in.step > 0 && !source_.empty() ? static_cast<size_t>(source_[u]) : u;
        if (lender != u) {
          head.middle = heads_[lender].middle;
          chosen = Base(n_ - rule_.local);
          for (const int32_t i : head.middle) chosen[static_cast<size_t>(i)] = true;
        } else {
          chosen = Choose(&head, &retrieval, &plain);
        }
        if (must || rule_.fail != CisOptions::OnFail::kReselectOnce) {
          Keep(&head, chosen);
        } else {
          head.middle = before;
        }
        attended = rule_.dilate_later ? plain : chosen;
      }
    }
    for (int32_t h = 0; h < head.count; ++h) {
      const auto at = static_cast<size_t>(head.first + h);
      decision.selected[at] = retrieval;
      if (!bounds.empty()) decision.bound[at] = bounds[static_cast<size_t>(h)];
      const Mask sight = Sight();
      Mask seen = attended;  // an inherited position may lie out of sight: neither kept nor dropped mass
      for (size_t i = 0; i < seen.size(); ++i) seen[i] = seen[i] && sight[i];
      decision.dropped[at] = 1 - std::exp(Lse(head.first + h, seen) - Lse(head.first + h, sight));
      for (int32_t i = 0; in.step > 0 && i < n_; ++i) {
        if (attended[static_cast<size_t>(i)]) decision.attended[at].push_back(i);
      }
    }
  }
  return decision;
}

}  // namespace prehoc
