// A store that hangs or fails: how long anybody waits for it, and when it is asked again.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <thread>

#include "base/test_point.h"
#include "tests/cache/host_tier_world.h"

namespace prehoc {
namespace {

constexpr int64_t kDeadline = 50'000'000;
constexpr int64_t kSecond = 1'000'000'000;

class HostTierDeadlineTest : public ::testing::Test {
 protected:
  explicit HostTierDeadlineTest() { MakeTier(2); }
  void MakeTier(int64_t blocks) {
    world_.tier.reset();
    HostTier::Options options;
    options.block_bytes = kTestBlockBytes;
    options.budget = static_cast<uint64_t>(blocks) * kTestBlockBytes;
    options.huge_pages = false;
    options.clock = &world_.clock;
    options.health = &health_;
    options.read_deadline_nanos = kDeadline;
    options.reader = &reader_;
    world_.tier = HostTier::Create(options, &world_.executor, &world_.background, world_.store.get()).value();
  }
  // A block that only the store has.
  BlockRef Stored(int n) {
    const BlockRef block = world_.Make(n);
    world_.background.Drain();
    std::vector<BlockRef> fillers;  // held: else they would go first
    while (world_.tier->state(block) != BlockState::kStoreOnly) fillers.push_back(world_.Make(1000 + n + filler_++));
    return block;
  }
  // Pins on a thread of its own, whose read waits in `reader_`.
  std::thread PinLater(const BlockRef& block, Status* status) {
    const size_t before = reader_.queued();
    std::thread thread([this, block, status] { *status = world_.tier->Pin(block).status(); });
    while (reader_.queued() == before) std::this_thread::yield();
    return thread;
  }
  HostTierWorld world_;
  ManualExecutor reader_;
  TierHealth health_{{}, &world_.clock};
  int filler_ = 0;
};

TEST_F(HostTierDeadlineTest, AReadInTimeIsLikeAnyOther) {
  const BlockRef block = Stored(1);
  Status status;
  std::thread pinner = PinLater(block, &status);
  world_.clock.Advance(kDeadline - 1);
  EXPECT_TRUE(reader_.RunNext());
  pinner.join();
  EXPECT_OK(status);
  EXPECT_EQ(world_.Counter("host.late"), 0);
  EXPECT_OK(world_.tier->CheckInvariants());
}

TEST_F(HostTierDeadlineTest, WhoWaitsForAHungReadIsToldAtTheDeadlineAndTheStoreIsNotAskedAgain) {
  const BlockRef block = Stored(1), other = Stored(2);
  Status status, shared;
  std::thread pinner = PinLater(block, &status);
  std::thread sharer([&] { shared = world_.tier->Pin(block).status(); });
  world_.AwaitWaiting(1);
  world_.clock.Advance(kDeadline);
  pinner.join();
  sharer.join();
  EXPECT_STATUS(StatusCode::kNotFound, "took more than 50 ms", status);
  EXPECT_STATUS(StatusCode::kNotFound, "made anew", shared);
  EXPECT_EQ(world_.tier->state(block), BlockState::kLost);
  EXPECT_EQ(world_.Counter("host.late"), 1);
  // One deadline was lost, and no second one.
  const int gets = world_.faulty->gets();
  EXPECT_FALSE(health_.Available());
  EXPECT_STATUS(StatusCode::kNotFound, "not asked for now", world_.tier->Pin(other));
  EXPECT_EQ(world_.faulty->gets(), gets);
  EXPECT_OK(world_.tier->CheckInvariants());
  // A repair makes the block anew while the read still hangs.
  EXPECT_EQ(world_.tier->Seal(world_.Tail(1).value(), TestKey(1)), block);
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(block).value(), 1));
  EXPECT_TRUE(reader_.RunNext()) << "it ends at last";
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(block).value(), 1));
  EXPECT_OK(world_.tier->CheckInvariants());
}

TEST_F(HostTierDeadlineTest, WhatComesLateIsKept) {
  const BlockRef block = Stored(1);
  std::atomic<bool> reading = false, go_on = false;
  world_.store->on_get = [&](const ChunkKey&) {
    reading = true;
    while (!go_on) std::this_thread::yield();
    return OkStatus();
  };
  Status status;
  std::thread pinner = PinLater(block, &status);
  std::thread disk([&] { reader_.RunNext(); });
  while (!reading) std::this_thread::yield();
  world_.clock.Advance(kDeadline);
  pinner.join();
  EXPECT_EQ(world_.tier->state(block), BlockState::kLost);
  EXPECT_OK(world_.tier->CheckInvariants());
  go_on = true;
  disk.join();
  EXPECT_FALSE(health_.Available()) << "that it came at last closes nothing";
  EXPECT_EQ(world_.tier->state(block), BlockState::kHost);
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(block).value(), 1));
  EXPECT_OK(world_.tier->CheckInvariants());
}

TEST_F(HostTierDeadlineTest, ABlockThatNobodyHoldsAnyMoreOutlivesItsRead) {
  BlockRef block = Stored(1);
  Status status;
  std::thread pinner = PinLater(block, &status);
  world_.clock.Advance(kDeadline);
  pinner.join();
  block.reset();
  world_.faulty->FailGet(1, {StatusCode::kIoError, "gone"});
  EXPECT_TRUE(reader_.RunNext());
  EXPECT_OK(world_.tier->CheckInvariants());
  EXPECT_EQ(world_.tier->used_blocks(), 1) << "its memory is free again";
}

TEST_F(HostTierDeadlineTest, MemoryIsNotAwaitedFromAHungRead) {
  MakeTier(1);
  const BlockRef block = Stored(1);
  Status status;
  std::thread pinner = PinLater(block, &status);
  world_.clock.Advance(kDeadline);
  pinner.join();
  EXPECT_EQ(world_.tier->NewTail().status().code(), StatusCode::kOutOfSpace) << "refused, not waited for";
  EXPECT_TRUE(reader_.RunNext());
  EXPECT_OK(world_.tier->NewTail());
}

TEST_F(HostTierDeadlineTest, AFailingStoreIsLeftAloneAndTriedAgain) {
  reader_.Drain();
  const auto pin = [&](const BlockRef& block) {
    Status status;
    std::thread pinner = PinLater(block, &status);
    reader_.Drain();
    pinner.join();
    return status;
  };
  const BlockRef one = Stored(1), two = Stored(2), three = Stored(3), four = Stored(4);
  world_.background.Drain();
  for (const BlockRef& block : {one, two, three}) {
    world_.faulty->FailGet(1, {StatusCode::kIoError, "bad sector"});
    EXPECT_STATUS(StatusCode::kNotFound, "bad sector", pin(block));
    EXPECT_EQ(world_.tier->state(block), BlockState::kLost) << "to be made anew, not to be failed for";
  }
  EXPECT_FALSE(health_.Available());
  EXPECT_FALSE(world_.tier->Find(TestKey(9)).has_value());
  // What is made anew is not written meanwhile.
  const int puts = world_.faulty->puts();
  EXPECT_EQ(world_.tier->Seal(world_.Tail(50).value(), TestKey(50)) != nullptr, true);
  world_.background.Drain();
  EXPECT_EQ(world_.faulty->puts(), puts);
  EXPECT_EQ(world_.Counter("write_behind.failed"), 1);
  world_.clock.Advance(kSecond);
  EXPECT_OK(pin(four));
  EXPECT_TRUE(health_.Available());
  EXPECT_OK(world_.tier->Flush());
  EXPECT_EQ(world_.faulty->puts(), puts + 1);
}

TEST_F(HostTierDeadlineTest, NothingIsFoundInAStoreThatIsNotAsked) {
  const BlockRef stored = Stored(1);
  ASSERT_OK(world_.memory->Put(TestKey(77), TestChunk(77, kTestBlockBytes)));
  EXPECT_TRUE(world_.tier->Find(TestKey(77)).has_value());
  ASSERT_OK(world_.memory->Put(TestKey(78), TestChunk(78, kTestBlockBytes)));
  ASSERT_TRUE(health_.Begin());
  health_.End({StatusCode::kDeadline, "hangs"});
  EXPECT_FALSE(world_.tier->Find(TestKey(78)).has_value());
  world_.clock.Advance(kSecond);
  EXPECT_TRUE(world_.tier->Find(TestKey(78)).has_value());
}

TEST_F(HostTierDeadlineTest, AReaderThatRefusesReadsOnTheCaller) {
  ManualExecutor full(0);
  HostTier::Options options;
  options.block_bytes = kTestBlockBytes;
  options.budget = kTestBlockBytes;
  options.huge_pages = false;
  options.read_deadline_nanos = kDeadline;
  options.reader = &full;
  world_.tier = HostTier::Create(options, &world_.executor, &world_.background, world_.store.get()).value();
  const BlockRef block = Stored(1);
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(block).value(), 1));
  EXPECT_OK(world_.tier->CheckInvariants());
  options.reader = nullptr;
  EXPECT_STATUS(StatusCode::kInvalid, "read_deadline_nanos",
                HostTier::Create(options, &world_.executor, &world_.background, world_.store.get()));
}

TEST_F(HostTierDeadlineTest, WithoutHealthADeadlineIsSaidAsSuch) {
  HostTier::Options options;
  options.block_bytes = kTestBlockBytes;
  options.budget = 2 * kTestBlockBytes;
  options.huge_pages = false;
  options.clock = &world_.clock;
  options.read_deadline_nanos = kDeadline;
  options.reader = &reader_;
  world_.tier = HostTier::Create(options, &world_.executor, &world_.background, world_.store.get()).value();
  const BlockRef block = Stored(1);
  Status status;
  std::thread pinner = PinLater(block, &status);
  world_.clock.Advance(kDeadline);
  pinner.join();
  EXPECT_EQ(status.code(), StatusCode::kDeadline) << status;
  reader_.Drain();
}

// --- writes and flushes ---

class HostTierWriteDeadlineTest : public HostTierDeadlineTest {
 protected:
  HostTierWriteDeadlineTest() {
    world_.tier.reset();
    HostTier::Options options;
    options.block_bytes = kTestBlockBytes;
    options.budget = 2 * kTestBlockBytes;
    options.huge_pages = false;
    options.clock = &world_.clock;
    options.health = &health_;
    options.write_deadline_nanos = kDeadline;
    options.reader = &reader_;
    world_.tier = HostTier::Create(options, &world_.executor, &world_.background, world_.store.get()).value();
  }
  // On a thread of its own, until its call of the store waits in `reader_`.
  std::thread Later(Status* status, std::function<Status()> call) {
    const size_t before = reader_.queued();
    std::thread thread([status, call] { *status = call(); });
    while (reader_.queued() == before) std::this_thread::yield();
    return thread;
  }
};

TEST_F(HostTierWriteDeadlineTest, AFlushInTimeIsLikeAnyOther) {
  world_.Make(1);
  Status status;
  std::thread flusher = Later(&status, [&] { return world_.tier->Flush(); });
  EXPECT_TRUE(reader_.RunNext());                            // the write
  while (reader_.queued() == 0) std::this_thread::yield();
  EXPECT_TRUE(reader_.RunNext());                            // the store's flush
  flusher.join();
  EXPECT_OK(status);
  EXPECT_TRUE(world_.store->Contains(TestKey(1)));
  EXPECT_EQ(world_.Counter("host.late"), 0);
  EXPECT_OK(world_.tier->CheckInvariants());
}

TEST_F(HostTierWriteDeadlineTest, AFlushEndsAtTheDeadlineOfAHungWriteAndAsksNoMore) {
  const BlockRef one = world_.Make(1), two = world_.Make(2);
  Status status;
  std::thread flusher = Later(&status, [&] { return world_.tier->Flush(); });
  world_.clock.Advance(kDeadline);
  flusher.join();
  EXPECT_STATUS(StatusCode::kDeadline, "took more than 50 ms", status);
  EXPECT_EQ(reader_.queued(), 1u) << "neither the other write nor a flush";
  EXPECT_FALSE(health_.Available());
  EXPECT_EQ(world_.Counter("host.late"), 1);
  EXPECT_OK(world_.tier->CheckInvariants());
  // Its bytes stay in place for the write, which ends at last; the block is written when the store is asked again.
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(one).value(), 1));
  EXPECT_TRUE(reader_.RunNext());
  EXPECT_FALSE(health_.Available()) << "a late end says nothing about now";
  EXPECT_OK(world_.tier->CheckInvariants());
  world_.clock.Advance(10 * kSecond);
  std::thread again = Later(&status, [&] { return world_.tier->Flush(); });
  for (int i = 0; i < 3; ++i) {  // two writes and a flush
    while (!reader_.RunNext()) std::this_thread::yield();
  }
  again.join();
  EXPECT_OK(status);
  EXPECT_TRUE(world_.store->Contains(TestKey(1)));
}

TEST_F(HostTierWriteDeadlineTest, AHungFlushOfTheStoreEndsAtTheDeadline) {
  Status status;
  std::thread flusher = Later(&status, [&] { return world_.tier->Flush(); });
  world_.clock.Advance(kDeadline);
  flusher.join();
  EXPECT_STATUS(StatusCode::kDeadline, "write or flush", status);
  EXPECT_TRUE(reader_.RunNext());
}

TEST_F(HostTierWriteDeadlineTest, WhoNeedsMemoryWaitsOneDeadlineForAHungWrite) {
  const BlockRef one = world_.Make(1), two = world_.Make(2);
  Status status;
  std::thread maker = Later(&status, [&] { return world_.tier->NewTail().status(); });
  world_.clock.Advance(kDeadline);
  maker.join();
  EXPECT_EQ(status.code(), StatusCode::kOutOfSpace) << status;
  // The next one waits for nothing.
  EXPECT_EQ(world_.tier->NewTail().status().code(), StatusCode::kOutOfSpace);
  EXPECT_EQ(world_.Counter("host.late"), 1);
  // Once the store has answered and the breaker's time is up, blocks leave as before.
  while (reader_.RunNext()) {
  }
  world_.clock.Advance(10 * kSecond);
  maker = Later(&status, [&] { return world_.tier->NewTail().status(); });
  EXPECT_TRUE(reader_.RunNext());
  maker.join();
  EXPECT_OK(status);
  EXPECT_OK(world_.tier->CheckInvariants());
}

TEST_F(HostTierWriteDeadlineTest, NeedsAReader) {
  HostTier::Options options;
  options.block_bytes = kTestBlockBytes;
  options.write_deadline_nanos = 1;
  EXPECT_STATUS(StatusCode::kInvalid, "write_deadline_nanos=1", options.Validate());
}

}  // namespace
}  // namespace prehoc
