// The engine over a dense backend: against fp64, in pieces, step by step, after errors, and what it refuses.
#include "integrations/reference/engine/engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>

#include "tests/integrations/engine/engine_fixture.h"
#include "tests/integrations/engine/naive_decoder.h"
#include "tests/integrations/engine/random_model.h"
#include "tests/support/seeded_rng.h"

namespace prehoc::reference {
namespace {

class EngineTest : public testing::Test {
 protected:
  std::unique_ptr<Engine> MakeEngine(std::shared_ptr<const Model> model, EngineOptions options = {}) {
    if (options.executor == nullptr) options.executor = &executor_;
    auto engine = Engine::Create(std::move(model), options);
    EXPECT_OK(engine);
    return engine.ok() ? std::move(engine).value() : nullptr;
  }
  ManualExecutor executor_;
};

TEST_F(EngineTest, AgreesWithFp64ForEveryWeightTypeLayoutAndLevel) {
  SeededRng rng(1);
  for (const WeightType type : {WeightType::kF32, WeightType::kF16, WeightType::kBF16, WeightType::kQ8_0, WeightType::kQ4_0,
                                WeightType::kQ4_1, WeightType::kQ4_K, WeightType::kQ6_K}) {
    ModelShape shape{.layers = 2, .type = type, .biases = rng.Chance(0.5), .qk_norm = rng.Chance(0.5),
                     .layout = rng.Chance(0.5) ? RopeLayout::kHalf : RopeLayout::kInterleaved};
    if (type == WeightType::kQ4_K || type == WeightType::kQ6_K) shape.hidden = shape.intermediate = 256, shape.head_dim = 64;
    const auto model = RandomModel(rng, shape);
    const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 11);
    const auto want = NaiveDecoder(*model).Run(tokens);
    for (const SimdLevel level : AvailableLevels()) {
      const auto engine = MakeEngine(model, {.simd = level});
      DenseBackend prompt = DenseFor(model->config), steps = DenseFor(model->config);
      const std::vector<float> logits = AllLogits(*engine, prompt, tokens, 11);
      for (size_t t = 0; t < tokens.size(); ++t) {
        EXPECT_LT(RelativeError(RowOf(logits, t, shape.vocab), want[t]), 1e-5)
            << WeightTypeName(type) << ", " << SimdLevelName(level) << ", prefill of token " << t;
        const std::vector<float> step = AllLogits(*engine, steps, std::span(tokens).subspan(t, 1), 0);
        EXPECT_LT(RelativeError(step, want[t]), 6e-4)
            << WeightTypeName(type) << ", " << SimdLevelName(level) << ", decode of token " << t;
      }
    }
  }
}

TEST_F(EngineTest, PrefillInPiecesHasTheBitsOfPrefillAtOnce) {
  SeededRng rng(2);
  const auto model = RandomModel(rng, {});
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 97);
  const auto whole = MakeEngine(model);
  DenseBackend backend = DenseFor(model->config);
  const std::vector<float> want = AllLogits(*whole, backend, tokens, 97);
  const auto pool = ThreadPool::Create({.loop_threads = 3}).value();
  for (const int32_t piece : {1, 13, 32, 96}) {
    const auto engine = MakeEngine(model, {.executor = pool.get(), .max_batch_tokens = piece});
    DenseBackend pieces = DenseFor(model->config, pool.get());
    std::vector<float> logits(tokens.size() * 90);
    ASSERT_OK(engine->Forward(pieces, tokens, 97, std::span(logits).first(90)));
    DenseBackend again = DenseFor(model->config, pool.get());
    ASSERT_OK(engine->Forward(again, std::span(tokens).first(40), 97, {}));
    ASSERT_OK(engine->Forward(again, std::span(tokens).subspan(40), 97, std::span(logits).subspan(90, 90)));
    for (size_t i = 0; i < 90; ++i) ASSERT_EQ(logits[i], logits[90 + i]) << "pieces of " << piece << ", logit " << i;
    EXPECT_LT(RelativeError(RowOf(logits, 0, 90), RowOf(want, 96, 90)), 6e-4);
    // Logits of one row are made as in decode; those of all rows show every bit of the layers before them.
    DenseBackend all = DenseFor(model->config, pool.get());
    if (piece > 1) {
      const std::vector<float> got = AllLogits(*engine, all, tokens, 97);
      const size_t in_company = 97 % piece == 1 ? 96 : 97;
      for (size_t i = 0; i < in_company * 90; ++i) ASSERT_EQ(got[i], want[i]) << "pieces of " << piece << ", logit " << i;
    }
  }
}

TEST_F(EngineTest, DecodeStepsContinueAPrompt) {
  SeededRng rng(3);
  const auto model = RandomModel(rng, {});
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 60);
  const auto engine = MakeEngine(model);
  DenseBackend whole = DenseFor(model->config), stepped = DenseFor(model->config);
  const std::vector<float> want = AllLogits(*engine, whole, tokens, 60);
  ASSERT_OK(engine->Forward(stepped, std::span(tokens).first(20), 20, {}));
  for (size_t t = 20; t < 60; ++t) {
    std::vector<float> logits(90);
    ASSERT_OK(engine->Forward(stepped, std::span(tokens).subspan(t, 1), 0, logits));
    EXPECT_LT(RelativeError(logits, RowOf(want, t, 90)), 6e-4) << "token " << t;
    EXPECT_EQ(stepped.length(), static_cast<int64_t>(t + 1));
  }
}

TEST_F(EngineTest, AnErrorOfTheBackendIsReturnedAfterRollbackAndTheTokensCanBeRunAgain) {
  SeededRng rng(4);
  const auto model = RandomModel(rng, {});
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 30);
  const auto engine = MakeEngine(model, {.max_batch_tokens = 8});
  DenseBackend plain = DenseFor(model->config);
  std::vector<float> want(90), got(90);
  ASSERT_OK(engine->Forward(plain, tokens, 30, want));
  RuledBackend backend(DenseFor(model->config), std::vector<FreezeRule>(4));
  ASSERT_OK(engine->Forward(backend, std::span(tokens).first(8), 30, {}));
  for (const int32_t layer : {0, 1, 3}) {
    backend.fail_layer = layer;
    EXPECT_STATUS(StatusCode::kIoError, "attention failed", engine->Forward(backend, std::span(tokens).subspan(8), 30, got));
    EXPECT_EQ(backend.length(), 8);
  }
  EXPECT_EQ(backend.rollbacks, 3);
  backend.fail_layer = -1;
  backend.fail_end = true;
  EXPECT_STATUS(StatusCode::kOutOfSpace, "end failed", engine->Forward(backend, std::span(tokens).subspan(8), 30, got));
  EXPECT_EQ(backend.rollbacks, 4);
  backend.fail_end = false;
  ASSERT_OK(engine->Forward(backend, std::span(tokens).subspan(8), 30, got));
  EXPECT_EQ(got, want);
}

TEST_F(EngineTest, ARefusalAnnouncesNothing) {
  SeededRng rng(5);
  const auto model = RandomModel(rng, {});
  const auto engine = MakeEngine(model, {.max_tokens = 10});
  DenseBackend backend = DenseFor(model->config);
  std::vector<float> logits(90);
  const std::vector<int32_t> good = {1, 2, 3}, negative = {1, -1}, beyond = {90}, many(11, 1);
  const std::vector<int32_t> none;
  EXPECT_STATUS(StatusCode::kInvalid, "no tokens", engine->Forward(backend, none, 0, logits));
  EXPECT_STATUS(StatusCode::kInvalid, "token -1 is not", engine->Forward(backend, negative, 0, logits));
  EXPECT_STATUS(StatusCode::kInvalid, "token 90 is not", engine->Forward(backend, beyond, 0, logits));
  EXPECT_STATUS(StatusCode::kInvalid, "11 tokens, but the limit is 10", engine->Forward(backend, many, 11, logits));
  EXPECT_STATUS(StatusCode::kInvalid, "11 tokens", engine->Forward(backend, good, 11, logits));
  EXPECT_STATUS(StatusCode::kInvalid, "prompt_tokens=-1", engine->Forward(backend, good, -1, logits));
  EXPECT_STATUS(StatusCode::kInvalid, "logits for 89", engine->Forward(backend, good, 0, std::span(logits).first(89)));
  EXPECT_STATUS(StatusCode::kInvalid, "room for 90 logits, expected 3 x 90", engine->ForwardAll(backend, good, 0, logits));
  EXPECT_EQ(backend.length(), 0);
  EXPECT_OK(engine->Forward(backend, good, 0, logits));
  EXPECT_EQ(backend.length(), 3);
}

TEST_F(EngineTest, CreateNamesWhatIsWrong) {
  SeededRng rng(6);
  const auto model = RandomModel(rng, {});
  EXPECT_STATUS(StatusCode::kInvalid, "executor", Engine::Create(model, {}));
  EXPECT_STATUS(StatusCode::kInvalid, "model is null", Engine::Create(nullptr, {.executor = &executor_}));
  EXPECT_STATUS(StatusCode::kInvalid, "max_batch_tokens=0", Engine::Create(model, {.executor = &executor_, .max_batch_tokens = 0}));
  EXPECT_STATUS(StatusCode::kInvalid, "max_tokens=-1", Engine::Create(model, {.executor = &executor_, .max_tokens = -1}));
  EXPECT_STATUS(StatusCode::kInvalid, "clock", Engine::Create(model, {.executor = &executor_, .clock = nullptr}));
  const auto broken = [&](const auto& change) {
    auto copy = std::make_shared<Model>(*model);
    change(*copy);
    return Engine::Create(copy, {.executor = &executor_});
  };
  EXPECT_STATUS(StatusCode::kInvalid, "layer 1 down is [64, 96], expected [64, 128]", broken([](Model& m) {
                  m.config.intermediate = 128;
                  m.layers[0].gate.rows = m.layers[0].up.rows = m.layers[1].gate.rows = m.layers[1].up.rows = 128;
                  m.layers[0].down.cols = 128;
                  m.layers[0].down.row_bytes = 80;
                }));
  EXPECT_STATUS(StatusCode::kInvalid, "output is missing", broken([](Model& m) { m.output = {}; }));
  EXPECT_STATUS(StatusCode::kInvalid, "layer 2 q_norm has 3", broken([](Model& m) { m.layers[2].q_norm.resize(3); }));
  EXPECT_STATUS(StatusCode::kInvalid, "3 layers of weights", broken([](Model& m) { m.layers.pop_back(); }));
  EXPECT_STATUS(StatusCode::kInvalid, "rows of 41 bytes", broken([](Model& m) { m.layers[0].q.row_bytes = 41; }));
}

TEST_F(EngineTest, ASlidingWindowIsTheLimitWhateverIsAskedFor) {
  SeededRng rng(7);
  auto model = RandomModel(rng, {});
  model->config.sliding_window = 16;
  EXPECT_EQ(MakeEngine(model)->max_tokens(), 16);
  const auto engine = MakeEngine(model, {.max_tokens = 64});
  DenseBackend backend = DenseFor(model->config);
  const std::vector<int32_t> tokens(17, 1);
  EXPECT_OK(engine->Forward(backend, std::span(tokens).first(16), 16, {}));
  EXPECT_STATUS(StatusCode::kInvalid, "sliding window is 16", engine->Forward(backend, std::span(tokens).first(1), 0, {}));
}

TEST_F(EngineTest, KeepsQueriesBeforeRopeWhenAsked) {
  SeededRng rng(8);
  const auto model = RandomModel(rng, {});
  const auto engine = MakeEngine(model, {.keep_q_pre_rope = true});
  RuledBackend backend(DenseFor(model->config), std::vector<FreezeRule>(4));
  backend.q_width = 64;
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 5);
  ASSERT_OK(engine->Forward(backend, tokens, 5, {}));
  RopeTables rope(model->config, 8);
  rope.Prepare(0, 5, 5);
  ASSERT_EQ(backend.q.size(), 5u * 64);
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t h = 0; h < 4; ++h) rope.Rotate(t, backend.q_pre_rope.data() + t * 64 + h * 16);
  }
  EXPECT_EQ(backend.q_pre_rope, backend.q);
  RuledBackend without(DenseFor(model->config), std::vector<FreezeRule>(4));
  ASSERT_OK(MakeEngine(model)->Forward(without, tokens, 5, {}));
  EXPECT_EQ(without.calls.front().q_pre_rope, nullptr);
}

TEST_F(EngineTest, ReportsTimeMemoryAndCounts) {
  SeededRng rng(9);
  const auto model = RandomModel(rng, {});
  class TickingClock final : public Clock {
    int64_t DoNowNanos() const override { return now_ += 1'000'000'000; }
    mutable int64_t now_ = 0;
  } clock;
  const auto engine = MakeEngine(model, {.max_batch_tokens = 4, .clock = &clock});
  DenseBackend backend = DenseFor(model->config);
  std::vector<float> logits(90);
  ASSERT_OK(engine->Forward(backend, RandomTokens(rng, model->config, 6), 6, logits));
  std::map<std::string, double> counters;
  engine->VisitCounters([&](std::string_view name, double value) { counters[std::string(name)] = value; });
  EXPECT_EQ(counters["engine.tokens"], 6);
  EXPECT_EQ(counters["engine.pieces"], 2);
  EXPECT_EQ(counters["engine.weight_bytes"], static_cast<double>(model->weight_bytes));
  EXPECT_GT(counters["engine.scratch_bytes"], 4 * (64 + 3 * 64 + 2 * 96) * 4);
  // A tick for each timed part: by layer two of projections and one of attention, by piece Begin, End, embedding.
  EXPECT_EQ(counters["engine.seconds.projections"], 2 * 4 * 2);
  EXPECT_EQ(counters["engine.seconds.attention"], 2 * (4 + 2));
  EXPECT_EQ(counters["engine.seconds.embedding"], 2);
  EXPECT_EQ(counters["engine.seconds.logits"], 1);
  EXPECT_EQ(engine->seconds().total(), 16 + 12 + 2 + 1);
}

}  // namespace
}  // namespace prehoc::reference
