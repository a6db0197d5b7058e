// ETF: in prefill an early prefix is left as it is, the longer the deeper the layer.
#include "tests/selector/selector_test_util.h"

namespace prehoc {
namespace {
// 4 layers, l_s = 2, c = 1/2: layers 1 and 2 freeze nothing, layer 3 29 % (1 - sqrt(1/2)), layer 4 half.
int64_t Frozen(std::initializer_list<std::string_view> knobs, int32_t layer, int64_t prompt, int64_t chunk_end) {
  return MakeSelector(Options("etf", knobs))->Prefill(layer, 4, prompt, chunk_end).frozen;
}

TEST(Etf, FreezesByDepth) {
  for (const int64_t chunk_end : {64, 100}) {  // the whole prompt counts, wherever its piece ends
    EXPECT_EQ(Frozen({"etf.c=0.5"}, 0, 100, chunk_end), 0);
    EXPECT_EQ(Frozen({"etf.c=0.5"}, 1, 100, chunk_end), 0);
    EXPECT_EQ(Frozen({"etf.c=0.5"}, 2, 100, chunk_end), 29);
    EXPECT_EQ(Frozen({"etf.c=0.5"}, 3, 100, chunk_end), 50);
  }
}

TEST(Etf, ExtentCanBeTheChunk) {
  EXPECT_EQ(Frozen({"etf.c=0.5", "etf.n=chunk"}, 3, 100, 40), 20);
  EXPECT_EQ(Frozen({"etf.c=0.5", "etf.n=chunk"}, 3, 100, 100), 50);
  // A piece [a, b) freezes nothing once a > (1 - c) b.
  EXPECT_LE(Frozen({"etf.c=0.5", "etf.n=chunk"}, 3, 100, 64), 32);
}

TEST(Etf, StartIsThatOfPsawUnlessGiven) {
  EXPECT_EQ(Frozen({"etf.c=0.5", "psaw.l_s=0"}, 0, 100, 100), 15);                    // 1 - 0.5^(1/4) = 0.159
  EXPECT_EQ(Frozen({"etf.c=0.5", "psaw.l_s=0", "etf.l_s=1/2"}, 0, 100, 100), 0);
  EXPECT_EQ(Frozen({"etf.c=0.5", "psaw.l_s=0", "etf.l_s=psaw"}, 0, 100, 100), 15);
  EXPECT_EQ(Frozen({"etf.c=0.5", "etf.l_s=3/4"}, 2, 100, 100), 0);
  EXPECT_EQ(Frozen({"etf.c=0.5", "etf.l_s=3/4"}, 3, 100, 100), 50);
}

TEST(Etf, NeverFreezesTheLastToken) {
  for (const char* c : {"etf.c=1", "etf.c=0.9", "etf.c=0.5", "etf.c=0.001", "etf.c=1e-300"}) {
    for (const char* l_s : {"etf.l_s=0", "etf.l_s=1/2", "etf.l_s=0.99"}) {
      for (const char* mode : {"etf.mode=carry", "etf.mode=reuse_kv"}) {
        const auto selector = MakeSelector(Options("etf", {c, l_s, mode}));
        for (const int32_t layers : {1, 2, 30}) {
          int64_t above = 0;
          for (int32_t layer = 0; layer < layers; ++layer) {
            for (const int64_t prompt : {1, 2, 3, 10, 1000, 1 << 30}) {
              const int64_t frozen = selector->Prefill(layer, layers, prompt, prompt).frozen;
              ASSERT_GE(frozen, 0);
              ASSERT_LT(frozen, prompt) << c << " " << l_s << " layer " << layer << " of " << layers;
            }
            // What is frozen stays frozen: the layers above never find a token that the one below left out.
            const int64_t frozen = selector->Prefill(layer, layers, 1000, 1000).frozen;
            ASSERT_GE(frozen, above);
            above = frozen;
          }
        }
      }
    }
  }
}

TEST(Etf, FrozenTokensCanReuseTheirKeysAndValues) {
  EXPECT_FALSE(MakeSelector(Options("etf"))->Prefill(3, 4, 100, 100).reuse_kv);
  // Layer l_s = 2, counted from 1, is layer 1 counted from 0: the last one that every token runs through.
  PrefillRule rule = MakeSelector(Options("etf", {"etf.mode=reuse_kv", "etf.c=0.5"}))->Prefill(3, 4, 100, 100);
  EXPECT_TRUE(rule.reuse_kv);
  EXPECT_EQ(rule.reuse_layer, 1);
  EXPECT_EQ(rule.frozen, 50);
  rule = MakeSelector(Options("etf", {"etf.mode=reuse_kv", "etf.reuse_from=last"}))->Prefill(3, 4, 100, 100);
  EXPECT_EQ(rule.reuse_layer, -1);
  // With l_s = 0 the first layer has nothing to reuse, and freezes nothing.
  const auto from_first = MakeSelector(Options("etf", {"etf.mode=reuse_kv", "etf.c=0.5", "etf.l_s=0"}));
  EXPECT_EQ(from_first->Prefill(0, 4, 100, 100).frozen, 0);
  EXPECT_EQ(from_first->Prefill(1, 4, 100, 100).reuse_layer, 0);
  EXPECT_EQ(from_first->Prefill(1, 4, 100, 100).frozen, 29);
}

// The layer that is reused must itself have been computed for every token, also where l_s is no whole number.
TEST(Etf, TheReusedLayerIsComplete) {
  for (const char* l_s : {"etf.l_s=0", "etf.l_s=0.1", "etf.l_s=1/3", "etf.l_s=1/2", "etf.l_s=0.77", "etf.l_s=0.95"}) {
    const auto selector = MakeSelector(Options("etf", {"etf.mode=reuse_kv", "etf.c=0.01", l_s}));
    for (int32_t layers = 1; layers < 40; ++layers) {
      for (int32_t layer = 0; layer < layers; ++layer) {
        const PrefillRule rule = selector->Prefill(layer, layers, 10'000, 10'000);
        ASSERT_GE(rule.reuse_layer, 0);
        ASSERT_EQ(selector->Prefill(rule.reuse_layer, layers, 10'000, 10'000).frozen, 0) << l_s << " of " << layers;
        ASSERT_TRUE(rule.frozen == 0 || rule.reuse_layer < layer);
      }
    }
  }
}

TEST(Etf, DecodeIsDense) {
  const SelectorOptions options = Options("etf", {"etf.c=0.5"});
  const StepRule rule = MakeSelector(options)->Rule({.layer = 3, .layers = 4, .step = 1, .n = 100});
  EXPECT_TRUE(rule.attend_all);
  EXPECT_EQ(rule.lo, rule.sinks);
  HandLayer layer(options, 1, 1, true, 3, 4);
  layer.SkipTo(1);
  EXPECT_EQ(layer.Step({std::vector<double>(100, 1)}, {0}).attended[0], Range(0, 100));
}

TEST(Etf, MethodTag) {
  const auto tag = [](std::initializer_list<std::string_view> knobs, int64_t prompt = 100) {
    return MakeSelector(Options("etf", knobs))->MethodTag(prompt);
  };
  EXPECT_EQ(tag({}), "etf(mode=carry,c=0.9,ls=0.5,n=prompt,T=100)");
  EXPECT_EQ(tag({"etf.c=1"}), "");
  EXPECT_NE(tag({}, 101), tag({}, 100));
  EXPECT_NE(tag({"etf.n=chunk"}, 101), tag({"etf.n=chunk"}, 100));  // the last piece ends there
  EXPECT_NE(tag({"etf.mode=reuse_kv"}), tag({}));
  EXPECT_NE(tag({"etf.mode=reuse_kv"}), tag({"etf.mode=reuse_kv", "etf.reuse_from=last"}));
  EXPECT_NE(tag({"etf.n=chunk"}), tag({}));
  EXPECT_NE(tag({"etf.c=0.8"}), tag({}));
  EXPECT_EQ(tag({"psaw.l_s=1/4"}), tag({"etf.l_s=1/4"}));  // the same start, the same rows
}

}  // namespace
}  // namespace prehoc
