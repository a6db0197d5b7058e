// CIS: a head selects at block starts and when its query has turned away, and else keeps its positions.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {
// 1 sink, 2 local, k = 2. Plain sets unless a test says otherwise: dilation has tests of its own.
SelectorOptions Small(std::initializer_list<std::string_view> more) {
  SelectorOptions options = Options("cis", {"budget=5", "budget.sinks=1", "budget.local=2", "cis.r=0", "cis.block=4"});
  for (const std::string_view knob : more) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
  }
  EXPECT_OK(options.Validate());
  return options;
}

// n weights of 1, but 9 and 8 at two places: the two that a selection finds, in this order.
std::vector<double> Peaks(int32_t n, int32_t first, int32_t second) {
  std::vector<double> weights(static_cast<size_t>(n), 1);
  weights[static_cast<size_t>(first)] = 9;
  weights[static_cast<size_t>(second)] = 8;
  return weights;
}

StepRule RuleOf(const SelectorOptions& options, int64_t step, int32_t layer = 0, int64_t n = 1000) {
  return MakeSelector(options)->Rule({.layer = layer, .layers = 4, .step = step, .n = n});
}

TEST(Cis, DefaultsAreThoseOfTheTable) {
  const SelectorOptions options = Options("cis", {"budget=128"});
  const StepRule rule = RuleOf(options, 1);
  EXPECT_EQ(rule.sinks, 8);
  EXPECT_EQ(rule.local, 32);
  EXPECT_EQ(rule.k, 88);
  EXPECT_EQ(rule.dilate_m, 30);  // ceil(88 / 3)
  EXPECT_EQ(rule.dilate_r, 1);
  EXPECT_EQ(rule.scorer, Scorer::kExact);
  EXPECT_DOUBLE_EQ(rule.tau, 0.8);
  EXPECT_EQ(rule.scope, CisOptions::GateScope::kKvHead);
  EXPECT_EQ(rule.fail, CisOptions::OnFail::kReselect);
  EXPECT_EQ(rule.gqa_set, CisOptions::GqaSet::kMaxWeight);
  EXPECT_FALSE(rule.pre_rope || rule.gate_batch || rule.certified || rule.dilate_later || rule.exact_budget ||
               rule.clip_visible || rule.half_logits || rule.local_held || rule.residents_only);
  EXPECT_EQ(rule.max_age, 0);
  EXPECT_FALSE(MakeSelector(options)->NeedsCodes());
}

// The operator grid of PrHS: sinks 8, local 64, k = n/8 - 72.
TEST(Cis, BudgetOfTheOperatorGrid) {
  const SelectorOptions options = Options("cis", {"budget=1/8", "budget.local=64"});
  EXPECT_EQ(RuleOf(options, 1, 0, 4096).k, 4096 / 8 - 72);
}

// s = 4: steps 0, 4, 8 start a block and select whatever the gate says.
TEST(Cis, BlocksStartUnconditionally) {
  const SelectorOptions options = Small({});
  for (int64_t step = 0; step < 10; ++step) {
    EXPECT_EQ(Inherits(RuleOf(options, step), 1.0f, 1), step % 4 != 0) << step;
    EXPECT_EQ(MustSelect(RuleOf(options, step), 1), step % 4 == 0) << step;
  }
}

// Layer 1 of a staggered run starts its blocks at (u + 1) mod 4 = 0: steps 3, 7, ..
TEST(Cis, StaggeredLayersStartBlocksAtDifferentSteps) {
  const SelectorOptions options = Small({"cis.phase=staggered"});
  for (int64_t step = 1; step < 10; ++step) {
    EXPECT_EQ(RuleOf(options, step, 1).may_inherit, (step + 1) % 4 != 0) << step;
    EXPECT_EQ(RuleOf(options, step, 0).may_inherit, step % 4 != 0) << step;
  }
  EXPECT_FALSE(RuleOf(options, 0, 1).may_inherit);  // the first anchor of every layer
}

TEST(Cis, GateIsStrictAndItsEndsHoldByRule) {
  StepRule rule = RuleOf(Small({}), 1);
  EXPECT_TRUE(Inherits(rule, 0.81f, 1));
  EXPECT_FALSE(Inherits(rule, 0.79f, 1));
  EXPECT_FALSE(Inherits(rule, -2, 1));  // a norm was zero or not finite
  EXPECT_FALSE(Inherits(rule, 1, -1));  // nothing to keep
  rule.tau = 0.5;
  EXPECT_FALSE(Inherits(rule, 0.5f, 1));
  rule = RuleOf(Small({"cis.tau=-1"}), 1);
  EXPECT_TRUE(Inherits(rule, -1, 1));
  EXPECT_TRUE(Inherits(rule, -2, 1));
  rule = RuleOf(Small({"cis.tau=1"}), 1);
  EXPECT_FALSE(Inherits(rule, 1.0000001f, 1));
}

// cos 30 degrees = 0.866 > 0.8; cos 40 degrees = 0.766.
TEST(Cis, KeepsPositionsNotWeightsUntilTheQueryTurns) {
  HandLayer layer(Small({}));
  ReferenceDecision step = layer.Step({Peaks(8, 4, 2)}, {0});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_TRUE(step.attended[0].empty());
  // Step 1: turned by 30 degrees: {2, 4} stays, though 3 and 5 are heavier now; the window has moved on to {7, 8}.
  // All weights 1, but 9 and 8 at 5 and 3: sum 24, dropped 9 + 8 + 1 (6) + 1 (1) = 19.
  step = layer.Step({Peaks(9, 5, 3)}, {30});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 4, 7, 8}));
  EXPECT_NEAR(step.dropped[0], 19.0 / 24, 1e-12);
  // Step 2: 40 degrees from the anchor, which is still the query of step 0 (only 10 from step 1's).
  step = layer.Step({Peaks(10, 5, 3)}, {40});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 5, 8, 9}));
  // Step 3: near the new anchor.
  step = layer.Step({Peaks(11, 2, 1)}, {50});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 5, 9, 10}));
  // Step 4: a block start. Position 8 has left the window and may be chosen.
  step = layer.Step({Peaks(12, 8, 1)}, {50});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 1, 8, 10, 11}));
}

TEST(Cis, FirstAnchorCanBeTheFirstDecodeStep) {
  const SelectorOptions options = Small({"cis.first_anchor=decode"});
  EXPECT_TRUE(RuleOf(options, 0).attend_all);
  HandLayer layer(options);
  EXPECT_FALSE(layer.Step({Peaks(8, 4, 2)}, {0}).selected[0]);
  EXPECT_TRUE(layer.Step({Peaks(9, 4, 2)}, {0}).selected[0]);
  EXPECT_FALSE(layer.Step({Peaks(10, 4, 2)}, {0}).selected[0]);
}

// Dense while n <= 5; the first sparse step finds no set, selects at once, and is no block start.
TEST(Cis, GrowsOutOfDenseSteps) {
  HandLayer layer(Small({}));
  EXPECT_FALSE(layer.Step({{1, 1, 1, 1}}, {0}).selected[0]);
  ReferenceDecision step = layer.Step({{1, 1, 1, 1, 1}}, {0});
  EXPECT_EQ(step.attended[0], Range(0, 5));
  EXPECT_FALSE(step.selected[0]);
  step = layer.Step({{1, 1, 9, 9, 1, 1}}, {0});  // step 2
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 3, 4, 5}));
  EXPECT_FALSE(layer.Step({{1, 1, 1, 1, 1, 1, 1}}, {0}).selected[0]);
  EXPECT_TRUE(layer.Step({{1, 1, 1, 1, 1, 1, 1, 1}}, {0}).selected[0]);  // step 4
}

// --- what happens when the gate fails ---

TEST(Cis, ReselectOnceLeavesTheAnchor) {
  HandLayer layer(Small({"cis.fail=reselect_once"}));
  layer.Step({Peaks(8, 4, 2)}, {0});
  ReferenceDecision step = layer.Step({Peaks(9, 5, 3)}, {90});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 3, 5, 7, 8}));
  step = layer.Step({Peaks(10, 5, 3)}, {10});  // back near the first query: its set is still there
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 4, 8, 9}));
}

TEST(Cis, FailDenseAttendsToAllWithoutARetrieval) {
  HandLayer layer(Small({"cis.fail=dense"}));
  layer.Step({Peaks(8, 4, 2)}, {0});
  ReferenceDecision step = layer.Step({Peaks(9, 5, 3)}, {90});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], Range(0, 9));
  EXPECT_EQ(step.dropped[0], 0);
  step = layer.Step({Peaks(10, 5, 3)}, {10});
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 4, 8, 9}));
  // Not at a block start, where nothing has failed.
  layer.Step({Peaks(11, 5, 3)}, {10});
  EXPECT_TRUE(layer.Step({Peaks(12, 5, 3)}, {90}).selected[0]);
}

// --- who is asked ---

// Head 0 stays, head 1 turns by 60 degrees (cosine 0.5): minimum 0.5, mean 0.75.
TEST(Cis, ScopeOfTheGate) {
  const std::vector<std::vector<double>> first = {Peaks(8, 4, 2), Peaks(8, 4, 2)};
  const std::vector<std::vector<double>> then = {Peaks(9, 5, 3), Peaks(9, 5, 3)};
  const auto second_step = [&](std::initializer_list<std::string_view> knobs, int32_t kv_heads, int32_t group) {
    HandLayer layer(Small(knobs), kv_heads, group);
    layer.Step(first, {0, 0});
    return layer.Step(then, {0, 60}).selected;
  };
  using Flags = std::vector<bool>;
  // One group of two: the worst member decides, or the mean.
  EXPECT_EQ(second_step({}, 1, 2), (Flags{true, true}));
  EXPECT_EQ(second_step({"cis.gate_scope=group_mean", "cis.tau=0.7"}, 1, 2), (Flags{false, false}));
  EXPECT_EQ(second_step({"cis.gate_scope=group_mean"}, 1, 2), (Flags{true, true}));
  // A set of its own per query head: each alone, or still the worst of the group.
  EXPECT_EQ(second_step({"cis.gqa_set=per_query_head", "cis.gate_scope=query_head"}, 1, 2), (Flags{false, true}));
  EXPECT_EQ(second_step({"cis.gqa_set=per_query_head"}, 1, 2), (Flags{true, true}));
  EXPECT_EQ(second_step({"cis.gqa_set=per_query_head", "cis.gate_scope=group_mean", "cis.tau=0.7"}, 1, 2),
            (Flags{false, false}));
  // A shared set has one gate, whatever the scope.
  EXPECT_EQ(second_step({"cis.gate_scope=query_head"}, 1, 2), (Flags{true, true}));
  // Two KV heads: each alone, or one gate for the layer.
  EXPECT_EQ(second_step({}, 2, 1), (Flags{false, true}));
  EXPECT_EQ(second_step({"cis.gate_scope=layer"}, 2, 1), (Flags{true, true}));
}

TEST(Cis, AnUnusableQueryFailsTheGateOfItsWholeScope) {
  const SelectorOptions options = Small({"cis.gate_scope=group_mean", "cis.tau=-0.9"});
  ReferenceTrace trace(options, {.layer = 0, .layers = 1, .kv_heads = 1, .group = 2, .head_dim = 2});
  std::vector<double> z(16, 0);
  std::vector<float> q = {1, 0, 1, 0};
  ReferenceInput input;
  input.n = 8, input.z = z, input.q = q;
  trace.Step(input);
  q = {1, 0, 0, 0};  // mean of 1 and 0 would pass; but there is no cosine with nothing
  z.assign(18, 0);
  input.step = 1, input.n = 9, input.z = z, input.q = q;
  EXPECT_TRUE(trace.Step(input).selected[0]);
  q = {1, 0, std::numeric_limits<float>::quiet_NaN(), 0};
  z.assign(20, 0);
  input.step = 2, input.n = 10, input.z = z, input.q = q;
  EXPECT_TRUE(trace.Step(input).selected[0]);
}

TEST(Cis, PreRopeQueriesCanBeCompared) {
  HandLayer layer(Small({"cis.cos_stage=pre_rope"}));
  EXPECT_TRUE(MakeSelector(Small({"cis.cos_stage=pre_rope"}))->NeedsPreRope());
  EXPECT_FALSE(MakeSelector(Small({}))->NeedsPreRope());
  layer.Step({Peaks(8, 4, 2)}, {0}, {0});
  EXPECT_FALSE(layer.Step({Peaks(9, 5, 3)}, {90}, {10}).selected[0]);
  EXPECT_TRUE(layer.Step({Peaks(10, 5, 3)}, {0}, {60}).selected[0]);
}

// With cis.gate_batch = batch the least cosine of the batch decides; 0.7 of another sequence fails what 1 of this one
// passes.
TEST(Cis, GateCanPoolOverABatch) {
  const SelectorOptions pooled = Small({"cis.gate_batch=batch"});
  EXPECT_TRUE(RuleOf(pooled, 1).gate_batch);
  HandLayer layer(pooled);
  layer.Step({Peaks(8, 4, 2)}, {0});
  EXPECT_FALSE(layer.Step({Peaks(9, 4, 2)}, {0}).selected[0]);  // a batch of one
  EXPECT_FALSE(layer.Step({Peaks(10, 4, 2)}, {0}, {}, {0.9}).selected[0]);
  EXPECT_TRUE(layer.Step({Peaks(11, 4, 2)}, {0}, {}, {0.7}).selected[0]);
  HandLayer alone(Small({}));
  alone.Step({Peaks(8, 4, 2)}, {0});
  EXPECT_FALSE(alone.Step({Peaks(9, 4, 2)}, {0}, {}, {0.7}).selected[0]);
}

// --- what a group chooses ---

// Two heads, middle [1, 8), everything else negligible.   Position:   1      2      3      4
//   head 0, weight (of 20)                            10     6      4      0
//   head 1, weight (of 2000)                          101    600    699    600
//   maximum of the shares                             0.50   0.30   0.35   0.30     -> 1, 3
//   mean of the shares                                0.2753 0.30   0.2748 0.15     -> 2, 1
//   maximum of the raw logits: the order of           101    600    699    600      -> 3, and 2 before 4
TEST(Cis, GroupRules) {
  const double tiny = 1e-6;
  const std::vector<std::vector<double>> weights = {{tiny, 10, 6, 4, 1e-4, tiny, tiny, tiny, tiny, tiny},
                                                    {tiny, 101, 600, 699, 600, tiny, tiny, tiny, tiny, tiny}};
  const auto chosen = [&](std::string_view knob, size_t head) {
    HandLayer layer(Small({knob}), 1, 2);
    layer.SkipTo(1);
    Positions middle = layer.Step(weights, {0}).attended[head];
    return Positions(middle.begin() + 1, middle.end() - 2);
  };
  for (const size_t head : {size_t{0}, size_t{1}}) {
    EXPECT_EQ(chosen("cis.gqa_set=max_weight", head), (Positions{1, 3}));
    EXPECT_EQ(chosen("cis.gqa_set=mean_weight", head), (Positions{1, 2}));
    EXPECT_EQ(chosen("cis.gqa_set=max_logit", head), (Positions{2, 3}));
  }
  EXPECT_EQ(chosen("cis.gqa_set=per_query_head", 0), (Positions{1, 2}));
  EXPECT_EQ(chosen("cis.gqa_set=per_query_head", 1), (Positions{2, 3}));
}

// fp16 has 11 bits: log-weights 1.0000 and 1.0001 are the same number in it, and the tie goes to the lower position.
TEST(Cis, HalfPrecisionMakesTies) {
  const double a = std::exp(1.0), b = std::exp(1.0001), c = std::exp(1.0002);
  const std::vector<double> weights = {1, a, b, c, 1, 1, 1, 1, 1, 1};
  const auto attended = [&](std::string_view knob) {
    HandLayer layer(Small({knob}));
    layer.SkipTo(1);
    return layer.Step({weights}, {0}).attended[0];
  };
  EXPECT_EQ(attended("cis.precision=f32"), (Positions{0, 2, 3, 8, 9}));
  EXPECT_EQ(attended("cis.precision=f16"), (Positions{0, 1, 2, 8, 9}));
  EXPECT_TRUE(RuleOf(Small({"cis.precision=f16"}), 1).half_logits);
}

// --- dilation ---

// k = 4: the ranks are 5, 9, 2, 12 of the middle [1, 14) of 16.
std::vector<double> FourPeaks() { return {1, 1, 7, 1, 1, 9, 1, 1, 1, 8, 1, 1, 6, 1, 1, 1}; }
Positions MiddleOf(std::initializer_list<std::string_view> knobs) {
  SelectorOptions options = Small({"budget=7", "cis.r=1"});
  for (const std::string_view knob : knobs) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
  }
  HandLayer layer(options);
  layer.SkipTo(1);
  const Positions attended = layer.Step({FourPeaks()}, {0}).attended[0];
  return {attended.begin() + 1, attended.end() - 2};
}

TEST(Cis, TheFirstRanksBringTheirNeighbours) {
  // m = ceil(4/3) = 2: ranks 5 and 9.
  EXPECT_EQ(MiddleOf({}), (Positions{2, 4, 5, 6, 8, 9, 10, 12}));
  EXPECT_EQ(MiddleOf({"cis.m=floor(k/3)"}), (Positions{2, 4, 5, 6, 9, 12}));
  EXPECT_EQ(MiddleOf({"cis.m=k"}), (Positions{1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13}));
  EXPECT_EQ(MiddleOf({"cis.m=0"}), (Positions{2, 5, 9, 12}));
  EXPECT_EQ(MiddleOf({"cis.r=0"}), (Positions{2, 5, 9, 12}));
  // r = 2: 3..7 and 7..11; what they share counts once.
  EXPECT_EQ(MiddleOf({"cis.r=2"}), (Positions{2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
}

// CIS*: exactly k = 4. Rank 1 brings 5, 4, 6; rank 2 brings 9, and nothing more fits.
TEST(Cis, ExactBudgetStopsAtK) {
  EXPECT_EQ(MiddleOf({"cis.budget=cis*"}), (Positions{4, 5, 6, 9}));
  EXPECT_EQ(MiddleOf({"cis.budget=cis*", "cis.m=0"}), (Positions{2, 5, 9, 12}));
  // m = 1: rank 1 brings three, rank 2 one.
  EXPECT_EQ(MiddleOf({"cis.budget=cis*", "cis.m=floor(k/3)"}), (Positions{4, 5, 6, 9}));
  // r = 2: nearest first, the lower of two first: 5, then 4 and 6, then 3.
  EXPECT_EQ(MiddleOf({"cis.budget=cis*", "cis.r=2"}), (Positions{3, 4, 5, 6}));
}

TEST(Cis, RuleCountsTheDilatedRanks) {
  const auto m = [](std::string_view knob) { return RuleOf(Small({"budget=7", "cis.r=1", knob}), 1).dilate_m; };
  EXPECT_EQ(m("cis.m=ceil(k/3)"), 2);
  EXPECT_EQ(m("cis.m=floor(k/3)"), 1);
  EXPECT_EQ(m("cis.m=k"), 4);
  EXPECT_EQ(m("cis.m=0"), 0);
  EXPECT_EQ(RuleOf(Small({"budget=7", "cis.r=2"}), 1).dilate_r, 2);
  EXPECT_TRUE(RuleOf(Small({"budget=7", "cis.r=1", "cis.budget=cis*"}), 1).exact_budget);
  EXPECT_TRUE(RuleOf(Small({"budget=7", "cis.r=1", "cis.anchor_attends=plain"}), 1).dilate_later);
  EXPECT_TRUE(RuleOf(Small({"budget=7", "cis.r=1", "cis.clip=visible"}), 1).clip_visible);
}

// k = 2, m = 1; the first rank lies at the edge of the middle [1, 6) of 8 and its upper neighbour in the window {6, 7}.
TEST(Cis, NeighboursAreClippedToTheMiddleOrNot) {
  for (const bool visible : {false, true}) {
    HandLayer layer(Small({"cis.r=1", visible ? "cis.clip=visible" : "cis.clip=middle"}));
    layer.Step({Peaks(8, 5, 2)}, {0});
    layer.Step({Peaks(9, 5, 2)}, {0});
    // Step 2: the window is {8, 9}. Position 6 has left it, and stays only as somebody's neighbour.
    const Positions attended = layer.Step({Peaks(10, 5, 2)}, {0}).attended[0];
    EXPECT_EQ(attended, visible ? (Positions{0, 2, 4, 5, 6, 8, 9}) : (Positions{0, 2, 4, 5, 8, 9}));
  }
}

// A neighbour in the window costs no exact budget: k = 2 takes 5, 4 and not 2.
TEST(Cis, ExactBudgetCountsTheMiddleAlone) {
  HandLayer layer(Small({"cis.r=1", "cis.clip=visible", "cis.budget=cis*"}));
  layer.Step({Peaks(8, 5, 2)}, {0});
  layer.Step({Peaks(9, 5, 2)}, {0});
  EXPECT_EQ(layer.Step({Peaks(10, 5, 2)}, {0}).attended[0], (Positions{0, 4, 5, 6, 8, 9}));
}

// The step that selects attends to the plain set, the steps after it to the dilated one. Step 1 fails the gate.
TEST(Cis, AnchorCanAttendToThePlainSet) {
  HandLayer layer(Small({"cis.r=1", "cis.anchor_attends=plain"}));
  layer.Step({Peaks(12, 5, 2)}, {0});
  ReferenceDecision step = layer.Step({Peaks(13, 5, 2)}, {90});
  EXPECT_TRUE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 5, 11, 12}));
  step = layer.Step({Peaks(14, 5, 2)}, {90});
  EXPECT_FALSE(step.selected[0]);
  EXPECT_EQ(step.attended[0], (Positions{0, 2, 4, 5, 6, 12, 13}));
}

// --- the local window ---

TEST(Cis, LocalEdgeSlidesOrIsHeld) {
  HandLayer held(Small({"cis.local_edge=held"}));
  EXPECT_TRUE(RuleOf(Small({"cis.local_edge=held"}), 1).local_held);
  held.Step({Peaks(8, 4, 2)}, {0});
  EXPECT_EQ(held.Step({Peaks(9, 4, 2)}, {0}).attended[0], (Positions{0, 2, 4, 6, 7, 8}));
  EXPECT_EQ(held.Step({Peaks(10, 4, 2)}, {0}).attended[0], (Positions{0, 2, 4, 6, 7, 8, 9}));
  // A selection brings it back to its length.
  EXPECT_EQ(held.Step({Peaks(11, 4, 2)}, {90}).attended[0], (Positions{0, 2, 4, 9, 10}));
}

// --- the certified gate ---

// Keys within radius 1 of the origin: no logit of a dropped key grew by more than |dq| / sqrt(2) (the head dimension is
// 2), and a turn by 60 degrees is |dq| = 1. At the anchor, n = 8, all weights are 1 but those of the chosen 4 and 2:
// dropped are 1, 3, 5, and with blocks of 2 steps one local position may leave: L_D = log 4. Kept one step later: 0, 2,
// 4, 7, 8, together 20.
//   u = log 4 + 1 / sqrt(2) + 0.001;   bound = 1 / (1 + 20 / exp(u)) = 0.289
TEST(Cis, CertifiedGateKeepsWhatItCanProve) {
  for (const double delta_max : {0.25, 0.5}) {
    const std::string knob = "cis.delta_max=" + std::to_string(delta_max);
    HandLayer layer(Small({"cis.gate=certified", "cis.block=2", knob}));
    const std::vector<float> keys = {1, 0, -1, 0};  // mean 0, radius 1
    layer.SetBalls({KeyBall(keys, 2)});
    layer.SkipTo(2);
    layer.Step({Peaks(8, 4, 2)}, {0});
    const ReferenceDecision step = layer.Step({Peaks(9, 4, 2)}, {60});
    const double u = std::log(4.0) + 1 / std::numbers::sqrt2 + 1e-3;
    const double bound = 1 / (1 + 20 / std::exp(u));
    if (bound <= delta_max) {
      EXPECT_FALSE(step.selected[0]);
      EXPECT_NEAR(step.bound[0], bound, 1e-6);
      EXPECT_GE(step.bound[0], step.dropped[0]);
    } else {
      EXPECT_TRUE(step.selected[0]);
      EXPECT_EQ(step.bound[0], -1);
    }
  }
}

TEST(Cis, CertifiedGateLooksAtNoCosine) {
  const StepRule rule = RuleOf(Small({"cis.gate=certified", "cis.local_edge=held", "cis.delta_max=0.2"}), 1);
  EXPECT_TRUE(rule.certified);
  EXPECT_DOUBLE_EQ(rule.delta_max, 0.2);
  EXPECT_TRUE(Inherits(rule, -2, 1));  // subject to the bound, which the caller computes
  EXPECT_FALSE(Inherits(RuleOf(Small({"cis.gate=certified", "cis.local_edge=held"}), 4), 1, 1));  // a block start
}

TEST(Cis, ScorersAskForTheirIndex) {
  EXPECT_TRUE(MakeSelector(Small({"cis.scorer=codes"}))->NeedsCodes());
  EXPECT_TRUE(MakeSelector(Small({"cis.scorer=pages"}))->NeedsPages());
  EXPECT_FALSE(MakeSelector(Small({"cis.scorer=codes"}))->NeedsErrorBounds());
  const auto certified = MakeSelector(Small({"cis.scorer=codes", "cis.gate=certified", "cis.local_edge=held"}));
  EXPECT_TRUE(certified->NeedsErrorBounds());  // L_D must not be below the truth
}

TEST(Cis, PrefillIsDense) {
  const auto selector = MakeSelector(Small({}));
  EXPECT_EQ(selector->Prefill(3, 4, 100, 64).frozen, 0);
  EXPECT_FALSE(selector->Prefill(3, 4, 100, 64).windowed);
  EXPECT_EQ(selector->MethodTag(100), "");
  EXPECT_EQ(selector->Residency().factor, 0);
}

}  // namespace
}  // namespace prehoc
