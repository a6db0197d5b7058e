// Quest: pages by their bounds, chosen at every step.
#include <algorithm>

#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {

StepRule RuleAt(const SelectorOptions& options, int64_t n, int32_t layer = 2, int64_t step = 1) {
  return MakeSelector(options)->Rule({.layer = layer, .layers = 4, .step = step, .n = n});
}

// The pages that a set consists of; the last one may be under way.
std::vector<int32_t> PagesOf(const Positions& set, int32_t page, int32_t n) {
  std::vector<int32_t> pages;
  for (size_t i = 0; i < set.size();) {
    const int32_t first = set[i];
    EXPECT_EQ(first % page, 0);
    const int32_t end = std::min(first + page, n);
    for (int32_t p = first; p < end; ++p, ++i) EXPECT_EQ(set[i], p);
    pages.push_back(first / page);
  }
  return pages;
}

TEST(Quest, FirstLayersAndThePromptAreDense) {
  const SelectorOptions options = Options("quest");
  EXPECT_TRUE(RuleAt(options, 1000, 0).attend_all);
  EXPECT_TRUE(RuleAt(options, 1000, 1).attend_all);
  EXPECT_FALSE(RuleAt(options, 1000, 2).attend_all);
  EXPECT_FALSE(RuleAt(Options("quest", {"quest.dense_layers=0"}), 1000, 0).attend_all);
  EXPECT_TRUE(RuleAt(options, 1000, 2, /*step=*/0).attend_all);  // no step would use it
}

TEST(Quest, TheBudgetIsInWholePagesAndTheLastPageIsOneOfThem) {
  // 1/16 of 1600 = 100 positions: 6 pages of 16, one of which is the last. 1600 positions end with a whole page.
  StepRule rule = RuleAt(Options("quest"), 1600);
  EXPECT_EQ(rule.scorer, Scorer::kPages);
  EXPECT_EQ(rule.page, 16);
  EXPECT_EQ(rule.k, 5 * 16);
  EXPECT_EQ(rule.local, 16);
  EXPECT_EQ(rule.sinks, 0);
  EXPECT_EQ(rule.lo, 0);
  EXPECT_TRUE(rule.middle_only);
  EXPECT_TRUE(MustSelect(rule, 1));
  // One more begins a page of its own.
  rule = RuleAt(Options("quest"), 1601);
  EXPECT_EQ(rule.k, 5 * 16);
  EXPECT_EQ(rule.local, 1);
  // Never fewer than three pages, whatever the share.
  EXPECT_EQ(RuleAt(Options("quest"), 100).k, 2 * 16);
  EXPECT_TRUE(RuleAt(Options("quest"), 48).attend_all);
  EXPECT_FALSE(RuleAt(Options("quest"), 49).attend_all);
  EXPECT_EQ(RuleAt(Options("quest", {"quest.page=64", "budget=1000"}), 5000).k, 14 * 64);
}

TEST(Quest, AHeadChoosesAloneUnlessItIsToldToShare) {
  EXPECT_TRUE(MakeSelector(Options("quest"))->ChoosesPerQueryHead());
  EXPECT_FALSE(MakeSelector(Options("quest", {"quest.gqa_set=max_logit"}))->ChoosesPerQueryHead());
  EXPECT_TRUE(MakeSelector(Options("quest"))->NeedsPages());
  EXPECT_FALSE(MakeSelector(Options("quest"))->NeedsCodes());
  EXPECT_EQ(MakeSelector(Options("quest", {"quest.page=32"}))->PageTokens(), 32);
}

// One channel: the bound of a page under a positive query is its largest key, under a negative one its smallest.
TEST(Quest, BoundsAreTheLargestProductPerChannel) {
  const std::vector<float> keys = {1, -4, 3, 0, 2, 2, 5};  // pages of 2: {1, -4}, {3, 0}, {2, 2}, {5}
  EXPECT_EQ(ReferencePageBounds(std::vector<float>{2}, keys, 1, 2), (std::vector<double>{2, 2, 6, 6, 4, 4, 10}));
  EXPECT_EQ(ReferencePageBounds(std::vector<float>{-1}, keys, 1, 2), (std::vector<double>{4, 4, 0, 0, -2, -2, -5}));
  // Two channels: the ends of a page need not belong to one key, so the bound (1 + 1) exceeds both logits (1).
  const auto bounds = ReferencePageBounds(std::vector<float>{1, 1}, std::vector<float>{1, 0, 0, 1}, 2, 2);
  for (const double bound : bounds) EXPECT_DOUBLE_EQ(bound, 2 / std::sqrt(2.0));
}

// Seven pages of 16 and 4 positions: of three pages one is the last. Heads 0 and 1 share a KV head.
class QuestSteps : public testing::Test {
 protected:
  static constexpr int32_t kN = 7 * 16 + 4;

  ReferenceDecision Step(const SelectorOptions& options, const std::vector<double>& head0, const std::vector<double>& head1) {
    std::vector<double> z(2 * kN, 0), scores;
    for (const auto& pages : {head0, head1}) {
      for (int32_t i = 0; i < kN; ++i) scores.push_back(i / 16 < 7 ? pages[static_cast<size_t>(i / 16)] : 100);
    }
    const std::vector<float> q = {1, 0, 1, 0};
    ReferenceTrace trace(options, {.layer = 2, .layers = 4, .kv_heads = 1, .group = 2, .head_dim = 2});
    return trace.Step({.step = 1, .n = kN, .z = z, .scores = scores, .rows = {}, .err = {}, .q = q, .q_pre = {}, .balls = {}, .batch = {}});
  }
};

TEST_F(QuestSteps, EachHeadTakesTheLargestBoundsAndTheLastPage) {
  const ReferenceDecision step = Step(Options("quest"), {1, 2, 9, 3, 8, 5, 4}, {7, 7, 1, 1, 1, 1, 7});
  EXPECT_EQ(PagesOf(step.attended[0], 16, kN), (std::vector<int32_t>{2, 4, 7}));
  EXPECT_EQ(PagesOf(step.attended[1], 16, kN), (std::vector<int32_t>{0, 1, 7}));  // equal bounds go to the lower page
  EXPECT_TRUE(step.selected[0] && step.selected[1]);
  EXPECT_NEAR(step.dropped[0], 5.0 * 16 / kN, 1e-12);  // of the true weights, which are all equal
}

// Raw bounds: head 1's large ones win. As shares of each head's bounds, head 0's lonely page 5 comes first.
TEST_F(QuestSteps, AGroupMaySharePages) {
  const std::vector<double> head0 = {0, 0, 0, 0, 0, 6, 0}, head1 = {20, 20, 19, 20, 20, 20, 20};
  const ReferenceDecision raw = Step(Options("quest", {"quest.gqa_set=max_logit"}), head0, head1);
  EXPECT_EQ(PagesOf(raw.attended[0], 16, kN), (std::vector<int32_t>{0, 1, 7}));
  EXPECT_EQ(raw.attended[1], raw.attended[0]);
  const ReferenceDecision shares = Step(Options("quest", {"quest.gqa_set=max_weight"}), head0, head1);
  EXPECT_EQ(PagesOf(shares.attended[0], 16, kN), (std::vector<int32_t>{0, 5, 7}));
}

TEST_F(QuestSteps, FirstPagesMayBeKeptOutOfTheSameBudget) {
  const std::vector<double> bounds = {1, 2, 9, 3, 8, 5, 4};
  ReferenceDecision step = Step(Options("quest", {"quest.sinks=1"}), bounds, bounds);
  EXPECT_EQ(PagesOf(step.attended[0], 16, kN), (std::vector<int32_t>{0, 2, 7}));
  step = Step(Options("quest", {"quest.sinks=2"}), bounds, bounds);
  EXPECT_EQ(PagesOf(step.attended[0], 16, kN), (std::vector<int32_t>{0, 1, 7}));
  const StepRule rule = RuleAt(Options("quest", {"quest.sinks=1"}), 1600);
  EXPECT_EQ(rule.sinks, 16);
  EXPECT_EQ(rule.lo, 16);
  EXPECT_EQ(rule.k, 4 * 16);
}

TEST_F(QuestSteps, LargerPages) {
  // Pages of 32: {0, 1}, {2, 3}, {4, 5}, and the last one, of 20 positions.
  const ReferenceDecision step =
      Step(Options("quest", {"quest.page=32", "budget=96"}), {1, 1, 5, 5, 4, 4, 9}, {3, 3, 1, 1, 2, 2, 0});
  EXPECT_EQ(PagesOf(step.attended[0], 32, kN), (std::vector<int32_t>{1, 2, 3}));
  EXPECT_EQ(PagesOf(step.attended[1], 32, kN), (std::vector<int32_t>{0, 2, 3}));
}

}  // namespace
}  // namespace prehoc
