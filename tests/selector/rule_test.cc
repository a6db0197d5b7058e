// What Selector::Rule() adds to every method: sinks and local, small n, bounds, the age of a choice.
#include "tests/selector/selector_test_util.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

StepRule RuleAt(const SelectorOptions& options, int64_t n, int64_t step = 1) {
  return MakeSelector(options)->Rule({.layer = 3, .layers = 4, .step = step, .n = n});
}

TEST(Rule, SmallSequencesAreDense) {
  for (const char* kind : {"window", "oracle", "cis", "cpe", "sc", "tc"}) {
    const SelectorOptions options = Options(kind, {"budget=100"});
    EXPECT_TRUE(RuleAt(options, 100).attend_all) << kind;
    EXPECT_FALSE(RuleAt(options, 101).attend_all) << kind;
    EXPECT_TRUE(RuleAt(options, 1).attend_all) << kind;
    const StepRule rule = RuleAt(options, 100);
    EXPECT_FALSE(rule.may_inherit || rule.residents_only || rule.filter_each_step) << kind;
    EXPECT_EQ(rule.scorer, Scorer::kNone) << kind;
    EXPECT_EQ(rule.k, 0) << kind;
  }
}

TEST(Rule, RegionsAreDisjointAndInOrder) {
  SeededRng rng;
  for (int i = 0; i < 2000; ++i) {
    SelectorOptions options = Options(rng.Pick(SelectorKindNames()));
    options.budget.sinks = static_cast<int32_t>(rng.Int(0, 20));
    options.budget.local = static_cast<int32_t>(rng.Int(1, 40));
    if (rng.Chance(0.5)) options.budget.tokens = options.budget.sinks + options.budget.local + static_cast<int32_t>(rng.Int(0, 50));
    if (options.kind == SelectorKind::kQuest && options.budget.tokens > 0) options.budget.tokens += 48;  // three pages
    options.psaw.c = rng.Uniform(0.01, 1);
    options.psaw.keep_sink = rng.Chance(0.5);
    const int64_t n = rng.Int(1, 300);
    const StepRule rule = RuleAt(options, n, rng.Int(0, 40));
    ASSERT_GE(rule.sinks, 0);
    ASSERT_LE(rule.sinks, rule.lo);
    ASSERT_LE(rule.lo, n - rule.local);
    ASSERT_GE(rule.local, 0);
    ASSERT_LE(rule.k, n - rule.local - rule.lo);
    ASSERT_LE(rule.k, rule.cap);
    ASSERT_LE(rule.cap, n - rule.local - rule.lo);
  }
}

TEST(Rule, MaxDroppedMassScoresEachStepAndMayTakeEverything) {
  for (const char* kind : {"oracle", "cis", "sc", "tc"}) {
    const SelectorOptions options = Options(kind, {"budget=100", "max_dropped_mass=0.05"});
    const StepRule rule = RuleAt(options, 1000);
    EXPECT_DOUBLE_EQ(rule.target_drop, 0.05) << kind;
    EXPECT_TRUE(rule.target_is_bound) << kind;
    EXPECT_EQ(rule.k, 60) << kind;            // from the budget on
    EXPECT_EQ(rule.cap, 1000 - 40) << kind;   // up to the whole middle
    EXPECT_TRUE(MustSelect(rule, 1)) << kind;
    EXPECT_FALSE(rule.residents_only) << kind;
    EXPECT_EQ(rule.theta, 0) << kind;         // nothing that was chosen is skipped
    EXPECT_EQ(rule.dilate_m, 0) << kind;
    EXPECT_TRUE(MakeSelector(options)->NeedsErrorBounds()) << kind;
  }
}

TEST(Rule, MassBudgetsAreByRankAlone) {
  const SelectorOptions options = Options("cis", {"budget=mass(0.9,cap=100)", "cis.budget=cis*", "cis.clip=visible",
                                                  "cis.anchor_attends=plain"});
  const StepRule rule = RuleAt(options, 1000);
  EXPECT_DOUBLE_EQ(rule.target_drop, 1 - 0.9);
  EXPECT_FALSE(rule.target_is_bound);
  EXPECT_EQ(rule.k, 0);
  EXPECT_EQ(rule.cap, 60);
  EXPECT_EQ(rule.dilate_m, 0);
  EXPECT_EQ(rule.dilate_r, 0);
  EXPECT_FALSE(rule.exact_budget || rule.dilate_later || rule.clip_visible);
  EXPECT_TRUE(rule.may_inherit);  // the gate is not touched
  EXPECT_FALSE(MakeSelector(options)->NeedsErrorBounds());
}

TEST(Rule, CertifyEveryLimitsTheAgeOfAChoice) {
  StepRule rule = RuleAt(Options("tc", {"certify_every=5"}), 1000);
  EXPECT_TRUE(Inherits(rule, 1, 4));
  EXPECT_FALSE(Inherits(rule, 1, 5));
  rule = RuleAt(Options("tc", {"certify_every=100"}), 1000);
  EXPECT_TRUE(Inherits(rule, 1, 16));
  EXPECT_FALSE(Inherits(rule, 1, 17));  // tc.max_age is the shorter
  rule = RuleAt(Options("cis", {"certify_every=5"}), 1000);
  EXPECT_TRUE(Inherits(rule, 1, 4));
  EXPECT_FALSE(Inherits(rule, 1, 5));
  rule = RuleAt(Options("cis", {"certify_every=1"}), 1000);
  EXPECT_FALSE(Inherits(rule, 1, 1));
  EXPECT_TRUE(MustSelect(rule, 1));
}

TEST(Rule, FailingTheGateIsNotTheSameAsHavingToSelect) {
  const StepRule rule = RuleAt(Options("cis", {"cis.fail=dense", "certify_every=8"}), 1000);
  EXPECT_FALSE(MustSelect(rule, 3));
  EXPECT_FALSE(Inherits(rule, 0.1f, 3));  // failed: rule.fail applies
  EXPECT_TRUE(MustSelect(rule, 8));       // too old: selects, whatever rule.fail says
  EXPECT_TRUE(MustSelect(rule, -1));      // no choice yet
  EXPECT_FALSE(Inherits(rule, std::numeric_limits<float>::quiet_NaN(), 3));
}

}  // namespace
}  // namespace prehoc
