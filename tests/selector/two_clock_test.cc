// Two clocks: scan everything whenever the gate does not hold; only residency is slow. The default.
#include <cmath>
#include <limits>

#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {
SelectorOptions Small(std::initializer_list<std::string_view> more = {}) {
  SelectorOptions options = Options("tc", {"budget=5", "budget.sinks=1", "budget.local=2"});
  options.tc.tau = 0.8;  // so that 30 degrees pass and 40 do not
  for (const std::string_view knob : more) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
  }
  EXPECT_OK(options.Validate());
  return options;
}
std::vector<double> Peaks(int32_t n, int32_t first, int32_t second) {
  std::vector<double> weights(static_cast<size_t>(n), 1);
  weights[static_cast<size_t>(first)] = 9;
  weights[static_cast<size_t>(second)] = 8;
  return weights;
}

TEST(TwoClock, IsTheDefaultWithTheGateOfCisAndDensePrefill) {
  const SelectorOptions options;
  EXPECT_EQ(options.kind, SelectorKind::kTwoClock);
  const auto selector = MakeSelector(options);
  EXPECT_EQ(selector->name(), "tc");
  const StepRule rule = selector->Rule({.layer = 2, .layers = 4, .step = 5, .n = 16'000});
  EXPECT_TRUE(rule.may_inherit);
  EXPECT_DOUBLE_EQ(rule.tau, 0.9);
  EXPECT_EQ(rule.max_age, 16);
  EXPECT_EQ(rule.scorer, Scorer::kCodes);
  EXPECT_DOUBLE_EQ(rule.theta * rule.k, 0.02) << "of the mass is what all that are chosen may leave out";
  EXPECT_DOUBLE_EQ(TwoClockOptions::ThetaOfMemory(2048), 0.02 / 2048);
  EXPECT_DOUBLE_EQ(TwoClockOptions::ThetaOfMemory(200), 0.0001);
  EXPECT_DOUBLE_EQ(TwoClockOptions::ThetaOfMemory(0), 0.0001);
  EXPECT_DOUBLE_EQ(selector->Rule({.layer = 2, .layers = 4, .step = 5, .n = 16'000, .reads_store = true}).theta, 0.001) << "rows of the store are dear";
  EXPECT_FALSE(rule.residents_only);
  EXPECT_EQ(rule.sinks, 8);
  EXPECT_EQ(rule.local, 32);
  EXPECT_EQ(rule.k, 16'000 / 16 - 40);
  EXPECT_EQ(rule.dilate_m, 0);
  const ResidencyRule residency = selector->Residency();
  EXPECT_EQ(residency.factor, 4);
  EXPECT_EQ(residency.refresh, 0) << "rows stay by their use";
  EXPECT_FALSE(residency.turns());
  EXPECT_EQ(residency.pool, 16);
  EXPECT_EQ(residency.lag, 0);
  EXPECT_TRUE(residency.stagger);
  EXPECT_EQ(selector->MethodTag(1000), "");
  EXPECT_FALSE(selector->Prefill(3, 4, 1000, 1000).windowed);
  EXPECT_EQ(selector->Prefill(3, 4, 1000, 1000).frozen, 0);
  EXPECT_TRUE(selector->NeedsCodes());
  EXPECT_FALSE(selector->NeedsErrorBounds());
}

// Where attention is flat everything that is chosen weighs more than a fixed theta, and is not worth its way.
TEST(TwoClock, ThetaGrowsWithWhatAHeadDropsAnyway) {
  SelectorOptions options;
  const StepRule rule = MakeSelector(options)->Rule({.layer = 2, .layers = 4, .step = 5, .n = 16'000});
  EXPECT_DOUBLE_EQ(rule.ThetaOf(0), rule.theta);
  EXPECT_DOUBLE_EQ(rule.ThetaOf(0.07), rule.theta);
  EXPECT_DOUBLE_EQ(rule.ThetaOf(0.8) * rule.k, 0.2);
  const StepRule far = MakeSelector(options)->Rule({.layer = 2, .layers = 4, .step = 5, .n = 16'000, .reads_store = true});
  EXPECT_DOUBLE_EQ(far.ThetaOf(0.8), 0.001);
  ASSERT_OK(options.Set("tc.theta", "0.00001"));  // whoever names one, means it
  EXPECT_DOUBLE_EQ(MakeSelector(options)->Rule({.layer = 2, .layers = 4, .step = 5, .n = 16'000}).ThetaOf(0.8), 0.00001);
  ASSERT_OK(options.Set("tc.theta", "auto"));
  ASSERT_OK(options.Set("budget", "mass(0.95)"));
  EXPECT_DOUBLE_EQ(MakeSelector(options)->Rule({.layer = 2, .layers = 4, .step = 5, .n = 16'000}).ThetaOf(0.8), 0.0001);
}

// cos 30 degrees = 0.866 passes, cos 40 degrees = 0.766 does not. There are no blocks.
TEST(TwoClock, InheritsWhileTheGateHoldsAndElseScans) {
  HandLayer layer(Small());
  EXPECT_TRUE(layer.Step({Peaks(8, 4, 2)}, {0}).selected[0]);
  ReferenceDecision step = layer.Step({Peaks(9, 5, 3)}, {30});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 4, 7, 8}));
  step = layer.Step({Peaks(10, 5, 3)}, {40});
  EXPECT_TRUE(step.selected[0]);  // a scan is a retrieval
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 5, 8, 9}));
  step = layer.Step({Peaks(11, 4, 2)}, {50});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 5, 9, 10}));
}

TEST(TwoClock, TheGateMayCompareQueriesBeforeRopeAndDecideForALayer) {
  EXPECT_TRUE(MakeSelector(Small({"tc.cos_stage=pre_rope"}))->NeedsPreRope());
  EXPECT_FALSE(MakeSelector(Small())->NeedsPreRope());
  EXPECT_FALSE(MakeSelector(Small({"tc.cos_stage=pre_rope", "tc.gate=mass"}))->NeedsPreRope());
  HandLayer layer(Small({"tc.cos_stage=pre_rope"}));
  layer.Step({Peaks(8, 4, 2)}, {0}, {0});
  EXPECT_FALSE(layer.Step({Peaks(9, 5, 3)}, {90}, {10}).selected[0]);
  EXPECT_TRUE(layer.Step({Peaks(10, 5, 3)}, {0}, {60}).selected[0]);
  EXPECT_EQ(MakeSelector(Small({"tc.gate_scope=layer"}))->Rule({.layers = 2, .step = 1, .n = 100}).scope, CisOptions::GateScope::kLayer);
}

// What is chosen can be anywhere: a jump is followed in its own step, whatever is resident.
TEST(TwoClock, ResidencyDoesNotNarrowTheChoice) {
  for (const bool all_resident : {false, true}) {
    HandLayer layer(Small({"tc.refresh=100", "tc.theta=0"}), 1, 1, all_resident);
    layer.Step({Peaks(8, 4, 2)}, {0});
    EXPECT_EQ(layer.Step({Peaks(9, 5, 3)}, {90}).attended[0], (Positions{0, 3, 5, 7, 8}));
  }
}

TEST(TwoClock, ChoicesGrowOld) {
  HandLayer layer(Small({"tc.max_age=3"}));
  std::vector<bool> scans;
  for (int32_t n = 8; n < 17; ++n) scans.push_back(layer.Step({Peaks(n, 4, 2)}, {0}).selected[0]);
  EXPECT_EQ(scans, (std::vector<bool>{true, false, false, false, true, false, false, false, true}));
  const StepRule rule = MakeSelector(Small({"tc.max_age=3"}))->Rule({.layer = 0, .layers = 1, .step = 9, .n = 100});
  EXPECT_TRUE(Inherits(rule, 1, 3));
  EXPECT_FALSE(Inherits(rule, 1, 4));
  EXPECT_TRUE(MustSelect(rule, 4));
  EXPECT_FALSE(MustSelect(rule, 3));
}

TEST(TwoClock, ShortContextsThatTheDeviceHoldsAreDense) {
  const auto all = [](const char* below, int64_t n, bool complete) {
    return MakeSelector(Small({below}))->Rule({.layer = 0, .layers = 1, .step = 1, .n = n, .complete = complete}).attend_all;
  };
  EXPECT_TRUE(all("tc.dense_below=101", 100, true));
  EXPECT_FALSE(all("tc.dense_below=100", 100, true));
  EXPECT_FALSE(all("tc.dense_below=101", 100, false)) << "rows would come from elsewhere";
  EXPECT_FALSE(all("tc.dense_below=auto", 100, true)) << "nobody says what pays";
  EXPECT_FALSE(all("tc.dense_below=0", 100, true));
}

TEST(TwoClock, GateCanBeOff) {
  for (const char* off : {"tc.tau=off", "tc.tau=1", "tc.tau=7", "tc.max_age=0"}) {
    const auto selector = MakeSelector(Small({off}));
    EXPECT_FALSE(Inherits(selector->Rule({.layer = 0, .layers = 1, .step = 1, .n = 100}), 1, 1)) << off;
    HandLayer layer(Small({off}));
    for (int32_t n = 8; n < 12; ++n) EXPECT_TRUE(layer.Step({Peaks(n, 4, 2)}, {0}).selected[0]) << off;
  }
}

TEST(TwoClock, TheWorstOfAGroupDecides) {
  HandLayer layer(Small(), 1, 2);
  layer.Step({Peaks(8, 4, 2), Peaks(8, 4, 2)}, {0, 0});
  EXPECT_TRUE(layer.Step({Peaks(9, 4, 2), Peaks(9, 4, 2)}, {0, 60}).selected[0]);
}

// The step is scanned at least every n-th step: the figure of the dropped mass is then at most n - 1 steps old.
TEST(TwoClock, CertifyingBoundsTheAge) {
  HandLayer layer(Small({"certify_every=2"}));
  std::vector<bool> scans;
  for (int32_t n = 8; n < 13; ++n) scans.push_back(layer.Step({Peaks(n, 4, 2)}, {0}).selected[0]);
  EXPECT_EQ(scans, (std::vector<bool>{true, false, true, false, true}));
}

TEST(TwoClock, KnobsOfTheSlowClock) {
  const auto selector =
      MakeSelector(Small({"tc.factor=2", "tc.refresh=64", "tc.pool=8", "tc.lag=4", "tc.stagger=false", "tc.theta=0.01"}));
  const ResidencyRule residency = selector->Residency();
  EXPECT_EQ(residency.factor, 2);
  EXPECT_EQ(residency.refresh, 64);
  EXPECT_EQ(residency.pool, 8);
  EXPECT_EQ(residency.lag, 4);
  EXPECT_FALSE(residency.stagger);
  for (const bool reads_store : {false, true}) {
    EXPECT_DOUBLE_EQ(selector->Rule({.layer = 0, .layers = 1, .step = 1, .n = 100, .reads_store = reads_store}).theta, 0.01);
  }
  SelectorOptions options = Small();
  options.tc.refresh = 64, options.tc.lag = 65;
  EXPECT_STATUS(StatusCode::kInvalid, "tc.lag=65", options.Validate());
  options.tc.refresh = 0;
  EXPECT_STATUS(StatusCode::kInvalid, "set tc.refresh", options.Validate());
}

TEST(TwoClock, ExpectedMissGrowsWithWhatWasDroppedAndWithTheMove) {
  EXPECT_EQ(ExpectedMiss(0.2, 0), 0);
  EXPECT_LT(ExpectedMiss(0.1, 1), ExpectedMiss(0.2, 1));
  EXPECT_LT(ExpectedMiss(0.1, 1), ExpectedMiss(0.1, 1.1));
  // Of weights outside that grow e^(1/2) times: 0.1 e^(1/2) / (0.9 + 0.1 e^(1/2)) - 0.1.
  EXPECT_NEAR(ExpectedMiss(0.1, 1), 0.1 * std::exp(0.5) / (0.9 + 0.1 * std::exp(0.5)) - 0.1, 1e-12);
  EXPECT_EQ(ExpectedMiss(0, 2), ExpectedMiss(1e-3, 2));  // what was not seen outside is not nothing
  EXPECT_NEAR(ExpectedMiss(0.25, std::numeric_limits<double>::infinity()), 0.75, 1e-12);
  EXPECT_EQ(ExpectedMiss(1, 3), 0);
}

TEST(TwoClock, ExactScoresNeedNoCodes) {
  EXPECT_FALSE(MakeSelector(Small({"tc.scorer=exact"}))->NeedsCodes());
  EXPECT_EQ(MakeSelector(Small({"tc.scorer=exact"}))->Rule({.layer = 0, .layers = 1, .step = 1, .n = 100}).scorer,
            Scorer::kExact);
}

}  // namespace
}  // namespace prehoc
