#include "cache/tier_health.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

constexpr int64_t kSecond = 1'000'000'000;
const Status kFailed{StatusCode::kIoError, "the disk"};
const Status kLate{StatusCode::kDeadline, "the disk"};

class TierHealthTest : public ::testing::Test {
 protected:
  double Counter(const std::string& name) const {
    std::map<std::string, double> counters;
    health_.VisitCounters([&](std::string_view shown, double value) { counters[std::string(shown)] = value; });
    return counters.at("health." + name);
  }
  void Read(const Status& status) {
    ASSERT_TRUE(health_.Begin());
    health_.End(status);
  }
  ManualClock clock_{5 * kSecond};
  TierHealth health_{{}, &clock_};
};

// ---- the breaker ----

TEST_F(TierHealthTest, OpensAfterFailuresInARowOnly) {
  for (int i = 0; i < 10; ++i) {
    Read(kFailed);
    Read(kFailed);
    Read({});
  }
  EXPECT_TRUE(health_.Available());
  Read(kFailed);
  Read({StatusCode::kCorrupt, "damage is no failure of the store"});
  Read({StatusCode::kBusy, "nor is this"});
  Read(kFailed);
  Read(kFailed);
  EXPECT_TRUE(health_.Available());
  Read(kFailed);
  EXPECT_FALSE(health_.Available());
  EXPECT_FALSE(health_.Begin());
  EXPECT_EQ(Counter("state"), 1);
  EXPECT_EQ(Counter("opened"), 1);
  EXPECT_EQ(Counter("refused"), 1);
}

TEST_F(TierHealthTest, OneDeadlineIsEnough) {
  Read(kLate);
  EXPECT_FALSE(health_.Begin());
  EXPECT_EQ(Counter("deadlines"), 1);
}

TEST_F(TierHealthTest, HalfOpenLetsOneThrough) {
  Read(kLate);
  clock_.Advance(kSecond - 1);
  EXPECT_FALSE(health_.Begin());
  clock_.Advance(1);
  EXPECT_TRUE(health_.Available());
  EXPECT_TRUE(health_.Begin());
  EXPECT_FALSE(health_.Available());
  EXPECT_FALSE(health_.Begin()) << "the first has not said yet";
  health_.End({});
  EXPECT_TRUE(health_.Begin());
  EXPECT_EQ(Counter("state"), 0);
}

TEST_F(TierHealthTest, BackoffDoublesUpToAMinuteAndBeginsAnewAfterASuccess) {
  Read(kLate);
  int64_t expected = kSecond;
  for (int i = 0; i < 10; ++i) {
    clock_.Advance(expected - 1);
    EXPECT_FALSE(health_.Begin()) << i;
    clock_.Advance(1);
    Read(kFailed);  // one failure is enough now
    EXPECT_FALSE(health_.Begin()) << i;
    expected = std::min<int64_t>(60 * kSecond, 2 * expected);
  }
  clock_.Advance(60 * kSecond);
  Read({});
  Read(kLate);
  clock_.Advance(kSecond);
  EXPECT_TRUE(health_.Begin());
}

TEST_F(TierHealthTest, WhatBeganBeforeItOpenedDoesNotCloseIt) {
  ASSERT_TRUE(health_.Begin());
  ASSERT_TRUE(health_.Begin());
  health_.End(kLate);
  health_.End({});
  EXPECT_FALSE(health_.Begin());
}

TEST_F(TierHealthTest, WritesCountAsReadsDo) {
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(health_.Begin());
    health_.End(kFailed);
  }
  EXPECT_FALSE(health_.Available());
}

// ---- the costs ----

TEST_F(TierHealthTest, WithoutMeasurementsAHitIsUsed) {
  EXPECT_EQ(health_.RestoreNanos(10), -1);
  EXPECT_EQ(health_.PrefillNanos(0, 10), -1);
  EXPECT_EQ(health_.WorthRestoring(7, 70, 0, 700), 7);
  health_.OnRestore(10, 10 * kSecond);
  EXPECT_EQ(health_.WorthRestoring(7, 70, 0, 700), 7) << "what computing costs is not known";
}

TEST_F(TierHealthTest, AHitIsUsedOnlyIfItIsFaster) {
  health_.OnRestore(100, 100 * 1000);   // 1 us a block
  health_.OnPrefill(0, 100, 100 * 5000);  // 5 us a token
  EXPECT_EQ(health_.WorthRestoring(4, 400, 0, 100), 4) << "400 us against 500 us";
  EXPECT_EQ(health_.WorthRestoring(4, 600, 0, 100), 0) << "600 us against 500 us";
  EXPECT_EQ(Counter("bypassed_chunks"), 4);
}

TEST_F(TierHealthTest, AStoreThatWasTooSlowIsTriedAgainByOneChunk) {
  health_.OnRestore(1, kSecond);
  health_.OnPrefill(0, 1, 1000);
  EXPECT_EQ(health_.WorthRestoring(4, 40, 0, 100), 0);
  clock_.Advance(10 * kSecond);
  EXPECT_EQ(health_.WorthRestoring(4, 40, 0, 100), 1);
  EXPECT_EQ(health_.WorthRestoring(4, 40, 0, 100), 0) << "one at a time";
  EXPECT_EQ(Counter("probes"), 1);
  // It has become fast: a few measurements are enough.
  int probes = 0;
  while (health_.WorthRestoring(4, 40, 0, 100) < 4 && ++probes < 100) {
    health_.OnRestore(10, 10);
    clock_.Advance(10 * kSecond);
  }
  EXPECT_LT(probes, 50);
}

TEST_F(TierHealthTest, LaterTokensCostMoreAsMeasured) {
  for (int64_t first = 0; first < 10'000; first += 500) {
    // 1,000 ns a token, and one more for every token before it.
    health_.OnPrefill(first, 500, 500 * (1000 + first + 250));
  }
  EXPECT_NEAR(health_.PrefillNanos(0, 500), 500 * 1250, 500 * 30);
  EXPECT_NEAR(health_.PrefillNanos(20'000, 500), 500 * 21'250, 500 * 300);
}

TEST_F(TierHealthTest, OneLengthAloneGivesNoSlope) {
  for (int i = 0; i < 5; ++i) health_.OnPrefill(1000, 500, 500'000);
  EXPECT_NEAR(health_.PrefillNanos(100'000, 10), 10'000, 1);
}

TEST_F(TierHealthTest, OddMeasurementsAreLeftOut) {
  health_.OnPrefill(0, 0, 5);
  health_.OnPrefill(0, 5, -5);
  health_.OnRestore(0, 5);
  EXPECT_EQ(health_.PrefillNanos(0, 10), -1);
  EXPECT_EQ(health_.RestoreNanos(1), -1);
}

TEST_F(TierHealthTest, RefusesOptionsThatMakeNoSense) {
  TierHealth::Options options;
  EXPECT_OK(options.Validate());
  options.failures = 0;
  EXPECT_STATUS(StatusCode::kInvalid, "failures=0", options.Validate());
  options = {};
  options.max_backoff_nanos = 1;
  EXPECT_STATUS(StatusCode::kInvalid, "max_backoff_nanos=1", options.Validate());
}

}  // namespace
}  // namespace prehoc
