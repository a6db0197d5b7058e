#include "integrations/cli/generate.h"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <vector>

#include "tests/support/status_matchers.h"

namespace prehoc::cli {
namespace {

constexpr int32_t kVocab = 10;
constexpr int32_t kEnd = 0;

// Counts up: after token t comes t + 1, after 9 the end. Notes every call.
class CountingModel {
 public:
  Forward forward() {
    return [this](std::span<const int32_t> tokens, int64_t prompt_tokens, std::span<float> logits) -> Status {
      if (calls_left_-- == 0) return {StatusCode::kOutOfSpace, "every budget is full"};
      pieces.emplace_back(tokens.begin(), tokens.end());
      prompts.push_back(prompt_tokens);
      clock.Advance(1'000'000'000);
      if (!logits.empty()) {
        std::fill(logits.begin(), logits.end(), 0.0f);
        logits[static_cast<size_t>((tokens.back() + 1) % kVocab)] = 5;
      }
      return {};
    };
  }
  void FailAfter(int calls) { calls_left_ = calls; }

  ManualClock clock;
  std::vector<std::vector<int32_t>> pieces;
  std::vector<int64_t> prompts;

 private:
  int calls_left_ = 1 << 30;
};

GenerateRequest Request(const std::vector<int32_t>& prompt, int64_t max_new_tokens) {
  GenerateRequest request;
  request.prompt = prompt;
  request.piece_tokens = 4;
  request.max_new_tokens = max_new_tokens;
  request.vocab = kVocab;
  return request;
}

GenerateHooks UntilEnd() {
  GenerateHooks hooks;
  hooks.is_end = [](int32_t token) { return token == kEnd; };
  return hooks;
}

TEST(GenerateTest, PrefillsInPiecesThenDecodesUntilTheEnd) {
  CountingModel model;
  const std::vector<int32_t> prompt = {1, 1, 1, 1, 1, 6};
  std::vector<int64_t> progress;
  std::vector<int32_t> printed;
  GenerateHooks hooks = UntilEnd();
  hooks.on_prefill = [&](int64_t done) { progress.push_back(done); };
  hooks.on_token = [&](int32_t token) { printed.push_back(token); return Status(); };
  const auto result = Generate(Request(prompt, 100), model.forward(), hooks, model.clock);
  ASSERT_OK(result);
  EXPECT_EQ(model.pieces, (std::vector<std::vector<int32_t>>{{1, 1, 1, 1}, {1, 6}, {7}, {8}, {9}}));
  EXPECT_EQ(model.prompts, (std::vector<int64_t>{6, 6, 0, 0, 0}));
  EXPECT_EQ(progress, (std::vector<int64_t>{4, 6}));
  EXPECT_EQ(printed, (std::vector<int32_t>{7, 8, 9}));
  EXPECT_EQ(result->decisions, (std::vector<int32_t>{7, 8, 9, kEnd}));
  EXPECT_EQ(result->answer_tokens, 3);
  EXPECT_EQ(result->stop, StopReason::kEnd);
  EXPECT_EQ(result->prefill_seconds, 2);
  EXPECT_EQ(result->decode_steps, 3);
  EXPECT_EQ(result->decode_seconds, 3);
}

TEST(GenerateTest, ARestoredPrefixIsNotRunAndPiecesKeepTheirPlaces) {
  CountingModel model;
  std::vector<int32_t> prompt(13);
  std::iota(prompt.begin(), prompt.end(), 0);
  for (int32_t& token : prompt) token %= 3;
  GenerateRequest request = Request(prompt, 1);
  request.restored = 6;
  const auto result = Generate(request, model.forward(), UntilEnd(), model.clock);
  ASSERT_OK(result);
  ASSERT_EQ(model.pieces.size(), 3u);
  EXPECT_EQ(model.pieces[0].size(), 2u);  // to 8
  EXPECT_EQ(model.pieces[1].size(), 4u);  // to 12
  EXPECT_EQ(model.pieces[2].size(), 1u);
  EXPECT_EQ(result->prefill_tokens, 7);
}

TEST(GenerateTest, StopsAtTheLimitWithoutARunThatNobodyNeeds) {
  CountingModel model;
  const auto result = Generate(Request({1}, 3), model.forward(), UntilEnd(), model.clock);
  ASSERT_OK(result);
  EXPECT_EQ(result->decisions, (std::vector<int32_t>{2, 3, 4}));
  EXPECT_EQ(result->stop, StopReason::kLimit);
  EXPECT_EQ(result->decode_steps, 2);
}

TEST(GenerateTest, AnInterruptionStopsBetweenTokensAndKeepsWhatIsThere) {
  CountingModel model;
  GenerateHooks hooks = UntilEnd();
  int asked = 0;
  hooks.stop_requested = [&] { return ++asked > 2; };
  const auto result = Generate(Request({1}, 100), model.forward(), hooks, model.clock);
  ASSERT_OK(result);
  EXPECT_EQ(result->stop, StopReason::kInterrupted);
  EXPECT_EQ(result->decisions, (std::vector<int32_t>{2, 3}));
}

TEST(GenerateTest, AnInterruptedPrefillDecidesNothing) {
  CountingModel model;
  GenerateHooks hooks = UntilEnd();
  hooks.stop_requested = [&] { return model.pieces.size() == 1; };
  const auto result = Generate(Request({1, 1, 1, 1, 1, 1}, 100), model.forward(), hooks, model.clock);
  ASSERT_OK(result);
  EXPECT_EQ(result->stop, StopReason::kInterrupted);
  EXPECT_TRUE(result->decisions.empty());
  EXPECT_EQ(result->prefill_tokens, 4);
}

TEST(GenerateTest, ForcedDecisionsAreFedAndOursAreReported) {
  CountingModel model;
  const std::vector<int32_t> prompt = {1};
  GenerateRequest request = Request(prompt, 1);
  const std::vector<int32_t> forced = {2, 7, 8, kEnd};
  request.forced = forced;
  int logits = 0;
  GenerateHooks hooks = UntilEnd();
  hooks.on_logits = [&](std::span<const float>) { ++logits; };
  const auto result = Generate(request, model.forward(), hooks, model.clock);
  ASSERT_OK(result);
  EXPECT_EQ(result->decisions, (std::vector<int32_t>{2, 3, 8, 9}));
  EXPECT_EQ(model.pieces, (std::vector<std::vector<int32_t>>{{1}, {2}, {7}, {8}}));
  EXPECT_EQ(logits, 4);
}

TEST(GenerateTest, ErrorsOfTheModelAndOfThePrinterEndIt) {
  CountingModel model;
  model.FailAfter(2);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "every budget", Generate(Request({1}, 100), model.forward(), UntilEnd(), model.clock));
  CountingModel other;
  GenerateHooks hooks = UntilEnd();
  hooks.on_token = [](int32_t) { return Status(StatusCode::kIoError, "standard output"); };
  EXPECT_STATUS(StatusCode::kIoError, "standard output", Generate(Request({1}, 100), other.forward(), hooks, other.clock));
  EXPECT_EQ(other.pieces.size(), 1u);
}

TEST(GenerateTest, LogitsThatAreNoNumbersAreNoAnswer) {
  const std::vector<int32_t> prompt = {1, 2, 3};
  int calls = 0;
  const Forward forward = [&](std::span<const int32_t>, int64_t, std::span<float> logits) {
    std::fill(logits.begin(), logits.end(), ++calls < 3 ? 1.0f : std::numeric_limits<float>::quiet_NaN());
    return OkStatus();
  };
  GenerateRequest request;
  request.prompt = prompt;
  request.piece_tokens = 8;
  request.max_new_tokens = 5;
  request.vocab = 10;
  const auto generated = Generate(request, forward, {}, SteadyClock::Get());
  EXPECT_STATUS(StatusCode::kCorrupt, "decision 3", generated);
  EXPECT_EQ(calls, 3);
}

TEST(MostLikelyTest, TakesTheLowestOfEqualsAndNeverNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(MostLikely(std::vector<float>{1, 3, 3}), 1);
  EXPECT_EQ(MostLikely(std::vector<float>{nan, -2, nan, -1}), 3);
  EXPECT_EQ(MostLikely(std::vector<float>{-5}), 0);
}

}  // namespace
}  // namespace prehoc::cli
