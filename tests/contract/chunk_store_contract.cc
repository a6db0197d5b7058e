#include "tests/contract/chunk_store_contract.h"

#include <thread>

#include "tests/support/chunk_data.h"
#include "tests/support/status_matchers.h"
#include "transfer/record_format.h"

namespace prehoc {

namespace {
std::vector<std::byte> TestChunk(int n) { return prehoc::TestChunk(n, kContractChunkBytes); }
}  // namespace

double ChunkStoreContract::Counter(const std::string& name) { return CounterOf(store(), name); }

TEST_P(ChunkStoreContract, GivesBackWhatWasPut) {
  for (int i = 0; i < 20; ++i) ASSERT_OK(store().Put(TestKey(i), TestChunk(i)));
  for (int i = 19; i >= 0; --i) {
    std::vector<std::byte> out(kContractChunkBytes);
    ASSERT_OK(store().Get(TestKey(i), out));
    EXPECT_EQ(out, TestChunk(i)) << i;
  }
}

// Whoever keeps the bytes can compare them again: with what they were written as, and with no other key's.
TEST_P(ChunkStoreContract, SaysWhatTheBytesWereComparedWith) {
  std::vector<std::byte> out(kContractChunkBytes);
  ChunkSeal seals[2], again;
  for (int i = 0; i < 2; ++i) {
    ASSERT_OK(store().Put(TestKey(i), TestChunk(1)));
    ASSERT_OK(store().Get(TestKey(i), out, &seals[i]));
    EXPECT_EQ(Hash128(out, seals[i].seed), seals[i].hash);
  }
  EXPECT_NE(seals[0], seals[1]) << "the same bytes under another key";
  ASSERT_OK(store().Flush());
  ASSERT_OK(store().Get(TestKey(1), out, &again));
  EXPECT_EQ(again, seals[1]);
  out[0] ^= std::byte{1};
  EXPECT_NE(Hash128(out, again.seed), again.hash);
}

TEST_P(ChunkStoreContract, PeeksAtWhatGetWouldCompareWith) {
  EXPECT_EQ(store().Peek(TestKey(1)).status().code(), StatusCode::kNotFound);
  ASSERT_OK(store().Put(TestKey(1), TestChunk(1)));
  std::vector<std::byte> out(kContractChunkBytes);
  ChunkSeal seal;
  ASSERT_OK(store().Get(TestKey(1), out, &seal));
  EXPECT_EQ(store().Peek(TestKey(1)).value(), seal);
  ASSERT_OK(store().Flush());
  EXPECT_EQ(store().Peek(TestKey(1)).value(), seal);
}

TEST_P(ChunkStoreContract, ReplacesWherePutDoesNot) {
  std::vector<std::byte> out(kContractChunkBytes);
  ASSERT_OK(store().Replace(TestKey(1), TestChunk(1))) << "where there is none it is a Put()";
  for (const bool flushed : {false, true}) {
    ASSERT_OK(store().Put(TestKey(1), TestChunk(9)));
    ASSERT_OK(store().Get(TestKey(1), out));
    EXPECT_NE(out, TestChunk(9));
    const ChunkSeal before = store().Peek(TestKey(1)).value();
    if (flushed) {
      ASSERT_OK(store().Flush());
    }
    ASSERT_OK(store().Replace(TestKey(1), TestChunk(flushed ? 3 : 2)));
    ASSERT_OK(store().Get(TestKey(1), out));
    EXPECT_EQ(out, TestChunk(flushed ? 3 : 2));
    EXPECT_NE(store().Peek(TestKey(1)).value(), before);
  }
  EXPECT_EQ(store().Replace(TestKey(1), std::span(out).first(1)).code(), StatusCode::kInvalid);
  ASSERT_OK(store().Delete(TestKey(1)));
  EXPECT_FALSE(store().Contains(TestKey(1)));
}

TEST_P(ChunkStoreContract, GivesBackWhatWasFlushed) {
  for (int i = 0; i < 20; ++i) ASSERT_OK(store().Put(TestKey(i), TestChunk(i)));
  ASSERT_OK(store().Flush());
  for (int i = 0; i < 20; ++i) {
    std::vector<std::byte> out(kContractChunkBytes);
    ASSERT_OK(store().Get(TestKey(i), out));
    EXPECT_EQ(out, TestChunk(i)) << i;
  }
}

TEST_P(ChunkStoreContract, MissesWhatWasNeverPut) {
  std::vector<std::byte> out(kContractChunkBytes);
  EXPECT_EQ(store().Get(TestKey(1), out).code(), StatusCode::kNotFound);
  EXPECT_FALSE(store().Contains(TestKey(1)));
  EXPECT_EQ(Counter("store.misses"), 1);
}

TEST_P(ChunkStoreContract, LayersAndChainsAreDifferentKeys) {
  ASSERT_OK(store().Put(TestKey(1, 0), TestChunk(1)));
  std::vector<std::byte> out(kContractChunkBytes);
  EXPECT_EQ(store().Get(TestKey(1, 1), out).code(), StatusCode::kNotFound);
  EXPECT_EQ(store().Get(TestKey(2, 0), out).code(), StatusCode::kNotFound);
  ChunkKey last_byte = TestKey(1, 0);
  last_byte.chain[31] ^= 1;
  EXPECT_EQ(store().Get(last_byte, out).code(), StatusCode::kNotFound);
}

TEST_P(ChunkStoreContract, RefusesWrongSizes) {
  std::vector<std::byte> small(kContractChunkBytes - 1), large(kContractChunkBytes + 1);
  EXPECT_EQ(store().Put(TestKey(1), small).code(), StatusCode::kInvalid);
  EXPECT_EQ(store().Put(TestKey(1), large).code(), StatusCode::kInvalid);
  EXPECT_EQ(store().Put(TestKey(1), {}).code(), StatusCode::kInvalid);
  EXPECT_FALSE(store().Contains(TestKey(1)));
  ASSERT_OK(store().Put(TestKey(1), TestChunk(1)));
  EXPECT_EQ(store().Get(TestKey(1), small).code(), StatusCode::kInvalid);
  EXPECT_EQ(store().Get(TestKey(1), large).code(), StatusCode::kInvalid);
}

TEST_P(ChunkStoreContract, RecordsAreImmutable) {
  ASSERT_OK(store().Put(TestKey(1), TestChunk(1)));
  ASSERT_OK(store().Put(TestKey(1), TestChunk(2)));
  std::vector<std::byte> out(kContractChunkBytes);
  ASSERT_OK(store().Get(TestKey(1), out));
  EXPECT_EQ(out, TestChunk(1));
  EXPECT_EQ(Counter("store.puts"), 1);
}

TEST_P(ChunkStoreContract, ForgetsWhatWasDeleted) {
  ASSERT_OK(store().Put(TestKey(1), TestChunk(1)));
  ASSERT_OK(store().Put(TestKey(2), TestChunk(2)));
  ASSERT_OK(store().Delete(TestKey(1)));
  ASSERT_OK(store().Delete(TestKey(1)));
  ASSERT_OK(store().Delete(TestKey(3)));
  std::vector<std::byte> out(kContractChunkBytes);
  EXPECT_EQ(store().Get(TestKey(1), out).code(), StatusCode::kNotFound);
  EXPECT_FALSE(store().Contains(TestKey(1)));
  EXPECT_TRUE(store().Contains(TestKey(2)));
  // And takes it again.
  ASSERT_OK(store().Put(TestKey(1), TestChunk(5)));
  ASSERT_OK(store().Get(TestKey(1), out));
  EXPECT_EQ(out, TestChunk(5));
}

TEST_P(ChunkStoreContract, CountsWhatHappens) {
  EXPECT_EQ(store().resident_bytes(), 0u);
  for (int i = 0; i < 3; ++i) ASSERT_OK(store().Put(TestKey(i), TestChunk(i)));
  std::vector<std::byte> out(kContractChunkBytes);
  ASSERT_OK(store().Get(TestKey(0), out));
  EXPECT_EQ(store().Get(TestKey(9), out).code(), StatusCode::kNotFound);
  EXPECT_EQ(Counter("store.puts"), 3);
  EXPECT_EQ(Counter("store.gets"), 2);
  EXPECT_EQ(Counter("store.hits"), 1);
  EXPECT_EQ(Counter("store.misses"), 1);
  EXPECT_EQ(Counter("store.corrupt"), 0);
  EXPECT_EQ(Counter("store.put_dropped"), 0);
  EXPECT_EQ(Counter("store.evicted"), 0);
  EXPECT_EQ(Counter("store.read_bytes"), kContractChunkBytes);
  EXPECT_EQ(Counter("store.written_bytes"), 3 * kContractChunkBytes);
  EXPECT_GE(store().resident_bytes(), 3 * kContractChunkBytes);
  EXPECT_EQ(Counter("store.resident_bytes"), static_cast<double>(store().resident_bytes()));
  EXPECT_EQ(Counter("store.budget_bytes"), static_cast<double>(store().budget()));
  EXPECT_GE(Counter("store.peak_bytes"), static_cast<double>(store().resident_bytes()));
}

TEST_P(ChunkStoreContract, KeepsAllWhileTheBudgetLasts) {
  for (int i = 0; i < kContractRecords; ++i) ASSERT_OK(store().Put(TestKey(i), TestChunk(i)));
  for (int i = 0; i < kContractRecords; ++i) EXPECT_TRUE(store().Contains(TestKey(i))) << i;
  EXPECT_EQ(Counter("store.evicted"), 0);
}

TEST_P(ChunkStoreContract, IsSafeFromSeveralThreads) {
  // Each thread puts and reads all keys in its own order; two write the same keys. A byte of another key, or a
  // torn record, would show.
  constexpr int kThreads = 3, kKeys = 48;
  std::vector<std::thread> threads;
  std::vector<std::string> errors(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::byte> out(kContractChunkBytes);
      for (int step = 0; step < 4 * kKeys; ++step) {
        const int n = (step * (2 * t + 1) + 7 * t) % kKeys;
        const Status put = store().Put(TestKey(n), TestChunk(n));
        if (!put.ok() && put.code() != StatusCode::kBusy) errors[t] = put.ToString();
        const Status got = store().Get(TestKey(n), out);
        if (got.ok() && out != TestChunk(n)) errors[t] = "wrong bytes for key " + std::to_string(n);
        if (!got.ok() && got.code() != StatusCode::kNotFound) errors[t] = got.ToString();
        if (step % 11 == 0) {
          const Status dropped = store().Delete(TestKey((n + 3) % kKeys));
          if (!dropped.ok()) errors[t] = dropped.ToString();
        }
        if (t == 0 && step % 50 == 0) {
          const Status flushed = store().Flush();
          if (!flushed.ok()) errors[t] = flushed.ToString();
        }
        store().Contains(TestKey(n));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_EQ(Counter("store.gets"), kThreads * 4 * kKeys);
}

}  // namespace prehoc
