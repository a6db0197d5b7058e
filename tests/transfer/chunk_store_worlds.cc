// The contract of ChunkStore, over every implementation, plain and behind a fault decorator that injects nothing.
#include "tests/contract/chunk_store_contract.h"
#include "tests/fakes/faulty_chunk_store.h"
#include "tests/support/chunk_data.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"
#include "transfer/memory_chunk_store.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {
namespace {

std::vector<std::byte> TestChunk(int n) { return prehoc::TestChunk(n, kContractChunkBytes); }

class MemoryWorld final : public ChunkStoreUnderTest {
 public:
  MemoryWorld() {
    MemoryChunkStore::Options options;
    options.identity = TestIdentity();
    options.chunk_bytes = kContractChunkBytes;
    options.budget = kContractRecords * (kContractChunkBytes + 128);
    store_ = MemoryChunkStore::Create(options).value();
  }
  ~MemoryWorld() override { EXPECT_OK(store_->CheckInvariants()); }
  ChunkStore& store() override { return *store_; }

 private:
  std::unique_ptr<MemoryChunkStore> store_;
};

class RocksDbWorld final : public ChunkStoreUnderTest {
 public:
  RocksDbWorld() {
    RocksDbStore::Options options;
    options.path = dir_.path() + "/store";
    options.identity = TestIdentity();
    options.chunk_bytes = kContractChunkBytes;
    options.budget = 32 << 20;
    store_ = RocksDbStore::Open(options).value();
  }
  ~RocksDbWorld() override { EXPECT_OK(store_->CheckInvariants()); }
  ChunkStore& store() override { return *store_; }

 private:
  TempDir dir_;
  std::unique_ptr<RocksDbStore> store_;
};

template <class Base>
class Decorated final : public ChunkStoreUnderTest {
 public:
  ChunkStore& store() override { return faulty_; }

 private:
  Base base_;
  FaultyChunkStore faulty_{&base_.store()};
};

template <class World>
ChunkStoreWorld Make(const char* name) {
  return {name, [] { return std::make_unique<World>(); }};
}

INSTANTIATE_TEST_SUITE_P(Worlds, ChunkStoreContract,
                         ::testing::Values(Make<MemoryWorld>("Memory"), Make<RocksDbWorld>("RocksDb"),
                                           Make<Decorated<MemoryWorld>>("FaultyMemory"),
                                           Make<Decorated<RocksDbWorld>>("FaultyRocksDb")),
                         ChunkStoreWorldName);

// --- the decorator itself ---

TEST(FaultyChunkStoreTest, FailsTheCallItWasToldTo) {
  MemoryWorld world;
  FaultyChunkStore store(&world.store());
  store.FailPut(2, {StatusCode::kIoError, "told to"});
  EXPECT_OK(store.Put(TestKey(1), TestChunk(1)));
  EXPECT_STATUS(StatusCode::kIoError, "told to", store.Put(TestKey(2), TestChunk(2)));
  EXPECT_FALSE(store.Contains(TestKey(2)));
  EXPECT_OK(store.Put(TestKey(2), TestChunk(2)));
  std::vector<std::byte> out(kContractChunkBytes);
  store.FailGet(1, {StatusCode::kDeadline, "late"});
  EXPECT_STATUS(StatusCode::kDeadline, "late", store.Get(TestKey(1), out));
  EXPECT_OK(store.Get(TestKey(1), out));
}

TEST(FaultyChunkStoreTest, DamagesBytes) {
  MemoryWorld world;
  FaultyChunkStore store(&world.store());
  ASSERT_OK(store.Put(TestKey(1), TestChunk(1)));
  std::vector<std::byte> out(kContractChunkBytes), expected = TestChunk(1);
  store.FlipBitInGet(1, 8 * 100 + 3);
  ASSERT_OK(store.Get(TestKey(1), out));
  expected[100] ^= std::byte{8};
  EXPECT_EQ(out, expected);
  std::fill(out.begin(), out.end(), std::byte{0});
  store.TearGet(1, 10);
  ASSERT_OK(store.Get(TestKey(1), out));
  EXPECT_EQ(out[9], TestChunk(1)[9]);
  EXPECT_EQ(out[10], std::byte{0});
}

TEST(FaultyChunkStoreTest, LosesWhatWasNotFlushed) {
  MemoryWorld world;
  FaultyChunkStore store(&world.store());
  ASSERT_OK(store.Put(TestKey(1), TestChunk(1)));
  ASSERT_OK(store.Flush());
  ASSERT_OK(store.Put(TestKey(2), TestChunk(2)));
  store.Crash();
  EXPECT_TRUE(store.Contains(TestKey(1)));
  EXPECT_FALSE(store.Contains(TestKey(2)));
  store.LosePut(1);
  ASSERT_OK(store.Put(TestKey(3), TestChunk(3)));
  EXPECT_FALSE(store.Contains(TestKey(3)));
}

}  // namespace
}  // namespace prehoc
