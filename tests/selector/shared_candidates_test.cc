// Shared candidates: every `refresh` steps the best become resident; a step chooses among residents only.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {
// 1 sink, 2 local, k = 1; a refresh every 4 steps makes 2 positions resident.
SelectorOptions Small(std::initializer_list<std::string_view> more = {}) {
  SelectorOptions options =
      Options("sc", {"budget=4", "budget.sinks=1", "budget.local=2", "sc.factor=2", "sc.refresh=4"});
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

TEST(SharedCandidates, DefaultsAndRule) {
  const auto selector = MakeSelector(Options("sc"));
  const ResidencyRule residency = selector->Residency();
  EXPECT_EQ(residency.factor, 4);
  EXPECT_EQ(residency.refresh, 16);
  EXPECT_EQ(residency.pool, 1);
  EXPECT_EQ(residency.lag, 0);
  EXPECT_FALSE(residency.stagger);
  const StepRule rule = selector->Rule({.layer = 0, .layers = 1, .step = 5, .n = 4096});
  EXPECT_TRUE(rule.residents_only);
  EXPECT_EQ(rule.scorer, Scorer::kExact);
  EXPECT_EQ(rule.k, 4096 / 16 - 40);
  EXPECT_FALSE(Inherits(rule, 1, 1));  // there is no gate: each step chooses
  EXPECT_TRUE(MakeSelector(Options("sc", {"sc.inner=codes"}))->NeedsCodes());
  EXPECT_FALSE(selector->NeedsCodes());
}

TEST(SharedCandidates, StepsChooseAmongResidents) {
  HandLayer layer(Small(), 1, 1, /*all_resident=*/false);
  // Step 0, n = 8: {4, 2} become resident; positions from 6 on are local, and stay.
  EXPECT_TRUE(layer.Step({Peaks(8, 4, 2)}, {0}).selected[0]);
  // Step 1: the heaviest, 5, is not resident; 2 is the best that is. No retrieval.
  ReferenceDecision step = layer.Step({Peaks(9, 5, 2)}, {0});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 7, 8}));
  EXPECT_NEAR(step.dropped[0], 13.0 / 24, 1e-12);  // 9 + 1 + 1 + 1 + 1
  // Step 2: 6 has left the window, {8, 9} now, but stays resident until the next refresh.
  step = layer.Step({Peaks(10, 6, 5)}, {0});
  EXPECT_EQ(step.attended[0], (Positions{0, 6, 8, 9}));
  // Step 3: a jump to 3 finds nothing there; of equals the lowest.
  step = layer.Step({Peaks(11, 3, 5)}, {0});
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 9, 10}));
  // Step 4: a refresh looks at everything, and its step profits.
  step = layer.Step({Peaks(12, 3, 5)}, {0});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 10, 11}));
  // Step 5: 4 and 6 are resident no more.
  step = layer.Step({Peaks(13, 4, 6)}, {0});
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 11, 12}));
}

// What a refresh at step 4 finds serves from step 6 on. Step 0 had nothing to wait for.
TEST(SharedCandidates, FetchesLag) {
  HandLayer layer(Small({"sc.lag=2"}), 1, 1, false);
  layer.Step({Peaks(8, 4, 2)}, {0});
  EXPECT_EQ(layer.Step({Peaks(9, 4, 2)}, {0}).attended[0], (Positions{0, 4, 7, 8}));
  layer.SkipTo(4);
  ReferenceDecision step = layer.Step({Peaks(12, 3, 5)}, {0});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 10, 11}));
  EXPECT_EQ(layer.Step({Peaks(13, 3, 5)}, {0}).attended[0], (Positions{0, 2, 11, 12}));
  EXPECT_EQ(layer.Step({Peaks(14, 3, 5)}, {0}).attended[0], (Positions{0, 3, 12, 13}));
}

// Two scans are pooled by the maximum of the shares. Step 0: 4 with 9/23 = 0.391, 2 with 8/23 = 0.348; step 2: 5 with
// 9/25 = 0.36, 3 with 8/25 = 0.32. Together 4 and 5 are best; of the last scan alone 5 and 3.
TEST(SharedCandidates, ScansArePooled) {
  for (const bool pooled : {true, false}) {
    HandLayer layer(Small({"sc.refresh=2", pooled ? "sc.pool=2" : "sc.pool=1"}), 1, 1, false);
    layer.Step({Peaks(8, 4, 2)}, {0});
    layer.SkipTo(2);
    layer.Step({Peaks(10, 5, 3)}, {0});
    const ReferenceDecision step = layer.Step({Peaks(11, 3, 4)}, {0});
    EXPECT_EQ(step.attended[0], pooled ? (Positions{0, 4, 9, 10}) : (Positions{0, 3, 9, 10}));
  }
}

// Between refreshes nothing is known of what is away: shares are of the residents' mass. Nearly all of head 0's mass is
// away, at position 1, so that over everything its share at 3 would be 0.0005, less than head 1's 0.4 / 5.1 = 0.08 at
// 5.
TEST(SharedCandidates, ResidentsAreWeighedAgainstEachOther) {
  HandLayer layer(Small(), 1, 2, false);
  layer.Step({Peaks(8, 3, 5), Peaks(8, 3, 5)}, {0});
  const std::vector<double> head0 = {1, 1000, 1, 0.5, 1, 0.1, 0.1, 0.1, 0.1};
  const std::vector<double> head1 = {1, 0.1, 1, 0.1, 1, 0.4, 0.1, 0.7, 0.7};
  // Residents: 0, 3, 5, 6, 7, 8. Head 0: 3 has 0.5 / 1.9 = 0.26; head 1: 5 has 0.4 / 3 = 0.13.
  EXPECT_EQ(layer.Step({head0, head1}, {0}).attended[0], (Positions{0, 3, 7, 8}));
}

TEST(SharedCandidates, EverythingResidentLeavesTheChoiceFree) {
  HandLayer layer(Small(), 1, 1, /*all_resident=*/true);
  layer.Step({Peaks(8, 4, 2)}, {0});
  const ReferenceDecision step = layer.Step({Peaks(9, 5, 2)}, {0});
  EXPECT_EQ(step.attended[0], (Positions{0, 5, 7, 8}));
  EXPECT_FALSE(step.selected[0]);  // no refresh ran
  layer.SkipTo(4);
  EXPECT_TRUE(layer.Step({Peaks(12, 5, 2)}, {0}).selected[0]);
}

TEST(SharedCandidates, CertifyingHastensTheRefresh) {
  EXPECT_EQ(MakeSelector(Small({"certify_every=2"}))->Residency().refresh, 2);
  EXPECT_EQ(MakeSelector(Small({"certify_every=9"}))->Residency().refresh, 4);
  HandLayer layer(Small({"certify_every=2"}), 1, 1, false);
  std::vector<bool> retrievals;
  for (int32_t n = 8; n < 13; ++n) retrievals.push_back(layer.Step({Peaks(n, 4, 2)}, {0}).selected[0]);
  EXPECT_EQ(retrievals, (std::vector<bool>{true, false, true, false, true}));
}

// A promise is kept with whatever rows it takes: every step scores everything, and counts.
TEST(SharedCandidates, AProvenBoundLooksEverywhere) {
  const SelectorOptions options = Small({"max_dropped_mass=0.5"});
  EXPECT_FALSE(MakeSelector(options)->Rule({.layer = 0, .layers = 1, .step = 1, .n = 100}).residents_only);
  HandLayer layer(options, 1, 1, false);
  layer.Step({Peaks(8, 4, 2)}, {0});
  const ReferenceDecision step = layer.Step({Peaks(9, 5, 2)}, {0});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 5, 7, 8}));  // 12 of 24
}

TEST(SharedCandidates, ALagBeyondTheRefreshIsRefused) {
  SelectorOptions options = Small();
  options.sc.lag = 5;
  EXPECT_STATUS(StatusCode::kInvalid, "sc.lag=5", options.Validate());
  options.sc.lag = 4;
  EXPECT_OK(options.Validate());
  options.certify_every = 3;  // refreshes come every 3 steps then
  EXPECT_STATUS(StatusCode::kInvalid, "sc.lag=4", options.Validate());
}

}  // namespace
}  // namespace prehoc
