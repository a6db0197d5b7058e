#include "selector/selector.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "selector/methods.h"

namespace prehoc {
namespace selector_internal {

StepRule AttendAll() {
  StepRule rule;
  rule.attend_all = true;
  return rule;
}

StepRule ChooseK(const SelectorOptions& options, Scorer scorer, int64_t n) {
  StepRule rule;
  rule.scorer = scorer;
  rule.k = options.budget.MiddleK(n);
  return rule;
}

}  // namespace selector_internal

namespace {
// Sinks, local window and lower edge, disjoint and in this order for any n: sinks <= lo <= n - local.
void FitEdges(const Budget& budget, int64_t n, StepRule* rule) {
  const auto visible = static_cast<int32_t>(n);
  rule->sinks = std::min(budget.sinks, visible);
  // A rule may bring a local window of its own (the window selector).
  rule->local = std::min(std::max(budget.local, rule->local), visible - rule->sinks);
  rule->lo = std::clamp(rule->lo, rule->sinks, visible - rule->local);
}

// Nothing is chosen: what is left of the rule is what is in sight.
StepRule WithoutChoice(const StepRule& rule) {
  StepRule plain = selector_internal::AttendAll();
  plain.sinks = rule.sinks;
  plain.local = rule.local;
  plain.lo = rule.lo;
  plain.cut_sinks = rule.cut_sinks;
  plain.evict_cut = rule.evict_cut;
  return plain;
}

// Choosing until a mass is reached: ranks only, so that "kept" means what was counted.
void AimAt(double dropped, bool is_bound, int32_t cap, StepRule* rule) {
  rule->target_drop = dropped;
  rule->target_is_bound = is_bound;
  rule->cap = cap;
  rule->dilate_m = rule->dilate_r = 0;
  rule->dilate_later = false;
  rule->clip_visible = false;
  rule->exact_budget = false;
}

void SelectNow(StepRule* rule) {
  rule->may_inherit = false;
  rule->certified = false;
  rule->delta_max = 0;
}

bool IsCis(const SelectorOptions& options) {
  return options.kind == SelectorKind::kCis || options.kind == SelectorKind::kCpe;
}

Scorer ScorerOf(const SelectorOptions& options) {
  switch (options.kind) {
    case SelectorKind::kOracle: return Scorer::kExact;
    case SelectorKind::kCis:
    case SelectorKind::kCpe: return options.cis.scorer;
    case SelectorKind::kSharedCandidates: return options.sc.inner;
    case SelectorKind::kTwoClock: return options.tc.scorer;
    case SelectorKind::kQuest: return Scorer::kPages;
    case SelectorKind::kHShare: return Scorer::kLabels;
    case SelectorKind::kDense:
    case SelectorKind::kWindow:
    case SelectorKind::kPsaw:
    case SelectorKind::kEtf: return Scorer::kNone;
  }
  return Scorer::kNone;
}
}  // namespace

Result<std::unique_ptr<Selector>> Selector::Create(const SelectorOptions& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  switch (options.kind) {
    case SelectorKind::kDense: return selector_internal::MakeDense(options);
    case SelectorKind::kWindow: return selector_internal::MakeWindow(options);
    case SelectorKind::kOracle: return selector_internal::MakeOracle(options);
    case SelectorKind::kCis: return selector_internal::MakeCis(options);
    case SelectorKind::kPsaw: return selector_internal::MakePsaw(options);
    case SelectorKind::kEtf: return selector_internal::MakeEtf(options);
    case SelectorKind::kCpe: return selector_internal::MakeCpe(options);
    case SelectorKind::kSharedCandidates: return selector_internal::MakeSharedCandidates(options);
    case SelectorKind::kTwoClock: return selector_internal::MakeTwoClock(options);
    case SelectorKind::kQuest: return selector_internal::MakeQuest(options);
    case SelectorKind::kHShare: return selector_internal::MakeHShare(options);
  }
  return {StatusCode::kInvalid, "selector kind out of range"};
}

StepRule Selector::Rule(const StepContext& context) const {
  PREHOC_CHECK(context.n >= 0 && context.n <= INT32_MAX && context.step >= 0);
  StepRule rule = DoRule(context);
  FitEdges(options_.Kept(), context.n, &rule);
  if (rule.attend_all || context.n <= int64_t{rule.sinks} + rule.k + rule.local) return WithoutChoice(rule);
  if (rule.scorer == Scorer::kNone) return rule;

  const int32_t middle = static_cast<int32_t>(context.n) - rule.local - rule.lo;
  rule.k = std::min(rule.k, middle);
  rule.cap = rule.k;
  rule.bound = options_.BoundInForce();
  if (rule.bound == BoundKind::kStatistical) rule.confidence = options_.bound_confidence;
  if (options_.max_dropped_mass >= 0) {
    AimAt(options_.max_dropped_mass, true, middle, &rule);
    SelectNow(&rule);
    // A promise is kept with whatever rows it takes, wherever they are.
    rule.residents_only = false;
    rule.theta = 0;
  } else if (options_.budget.mass > 0) {
    AimAt(1 - options_.budget.mass, false, std::min(options_.budget.MiddleCap(context.n), middle), &rule);
  }
  if (options_.certify_every == 1) SelectNow(&rule);
  if (options_.certify_every > 1) {
    const int32_t oldest = options_.certify_every - 1;
    rule.max_age = rule.max_age > 0 ? std::min(rule.max_age, oldest) : oldest;
  }
  return rule;
}

double StepRule::ThetaOf(double dropped) const { return theta > 0 && k > 0 ? std::max(theta, theta_of_dropped * dropped / k) : theta; }

int64_t Selector::WindowStart(int32_t, int32_t, int64_t) const { return 0; }

bool Selector::NeedsCodes() const { return ScorerOf(options_) == Scorer::kCodes; }

bool Selector::NeedsPages() const { return ScorerOf(options_) == Scorer::kPages; }

bool Selector::NeedsLabels() const { return ScorerOf(options_) == Scorer::kLabels; }

int32_t Selector::PageTokens() const { return options_.kind == SelectorKind::kQuest ? options_.quest.page : 16; }

bool Selector::ChoosesPerQueryHead() const {
  constexpr auto alone = CisOptions::GqaSet::kPerQueryHead;
  if (options_.kind == SelectorKind::kQuest) return options_.quest.gqa_set == alone;
  if (options_.kind == SelectorKind::kHShare) return options_.hshare.gqa_set == alone;
  return IsCis(options_) && options_.cis.gqa_set == alone;
}

int32_t Selector::HeldSteps() const {
  if (options_.kind == SelectorKind::kHShare) return options_.hshare.keep_list ? 0 : options_.hshare.steps - 1;
  return IsCis(options_) && options_.cis.local_edge_held ? options_.cis.block - 1 : 0;
}

bool Selector::NeedsErrorBounds() const {
  return options_.BoundInForce() != BoundKind::kNone || (IsCis(options_) && options_.cis.gate == CisOptions::Gate::kCertified && NeedsCodes());
}

bool Selector::NeedsPreRope() const {
  constexpr auto kPreRope = CisOptions::CosStage::kPreRope;
  if (options_.kind == SelectorKind::kTwoClock) return options_.tc.cos_stage == kPreRope && options_.tc.gate == TwoClockOptions::Gate::kCosine;
  return IsCis(options_) && options_.cis.cos_stage == kPreRope;
}

double ExpectedMiss(double dropped, double spread) {
  constexpr double kLeastDropped = 1e-3;
  const double outside = std::max(dropped, kLeastDropped);
  // Of e^x times as much outside, and as much inside as before.
  const double grown = outside * std::exp(std::min(spread * spread / 2, 700.0));
  return grown / (grown + 1 - std::min(outside, 1.0)) - outside;
}

bool MustSelect(const StepRule& rule, int64_t age) {
  return !rule.may_inherit || age < 0 || (rule.max_age > 0 && age > rule.max_age);
}

bool Inherits(const StepRule& rule, float cosine, int64_t age) {
  if (MustSelect(rule, age)) return false;
  if (rule.certified) return true;
  // The ends hold by rule: rounding can carry a cosine past them.
  if (rule.tau <= -1) return true;
  if (rule.tau >= 1) return false;
  return static_cast<double>(cosine) > rule.tau;
}

}  // namespace prehoc
