// PSAW: a window that shortens with depth.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {
// 4 layers, l_s = 2, c = 1/2. Layers 1 and 2 see all; layer 3 (x = 1/2) keeps sqrt(1/2) = 0.7071; layer 4 keeps 1/2.
SelectorOptions Half(std::initializer_list<std::string_view> more = {}) {
  SelectorOptions options = Options("psaw", {"psaw.c=0.5", "budget.sinks=4", "budget.local=10"});
  for (const std::string_view knob : more) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
  }
  EXPECT_OK(options.Validate());
  return options;
}
StepRule RuleOf(const SelectorOptions& options, int32_t layer, int64_t n) {
  return MakeSelector(options)->Rule({.layer = layer, .layers = 4, .step = 1, .n = n});
}
Positions Attended(const SelectorOptions& options, int32_t layer, int32_t n) {
  HandLayer hand(options, 1, 1, true, layer, 4);
  hand.SkipTo(1);
  return hand.Step({std::vector<double>(static_cast<size_t>(n), 1)}, {0}).attended[0];
}

TEST(Psaw, EdgeByDepth) {
  const auto selector = MakeSelector(Half());
  EXPECT_EQ(selector->WindowStart(0, 4, 100), 0);
  EXPECT_EQ(selector->WindowStart(1, 4, 100), 0);   // nothing is cut at l = l_s
  EXPECT_EQ(selector->WindowStart(2, 4, 100), 29);  // floor(29.29)
  EXPECT_EQ(selector->WindowStart(3, 4, 100), 50);
  EXPECT_EQ(selector->WindowStart(3, 4, 101), 50);  // floor(50.5)
  const auto base_zero = MakeSelector(Half({"psaw.layer_base=0"}));
  EXPECT_EQ(base_zero->WindowStart(2, 4, 100), 0);
  EXPECT_EQ(base_zero->WindowStart(3, 4, 100), 29);  // the last layer does not reach c
}

// Where the result is whole in real arithmetic, rounding must not take one off: (1 - 0.9) * 10 is 0.99.. in doubles.
TEST(Psaw, WholeNumbersStayWhole) {
  const auto selector = MakeSelector(Options("psaw", {"psaw.c=0.9", "budget.local=1"}));
  for (int64_t tens = 1; tens < 200'000; tens += 97) EXPECT_EQ(selector->WindowStart(3, 4, 10 * tens), tens);
}

TEST(Psaw, RulesCutTheMiddleOfASight) {
  const StepRule rule = RuleOf(Half(), 3, 100);
  EXPECT_TRUE(rule.attend_all);
  EXPECT_EQ(rule.sinks, 4);
  EXPECT_EQ(rule.lo, 50);
  EXPECT_FALSE(rule.cut_sinks);
  EXPECT_EQ(Attended(Half(), 3, 100), Join({Range(0, 4), Range(50, 100)}));
  EXPECT_EQ(Attended(Half(), 2, 100), Join({Range(0, 4), Range(29, 100)}));
  EXPECT_EQ(Attended(Half(), 1, 100), Range(0, 100));
}

TEST(Psaw, AWindowReachesBackToTheSinks) {
  EXPECT_EQ(Attended(Half(), 2, 12), Range(0, 12));  // the edge 2 lies among the sinks
  EXPECT_EQ(RuleOf(Half(), 2, 12).lo, 4);
}

TEST(Psaw, SinksCanGo) {
  const SelectorOptions options = Half({"psaw.keep_sink=false"});
  EXPECT_TRUE(RuleOf(options, 3, 100).cut_sinks);
  EXPECT_EQ(Attended(options, 3, 100), Range(50, 100));
  // They go together, once the edge has passed the last of them: at n = 14 the guard holds the edge at 4, at n = 13 at
  // 3.
  EXPECT_EQ(Attended(options, 3, 14), Range(4, 14));
  EXPECT_TRUE(RuleOf(options, 3, 14).cut_sinks);
  EXPECT_EQ(Attended(options, 3, 13), Range(0, 13));
  EXPECT_FALSE(RuleOf(options, 3, 13).cut_sinks);
  EXPECT_FALSE(RuleOf(options, 1, 100).cut_sinks);
  EXPECT_FALSE(MakeSelector(options)->Prefill(3, 4, 100, 100).keep_sink);
}

// The guard: P_l(n) <= n - local.
TEST(Psaw, TheLocalWindowIsNeverCut) {
  const auto selector = MakeSelector(Half({"psaw.c=0.001"}));
  EXPECT_EQ(selector->WindowStart(3, 4, 100), 90);
  EXPECT_EQ(selector->WindowStart(3, 4, 10), 0);
  EXPECT_EQ(selector->WindowStart(3, 4, 5), 0);
}

TEST(Psaw, TheEdgeCanBeRoundedDownToTiles) {
  const auto selector = MakeSelector(Half({"psaw.round=16"}));
  EXPECT_EQ(selector->WindowStart(3, 4, 100), 48);
  EXPECT_EQ(selector->WindowStart(2, 4, 100), 16);
  EXPECT_EQ(selector->WindowStart(3, 4, 31), 0);
  EXPECT_EQ(Attended(Half({"psaw.round=16"}), 3, 100), Join({Range(0, 4), Range(48, 100)}));
}

TEST(Psaw, Phases) {
  const auto check = [](std::string_view phase, bool prefill, bool decode) {
    const SelectorOptions options = Half({phase});
    const auto selector = MakeSelector(options);
    EXPECT_EQ(selector->Prefill(3, 4, 100, 100).windowed, prefill) << phase;
    EXPECT_EQ(selector->MethodTag(100).empty(), !prefill) << phase;
    EXPECT_EQ(RuleOf(options, 3, 100).lo > 4, decode) << phase;
    EXPECT_EQ(Attended(options, 3, 100).size() < 100, decode) << phase;
  };
  check("psaw.phase=both", true, true);
  check("psaw.phase=prefill", true, false);
  check("psaw.phase=decode", false, true);
  check("psaw.phase=off", false, false);
  EXPECT_EQ(MakeSelector(Half({"psaw.phase=off"}))->WindowStart(3, 4, 100), 0);
}

TEST(Psaw, WholeShareIsDense) {
  const auto selector = MakeSelector(Half({"psaw.c=1"}));
  EXPECT_EQ(selector->WindowStart(3, 4, 100), 0);
  EXPECT_FALSE(selector->Prefill(3, 4, 100, 100).windowed);
  EXPECT_EQ(selector->MethodTag(100), "");
}

// What may be freed at n must not be in sight at any later n.
TEST(Psaw, TheEdgeNeverGoesBack) {
  for (const char* c : {"psaw.c=0.9", "psaw.c=0.7", "psaw.c=0.5", "psaw.c=0.01"}) {
    for (const char* l_s : {"psaw.l_s=0", "psaw.l_s=1/4", "psaw.l_s=1/2", "psaw.l_s=0.9"}) {
      for (const char* round : {"psaw.round=1", "psaw.round=16", "psaw.round=7"}) {
        for (const char* base : {"psaw.layer_base=0", "psaw.layer_base=1"}) {
          const auto selector = MakeSelector(Half({c, l_s, round, base}));
          for (const int32_t layers : {1, 4, 30}) {
            for (const int32_t layer : {0, layers / 2, layers - 1}) {
              int64_t last = 0;
              for (int64_t n = 1; n < 700; ++n) {
                const int64_t start = selector->WindowStart(layer, layers, n);
                ASSERT_GE(start, last) << c << " " << l_s << " " << round << " layer " << layer << " n " << n;
                ASSERT_LE(start, std::max<int64_t>(0, n - 10));
                last = start;
              }
            }
          }
        }
      }
    }
  }
}

TEST(Psaw, DeeperLayersSeeNoMore) {
  const auto selector = MakeSelector(Half({"psaw.c=0.7"}));
  for (int32_t layer = 1; layer < 30; ++layer) {
    EXPECT_GE(selector->WindowStart(layer, 30, 5000), selector->WindowStart(layer - 1, 30, 5000)) << layer;
  }
}

TEST(Psaw, EvictionNeedsAnEdgeThatDecodeKeeps) {
  EXPECT_TRUE(RuleOf(Half({"psaw.evict=true"}), 3, 100).evict_cut);
  EXPECT_FALSE(RuleOf(Half(), 3, 100).evict_cut);
  for (const auto phase : {PsawOptions::Phase::kPrefill, PsawOptions::Phase::kOff}) {
    SelectorOptions options = Half({"psaw.evict=true"});
    options.psaw.phase = phase;
    EXPECT_STATUS(StatusCode::kInvalid, "psaw.evict=true", options.Validate());
  }
}

// The key of stored K and V changes with everything that changes them, and with nothing else.
TEST(Psaw, MethodTag) {
  const std::string tag = MakeSelector(Half())->MethodTag(100);
  EXPECT_EQ(tag, "psaw(c=0.5,ls=0.5,sink=4,local=10,base=1,round=1)");
  EXPECT_EQ(MakeSelector(Half())->MethodTag(200), tag);
  EXPECT_EQ(MakeSelector(Half({"psaw.evict=true"}))->MethodTag(100), tag);
  const auto differs = [&](std::initializer_list<std::string_view> knobs) {
    return MakeSelector(Half(knobs))->MethodTag(100) != tag;
  };
  EXPECT_TRUE(differs({"psaw.c=0.51"}));
  EXPECT_TRUE(differs({"psaw.l_s=0.25"}));
  EXPECT_TRUE(differs({"psaw.keep_sink=false"}));
  EXPECT_TRUE(differs({"psaw.layer_base=0"}));
  EXPECT_TRUE(differs({"psaw.round=16"}));
  EXPECT_TRUE(differs({"budget.sinks=5"}));
  EXPECT_TRUE(differs({"budget.local=11"}));
  // Without keep_sink the sinks still say when they go.
  EXPECT_NE(MakeSelector(Half({"psaw.keep_sink=false"}))->MethodTag(100),
            MakeSelector(Half({"psaw.keep_sink=false", "budget.sinks=5"}))->MethodTag(100));
}

}  // namespace
}  // namespace prehoc
