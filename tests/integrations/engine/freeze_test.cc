// Frozen prefixes (docs/selectors/etf.md): carry and reuse_kv against the naive decoder, in pieces and at once.
#include <gtest/gtest.h>

#include "tests/integrations/engine/engine_fixture.h"
#include "tests/integrations/engine/naive_decoder.h"
#include "tests/integrations/engine/random_model.h"
#include "tests/support/seeded_rng.h"

namespace prehoc::reference {
namespace {

constexpr int64_t kTokens = 41;

struct FreezeCase {
  const char* name;
  std::vector<FreezeRule> rules;  // [4 layers]
};

class FreezeTest : public testing::TestWithParam<FreezeCase> {};

TEST_P(FreezeTest, AgreesWithTheNaiveDecoder) {
  SeededRng rng(1);
  const auto model = RandomModel(rng, {});
  const auto& rules = GetParam().rules;
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, kTokens);
  const auto want = NaiveDecoder(*model).Run(tokens, [&](int32_t l) { return rules[static_cast<size_t>(l)]; });
  ManualExecutor executor;
  for (const int32_t piece : {64, 16, 5}) {
    const auto engine = Engine::Create(model, {.executor = &executor, .max_batch_tokens = piece}).value();
    RuledBackend backend(DenseFor(model->config), rules);
    const std::vector<float> logits = AllLogits(*engine, backend, tokens, kTokens);
    for (size_t t = 0; t < tokens.size(); ++t) {
      EXPECT_LT(RelativeError(RowOf(logits, t, 90), want[t]), 2e-4) << "token " << t << ", pieces of " << piece;
    }
    for (const AttendCall& call : backend.calls) {
      const int64_t frozen = rules[static_cast<size_t>(call.layer)].frozen;
      EXPECT_EQ(call.q_skip, std::clamp<int64_t>(frozen - call.first, 0, call.count));
    }
  }
}

// The rules must matter, or the test above shows nothing.
TEST_P(FreezeTest, ChangesTheLastToken) {
  SeededRng rng(1);
  const auto model = RandomModel(rng, {});
  const auto& rules = GetParam().rules;
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, kTokens);
  NaiveDecoder naive(*model);
  const auto frozen = naive.Run(tokens, [&](int32_t l) { return rules[static_cast<size_t>(l)]; });
  EXPECT_GT(RelativeError(frozen.back(), naive.Run(tokens).back()), 1e-3);
}

// Decode steps are never frozen; they see the K and V that the frozen tokens left.
TEST_P(FreezeTest, DecodeContinuesAFrozenPrompt) {
  SeededRng rng(2);
  const auto model = RandomModel(rng, {});
  const auto& rules = GetParam().rules;
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, kTokens + 3);
  const auto want = NaiveDecoder(*model).Run(tokens, [&](int32_t l) { return rules[static_cast<size_t>(l)]; });
  ManualExecutor executor;
  const auto engine = Engine::Create(model, {.executor = &executor}).value();
  RuledBackend backend(DenseFor(model->config), rules);
  ASSERT_OK(engine->Forward(backend, std::span(tokens).first(kTokens), kTokens, {}));
  for (size_t t = kTokens; t < tokens.size(); ++t) {
    std::vector<float> logits(90);
    ASSERT_OK(engine->Forward(backend, std::span(tokens).subspan(t, 1), 0, logits));
    EXPECT_LT(RelativeError(logits, want[t]), 6e-4) << "token " << t;
  }
}

TEST(FreezeRuleTest, ALayerThatDidNotKeepItsKeysCannotBeReused) {
  SeededRng rng(3);
  const auto model = RandomModel(rng, {});
  ManualExecutor executor;
  const auto engine = Engine::Create(model, {.executor = &executor, .max_batch_tokens = 16}).value();
  RuledBackend backend(DenseFor(model->config), {{0, false}, {0, false}, {20, true, 1}, {20, true, 1}});
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, kTokens);
  EXPECT_STATUS(StatusCode::kInvalid, "layer 2 reuses K and V of layer 1", engine->Forward(backend, tokens, kTokens, {}));
  EXPECT_EQ(backend.rollbacks, 1);
  EXPECT_EQ(backend.length(), 0);
}

INSTANTIATE_TEST_SUITE_P(
    All, FreezeTest,
    testing::Values(FreezeCase{"Carry", {{0, false}, {9, false}, {20, false}, {33, false}}},
                    FreezeCase{"ReuseKv", {{0, true}, {9, true}, {20, true}, {33, true}}},
                    FreezeCase{"FromTheFirstLayer", {{30, true}, {30, true}, {30, false}, {40, true}}},
                    FreezeCase{"Shrinking", {{0, false}, {33, true}, {12, true}, {20, true}}},
                    FreezeCase{"OfOneLayer", {{0, false}, {0, true, 1}, {20, true, 1}, {33, true, 1}}},
                    FreezeCase{"OfTheFirstLayer", {{0, true, 0}, {33, true, 0}, {12, true, 0}, {20, true, 0}}},
                    FreezeCase{"Mixed", {{5, false}, {17, true}, {17, false}, {38, true}}}),
    [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace prehoc::reference
