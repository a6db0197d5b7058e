// HostTier and its store: write-behind, evictions that write, loads, losses and healing, prefetches, Flush(); and what
// threads see of one another's I/O, ordered by test points.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "base/test_point.h"
#include "cache/host_tier.h"
#include "tests/cache/host_tier_world.h"

namespace prehoc {
namespace {

const Status kBusyStatus(StatusCode::kBusy, "would stall");
const Status kFullStatus(StatusCode::kOutOfSpace, "disk is full");
const Status kBrokenStatus(StatusCode::kIoError, "cable is out");

std::function<Status(const ChunkKey&)> Always(Status status) {
  return [status](const ChunkKey&) { return status; };
}

// ---- write-behind ----

TEST(HostTierWriteTest, NothingIsWrittenUntilTheBackgroundRuns) {
  HostTierWorld world;
  const BlockRef one = world.Make(1), two = world.Make(2), three = world.Make(3);
  EXPECT_EQ(world.faulty->puts(), 0);
  EXPECT_EQ(world.background.queued(), 3u);
  EXPECT_EQ(world.Counter("write_behind.queued"), 3);
  ASSERT_TRUE(world.background.RunAt(1));
  EXPECT_TRUE(world.store->Contains(TestKey(2)));
  EXPECT_FALSE(world.store->Contains(TestKey(1)));
  EXPECT_EQ(world.tier->state(two), BlockState::kHost) << "written is not evicted";
  world.background.Drain();
  EXPECT_TRUE(world.store->Contains(TestKey(1)));
  EXPECT_TRUE(world.store->Contains(TestKey(3)));
  EXPECT_EQ(world.Counter("write_behind.queued"), 0);
  EXPECT_EQ(world.Counter("write_behind.written"), 3);
  EXPECT_EQ(world.Counter("write_behind.bytes"), 3 * kTestBlockBytes);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierWriteTest, AWrittenBlockIsEvictedWithoutAnotherWrite) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.background.Drain();
  world.Make(2);
  EXPECT_EQ(world.faulty->puts(), 1);
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
}

TEST(HostTierWriteTest, AWriteThatComesAfterTheEvictionDoesNothing) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  const BlockRef two = world.Make(2);
  EXPECT_EQ(world.faulty->puts(), 1);  // by the eviction
  ASSERT_TRUE(world.background.RunNext());
  EXPECT_EQ(world.faulty->puts(), 1);
  ASSERT_TRUE(world.background.RunNext());
  EXPECT_EQ(world.faulty->puts(), 2);
  EXPECT_EQ(world.Counter("write_behind.queued"), 0);
}

TEST(HostTierWriteTest, AQueuedWriteOfABlockThatNobodyHoldsIsDoneAllTheSame) {
  HostTierWorld world;
  world.Make(1);
  world.background.Drain();
  EXPECT_TRUE(world.store->Contains(TestKey(1)));
}

TEST(HostTierWriteTest, AFullQueueShedsAndFlushWritesTheRest) {
  HostTierWorld world({.blocks = 4, .max_queued_writes = 1});
  const BlockRef one = world.Make(1), two = world.Make(2), three = world.Make(3);
  EXPECT_EQ(world.background.queued(), 1u);
  EXPECT_EQ(world.Counter("write_behind.shed"), 2);
  EXPECT_OK(world.tier->Flush());
  EXPECT_EQ(world.faulty->puts(), 3);
  EXPECT_EQ(world.Counter("write_behind.written"), 3);
  EXPECT_OK(world.tier->Flush());
  world.background.Drain();
  EXPECT_EQ(world.faulty->puts(), 3) << "everything is stored";
}

TEST(HostTierWriteTest, AnExecutorThatRefusesSheds) {
  ManualExecutor narrow(/*max_queued_jobs=*/1);
  HostTierWorld world({.background = &narrow});
  const BlockRef one = world.Make(1), two = world.Make(2);
  EXPECT_EQ(world.Counter("write_behind.shed"), 1);
  EXPECT_EQ(world.Counter("write_behind.queued"), 1);
  EXPECT_OK(world.tier->CheckInvariants());
  narrow.Drain();
  EXPECT_FALSE(world.store->Contains(TestKey(2)));
  EXPECT_OK(world.tier->Flush());
  EXPECT_TRUE(world.store->Contains(TestKey(2)));
}

TEST(HostTierWriteTest, NoWriteBehindIfTheQueueHasNoPlace) {
  HostTierWorld world({.blocks = 1, .max_queued_writes = 0});
  const BlockRef one = world.Make(1);
  EXPECT_EQ(world.background.queued(), 0u);
  world.Make(2);
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
}

TEST(HostTierWriteTest, ARefusedWriteIsCountedAndTriedAgainAtEviction) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.faulty->FailPut(1, kBusyStatus);
  world.background.Drain();
  EXPECT_EQ(world.Counter("write_behind.dropped"), 1);
  EXPECT_FALSE(world.store->Contains(TestKey(1)));
  world.Make(2);
  EXPECT_TRUE(world.store->Contains(TestKey(1)));
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
}

TEST(HostTierWriteTest, JobsThatOutliveTheTierDoNothing) {
  HostTierWorld world({.blocks = 2});
  {
    const BlockRef one = world.Make(1), two = world.Make(2), three = world.Make(3);
    world.tier->Prefetch({&one, 1});
    EXPECT_EQ(world.background.queued(), 4u);
  }
  world.tier.reset();
  const int puts = world.faulty->puts();
  world.background.Drain();
  EXPECT_EQ(world.faulty->puts(), puts);
  EXPECT_EQ(world.faulty->gets(), 0);
}

// ---- evictions that write ----

TEST(HostTierEvictTest, ABlockThatTheStoreRefusesStaysAndTheNextGoes) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  world.faulty->FailPut(1, kFullStatus);
  const BlockRef three = world.Make(3);
  EXPECT_EQ(world.tier->state(one), BlockState::kHost);
  EXPECT_EQ(world.tier->state(two), BlockState::kStoreOnly);
  EXPECT_EQ(world.Counter("write_behind.failed"), 1);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
}

TEST(HostTierEvictTest, SaysWhyNothingCanGo) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  world.store->on_put = Always(kFullStatus);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "2 cannot be evicted (out of space: disk is full)", world.tier->NewTail());
  EXPECT_EQ(world.tier->state(one), BlockState::kHost);
  EXPECT_EQ(world.tier->state(two), BlockState::kHost);
  world.store->on_put = Always(OkStatus());
  EXPECT_OK(world.tier->NewTail());
}

TEST(HostTierEvictTest, AStoreThatRefusesIsNotAskedForEveryBlock) {
  HostTierWorld world({.blocks = 64});
  std::vector<BlockRef> blocks;
  for (int n = 0; n < 64; ++n) blocks.push_back(world.Make(n));
  int puts = 0;
  world.store->on_put = [&](const ChunkKey&) { return ++puts, kFullStatus; };
  EXPECT_STATUS(StatusCode::kOutOfSpace, "disk is full", world.tier->NewTail());
  EXPECT_LE(puts, 4);
  // One that is stored goes even so, wherever it is in the order.
  ASSERT_OK(world.memory->Put(TestKey(50), TestChunk(50, kTestBlockBytes)));
  for (int i = 0; i < 64; ++i) world.background.RunNext();
  EXPECT_OK(world.tier->NewTail());
  EXPECT_EQ(world.tier->state(blocks[50]), BlockState::kStoreOnly);
}

TEST(HostTierEvictTest, AStalledStoreIsFlushedAndAskedAgain) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  bool stalled = true;
  int flushes = 0;
  world.store->on_put = [&](const ChunkKey&) { return stalled ? kBusyStatus : OkStatus(); };
  world.store->on_flush = [&] { return stalled = false, ++flushes, OkStatus(); };
  EXPECT_OK(world.tier->NewTail());
  EXPECT_EQ(flushes, 1);
  EXPECT_EQ(world.Counter("write_behind.dropped"), 2);
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
}

TEST(HostTierEvictTest, AStoreThatStaysStalledIsFlushedOnlyOnce) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  int flushes = 0;
  world.store->on_put = Always(kBusyStatus);
  world.store->on_flush = [&] { return ++flushes, OkStatus(); };
  EXPECT_STATUS(StatusCode::kOutOfSpace, "busy: would stall", world.tier->NewTail());
  EXPECT_EQ(flushes, 1);
}

TEST(HostTierEvictTest, ABlockThatNobodyHoldsIsStoredIfItCanAndGoesIfItCannot) {
  HostTierWorld world({.blocks = 1});
  world.Make(1);
  world.Make(2);
  EXPECT_TRUE(world.store->Contains(TestKey(1)));
  EXPECT_EQ(world.Counter("host.forgotten"), 0);
  world.store->on_put = Always(kBrokenStatus);
  world.Make(3);
  EXPECT_EQ(world.Counter("host.forgotten"), 1);
  EXPECT_FALSE(world.tier->Find(TestKey(2)).has_value());
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierEvictTest, AForgottenBlockWithAWriteStillQueuedIsNotFound) {
  HostTierWorld world({.blocks = 1});
  world.Make(1);
  world.store->on_put = Always(kBrokenStatus);
  const BlockRef two = world.Make(2);
  EXPECT_EQ(world.background.queued(), 2u);
  EXPECT_FALSE(world.tier->Find(TestKey(1)).has_value());
  EXPECT_OK(world.tier->CheckInvariants());
  world.background.Drain();
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierEvictTest, WhatAStoreShedIsWrittenAgain) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.background.Drain();
  ASSERT_OK(world.memory->Delete(TestKey(1)));
  world.Make(2);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
}

TEST(HostTierEvictTest, AWriteThatWasNotOneIsFoundAtEviction) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.faulty->LosePut(1);
  world.background.Drain();
  world.Make(2);
  EXPECT_EQ(world.faulty->puts(), 2);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
}

// ---- loads ----

TEST(HostTierLoadTest, BringsTheBytesBackAndCounts) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1), two = world.Make(2);
  const double hits = world.Counter("host.hits");
  world.store->on_get = [&](const ChunkKey&) { return world.clock.Advance(1000), OkStatus(); };
  {
    const BlockPin pin = world.tier->Pin(one).value();
    EXPECT_TRUE(pin.loaded());
    EXPECT_TRUE(HoldsBytesOf(pin, 1));
    EXPECT_FALSE(world.tier->Pin(one).value().loaded());
  }
  EXPECT_EQ(world.tier->state(one), BlockState::kHost);
  EXPECT_EQ(world.tier->state(two), BlockState::kStoreOnly);
  EXPECT_EQ(world.Counter("host.loads"), 1);
  EXPECT_EQ(world.Counter("host.load_nanos"), 1000);
  EXPECT_EQ(world.Counter("host.hits"), hits + 1);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierLoadTest, AnErrorOfTheDeviceOrADeadlineLeavesTheBlock) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  for (const StatusCode code : {StatusCode::kIoError, StatusCode::kDeadline}) {
    world.faulty->FailGet(1, {code, "not now"});
    EXPECT_STATUS(code, "not now", world.tier->Pin(one));
    EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
    EXPECT_EQ(world.tier->used_blocks(), 0) << "the memory of a failed load is free again";
  }
  EXPECT_EQ(world.Counter("host.load_errors"), 2);
  EXPECT_EQ(world.Counter("host.lost"), 0);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
}

TEST(HostTierLoadTest, AnErrorKeepsTheBlockForTheMapUntilNobodyHoldsIt) {
  HostTierWorld world({.blocks = 1});
  BlockRef one = world.Make(1);
  world.Make(2);
  world.faulty->FailGet(1, kBrokenStatus);
  EXPECT_FALSE(world.tier->Pin(one).ok());
  one = nullptr;
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierLoadTest, CorruptOrMissingIsLostAndNotAskedForAgain) {
  for (const StatusCode code : {StatusCode::kCorrupt, StatusCode::kNotFound}) {
    HostTierWorld world({.blocks = 1});
    const BlockRef one = world.Make(1);
    world.Make(2);
    world.faulty->FailGet(1, {code, "as the store says"});
    EXPECT_STATUS(code, "as the store says", world.tier->Pin(one));
    EXPECT_STATUS(code, "chunk " + TestKey(1).ToString() + " is lost", world.tier->Pin(one));
    EXPECT_EQ(world.faulty->gets(), 1);
    EXPECT_EQ(world.tier->state(one), BlockState::kLost);
    EXPECT_EQ(world.Counter("host.lost"), 1);
    EXPECT_OK(world.tier->CheckInvariants());
  }
}

TEST(HostTierLoadTest, ARecordThatTheStoreFindsDamagedIsLost) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  ASSERT_OK(world.memory->FlipBitForTest(TestKey(1), 12345));
  EXPECT_STATUS(StatusCode::kCorrupt, "memory store", world.tier->Pin(one));
  EXPECT_FALSE(world.tier->Find(TestKey(1)).has_value());
}

TEST(HostTierLoadTest, SealHealsALostBlockForAllWhoHoldIt) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1);
  world.Make(2), world.Make(3);
  ASSERT_OK(world.memory->Delete(TestKey(1)));
  EXPECT_STATUS(StatusCode::kNotFound, "", world.tier->Pin(one));
  EXPECT_EQ(world.Make(1), one);
  EXPECT_EQ(world.tier->state(one), BlockState::kHost);
  EXPECT_EQ(world.Counter("host.healed"), 1);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
  world.Make(4), world.Make(5);  // and it is stored again when it goes
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
}

TEST(HostTierLoadTest, AHealedBlockIsWrittenBehind) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1);
  world.Make(2), world.Make(3);
  world.background.Drain();
  ASSERT_OK(world.memory->Delete(TestKey(1)));
  EXPECT_FALSE(world.tier->Pin(one).ok());
  world.Make(1);
  world.background.Drain();
  EXPECT_TRUE(world.memory->Contains(TestKey(1)));
}

TEST(HostTierLoadTest, SealBringsBackWhatOnlyTheStoreHas) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1);
  world.Make(2), world.Make(3);
  ASSERT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  EXPECT_EQ(world.Make(1), one);
  EXPECT_EQ(world.tier->state(one), BlockState::kHost);
  EXPECT_EQ(world.faulty->gets(), 0);
  EXPECT_EQ(world.Counter("host.healed"), 0);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierLoadTest, FindHealsWhatTheStoreHasAgain) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  ASSERT_OK(world.memory->Delete(TestKey(1)));
  EXPECT_FALSE(world.tier->Pin(one).ok());
  EXPECT_FALSE(world.tier->Find(TestKey(1)).has_value());
  ASSERT_OK(world.memory->Put(TestKey(1), TestChunk(1, kTestBlockBytes)));  // another tier of the same store
  EXPECT_EQ(world.tier->Find(TestKey(1)), one);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
}

TEST(HostTierLoadTest, NeedsMemoryForIt) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1), two = world.Make(2);
  const BlockPin pin = world.tier->Pin(two).value();
  EXPECT_STATUS(StatusCode::kOutOfSpace, "1 pinned", world.tier->Pin(one));
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
}

// ---- prefetch ----

TEST(HostTierPrefetchTest, LoadsInTheBackground) {
  HostTierWorld world({.blocks = 3});
  const std::vector<BlockRef> blocks{world.Make(1), world.Make(2), world.Make(3)};
  world.Make(4), world.Make(5);
  world.Use(blocks[2], BlockUse::kKeep);
  world.background.Drain();
  world.tier->Prefetch(blocks);  // the third is in memory, and used last
  world.tier->Prefetch(blocks);  // and the others are on their way
  EXPECT_EQ(world.background.queued(), 2u);
  world.background.Drain();
  EXPECT_EQ(world.faulty->gets(), 2);
  EXPECT_EQ(world.Counter("host.prefetches"), 2);
  for (int n = 1; n <= 3; ++n) {
    const BlockRef& block = blocks[static_cast<size_t>(n - 1)];
    ASSERT_EQ(world.tier->state(block), BlockState::kHost) << n;
    const BlockPin pin = world.tier->Pin(block).value();
    EXPECT_FALSE(pin.loaded());
    EXPECT_TRUE(HoldsBytesOf(pin, n));
  }
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierPrefetchTest, DoesNotPushOutWhatWasPrefetchedAndIsStillAwaited) {
  HostTierWorld world({.blocks = 2});
  std::vector<BlockRef> blocks;
  for (int n = 0; n < 6; ++n) {
    blocks.push_back(world.Make(n));
    world.Use(blocks.back(), BlockUse::kStream);
  }
  world.background.Drain();
  world.tier->Prefetch(std::span(blocks).subspan(1, 4));  // 0 is in memory, and 5
  world.background.Drain();
  EXPECT_EQ(world.tier->state(blocks[1]), BlockState::kHost);
  EXPECT_EQ(world.tier->state(blocks[2]), BlockState::kHost);
  EXPECT_EQ(world.tier->state(blocks[3]), BlockState::kStoreOnly);
  EXPECT_EQ(world.tier->state(blocks[4]), BlockState::kStoreOnly);
  world.Use(blocks[1], BlockUse::kStream);  // no longer awaited
  world.tier->Prefetch({&blocks[4], 1});
  world.background.Drain();
  EXPECT_EQ(world.tier->state(blocks[1]), BlockState::kStoreOnly);
  EXPECT_EQ(world.tier->state(blocks[4]), BlockState::kHost);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(blocks[0]).value(), 0)) << "a demand takes what it needs";
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierPrefetchTest, AnErrorShowsAtPin) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  world.background.Drain();
  world.faulty->FailGet(1, kBrokenStatus);
  world.tier->Prefetch({&one, 1});
  world.background.Drain();
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  world.faulty->FailGet(1, {StatusCode::kCorrupt, "rotten"});
  world.tier->Prefetch({&one, 1});
  world.background.Drain();
  EXPECT_EQ(world.tier->state(one), BlockState::kLost);
  EXPECT_STATUS(StatusCode::kCorrupt, "rotten", world.tier->Pin(one));
  world.tier->Prefetch({&one, 1});
  EXPECT_EQ(world.background.queued(), 0u);
}

TEST(HostTierPrefetchTest, WhatTheExecutorRefusesIsLeftToPin) {
  ManualExecutor narrow(/*max_queued_jobs=*/1);
  HostTierWorld world({.blocks = 2, .background = &narrow});
  const std::vector<BlockRef> blocks{world.Make(1), world.Make(2)};
  world.Make(3), world.Make(4);
  narrow.Drain();
  world.tier->Prefetch(blocks);
  EXPECT_EQ(narrow.queued(), 1u);
  EXPECT_EQ(world.Counter("host.prefetches_refused"), 1);
  narrow.Drain();
  EXPECT_FALSE(world.tier->Pin(blocks[0]).value().loaded());
  EXPECT_TRUE(world.tier->Pin(blocks[1]).value().loaded());
}

TEST(HostTierPrefetchTest, AJobForABlockThatNobodyHoldsAnyMoreReadsNothing) {
  HostTierWorld world({.blocks = 1});
  BlockRef one = world.Make(1);
  world.Make(2);
  world.background.Drain();
  world.tier->Prefetch({&one, 1});
  one = nullptr;
  world.background.Drain();
  EXPECT_EQ(world.faulty->gets(), 0);
  EXPECT_OK(world.tier->CheckInvariants());
}

// ---- Flush ----

TEST(HostTierFlushTest, WritesOldestFirstThenFlushesTheStore) {
  HostTierWorld world({.blocks = 8});
  std::vector<BlockRef> blocks;
  for (const int n : {5, 3, 8, 1}) blocks.push_back(world.Make(n));
  std::vector<ChunkKey> order;
  world.store->on_put = [&](const ChunkKey& key) { return order.push_back(key), OkStatus(); };
  size_t written_at_flush = 0;
  world.store->on_flush = [&] { return written_at_flush = order.size(), OkStatus(); };
  EXPECT_OK(world.tier->Flush());
  EXPECT_EQ(order, (std::vector<ChunkKey>{TestKey(5), TestKey(3), TestKey(8), TestKey(1)}));
  EXPECT_EQ(written_at_flush, 4u);
}

TEST(HostTierFlushTest, SurvivesACrash) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  EXPECT_OK(world.tier->Flush());
  const BlockRef three = world.Make(3);  // evicts, so that 1 is only in the store
  world.background.Drain();
  world.faulty->Crash();
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(one).value(), 1));
  EXPECT_FALSE(world.memory->Contains(TestKey(3)));
}

TEST(HostTierFlushTest, BusyIsTriedAgainAfterTheStoresFlush) {
  HostTierWorld world({.blocks = 8});
  std::vector<BlockRef> blocks;
  for (int n = 0; n < 6; ++n) blocks.push_back(world.Make(n));
  int room = 2, flushes = 0;  // the store takes two between flushes
  world.store->on_put = [&](const ChunkKey&) { return room-- > 0 ? OkStatus() : kBusyStatus; };
  world.store->on_flush = [&] { return room = 2, ++flushes, OkStatus(); };
  EXPECT_OK(world.tier->Flush());
  EXPECT_EQ(flushes, 3);
  for (int n = 0; n < 6; ++n) EXPECT_TRUE(world.memory->Contains(TestKey(n)));
}

TEST(HostTierFlushTest, AStoreThatStaysBusyEndsIt) {
  HostTierWorld world;
  const BlockRef one = world.Make(1);
  world.store->on_put = Always(kBusyStatus);
  EXPECT_STATUS(StatusCode::kBusy, "would stall", world.tier->Flush());
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierFlushTest, ReturnsTheFirstErrorAndWritesTheOthers) {
  HostTierWorld world({.blocks = 8});
  std::vector<BlockRef> blocks;
  for (int n = 0; n < 5; ++n) blocks.push_back(world.Make(n));
  world.store->on_put = [&](const ChunkKey& key) {
    if (key == TestKey(1)) return kBrokenStatus;
    return key == TestKey(3) ? kFullStatus : OkStatus();
  };
  EXPECT_STATUS(StatusCode::kIoError, "cable", world.tier->Flush());
  for (const int n : {0, 2, 4}) EXPECT_TRUE(world.memory->Contains(TestKey(n))) << n;
  world.store->on_put = Always(OkStatus());
  world.store->on_flush = [&] { return kBrokenStatus; };
  EXPECT_STATUS(StatusCode::kIoError, "cable", world.tier->Flush());
  EXPECT_TRUE(world.memory->Contains(TestKey(3)));
}

TEST(HostTierFlushTest, HasNothingToDoWithoutAStore) {
  HostTierWorld world({.store_blocks = 0});
  const BlockRef one = world.Make(1);
  EXPECT_OK(world.tier->Flush());
}

// ---- threads and one another's I/O ----

TEST(HostTierThreadsTest, ConcurrentPinsShareOneLoad) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  constexpr int kThreads = 4;
  const TestPointHook hook("host_tier.load", [&] { world.AwaitWaiting(kThreads - 1); });
  std::atomic<int> loaded = 0, right = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      const auto pin = world.tier->Pin(one);
      if (!pin.ok()) return;
      loaded += pin->loaded();
      right += HoldsBytesOf(*pin, 1) ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(world.faulty->gets(), 1);
  EXPECT_EQ(loaded, 1);
  EXPECT_EQ(right, kThreads);
  EXPECT_EQ(world.Counter("host.shared_loads"), kThreads - 1);
  EXPECT_EQ(world.Counter("host.pinned"), 0);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierThreadsTest, AFailedLoadWakesAllWithItsError) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  world.store->on_get = Always(kBrokenStatus);
  const TestPointHook hook("host_tier.load", [&] { world.AwaitWaiting(3); });
  std::atomic<int> failed = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] { failed += world.tier->Pin(one).status().code() == StatusCode::kIoError; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 4);
  EXPECT_EQ(world.Counter("host.load_errors"), 1);
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
}

TEST(HostTierThreadsTest, ASealDuringALoadMakesTheStoresTroubleNotMatter) {
  for (const bool damaged : {true, false}) {
    HostTierWorld world({.blocks = 3});
    const BlockRef one = world.Make(1);
    world.Make(2), world.Make(3), world.Make(4);
    ASSERT_EQ(world.tier->state(one), BlockState::kStoreOnly);
    if (damaged) {
      ASSERT_OK(world.memory->FlipBitForTest(TestKey(1), 9999));
    }
    const TestPointHook hook("host_tier.load", [&] { EXPECT_EQ(world.Make(1), one); });
    const BlockPin pin = world.tier->Pin(one).value();
    EXPECT_EQ(pin.loaded(), !damaged);
    EXPECT_TRUE(HoldsBytesOf(pin, 1));
    EXPECT_EQ(world.Counter("host.lost"), 0);
    EXPECT_EQ(world.tier->used_blocks(), 2) << "one copy, and one other block";
    EXPECT_OK(world.tier->CheckInvariants());
    EXPECT_OK(world.tier->Flush());
    EXPECT_TRUE(world.memory->Contains(TestKey(1)));
  }
}

TEST(HostTierThreadsTest, APinDuringAnEvictionKeepsTheBlock) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  BlockPin pin;
  const TestPointHook hook("host_tier.write", [&] {
    if (!pin) pin = world.tier->Pin(one).value();
  });
  const BlockRef tail = world.tier->NewTail().value();
  EXPECT_TRUE(HoldsBytesOf(pin, 1));
  EXPECT_EQ(world.tier->state(one), BlockState::kHost);
  EXPECT_EQ(world.tier->state(two), BlockState::kStoreOnly);
}

TEST(HostTierThreadsTest, WhoNeedsMemoryWaitsForTheWriteThatHoldsIt) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  std::atomic<bool> writing = false;
  const TestPointHook hook("host_tier.write", [&] {
    if (!writing.exchange(true)) world.AwaitWaiting(1);
  });
  std::thread writer([&] { world.background.RunNext(); });
  while (!writing) std::this_thread::yield();
  const Result<BlockRef> tail = world.tier->NewTail();
  writer.join();
  EXPECT_OK(tail);
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  EXPECT_EQ(world.faulty->puts(), 1);
}

TEST(HostTierThreadsTest, WhoWaitsForAPrefetchWithoutMemoryLoadsItself) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1), two = world.Make(2), three = world.Make(3);
  world.background.Drain();
  world.tier->Prefetch({&one, 1});
  world.background.Drain();
  ASSERT_EQ(world.tier->state(one), BlockState::kHost);  // and awaited: no prefetch takes its memory
  std::atomic<bool> waited = false;
  const TestPointHook hook("host_tier.reserve", [&] {
    if (!waited.exchange(true)) world.AwaitWaiting(1);
  });
  world.tier->Prefetch({&two, 1});
  std::thread prefetcher([&] { world.background.Drain(); });
  while (!waited) std::this_thread::yield();
  const Result<BlockPin> pin = world.tier->Pin(two);
  prefetcher.join();
  ASSERT_OK(pin);
  EXPECT_TRUE(pin->loaded());
  EXPECT_TRUE(HoldsBytesOf(*pin, 2));
  EXPECT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierThreadsTest, TheEndOfTheTierWaitsForTheWriteUnderWay) {
  HostTierWorld world({.blocks = 2});
  world.Make(1);
  std::atomic<bool> writing = false, ending = false;
  const TestPointHook write_hook("host_tier.write", [&] {
    writing = true;
    while (!ending) std::this_thread::yield();
  });
  const TestPointHook close_hook("host_tier.close", [&] { ending = true; });
  std::thread writer([&] { world.background.RunNext(); });
  while (!writing) std::this_thread::yield();
  world.tier.reset();
  EXPECT_TRUE(world.memory->Contains(TestKey(1)));
  writer.join();
}

}  // namespace
}  // namespace prehoc
