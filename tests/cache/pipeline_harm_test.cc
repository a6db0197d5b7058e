// Never slower than without: what a store that is slow, dead or useless costs a sequence, in a time that the test makes.
#include <gtest/gtest.h>

#include <functional>

#include "tests/cache/pipeline_world.h"

namespace prehoc {
namespace {

constexpr int64_t kPrompt = 256;
constexpr int64_t kTokenNanos = 1'000;  // what the engine takes to compute one token
constexpr int64_t kSecond = 1'000'000'000;

// Time passes where this says so: `nanos` with every read.
class SlowStore final : public ChunkStoreWrapper {
 public:
  SlowStore(ChunkStore* base, ManualClock* clock) : ChunkStoreWrapper(base), clock_(clock) {}
  int64_t nanos = 0;
  Status with;  // not OK: the answer of every read
  int gets = 0;

 private:
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override {
    ++gets;
    clock_->Advance(nanos);
    return with.ok() ? base()->Get(key, out, seal) : with;
  }
  ManualClock* clock_;
};

class HarmTest : public ::testing::Test {
 protected:
  HarmTest() : stream_(SmallGeometry(), kPrompt, 11), device_(64 << 20) {
    MemoryChunkStore::Options options;
    options.chunk_bytes = SmallGeometry().block_bytes();
    options.identity.layout = SmallGeometry().LayoutName();
    memory_ = MemoryChunkStore::Create(options).value();
    store_ = std::make_unique<SlowStore>(memory_.get(), &clock_);
  }

  // A process of its own: nothing is left in its memory of the one before.
  void NewCache(bool guard = true) {
    cache_.reset();
    CacheOptions options = WorldOptions::Default().cache;
    options.selector.kind = SelectorKind::kDense;
    options.guard_store = guard;
    CacheResources resources;
    resources.executor = &executor_;
    resources.device = &device_;
    resources.store = store_.get();
    resources.clock = &clock_;
    cache_ = KvCache::Create(options, resources).value();
  }
  // Opens the prompt and computes what was not restored; the time that took.
  int64_t Run(int64_t* restored = nullptr) {
    const int64_t start = clock_.NowNanos();
    auto sequence = cache_->OpenWithPrefix({.max_tokens = kPrompt}, stream_.ids(0, kPrompt)).value();
    if (restored) *restored = sequence->restored();
    while (sequence->length() < kPrompt) {
      const int64_t first = sequence->length(), count = std::min<int64_t>(64, kPrompt - first);
      EXPECT_OK(sequence->Begin(stream_.ids(first, count), kPrompt));
      Outputs out;
      EXPECT_OK(RunLayers(*sequence, stream_, first, count, false, &out));
      clock_.Advance(count * kTokenNanos);
      EXPECT_OK(sequence->End());
    }
    const int64_t taken = clock_.NowNanos() - start;
    sequence.reset();
    EXPECT_OK(cache_->Flush());
    // Out of host memory, as after a restart.
    return taken;
  }
  double Counter(std::string_view name) const {
    double found = -1;
    cache_->VisitCounters([&](std::string_view shown, double value) { found = shown == name ? value : found; });
    return found;
  }

  static constexpr int64_t kCold = kPrompt * kTokenNanos;  // computing all of it
  const Stream stream_;
  ManualClock clock_{kSecond};
  ManualExecutor executor_;
  HostDeviceMemory device_;
  std::unique_ptr<MemoryChunkStore> memory_;
  std::unique_ptr<SlowStore> store_;
  std::unique_ptr<KvCache> cache_;
};

TEST_F(HarmTest, AFastStoreIsUsed) {
  NewCache();
  EXPECT_EQ(Run(), kCold);
  NewCache();
  store_->nanos = 10;
  int64_t restored = 0;
  for (int i = 0; i < 5; ++i) {
    EXPECT_LT(Run(&restored), kCold / 2);
    EXPECT_EQ(restored, 192);
  }
  EXPECT_EQ(Counter("health.bypassed_chunks"), 0);
}

TEST_F(HarmTest, AUselessStoreIsNeverRead) {
  NewCache();
  EXPECT_EQ(Run(), kCold) << "no hits, no reads, no time";
  EXPECT_EQ(store_->gets, 0);
}

// Prompts that are stored, and that no memory holds: each in a cache whose host tier has forgotten them.
TEST_F(HarmTest, AStoreThatIsSlowerThanComputingIsLeftAlone) {
  NewCache();
  Run();
  store_->nanos = 2 * kCold;  // each of 9 reads
  NewCache();
  const int64_t learning = Run();
  EXPECT_GT(learning, kCold) << "nothing is known yet: the hit is used";
  // The prompt is in host memory now; another process's prompts are not. What was learned stays.
  const Stream other(SmallGeometry(), kPrompt, 12);
  {
    CacheOptions options = WorldOptions::Default().cache;
    options.selector.kind = SelectorKind::kDense;
    ManualExecutor executor;
    CacheResources resources;
    resources.executor = &executor;
    resources.device = &device_;
    resources.store = memory_.get();
    const auto writer = KvCache::Create(options, resources).value();
    const auto sequence = writer->Open({.max_tokens = kPrompt}).value();
    ASSERT_OK(PrefillAll(*sequence, other, kPrompt, 64));
    ASSERT_OK(writer->Flush());
  }
  const int gets = store_->gets;
  const int64_t start = clock_.NowNanos();
  auto sequence = cache_->OpenWithPrefix({.max_tokens = kPrompt}, other.ids(0, kPrompt)).value();
  EXPECT_EQ(clock_.NowNanos(), start) << "not a nanosecond for a hit that does not pay";
  EXPECT_EQ(sequence->restored(), 0);
  EXPECT_EQ(store_->gets, gets);
  EXPECT_EQ(Counter("health.bypassed_chunks"), 3);
  sequence.reset();
  // Ten seconds later one chunk is tried; it has become fast, and so the next prompts use it again.
  store_->nanos = 1;
  int64_t restored = 0;
  for (int i = 0; i < 100 && restored < 192; ++i) {
    clock_.Advance(10 * kSecond);
    sequence.reset();
    sequence = cache_->OpenWithPrefix({.max_tokens = kPrompt}, other.ids(0, kPrompt)).value();
    restored = sequence->restored();
    if (i == 0) {
      EXPECT_EQ(restored, 64);
    }
  }
  EXPECT_EQ(restored, 192);
  EXPECT_GE(Counter("health.probes"), 1);
}

TEST_F(HarmTest, ADeadStoreCostsAFewReadsAndThenNone) {
  NewCache();
  Run();
  store_->with = {StatusCode::kIoError, "no such device"};
  store_->nanos = 500;
  NewCache();
  const int64_t start = clock_.NowNanos();
  for (int i = 0; i < 10; ++i) {
    auto sequence = cache_->OpenWithPrefix({.max_tokens = kPrompt}, stream_.ids(0, kPrompt)).value();
    EXPECT_EQ(sequence->restored(), 0);
  }
  EXPECT_EQ(store_->gets, 3) << "three failures, then it is left alone";
  EXPECT_EQ(clock_.NowNanos() - start, 3 * 500);
  EXPECT_EQ(Counter("health.state"), 1);
  EXPECT_EQ(Run(), kCold) << "as without it";
  // Its backoff over, it is asked once more, and used again if it answers.
  clock_.Advance(kSecond);
  store_->with = {};
  NewCache();
  int64_t restored = 0;
  Run(&restored);
  EXPECT_EQ(restored, 192);
}

TEST_F(HarmTest, UnguardedEveryErrorIsTheCallers) {
  NewCache();
  Run();
  store_->with = {StatusCode::kIoError, "no such device"};
  NewCache(/*guard=*/false);
  for (int i = 0; i < 10; ++i) EXPECT_OK(cache_->OpenWithPrefix({.max_tokens = kPrompt}, stream_.ids(0, kPrompt)));
  EXPECT_EQ(store_->gets, 10);
  EXPECT_EQ(Counter("health.state"), -1);
}

// A method that does not pay yet is left alone: every step is what it is without one, and choosing begins where it was said to.
TEST(SelectorHarmTest, AShortContextIsDense) {
  constexpr int64_t kSteps = 6;
  const Stream stream(SmallGeometry(), kPrompt + kSteps, 21);
  std::vector<std::vector<Outputs>> all(2);
  for (const bool chooses : {false, true}) {
    WorldOptions options = WorldOptions::Default();
    options.cache.selector.kind = chooses ? SelectorKind::kTwoClock : SelectorKind::kDense;
    options.cache.selector.tc.dense_below = kPrompt + 4;  // the fourth step sees so many
    World world(options);
    auto sequence = world.cache().Open({.max_tokens = kPrompt + kSteps});
    ASSERT_OK(sequence);
    ASSERT_OK(PrefillAll(**sequence, stream, kPrompt, 64));
    for (int64_t step = 1; step <= kSteps; ++step) {
      ASSERT_OK(DecodeOne(**sequence, stream, &all[chooses].emplace_back()));
      const SequenceReport report = (*sequence)->Report();
      EXPECT_EQ(report.retrievals > 0, chooses && step >= 4) << "step " << step;
    }
  }
  for (size_t step = 0; step < kSteps; ++step) EXPECT_EQ(all[1][step] == all[0][step], step < 3) << "step " << step + 1;
}

}  // namespace
}  // namespace prehoc
