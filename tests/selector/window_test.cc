// Window: sinks and the last positions, as many as the budget allows.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {

// Of 20 visible positions, a budget of 8 with 2 sinks and a local window of 3 leaves 8 - 2 - 3 = 3 for the middle,
// which the window spends on the positions before the local ones: 2 sinks and the last 6.
TEST(Window, SpendsTheWholeBudgetOnTheEnd) {
  const SelectorOptions options = Options("window", {"budget=8", "budget.sinks=2", "budget.local=3"});
  const StepRule rule = MakeSelector(options)->Rule({.layer = 0, .layers = 1, .step = 1, .n = 20});
  EXPECT_FALSE(rule.attend_all);
  EXPECT_EQ(rule.scorer, Scorer::kNone);
  EXPECT_EQ(rule.sinks, 2);
  EXPECT_EQ(rule.local, 6);
  EXPECT_FALSE(rule.may_inherit);

  HandLayer layer(options);
  layer.SkipTo(1);
  // All weights 1: 12 of 20 positions, and of the mass, are dropped.
  const ReferenceDecision step = layer.Step({std::vector<double>(20, 1)}, {0});
  EXPECT_EQ(step.attended[0], Join({Range(0, 2), Range(14, 20)}));
  EXPECT_FALSE(step.selected[0]);
  EXPECT_NEAR(step.dropped[0], 12.0 / 20, 1e-12);
}

// A share follows n: 1/4 of 40 is 10, of 80 is 20.
TEST(Window, FollowsAShare) {
  const auto selector = MakeSelector(Options("window", {"budget=1/4", "budget.sinks=2", "budget.local=3"}));
  EXPECT_EQ(selector->Rule({.layer = 0, .layers = 1, .step = 1, .n = 40}).local, 8);
  EXPECT_EQ(selector->Rule({.layer = 0, .layers = 1, .step = 1, .n = 80}).local, 18);
}

TEST(Window, ShortSequencesAreDense) {
  const auto selector = MakeSelector(Options("window", {"budget=8", "budget.sinks=2", "budget.local=3"}));
  EXPECT_TRUE(selector->Rule({.layer = 0, .layers = 1, .step = 1, .n = 8}).attend_all);
  EXPECT_FALSE(selector->Rule({.layer = 0, .layers = 1, .step = 1, .n = 9}).attend_all);
}

TEST(Window, KnowsNoMassAndGivesNoBound) {
  SelectorOptions options = Options("window");
  options.max_dropped_mass = 0.1;
  EXPECT_STATUS(StatusCode::kInvalid, "max_dropped_mass=0.1", Selector::Create(options));
  options = Options("window");
  options.budget.mass = 0.9;
  EXPECT_STATUS(StatusCode::kInvalid, "budget=mass(0.9", Selector::Create(options));
}

}  // namespace
}  // namespace prehoc
