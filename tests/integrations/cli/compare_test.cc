#include "integrations/cli/compare.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tests/support/seeded_rng.h"

namespace prehoc::cli {
namespace {

TEST(CompareTest, LogSoftmaxSumsToOneWhateverTheScale) {
  for (const float scale : {1.0f, 100.0f, 10000.0f}) {
    const std::vector<float> logits = {scale * 0.1f, scale * -3.0f, scale * 2.0f, 0};
    double sum = 0;
    for (const float value : LogSoftmax(logits)) sum += std::exp(static_cast<double>(value));
    EXPECT_NEAR(sum, 1, 1e-5) << scale;
  }
}

TEST(CompareTest, KlOfAHandMadeExample) {
  // p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2)
  const std::vector<float> p = {std::log(0.75f), std::log(0.25f)}, q = {std::log(0.5f), std::log(0.5f)};
  EXPECT_NEAR(KlDivergence(p, q), 0.75 * std::log(1.5) + 0.25 * std::log(0.5), 1e-6);
  EXPECT_EQ(KlDivergence(p, p), 0);
}

TEST(CompareTest, KlIsNeverNegativeAndIgnoresAShift) {
  Rng rng = SeededRng();
  for (int round = 0; round < 100; ++round) {
    std::vector<float> a = rng.Normals(1000, 3), b = a;
    for (float& value : b) value += 17;
    EXPECT_NEAR(KlDivergence(LogSoftmax(a), LogSoftmax(b)), 0, 1e-4);
    b = rng.Normals(1000, 3);
    EXPECT_GT(KlDivergence(LogSoftmax(a), LogSoftmax(b)), 0.1);
  }
}

TEST(CompareTest, TheRecordStaysWithinItsBytesButHoldsOneStep) {
  LogitsRecord record(3 * 4 * sizeof(float));
  for (int i = 0; i < 5; ++i) record.Add(std::vector<float>{1, 2, 3, static_cast<float>(i)});
  ASSERT_EQ(record.steps(), 3u);
  EXPECT_EQ(std::vector<float>(record.step(2).begin(), record.step(2).end()), LogSoftmax(std::vector<float>{1, 2, 3, 2}));
  LogitsRecord small(1);
  small.Add(std::vector<float>{1, 2});
  small.Add(std::vector<float>{1, 2});
  EXPECT_EQ(small.steps(), 1u);
}

TEST(CompareTest, MeanAndMaximumLeaveTheFirstDecisionOutIfTheyCan) {
  Agreement agreement;
  EXPECT_EQ(agreement.kl_mean(), 0);
  agreement.kl = {0.5};
  EXPECT_EQ(agreement.kl_mean(), 0.5);
  agreement.kl = {0.5, 0.1, 0.3};
  EXPECT_DOUBLE_EQ(agreement.kl_mean(), 0.2);
  EXPECT_DOUBLE_EQ(agreement.kl_max(), 0.3);
}

}  // namespace
}  // namespace prehoc::cli
