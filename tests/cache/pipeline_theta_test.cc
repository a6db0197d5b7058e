// How light a missing row must be to be left out: tc.theta = auto.
#include <gtest/gtest.h>

#include "base/units.h"
#include "tests/cache/pipeline_world.h"

namespace prehoc {
namespace {

constexpr int64_t kSteps = 24;

// What a row costs decides how light one is that is not worth its way: tc.theta = auto.
TEST(PipelineTheta, ThetaIsThatOfTheTierWhereRowsAre) {
  constexpr int64_t kMany = 2000;
  for (const bool small : {false, true}) {
    SCOPED_TRACE(small ? "rows in the store" : "rows in host memory");
    WorldOptions options = WorldOptions::Default();
    options.cache.selector.budget.tokens = 700;  // the lightest that are chosen lie between the two thetas
    options.device_budget = SmallestDevice(options, kMany + kSteps);
    const KvGeometry& geometry = options.cache.geometry;
    const auto least = static_cast<uint64_t>(geometry.layers + CeilDiv(kMany + kSteps, geometry.chunk_tokens)) * geometry.block_bytes();
    options.cache.host_budget = small ? least : uint64_t{64} << 20;
    const auto run = [&](double theta, SequenceReport* report) {
      options.cache.selector.tc.theta = theta;
      World world(options);
      const Stream stream(options.cache.geometry, kMany + kSteps, 11);
      auto sequence = Open(world, kMany + kSteps);
      EXPECT_OK(PrefillAll(*sequence, stream, kMany, 128));
      const std::vector<float> out = Decode(*sequence, stream, kSteps);
      *report = sequence->Report();
      return out;
    };
    SequenceReport chosen, near, far;
    const std::vector<float> out = run(TwoClockOptions::kAuto, &chosen);
    const double theta = TwoClockOptions::ThetaOfMemory(options.cache.selector.budget.MiddleK(kMany));
    const std::vector<float> of_memory = run(theta, &near), of_store = run(TwoClockOptions::kThetaOfStore, &far);
    EXPECT_EQ(out, small ? of_store : of_memory);
    EXPECT_EQ(chosen.rows_host + chosen.rows_disk, small ? far.rows_host + far.rows_disk : near.rows_host + near.rows_disk);
    EXPECT_GT(near.rows_host + near.rows_disk, far.rows_host + far.rows_disk) << "no row lies between the two";
    EXPECT_EQ(small, chosen.bytes_from_disk > 0);
  }
}

// Few of many keys that are much alike: of what is missing most is not worth its way, and what that adds to what is left out is a quarter of it at most.
TEST(PipelineTheta, WhereMuchIsLeftOutAnywayMoreIsSkipped) {
  constexpr int64_t kMany = 6000;
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.budget.tokens = 80;
  options.cache.selector.tc.tau = 1;  // every step chooses
  options.cache.audit_every = 1;
  options.device_budget = SmallestDevice(options, kMany + kSteps);
  const auto run = [&](double theta) {
    options.cache.selector.tc.theta = theta;
    World world(options);
    Stream stream(options.cache.geometry, kMany + kSteps, 11);
    stream.ScaleQueries(0.3f);
    auto sequence = Open(world, kMany + kSteps);
    EXPECT_OK(PrefillAll(*sequence, stream, kMany, 128));
    Decode(*sequence, stream, kSteps);
    return sequence->Report();
  };
  const SequenceReport fixed = run(TwoClockOptions::ThetaOfMemory(options.cache.selector.budget.MiddleK(kMany))), grown = run(TwoClockOptions::kAuto);
  EXPECT_GT(fixed.dropped_audited.mean(), 0.3);
  EXPECT_LT(2 * grown.rows_host, fixed.rows_host);
  EXPECT_GT(grown.dropped_audited.mean(), fixed.dropped_audited.mean());
  EXPECT_LT(grown.dropped_audited.mean(), fixed.dropped_audited.mean() / (1 - TwoClockOptions::kThetaOfDropped));
}

// Host memory could hold the sequence, but others have taken it: the first step that reads the store is the last with the lower theta.
TEST(PipelineTheta, ThetaIsThatOfTheStoreOnceItWasRead) {
  constexpr int64_t kMany = 2000;
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.budget.tokens = 700;
  options.cache.selector.tc.tau = 1;  // every step chooses
  options.device_budget = 2 * SmallestDevice(options, kMany + kSteps);
  const KvGeometry& geometry = options.cache.geometry;
  options.cache.host_budget = static_cast<uint64_t>((geometry.layers + 1) * CeilDiv(kMany + kSteps, geometry.chunk_tokens)) * geometry.block_bytes();
  const auto run = [&](double theta, bool beside) {
    options.cache.selector.tc.theta = theta;
    World world(options);
    const Stream stream(options.cache.geometry, kMany + kSteps, 11);
    const auto open = [&] {
      auto opened = world.cache().Open({.max_tokens = kMany + kSteps, .device_bytes = options.device_budget / 2});
      EXPECT_OK(opened);
      return std::move(opened).value();
    };
    auto sequence = open();
    EXPECT_OK(PrefillAll(*sequence, stream, kMany, 128));
    if (beside) {
      EXPECT_OK(PrefillAll(*open(), Stream(options.cache.geometry, kMany, 12), kMany, 128));
    }
    Decode(*sequence, stream, kSteps);
    return sequence->Report();
  };
  const auto rows = [](const SequenceReport& report) { return report.rows_host + report.rows_disk; };
  const double theta = TwoClockOptions::ThetaOfMemory(options.cache.selector.budget.MiddleK(kMany));
  const SequenceReport near = run(theta, true), chosen = run(TwoClockOptions::kAuto, true), alone = run(TwoClockOptions::kAuto, false);
  EXPECT_GT(near.bytes_from_disk, 0);
  EXPECT_LT(rows(chosen), rows(near));
  EXPECT_EQ(alone.bytes_from_disk, 0);
  EXPECT_EQ(rows(alone), rows(near));
}

}  // namespace
}  // namespace prehoc
