#include "transfer/memory_chunk_store.h"

#include <list>
#include <random>

#include "tests/support/chunk_data.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

constexpr size_t kBytes = 64;
constexpr uint64_t kRecord = kBytes + sizeof(RecordHeader);

std::unique_ptr<MemoryChunkStore> Make(uint64_t budget) {
  MemoryChunkStore::Options options;
  options.identity = TestIdentity();
  options.chunk_bytes = kBytes;
  options.budget = budget;
  return MemoryChunkStore::Create(options).value();
}

TEST(MemoryChunkStoreTest, RefusesOptionsThatMakeNoSense) {
  MemoryChunkStore::Options options;
  options.identity = TestIdentity();
  EXPECT_STATUS(StatusCode::kInvalid, "chunk_bytes=0", MemoryChunkStore::Create(options).status());
  options.chunk_bytes = SIZE_MAX;
  EXPECT_STATUS(StatusCode::kInvalid, "over 1 TiB", MemoryChunkStore::Create(options).status());
  options.chunk_bytes = kBytes;
  options.budget = kRecord - 1;
  EXPECT_STATUS(StatusCode::kInvalid, "budget=191", MemoryChunkStore::Create(options).status());
  options.budget = kRecord;
  EXPECT_OK(MemoryChunkStore::Create(options).status());
  options.identity.dtype = "f8";
  EXPECT_STATUS(StatusCode::kInvalid, "'f8'", MemoryChunkStore::Create(options).status());
  options.identity = TestIdentity();
  options.identity.format_version = 7;
  EXPECT_STATUS(StatusCode::kInvalid, "version 7", MemoryChunkStore::Create(options).status());
}

TEST(MemoryChunkStoreTest, EvictsTheLeastRecentlyUsedLikeTheModel) {
  constexpr size_t kCapacity = 10;
  auto store = Make(kCapacity * kRecord + kRecord / 2);
  std::mt19937 rng(7);
  std::list<int> model;  // most recently used first
  uint64_t evicted = 0;
  const auto touch = [&](int n) { model.remove(n), model.push_front(n); };
  for (int step = 0; step < 5000; ++step) {
    const int n = static_cast<int>(rng() % 30);
    const bool present = std::find(model.begin(), model.end(), n) != model.end();
    std::vector<std::byte> out(kBytes);
    switch (rng() % 4) {
      case 0:
        ASSERT_EQ(store->Get(TestKey(n), out).ok(), present) << step;
        if (present) touch(n);
        break;
      case 1:
        ASSERT_OK(store->Delete(TestKey(n)));
        model.remove(n);
        break;
      default:
        ASSERT_OK(store->Put(TestKey(n), TestChunk(n, kBytes)));
        if (!present && model.size() == kCapacity) model.pop_back(), ++evicted;
        if (!present) model.push_front(n);
    }
    for (int key = 0; key < 30; ++key) {
      ASSERT_EQ(store->Contains(TestKey(key)), std::find(model.begin(), model.end(), key) != model.end()) << step;
    }
    ASSERT_EQ(store->resident_bytes(), model.size() * kRecord);
    ASSERT_OK(store->CheckInvariants());
  }
  EXPECT_EQ(CounterOf(*store, "store.evicted"), static_cast<double>(evicted));
  EXPECT_LE(CounterOf(*store, "store.peak_bytes"), CounterOf(*store, "store.budget_bytes"));
  EXPECT_GT(evicted, 100u);
}

TEST(MemoryChunkStoreTest, FindsEveryFlippedBitAndDropsTheRecord) {
  auto store = Make(1 << 20);
  std::vector<std::byte> out(kBytes);
  int corrupt = 0;
  for (size_t bit = 0; bit < 8 * kRecord; ++bit) {
    ASSERT_OK(store->Put(TestKey(1), TestChunk(1, kBytes)));
    ASSERT_OK(store->FlipBitForTest(TestKey(1), bit));
    ASSERT_EQ(store->Get(TestKey(1), out).code(), StatusCode::kCorrupt) << "bit " << bit;
    ASSERT_FALSE(store->Contains(TestKey(1)));
    ++corrupt;
  }
  EXPECT_EQ(CounterOf(*store, "store.corrupt"), corrupt);
  EXPECT_EQ(store->resident_bytes(), 0u);
}

}  // namespace
}  // namespace prehoc
