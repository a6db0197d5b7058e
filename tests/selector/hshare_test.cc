// HShare: choices shared over steps, heads and layers.
#include "selector/borrow_map.h"
#include "tests/selector/selector_test_util.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

TEST(BorrowMap, CountsWhoMayBorrow) {
  EXPECT_EQ(Borrowers(0.75, 32), 8);
  EXPECT_EQ(Borrowers(0.875, 32), 4);
  EXPECT_EQ(Borrowers(0.5, 32), 16);
  EXPECT_EQ(Borrowers(0.75, 9), 2);   // at least 3/4 choose
  EXPECT_EQ(Borrowers(0.9, 10), 1);   // though 0.9 is not exact
  EXPECT_EQ(Borrowers(1, 32), 0);
  EXPECT_EQ(Borrowers(0.01, 5), 4);   // one always chooses
  EXPECT_EQ(Borrowers(0.5, 1), 0);
  EXPECT_EQ(Borrowers(0.5, 0), 0);
}

TEST(BorrowMap, CountsWhatListsHaveInCommon) {
  EXPECT_EQ(InCommon(Positions{1, 3, 5, 7}, Positions{2, 3, 4, 7, 9}), 2);
  EXPECT_EQ(InCommon(Positions{}, Positions{1}), 0);
  EXPECT_EQ(InCommon(Positions{4, 5}, Positions{4, 5}), 2);
}

// 3 and 2 have most in common, so 3 takes from 2. Then 2 and 0: 2 takes from 0, and 3 with it. 1 and 3 would be next, but
// who borrows lends no more: 1 and 0.
TEST(BorrowMap, IsGreedyAndPointsAtThoseWhoChoose) {
  const std::vector<int64_t> common = {0, 9, 9, 9,   // above the diagonal: not looked at
                                       1, 0, 9, 9,   //
                                       5, 2, 0, 9,   //
                                       3, 4, 8, 0};
  EXPECT_EQ(GreedyBorrowMap(common, 4, 0), (BorrowMap{0, 1, 2, 3}));
  EXPECT_EQ(GreedyBorrowMap(common, 4, 1), (BorrowMap{0, 1, 2, 2}));
  EXPECT_EQ(GreedyBorrowMap(common, 4, 2), (BorrowMap{0, 1, 0, 0}));
  EXPECT_EQ(GreedyBorrowMap(common, 4, 3), (BorrowMap{0, 0, 0, 0}));
}

TEST(BorrowMap, NothingInCommonStillGivesAMap) {
  EXPECT_EQ(GreedyBorrowMap(std::vector<int64_t>(9, 0), 3, 1), (BorrowMap{0, 0, 2}));
  EXPECT_EQ(GreedyBorrowMap(std::vector<int64_t>(9, 0), 3, 2), (BorrowMap{0, 0, 0}));
  EXPECT_EQ(GreedyBorrowMap({}, 0, 0), BorrowMap{});
}

TEST(BorrowMap, HoldsItsPromisesOnRandomTables) {
  SeededRng rng;
  for (int i = 0; i < 500; ++i) {
    const auto count = static_cast<int32_t>(rng.Int(1, 12)), borrowers = static_cast<int32_t>(rng.Int(0, count - 1));
    std::vector<int64_t> common(static_cast<size_t>(count) * static_cast<size_t>(count));
    for (int64_t& both : common) both = rng.Int(0, 5);
    const BorrowMap map = GreedyBorrowMap(common, count, borrowers);
    int32_t borrowing = 0;
    for (int32_t h = 0; h < count; ++h) {
      const int16_t source = map[static_cast<size_t>(h)];
      ASSERT_LE(source, h);
      ASSERT_EQ(map[static_cast<size_t>(source)], source);
      borrowing += source != h;
    }
    ASSERT_EQ(borrowing, borrowers);
  }
}

TEST(HShare, ChoosesEverySoManyStepsByLength) {
  const auto selector = MakeSelector(Options("hshare", {"hshare.steps=4", "budget=100"}));
  for (int64_t n = 1000; n < 1012; ++n) {
    const StepRule rule = selector->Rule({.layer = 3, .layers = 4, .step = n - 900, .n = n});
    EXPECT_EQ(MustSelect(rule, 3), n % 4 == 0) << n;
    EXPECT_EQ(Inherits(rule, -2, 3), n % 4 != 0) << n;  // no gate is asked
    EXPECT_TRUE(MustSelect(rule, -1));
    EXPECT_EQ(rule.scorer, Scorer::kLabels);
    EXPECT_EQ(rule.k, 60);
    EXPECT_TRUE(rule.middle_only && rule.borrows && rule.local_held);
  }
  EXPECT_FALSE(selector->Rule({.layer = 0, .layers = 4, .step = 0, .n = 1001}).may_inherit);  // the prompt's last token
  EXPECT_EQ(selector->HeldSteps(), 3);
  const auto keep = MakeSelector(Options("hshare", {"hshare.steps=4", "hshare.list=keep"}));
  EXPECT_FALSE(keep->Rule({.layer = 0, .layers = 4, .step = 1, .n = 1001}).local_held);
  EXPECT_EQ(keep->HeldSteps(), 0);
  EXPECT_TRUE(keep->NeedsLabels());
  EXPECT_FALSE(keep->NeedsCodes() || keep->NeedsPages() || keep->NeedsErrorBounds());
  EXPECT_TRUE(keep->ChoosesPerQueryHead());
  EXPECT_FALSE(MakeSelector(Options("hshare", {"hshare.gqa_set=max_weight"}))->ChoosesPerQueryHead());
}

TEST(HShare, ChannelsAreThoseThatQueriesAndKeysMakeLarge) {
  // Sums of |q|: 1, 3, 2, 0; of |k|: 4, 1, 1, 9. Products 4, 3, 2, 0.
  const std::vector<float> q = {1, -1, 2, 0, 0, 2, 0, 0}, k = {-4, 1, 1, 9};
  EXPECT_EQ(ReferenceChannels(q, k, 4, 2), (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(ReferenceChannels(q, k, 4, 4), (std::vector<int32_t>{0, 1, 2, 3}));
  const std::vector<float> same(4, 1);
  EXPECT_EQ(ReferenceChannels(same, same, 4, 2), (std::vector<int32_t>{0, 1}));  // equal ones by number
}

TEST(HShare, LabelsHaveSixteenLevelsBetweenTheirEnds) {
  const std::vector<int32_t> channels = {2, 0, 1};
  // Levels of the key are 0, 1, .. 15; 7.4 becomes 7. The query's are the same three numbers, exactly.
  const std::vector<float> q = {15, 0, 7, 99}, k = {15, 0, 7.4f, 99};
  EXPECT_NEAR(ReferenceLabelScores(q, k, 4, channels, 4)[0], (15 * 15 + 7 * 7) / std::sqrt(3.0), 1e-9);
  EXPECT_NEAR(ReferenceLabelScores(q, k, 4, channels, 16)[0], (15 * 15 + 7 * double{7.4f}) / std::sqrt(3.0), 1e-9);
  const std::vector<float> flat = {3, 3, 3, 0};
  EXPECT_NEAR(ReferenceLabelScores(flat, flat, 4, channels, 4)[0], 27 / std::sqrt(3.0), 1e-9);
}

// One sink, two local, k = 2, four heads that each have a KV head. The trace is told scores; weights do not matter.
class HShareSteps : public testing::Test {
 protected:
  static constexpr int32_t kHeads = 4;
  static SelectorOptions Small(std::initializer_list<std::string_view> knobs) {
    SelectorOptions options = Options("hshare", {"budget=5", "budget.sinks=1", "budget.local=2"});
    for (const std::string_view knob : knobs) {
      const size_t equals = knob.find('=');
      EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
    }
    return options;
  }
  static std::unique_ptr<ReferenceTrace> Trace(const SelectorOptions& options, int32_t layer = 0) {
    return std::make_unique<ReferenceTrace>(
        options, ReferenceShape{.layer = layer, .layers = 2, .kv_heads = kHeads, .group = 1, .head_dim = 1});
  }
  // Each head prefers the two positions that are given for it.
  using Wants = std::vector<std::pair<int32_t, int32_t>>;
  static std::vector<double> Scores(const Wants& wants, int64_t n) {
    std::vector<double> scores;
    for (const auto& [first, second] : wants) {
      for (int32_t i = 0; i < n; ++i) scores.push_back(i == first ? 9 : i == second ? 8 : 0);
    }
    return scores;
  }
  static ReferenceDecision Step(ReferenceTrace& trace, int64_t step, int64_t n, const Wants& wants) {
    const std::vector<double> scores = Scores(wants, n), z(scores.size(), 0);
    const std::vector<float> q(kHeads, 1);
    const std::vector<ReferenceRow> rows = {{n, scores}};
    ReferenceInput input;
    input.step = step;
    input.n = n;
    input.z = z;
    input.scores = scores;
    input.q = q;
    if (step == 0) input.rows = rows;
    return trace.Step(input);
  }
};

TEST_F(HShareSteps, HeadsThatChoseAlikeShareTheChoiceOfOne) {
  // Heads 2 and 0 choose the same, 3 and 1 have one in common: with one borrower 2 takes from 0.
  const auto trace = Trace(Small({"hshare.heads=0.75", "hshare.steps=1"}));
  ReferenceDecision step = Step(*trace, 0, 12, {{3, 4}, {5, 6}, {4, 3}, {6, 7}});
  for (int h = 0; h < kHeads; ++h) EXPECT_TRUE(step.selected[static_cast<size_t>(h)]);  // nobody borrows yet
  step = Step(*trace, 1, 13, {{2, 4}, {5, 6}, {7, 8}, {8, 9}});
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 4, 11, 12}));
  EXPECT_EQ(step.attended[1], (Positions{0, 5, 6, 11, 12}));
  EXPECT_EQ(step.attended[2], step.attended[0]);
  EXPECT_EQ(step.attended[3], (Positions{0, 8, 9, 11, 12}));
  EXPECT_EQ(step.selected, (std::vector<bool>{true, true, false, true}));
}

// Lengths 12 and 14 choose, 13 does not. 11 was local when 12 chose, and is older than the window at 13.
TEST_F(HShareSteps, ADiscardListKeepsWhatLeavesTheWindowAKeepListDoesNot) {
  const Wants same(kHeads, {3, 4}), other(kHeads, {5, 6});
  for (const bool keep : {false, true}) {
    const auto trace = Trace(Small({"hshare.heads=1", keep ? "hshare.list=keep" : "hshare.list=discard"}));
    Step(*trace, 0, 11, same);
    ReferenceDecision step = Step(*trace, 1, 12, same);
    EXPECT_EQ(step.attended[0], (Positions{0, 3, 4, 10, 11}));
    EXPECT_TRUE(step.selected[0]);
    step = Step(*trace, 2, 13, other);
    EXPECT_EQ(step.attended[0], keep ? (Positions{0, 3, 4, 11, 12}) : (Positions{0, 3, 4, 10, 11, 12}));
    EXPECT_FALSE(step.selected[0]);
    step = Step(*trace, 3, 14, other);
    EXPECT_EQ(step.attended[0], (Positions{0, 5, 6, 12, 13}));
    EXPECT_TRUE(step.selected[0]);
  }
}

TEST_F(HShareSteps, ALayerTakesTheChoicesOfAnEarlierOne) {
  const SelectorOptions options = Small({"hshare.layers=1/2", "hshare.heads=1", "hshare.steps=1"});
  std::vector<std::unique_ptr<ReferenceTrace>> layers;
  for (int32_t l = 0; l < 2; ++l) layers.push_back(Trace(options, l));
  for (const auto& layer : layers) Step(*layer, 0, 12, Wants(kHeads, {3, 4}));
  ReferenceTrace::ShareLayers(layers);
  const Wants wants = {{2, 4}, {5, 6}, {7, 8}, {8, 9}};
  const ReferenceDecision lender = Step(*layers[0], 1, 13, wants);
  const ReferenceDecision borrower = Step(*layers[1], 1, 13, Wants(kHeads, {3, 4}));
  EXPECT_EQ(borrower.attended, lender.attended);
  EXPECT_EQ(lender.selected, std::vector<bool>(kHeads, true));
  EXPECT_EQ(borrower.selected, std::vector<bool>(kHeads, false));
}

TEST_F(HShareSteps, APromptWithinItsBudgetTellsNothingSoNobodyBorrows) {
  const auto trace = Trace(Small({"hshare.heads=1/2", "hshare.steps=1"}));
  Step(*trace, 0, 5, Wants(kHeads, {1, 2}));
  const ReferenceDecision step = Step(*trace, 1, 6, {{1, 2}, {2, 3}, {3, 1}, {1, 2}});
  EXPECT_EQ(step.selected, std::vector<bool>(kHeads, true));
  EXPECT_EQ(step.attended[1], (Positions{0, 2, 3, 4, 5}));
}

// The share of choices is the product of the three ratios, at every length.
TEST_F(HShareSteps, RetrievalsAreTheProductOfTheRatios) {
  const auto trace = Trace(Small({"hshare.heads=1/2", "hshare.steps=4"}));
  Step(*trace, 0, 12, Wants(kHeads, {3, 4}));
  int64_t retrievals = 0;
  for (int64_t u = 1; u <= 40; ++u) {
    const ReferenceDecision step = Step(*trace, u, 12 + u, Wants(kHeads, {3, 4}));
    retrievals += std::count(step.selected.begin(), step.selected.end(), true);
  }
  EXPECT_EQ(retrievals, 40 * kHeads / 2 / 4);
}

}  // namespace
}  // namespace prehoc
