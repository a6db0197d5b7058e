// Bytes in host memory against the checksum of their Seal(): what was damaged there is neither written, nor handed on.
#include <gtest/gtest.h>

#include <utility>

#include "base/test_point.h"
#include "tests/cache/host_tier_world.h"

namespace prehoc {
namespace {

// One sealed block, damaged in memory.
class HostTierIntegrityTest : public ::testing::Test {
 protected:
  void MakeDamaged(bool stored) {
    block_ = world_.Make(1);
    if (stored) world_.background.Drain();
    ASSERT_TRUE(world_.tier->FlipIdleBitForTest(0, 4099));
  }
  HostTierWorld world_;
  BlockRef block_;
};

TEST_F(HostTierIntegrityTest, DamageIsNotWrittenBehind) {
  MakeDamaged(/*stored=*/false);
  world_.background.Drain();
  EXPECT_EQ(world_.faulty->puts(), 0) << "the store would have given it a checksum that holds";
  EXPECT_EQ(world_.tier->state(block_), BlockState::kLost);
  EXPECT_STATUS(StatusCode::kCorrupt, "no longer holds what was sealed", world_.tier->Pin(block_));
  EXPECT_EQ(world_.Counter("host.corrupt"), 1);
  EXPECT_EQ(world_.Counter("host.lost"), 1);
  EXPECT_OK(world_.tier->CheckInvariants());
  // A repair brings it back, for whoever holds it.
  EXPECT_EQ(world_.Make(1), block_);
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(block_, BlockUse::kKeep, PinCheck::kVerify).value(), 1));
  EXPECT_EQ(world_.Counter("host.healed"), 1);
}

TEST_F(HostTierIntegrityTest, DamageIsNotWrittenByFlushOrEviction) {
  MakeDamaged(/*stored=*/false);
  EXPECT_EQ(world_.tier->Flush().code(), StatusCode::kCorrupt);
  EXPECT_EQ(world_.faulty->puts(), 0);
  EXPECT_EQ(world_.tier->state(block_), BlockState::kLost);

  HostTierWorld small({.blocks = 1});
  const BlockRef one = small.Make(1);
  ASSERT_TRUE(small.tier->FlipIdleBitForTest(1, 77));
  EXPECT_OK(small.tier->NewTail()) << "its memory is free for others";
  EXPECT_EQ(small.faulty->puts(), 0);
  EXPECT_EQ(small.tier->state(one), BlockState::kLost);
  EXPECT_OK(small.tier->CheckInvariants());
}

TEST_F(HostTierIntegrityTest, AVerifiedPinTakesTheStoresBytesInstead) {
  MakeDamaged(/*stored=*/true);
  const Result<BlockPin> pin = world_.tier->Pin(block_, BlockUse::kKeep, PinCheck::kVerify);
  ASSERT_OK(pin);
  EXPECT_TRUE(pin->loaded());
  EXPECT_TRUE(HoldsBytesOf(*pin, 1));
  EXPECT_EQ(world_.Counter("host.corrupt"), 1);
  EXPECT_EQ(world_.Counter("host.lost"), 0);
  EXPECT_OK(world_.tier->CheckInvariants());
}

// What the store compared is what counts, also where this tier has never seen the block: damage between the store's check and
// our memory does not become the truth.
TEST_F(HostTierIntegrityTest, TheStoresOwnChecksumIsTheSealOfABlockFromElsewhere) {
  ASSERT_OK(world_.memory->Put(TestKey(1), TestChunk(1, kTestBlockBytes)));
  world_.faulty->FlipBitInGet(1, 1234);
  const BlockRef block = world_.tier->Find(TestKey(1)).value();
  ASSERT_FALSE(HoldsBytesOf(world_.tier->Pin(block).value(), 1));
  const Result<BlockPin> pin = world_.tier->Pin(block, BlockUse::kKeep, PinCheck::kVerify);
  ASSERT_OK(pin);
  EXPECT_TRUE(HoldsBytesOf(*pin, 1));
  EXPECT_EQ(world_.Counter("host.corrupt"), 1);
}

// A duplicate is compared by the seed of the block that has the key, whoever gave that one its seal.
TEST_F(HostTierIntegrityTest, TheSameBytesComputedAgainAreTakenForTheSame) {
  HostTierWorld world({.blocks = 2});
  ASSERT_OK(world.memory->Put(TestKey(1), TestChunk(1, kTestBlockBytes)));
  const BlockRef block = world.tier->Find(TestKey(1)).value();
  world.Use(block, BlockUse::kStream);
  const BlockRef second = world.Make(2);
  world.background.Drain();
  const BlockRef third = world.Make(3);
  ASSERT_EQ(world.tier->state(block), BlockState::kStoreOnly);
  EXPECT_EQ(world.Make(1), block);
  EXPECT_EQ(world.tier->state(block), BlockState::kHost) << "its bytes are in memory again without a read";
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(block, BlockUse::kKeep, PinCheck::kVerify).value(), 1));
  EXPECT_OK(world.tier->CheckInvariants());
}

// K and V computed again may differ in their last bits from what the store has of the same tokens, and nobody holds.
TEST_F(HostTierIntegrityTest, WhatWasComputedAgainTakesThePlaceOfTheStoresVersion) {
  HostTierWorld world({.blocks = 2});
  ASSERT_OK(world.memory->Put(TestKey(1), TestChunk(7, kTestBlockBytes)));
  const BlockRef block = world.Make(1);
  world.background.Drain();
  EXPECT_EQ(world.Counter("write_behind.replaced"), 1);
  world.Use(block, BlockUse::kStream);
  const BlockRef others[] = {world.Make(2), world.Make(3)};
  ASSERT_EQ(world.tier->state(block), BlockState::kStoreOnly);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(block).value(), 1)) << "whoever holds it has seen these";
  EXPECT_EQ(world.Counter("host.corrupt"), 0);
}

// As it is before the write behind has run: what the store has is no reason to let the block go.
TEST_F(HostTierIntegrityTest, ABlockLeavesMemoryOnlyOnceTheStoreHasItsVersion) {
  HostTierWorld world({.blocks = 2, .max_queued_writes = 0});
  ASSERT_OK(world.memory->Put(TestKey(1), TestChunk(7, kTestBlockBytes)));
  const BlockRef found = world.tier->Find(TestKey(1)).value();
  const BlockRef block = world.Make(1);
  ASSERT_EQ(block, found) << "found before, and read by nobody";
  world.Use(block, BlockUse::kStream);
  const BlockRef others[] = {world.Make(2), world.Make(3)};
  ASSERT_EQ(world.tier->state(block), BlockState::kStoreOnly);
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(block).value(), 1));
}

// A read that began before bytes computed anew took the record's place, and ends after they left memory, has the record of before.
TEST_F(HostTierIntegrityTest, AReadOvertakenByANewVersionIsReadAgain) {
  for (const bool prefetched : {false, true}) {
    HostTierWorld world({.blocks = 2});
    ASSERT_OK(world.memory->Put(TestKey(1), TestChunk(1, kTestBlockBytes)));
    const BlockRef block = world.tier->Find(TestKey(1)).value();
    int reads = 0;
    world.store->after_get = [&](const ChunkKey& key) {
      if (key != TestKey(1) || ++reads > 1) return;
      BlockRef tail = world.Tail(2).value();
      ASSERT_EQ(world.tier->Seal(std::move(tail), TestKey(1)), block);
      while (world.background.RunNext()) continue;
      world.Make(3);
      ASSERT_EQ(world.tier->state(block), BlockState::kStoreOnly);
    };
    if (prefetched) {
      world.tier->Prefetch({&block, 1});
      world.background.Drain();
    }
    const Result<BlockPin> pin = world.tier->Pin(block);
    ASSERT_OK(pin);
    EXPECT_TRUE(HoldsBytesOf(*pin, 2));
    EXPECT_EQ(reads, 2);
    EXPECT_EQ(world.Counter("write_behind.replaced"), 1);
    EXPECT_EQ(world.Counter("host.corrupt"), 0);
    EXPECT_EQ(world.Counter("host.lost"), 0);
    EXPECT_OK(world.tier->CheckInvariants());
  }
}

TEST_F(HostTierIntegrityTest, TheSameBytesAreNotWrittenAgain) {
  ASSERT_OK(world_.memory->Put(TestKey(1), TestChunk(1, kTestBlockBytes)));
  block_ = world_.Make(1);
  world_.background.Drain();
  EXPECT_EQ(world_.Counter("write_behind.written"), 0);
  EXPECT_EQ(world_.Counter("write_behind.replaced"), 0);
  EXPECT_EQ(CounterOf(*world_.memory, "store.puts"), 1);
  ASSERT_OK(world_.tier->Flush());
  EXPECT_EQ(CounterOf(*world_.memory, "store.puts"), 1);
}

TEST_F(HostTierIntegrityTest, EveryBitIsFound) {
  for (uint64_t bit = 0; bit < 8 * kTestBlockBytes; bit += 509) {
    HostTierWorld world;
    const BlockRef block = world.Make(1);
    world.background.Drain();
    ASSERT_TRUE(world.tier->FlipIdleBitForTest(1, bit));
    const Result<BlockPin> pin = world.tier->Pin(block, BlockUse::kKeep, PinCheck::kVerify);
    ASSERT_OK(pin);
    EXPECT_TRUE(HoldsBytesOf(*pin, 1)) << bit;
    EXPECT_EQ(world.Counter("host.corrupt"), 1) << bit;
  }
}

TEST_F(HostTierIntegrityTest, DamagedMemoryInUseIsRefusedAndGoesWithItsLastPin) {
  block_ = world_.Make(1);
  world_.background.Drain();
  {
    const BlockPin pin = world_.tier->Pin(block_).value();
    // Nobody may write here: this is what failing memory does.
    pin.bytes()[5] ^= std::byte{1};
    EXPECT_STATUS(StatusCode::kCorrupt, "no longer holds", world_.tier->Pin(block_, BlockUse::kKeep, PinCheck::kVerify));
    EXPECT_STATUS(StatusCode::kCorrupt, "no longer holds", world_.tier->Pin(block_)) << "known to be damaged";
    EXPECT_FALSE(world_.tier->TryPin(block_).has_value());
    EXPECT_OK(world_.tier->CheckInvariants());
  }
  EXPECT_EQ(world_.tier->state(block_), BlockState::kStoreOnly);
  EXPECT_TRUE(HoldsBytesOf(world_.tier->Pin(block_, BlockUse::kKeep, PinCheck::kVerify).value(), 1));
  EXPECT_EQ(world_.Counter("host.corrupt"), 1);
}

TEST_F(HostTierIntegrityTest, OneCheckServesAllWhoPinAtOnce) {
  block_ = world_.Make(1);
  const BlockPin trusting = world_.tier->Pin(block_).value();
  const auto verified = [&] { return world_.tier->Pin(block_, BlockUse::kKeep, PinCheck::kVerify).value(); };
  const BlockPin first = verified(), second = verified();
  EXPECT_EQ(world_.Counter("host.verified_bytes"), kTestBlockBytes);
}

// Whoever comes while another still compares must not take its word.
TEST_F(HostTierIntegrityTest, ACheckUnderWayIsNoCheck) {
  HostTierWorld world;
  const BlockRef block = world.Make(1);
  world.background.Drain();
  ASSERT_TRUE(world.tier->FlipIdleBitForTest(1, 99));
  bool inside = false;
  const TestPointHook hook("host_tier.verify", [&] {
    if (std::exchange(inside, true)) return;
    const Result<BlockPin> pin = world.tier->Pin(block, BlockUse::kKeep, PinCheck::kVerify);
    EXPECT_TRUE(!pin.ok() || HoldsBytesOf(*pin, 1));
  });
  const Result<BlockPin> pin = world.tier->Pin(block, BlockUse::kKeep, PinCheck::kVerify);
  EXPECT_TRUE(inside);
  EXPECT_TRUE(!pin.ok() || HoldsBytesOf(*pin, 1));
}

// Between the store's check and this memory nobody else looks.
TEST_F(HostTierIntegrityTest, BytesThatTheStoreGaveOutWrongAreFound) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);  // evicts it
  ASSERT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  world.faulty->FlipBitInGet(1, 12345);
  EXPECT_STATUS(StatusCode::kCorrupt, "other bytes than were sealed", world.tier->Pin(one));
  EXPECT_EQ(world.tier->state(one), BlockState::kLost);
  EXPECT_FALSE(world.memory->Contains(TestKey(1))) << "it would keep the right record from being written";
  EXPECT_EQ(world.Counter("host.corrupt"), 1);
  EXPECT_OK(world.tier->CheckInvariants());
}

// Computed twice, bytes may differ in their last bits: that is no damage.
TEST_F(HostTierIntegrityTest, ABlockComputedTwiceStaysWhatTheStoreHas) {
  HostTierWorld world({.blocks = 1});
  const BlockRef one = world.Make(1);
  world.Make(2);
  ASSERT_EQ(world.tier->state(one), BlockState::kStoreOnly);
  EXPECT_EQ(world.tier->Seal(world.Tail(3).value(), TestKey(1)), one);  // other bytes under the same key
  const Result<BlockPin> pin = world.tier->Pin(one);
  ASSERT_OK(pin);
  EXPECT_TRUE(HoldsBytesOf(*pin, 1));
  EXPECT_EQ(world.Counter("host.corrupt"), 0);
}

TEST_F(HostTierIntegrityTest, WithVerifyPinsEveryUseIsChecked) {
  HostTier::Options options;
  options.block_bytes = kTestBlockBytes;
  options.budget = 4 * kTestBlockBytes;
  options.huge_pages = false;
  options.verify_pins = true;
  auto tier = HostTier::Create(options, &world_.executor, nullptr, world_.store.get()).value();
  const BlockRef block = tier->Seal(tier->NewTail().value(), TestKey(7));
  ASSERT_OK(tier->Flush());
  EXPECT_OK(tier->Pin(block));
  ASSERT_TRUE(tier->FlipIdleBitForTest(0, 3));
  const Result<BlockPin> pin = tier->Pin(block);
  ASSERT_OK(pin);
  EXPECT_EQ(pin->bytes()[0], std::byte{0});
  EXPECT_TRUE(pin->loaded());
}

}  // namespace
}  // namespace prehoc
