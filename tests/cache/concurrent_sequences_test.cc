// Many sequences of one cache at once, each in a thread of its own, in tiers that hold a part of them: every budget is kept, and
// each answers as it does alone.
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "tests/cache/pipeline_world.h"
#include "tests/support/compare.h"

namespace prehoc {
namespace {

constexpr int kSequences = 64;
constexpr int64_t kPrompt = 200, kSteps = 6;

WorldOptions Tight() {
  WorldOptions options = WorldOptions::Default();
  EXPECT_OK(options.cache.selector.Set("selector", "tc"));
  EXPECT_OK(options.cache.selector.Set("tc.scorer", "exact"));
  EXPECT_OK(options.cache.selector.Set("tc.theta", "0"));
  options.cache.audit_every = 3;
  return options;
}

// Outputs of all steps, one after the other.
Status Play(KvCache& cache, const Stream& stream, uint64_t device_bytes, std::vector<float>* outputs) {
  PREHOC_ASSIGN_OR_RETURN(const auto sequence, cache.Open({.max_tokens = kPrompt + kSteps, .device_bytes = device_bytes}));
  PREHOC_RETURN_IF_ERROR(PrefillAll(*sequence, stream, kPrompt, 70));
  for (int64_t step = 0; step < kSteps; ++step) {
    Outputs out;
    PREHOC_RETURN_IF_ERROR(DecodeOne(*sequence, stream, &out));
    for (const auto& layer : out) outputs->insert(outputs->end(), layer.begin(), layer.end());
  }
  return sequence->CheckInvariants();
}

TEST(ConcurrentSequencesTest, SixtyFourStayInTheirBudgetsAndAnswerAsAlone) {
  WorldOptions options = Tight();
  const uint64_t each = SmallestDevice(options, kPrompt + kSteps);
  const KvGeometry geometry = options.cache.geometry;
  options.device_budget = kSequences * ((each + 255) / 256 * 256 + 256);
  // What all can have pinned at once, and less than the 64 x 12 blocks that they have.
  options.cache.host_budget = kSequences * 7 * geometry.block_bytes();
  World world(options);
  std::vector<std::vector<float>> together(kSequences);
  std::vector<Status> statuses(kSequences);
  std::vector<std::thread> threads;
  for (int i = 0; i < kSequences; ++i) {
    threads.emplace_back([&, i] {
      const Stream stream(geometry, kPrompt + kSteps, static_cast<uint64_t>(i));
      statuses[static_cast<size_t>(i)] = Play(world.cache(), stream, each, &together[static_cast<size_t>(i)]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(world.device().peak(), options.device_budget);
  EXPECT_LE(world.Counter("host.peak_bytes"), static_cast<double>(options.cache.host_budget));
  EXPECT_LE(world.Counter("store.peak_bytes"), static_cast<double>(options.store_budget));
  EXPECT_EQ(world.Counter("host.tails"), 0);
  EXPECT_GT(world.Counter("host.evicted"), 0);
  EXPECT_EQ(world.device().used(), 0u);
  for (int i = 0; i < kSequences; ++i) {
    ASSERT_OK(statuses[static_cast<size_t>(i)]);
    World alone(Tight());
    std::vector<float> expected;
    const Stream stream(geometry, kPrompt + kSteps, static_cast<uint64_t>(i));
    ASSERT_OK(Play(alone.cache(), stream, each, &expected));
    const std::vector<float>& got = together[static_cast<size_t>(i)];
    ASSERT_EQ(got.size(), expected.size());
    const std::vector<double> truth(expected.begin(), expected.end());
    EXPECT_TRUE(AllClose(got, truth, {2e-5, 2e-5})) << "sequence " << i;
  }
}

}  // namespace
}  // namespace prehoc
