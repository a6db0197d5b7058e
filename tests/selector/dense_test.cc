// Dense: everything visible, always.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {

TEST(Dense, RuleAttendsToAllAndNeedsNothing) {
  const auto selector = MakeSelector(Options("dense"));
  for (const int64_t n : {1, 7, 40, 1000, 1 << 20}) {
    for (const int64_t step : {0, 1, 17}) {
      const StepRule rule = selector->Rule({.layer = 3, .layers = 4, .step = step, .n = n});
      EXPECT_TRUE(rule.attend_all) << n;
      EXPECT_FALSE(rule.cut_sinks);
      EXPECT_FALSE(rule.may_inherit);
      EXPECT_EQ(rule.scorer, Scorer::kNone);
      EXPECT_EQ(rule.lo, rule.sinks);  // nothing is cut between sinks and middle
    }
  }
  EXPECT_FALSE(selector->NeedsCodes());
  EXPECT_FALSE(selector->NeedsPages());
  EXPECT_FALSE(selector->NeedsPreRope());
  EXPECT_FALSE(selector->NeedsErrorBounds());
  EXPECT_EQ(selector->Residency().factor, 0);
}

TEST(Dense, PrefillIsDenseAndLeavesNoMark) {
  const auto selector = MakeSelector(Options("dense"));
  const PrefillRule rule = selector->Prefill(3, 4, 1000, 512);
  EXPECT_EQ(rule.frozen, 0);
  EXPECT_FALSE(rule.windowed);
  EXPECT_FALSE(rule.reuse_kv);
  EXPECT_EQ(selector->WindowStart(3, 4, 1000), 0);
  EXPECT_EQ(selector->MethodTag(1000), "");
}

TEST(Dense, TraceAttendsToAll) {
  HandLayer layer(Options("dense"), 1, 2);
  const ReferenceDecision prompt = layer.Step({{1, 2, 3}, {3, 2, 1}}, {0});
  EXPECT_TRUE(prompt.attended[0].empty());  // step 0's attention belongs to prefill
  const ReferenceDecision step = layer.Step({{1, 2, 3, 4}, {4, 3, 2, 1}}, {0});
  for (size_t h = 0; h < 2; ++h) {
    EXPECT_EQ(step.attended[h], Range(0, 4));
    EXPECT_FALSE(step.selected[h]);
    EXPECT_EQ(step.dropped[h], 0);
    EXPECT_EQ(step.bound[h], -1);
  }
}

}  // namespace
}  // namespace prehoc
