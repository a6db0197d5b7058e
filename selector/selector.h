// What a step attends to, decided before attention is scored. A selector is a pure function from (layer, step, visible
// positions) to a rule; the cache applies the rule per KV head with kernels, so every method runs through one pipeline
// (two clocks, cache/README.md) and a rule can be compared in a test, printed, or captured in a graph.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/result.h"
#include "selector/options.h"

namespace prehoc {

struct StepContext {
  int32_t layer = 0;   // 0-based
  int32_t layers = 0;
  int64_t step = 0;    // u: 0 = the last prompt token (select only), 1 = the first decode step
  int64_t n = 0;       // visible positions, the current one included
  bool complete = false;  // the device holds, or will hold, every row of the sequence
  bool reads_store = false;  // some of its rows may have to be read from the store
};

// What one layer does at one step, before anything is known about a head.
struct StepRule {
  bool attend_all = false;   // every visible position (within the window), exactly; nothing is selected
  Scorer scorer = Scorer::kNone;  // kNone without attend_all: sinks and local only
  int32_t sinks = 0;
  int32_t local = 0;         // the last positions are always kept
  int32_t lo = 0;            // first position of the middle: sinks, or the PSAW edge
  bool cut_sinks = false;    // PSAW without keep_sink: [0, lo) is out of sight, sinks included
  bool evict_cut = false;    // what is out of sight now never returns in this layer: its rows may be freed

  // Gate: an earlier choice is kept while this holds (age in steps since it was made).
  bool may_inherit = false;  // false: select now (block start, no gate)
  double tau = 2;            // <= -1 always, >= 1 never
  int32_t max_age = 0;       // inclusive; 0 = no limit
  bool pre_rope = false;
  bool gate_batch = false;   // the cosine that counts is the least of all sequences that step together
  CisOptions::GateScope scope = CisOptions::GateScope::kKvHead;
  CisOptions::OnFail fail = CisOptions::OnFail::kReselect;
  bool certified = false;    // gate on the certificate (certificate.h) instead of the cosine
  double delta_max = 0;
  bool by_mass = false;      // gate on ExpectedMiss() instead of the cosine; tau is not looked at
  double epsilon = 0;

  // Choice.
  int32_t k = 0;             // middle positions
  int32_t cap = 0;           // most middle positions when a mass or bound is aimed at
  double target_drop = -1;   // >= 0: keep until the dropped mass is at most this
  bool target_is_bound = false;  // by bound (max_dropped_mass) rather than estimate (mass budget)
  BoundKind bound = BoundKind::kNone;  // what a selection has to say of what it drops
  double confidence = 0;         // of a statistical bound
  int32_t dilate_m = 0, dilate_r = 0;  // the first m ranks bring p - 1, p + 1, p - 2, .. p + r: in this order, for exact_budget
  bool clip_visible = false;     // neighbours may also lie in the local window; the set then overlaps it until it moves on
  bool dilate_later = false;     // anchor step attends the plain set, later steps the dilated one
  bool exact_budget = false;
  CisOptions::GqaSet gqa_set = CisOptions::GqaSet::kMaxWeight;
  bool half_logits = false;
  // Scores are of the middle alone, weights are shares of it, and they only order it: nothing is known of what is
  // dropped.
  bool middle_only = false;
  int32_t page = 0;          // > 0: whole pages of so many positions are chosen; lo, n - local and k are multiples of it
  // From step 1 on, heads and layers that have a source (borrow_map.h) take its choice of the same step instead of making
  // one. At step 0 nobody borrows: what each of them chooses there, for the prompt's last queries, is what the maps come from.
  bool borrows = false;
  bool local_held = false;   // the local window keeps its left edge until the next selection
  bool filter_each_step = false;  // drop inherited positions below lo

  // Residency.
  // Choose among device-resident positions (shared candidates), weighed as shares of what the step scored: the
  // residents, or at a refresh everything. Only the latter, a scan of all positions, is a retrieval.
  bool residents_only = false;
  double theta = 0;          // with a device that does not hold everything: fetch missing positions heavier than this;
                             // 0 = fetch whatever is chosen
  double theta_of_dropped = 0;  // > 0: and a head's theta is at least this share of what its last choice dropped, over k
  double ThetaOf(double dropped) const;
};

// The slow clock of one (layer, KV head). Rows that a step had to fetch stay whatever it says; without turns what was not attended to for longest makes room.
struct ResidencyRule {
  double factor = 0;     // wanted = factor * k rows (mass budget: factor * cap), at each turn and when the prompt ends; 0 = nothing is
  int32_t refresh = 16;  // [steps] between turns; 0 = there are none
  int32_t pool = 16;     // scans whose scores are pooled by maximum
  int32_t lag = 0;       // [steps] what a refresh at step t decides serves from step t + lag on; at most `refresh`
  bool stagger = true;   // (layer, KV head) pairs refresh at different steps
  bool turns() const { return factor > 0 && refresh > 0; }
};

// What prefill leaves out (PSAW, ETF).
struct PrefillRule {
  int64_t frozen = 0;      // ETF: positions [0, frozen) pass this layer unchanged
  bool reuse_kv = false;   // their K and V are not computed either, but those of ...
  int32_t reuse_layer = -1;  // ... this layer (0-based); -1: of the last layer that computed them, for each token its own
  bool windowed = false;   // PSAW: a query that sees n positions attends from WindowStart(n) on, and to the sinks
  bool keep_sink = true;   // false: the sinks go, all together, once WindowStart(n) has passed them
};

class Selector {
 public:
  // Returns kInvalid as SelectorOptions::Validate does.
  static Result<std::unique_ptr<Selector>> Create(const SelectorOptions& options);
  virtual ~Selector() = default;

  const SelectorOptions& options() const { return options_; }
  std::string_view name() const { return SelectorKindName(options_.kind); }

  StepRule Rule(const StepContext& context) const;  // the method's rule, then what all methods share (small n, bounds)
  ResidencyRule Residency() const { return DoResidency(); }
  PrefillRule Prefill(int32_t layer, int32_t layers, int64_t prompt_tokens, int64_t chunk_end) const {
    return DoPrefill(layer, layers, prompt_tokens, chunk_end);
  }
  // P_l(n): positions [0, result) are out of the window of a query that sees n positions. Never decreases with n, and
  // leaves at least the local window. 0 without PSAW.
  virtual int64_t WindowStart(int32_t layer, int32_t layers, int64_t n) const;
  bool NeedsCodes() const;      // the index must hold codes
  bool NeedsPages() const;      // ... page bounds
  int32_t PageTokens() const;   // of so many positions each
  bool NeedsLabels() const;     // ... labels of keys (hshare)
  bool ChoosesPerQueryHead() const;  // else the query heads of a KV head share one choice
  int32_t HeldSteps() const;    // with StepRule::local_held: how far the window's edge can fall behind
  bool NeedsErrorBounds() const;  // a bound has to include the error of the scores
  bool NeedsPreRope() const;    // the gate compares queries before RoPE
  // Part of every persisted key: how prefill changes K and V. Empty when prefill is dense. With etf.n = chunk they also
  // depend on where the pieces of prefill end: the caller adds that.
  std::string MethodTag(int64_t prompt_tokens) const { return DoMethodTag(prompt_tokens); }

 protected:
  explicit Selector(const SelectorOptions& options) : options_(options) {}

 private:
  virtual StepRule DoRule(const StepContext& context) const = 0;
  virtual ResidencyRule DoResidency() const { return {}; }
  virtual PrefillRule DoPrefill(int32_t, int32_t, int64_t, int64_t) const { return {}; }
  virtual std::string DoMethodTag(int64_t) const { return {}; }

  const SelectorOptions options_;
};

// True if the gate is not asked: no choice yet (age < 0), a block start, or the choice is too old. A head for which
// this is false, and Inherits() too, has failed the gate: rule.fail says what then.
bool MustSelect(const StepRule& rule, int64_t age);

// Share of the attention mass that a choice is expected to miss beyond what it missed when it was made: `dropped` of the mass lay
// outside, and logits have since moved with standard deviation `spread` [nats]. Where they move as a normal variable that knows nothing
// of which keys were dropped, the mass outside grows by E exp(move) = exp(spread^2 / 2). A choice that dropped less than kLeastDropped
// counts as if it had dropped that: its outside is unknown rather than empty.
double ExpectedMiss(double dropped, double spread);

// True if a head keeps its choice: `cosine` as the gate reports it (-2 = unusable), `age` steps since it was made.
// With `certified` the cosine is not looked at: true means that the choice may stay if its bound (certificate.h) also
// holds, that is, is at most delta_max.
bool Inherits(const StepRule& rule, float cosine, int64_t age);

}  // namespace prehoc
