// A host tier over a store in memory that fails on request, and blocks whose bytes follow from their number.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/executor.h"
#include "cache/host_tier.h"
#include "tests/fakes/faulty_chunk_store.h"
#include "tests/support/chunk_data.h"
#include "tests/support/status_matchers.h"
#include "transfer/memory_chunk_store.h"
#include "transfer/record_format.h"

namespace prehoc {

inline constexpr size_t kTestBlockBytes = 4096;

// Answers as `on_put` and `on_get` say; an OK goes on to the store below.
class ScriptedStore final : public ChunkStoreWrapper {
 public:
  using ChunkStoreWrapper::ChunkStoreWrapper;
  std::function<Status(const ChunkKey&)> on_put = [](const ChunkKey&) { return OkStatus(); };
  std::function<Status(const ChunkKey&)> on_get = [](const ChunkKey&) { return OkStatus(); };
  std::function<void(const ChunkKey&)> after_get = [](const ChunkKey&) {};
  std::function<Status()> on_flush = [] { return OkStatus(); };

 private:
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override {
    PREHOC_RETURN_IF_ERROR(on_put(key));
    return base()->Put(key, data, origin);
  }
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override {
    PREHOC_RETURN_IF_ERROR(on_get(key));
    const Status status = base()->Get(key, out, seal);
    after_get(key);
    return status;
  }
  Status DoFlush() override {
    PREHOC_RETURN_IF_ERROR(on_flush());
    return base()->Flush();
  }
};

struct HostTierSetUp {
  int64_t blocks = 4;                  // host budget
  uint64_t store_blocks = UINT64_MAX;  // budget of the store; 0 = no store
  int32_t max_queued_writes = 64;
  Executor* background = nullptr;      // null = the world's ManualExecutor
};

class HostTierWorld {
 public:
  explicit HostTierWorld(const HostTierSetUp& setup = {}) {
    MemoryChunkStore::Options store_options;
    store_options.identity = TestIdentity();
    store_options.chunk_bytes = kTestBlockBytes;
    const uint64_t record = kTestBlockBytes + sizeof(RecordHeader);
    if (setup.store_blocks > 0 && setup.store_blocks < UINT64_MAX) store_options.budget = setup.store_blocks * record;
    memory = MemoryChunkStore::Create(store_options).value();
    faulty = std::make_unique<FaultyChunkStore>(memory.get());
    store = std::make_unique<ScriptedStore>(faulty.get());
    HostTier::Options options;
    options.block_bytes = kTestBlockBytes;
    options.budget = static_cast<uint64_t>(setup.blocks) * kTestBlockBytes;
    options.huge_pages = false;
    options.max_queued_writes = setup.max_queued_writes;
    options.clock = &clock;
    Executor* const jobs = setup.background != nullptr ? setup.background : &background;
    tier = HostTier::Create(options, &executor, jobs, setup.store_blocks > 0 ? store.get() : nullptr).value();
  }

  // A tail with the bytes of block `n`.
  Result<BlockRef> Tail(int n) {
    PREHOC_ASSIGN_OR_RETURN(BlockRef tail, tier->NewTail());
    PREHOC_ASSIGN_OR_RETURN(const BlockPin pin, tier->Pin(tail));
    const std::vector<std::byte> bytes = TestChunk(n, kTestBlockBytes);
    std::copy(bytes.begin(), bytes.end(), pin.bytes().begin());
    return tail;
  }
  Result<BlockRef> Sealed(int n) {
    PREHOC_ASSIGN_OR_RETURN(BlockRef tail, Tail(n));
    return tier->Seal(std::move(tail), TestKey(n));
  }
  BlockRef Make(int n) {
    Result<BlockRef> block = Sealed(n);
    EXPECT_OK(block);
    return block.ok() ? *block : nullptr;
  }
  // Pins and unpins.
  void Use(const BlockRef& block, BlockUse use) { EXPECT_OK(tier->Pin(block, use)); }

  double Counter(std::string_view name) const {
    double found = -1;
    tier->VisitCounters([&](std::string_view shown, double value) {
      if (shown == name) found = value;
    });
    EXPECT_NE(found, -1) << "no counter " << name;
    return found;
  }
  // Until `count` callers wait for the I/O of others.
  void AwaitWaiting(int count) const {
    while (Counter("host.waiting") < count) std::this_thread::yield();
  }

  ManualClock clock;
  ManualExecutor executor;    // touches memory
  ManualExecutor background;  // writes behind and prefetches
  std::unique_ptr<MemoryChunkStore> memory;
  std::unique_ptr<FaultyChunkStore> faulty;
  std::unique_ptr<ScriptedStore> store;
  std::unique_ptr<HostTier> tier;
};

inline testing::AssertionResult HoldsBytesOf(const BlockPin& pin, int n) {
  const std::vector<std::byte> want = TestChunk(n, kTestBlockBytes);
  const std::span<std::byte> got = pin.bytes();
  if (got.size() != want.size()) return testing::AssertionFailure() << got.size() << " bytes";
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] != want[i]) return testing::AssertionFailure() << "byte " << i << " is not of block " << n;
  }
  return testing::AssertionSuccess();
}

}  // namespace prehoc
