// CPE: PSAW and ETF in prefill, CIS within PSAW's window in decode.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {
// 4 layers, l_s = 2, c = 1/2: the last layer sees the later half. 1 sink, 2 local, k = 2, plain sets, blocks of 4.
SelectorOptions Small(std::initializer_list<std::string_view> more = {}) {
  SelectorOptions options = Options("cpe", {"budget=5", "budget.sinks=1", "budget.local=2", "cis.r=0", "cis.block=4",
                                            "psaw.c=0.5", "etf.c=0.5"});
  for (const std::string_view knob : more) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
  }
  EXPECT_OK(options.Validate());
  return options;
}
constexpr int32_t kLast = 3;

std::vector<double> Falling(int32_t n) {  // the earlier the heavier: what a window cuts is what would be chosen
  std::vector<double> weights;
  for (int32_t i = 0; i < n; ++i) weights.push_back(2 * n - i);
  return weights;
}

TEST(Cpe, ChoosesWithinTheWindow) {
  HandLayer layer(Small(), 1, 1, true, kLast, 4);
  layer.SkipTo(1);
  // n = 20: the window starts at 10, the middle is [10, 18): the heaviest are 10 and 11.
  const ReferenceDecision step = layer.Step({Falling(20)}, {0});
  EXPECT_EQ(step.attended[0], (Positions{0, 10, 11, 18, 19}));
  // What is out of sight is not counted: kept 40 + 30 + 29 + 22 + 21 of 40 + SUM_{10..19} (40 - i) = 40 + 255.
  EXPECT_NEAR(step.dropped[0], 1 - 142.0 / 295, 1e-12);
  HandLayer early(Small(), 1, 1, true, 1, 4);
  early.SkipTo(1);
  EXPECT_EQ(early.Step({Falling(20)}, {0}).attended[0], (Positions{0, 1, 2, 18, 19}));
}

TEST(Cpe, RuleIsThatOfCisWithAnEdge) {
  const StepRule rule = MakeSelector(Small())->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 100});
  EXPECT_FALSE(rule.attend_all);
  EXPECT_EQ(rule.lo, 50);
  EXPECT_EQ(rule.k, 2);
  EXPECT_TRUE(rule.may_inherit);
  EXPECT_DOUBLE_EQ(rule.tau, 0.8);
  EXPECT_FALSE(rule.filter_each_step);
  // A middle smaller than k: all of it.
  const auto wide = MakeSelector(Small({"budget=23"}));  // k = 20; at n = 30 the middle is [15, 28)
  EXPECT_EQ(wide->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 30}).k, 13);
}

// An inherited position may outlive its window by the steps of a block, or not.
TEST(Cpe, InheritedPositionsBelowTheEdge) {
  for (const bool filter : {false, true}) {
    HandLayer layer(Small({filter ? "psaw.cis_filter=step" : "psaw.cis_filter=select"}), 1, 1, true, kLast, 4);
    layer.Step({Falling(20)}, {0});  // chooses 10 and 11
    layer.Step({Falling(21)}, {0});  // the edge is 10 still
    const ReferenceDecision step = layer.Step({Falling(22)}, {0});  // 11 now
    EXPECT_FALSE(step.selected[0]);
    EXPECT_EQ(step.attended[0], filter ? (Positions{0, 11, 20, 21}) : (Positions{0, 10, 11, 20, 21}));
  }
  EXPECT_TRUE(MakeSelector(Small({"psaw.cis_filter=step"}))
                  ->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 100})
                  .filter_each_step);
}

TEST(Cpe, ShortSequencesAttendToTheWholeWindow) {
  const StepRule rule = MakeSelector(Small({"budget=30"}))->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 30});
  EXPECT_TRUE(rule.attend_all);
  EXPECT_EQ(rule.lo, 15);
  HandLayer layer(Small({"budget=30"}), 1, 1, true, kLast, 4);
  layer.SkipTo(1);
  EXPECT_EQ(layer.Step({Falling(30)}, {0}).attended[0], Join({{0}, Range(15, 30)}));
}

TEST(Cpe, PrefillHasBoth) {
  const PrefillRule rule = MakeSelector(Small())->Prefill(kLast, 4, 100, 64);
  EXPECT_TRUE(rule.windowed);
  EXPECT_TRUE(rule.keep_sink);
  EXPECT_EQ(rule.frozen, 50);
  EXPECT_EQ(MakeSelector(Small())->MethodTag(100),
            "psaw(c=0.5,ls=0.5,sink=1,local=2,base=1,round=1)+etf(mode=carry,c=0.5,ls=0.5,n=prompt,T=100)");
}

TEST(Cpe, EachPartCanBeSwitchedOff) {
  const auto no_psaw = MakeSelector(Small({"psaw.phase=off"}));
  EXPECT_FALSE(no_psaw->Prefill(kLast, 4, 100, 100).windowed);
  EXPECT_EQ(no_psaw->Prefill(kLast, 4, 100, 100).frozen, 50);
  EXPECT_EQ(no_psaw->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 100}).lo, 1);
  EXPECT_EQ(no_psaw->MethodTag(100).find("psaw"), std::string::npos);

  const auto no_etf = MakeSelector(Small({"etf.c=1"}));
  EXPECT_EQ(no_etf->Prefill(kLast, 4, 100, 100).frozen, 0);
  EXPECT_TRUE(no_etf->Prefill(kLast, 4, 100, 100).windowed);
  EXPECT_EQ(no_etf->MethodTag(100).find("etf"), std::string::npos);

  // CIS off: a budget that no sequence reaches.
  const auto no_cis = MakeSelector(Small({"budget=1000000"}));
  const StepRule rule = no_cis->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 100});
  EXPECT_TRUE(rule.attend_all);
  EXPECT_EQ(rule.lo, 50);
}

TEST(Cpe, EvictionNeedsSetsWithinTheWindow) {
  SelectorOptions options = Small();
  options.psaw.evict = true;
  EXPECT_STATUS(StatusCode::kInvalid, "psaw.cis_filter=step", options.Validate());
  options.psaw.filter_each_step = true;
  EXPECT_OK(options.Validate());
  EXPECT_TRUE(MakeSelector(options)->Rule({.layer = kLast, .layers = 4, .step = 1, .n = 100}).evict_cut);
}

// A proven bound must cover what PSAW cuts; nobody scores that.
TEST(Cpe, NoBoundOverAWindow) {
  SelectorOptions options = Small();
  options.max_dropped_mass = 0.1;
  EXPECT_STATUS(StatusCode::kInvalid, "psaw.phase", options.Validate());
  EXPECT_OK(options.Set("psaw.phase", "prefill"));
  EXPECT_OK(options.Validate());
  EXPECT_OK(options.Set("psaw.phase", "both"));
  EXPECT_OK(options.Set("psaw.c", "1"));
  EXPECT_OK(options.Validate());
}

}  // namespace
}  // namespace prehoc
