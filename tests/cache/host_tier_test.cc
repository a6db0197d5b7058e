// What each method of HostTier promises, except for what the store and other threads do: host_tier_io_test.cc.
#include "cache/host_tier.h"

#include <gtest/gtest.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "tests/cache/host_tier_world.h"

namespace prehoc {
namespace {

static_assert(!std::is_copy_constructible_v<BlockPin> && !std::is_copy_assignable_v<BlockPin>);
static_assert(std::is_nothrow_move_constructible_v<BlockPin> && std::is_nothrow_move_assignable_v<BlockPin>);

TEST(HostTierTest, RefusesOptionsThatMakeNoSense) {
  ManualExecutor executor;
  HostTierWorld world;
  const auto create = [&](auto change, ChunkStore* store = nullptr) {
    HostTier::Options options;
    options.block_bytes = kTestBlockBytes;
    options.budget = 4 * kTestBlockBytes;
    change(options);
    return HostTier::Create(options, &executor, nullptr, store);
  };
  using Options = HostTier::Options;
  EXPECT_OK(create([](Options&) {}));
  EXPECT_STATUS(StatusCode::kInvalid, "block_bytes=0", create([](Options& o) { o.block_bytes = 0; }));
  EXPECT_STATUS(StatusCode::kInvalid, "max_queued_writes=-1", create([](Options& o) { o.max_queued_writes = -1; }));
  EXPECT_STATUS(StatusCode::kInvalid, "budget=4095", create([](Options& o) { o.budget = kTestBlockBytes - 1; }));
  EXPECT_STATUS(StatusCode::kInvalid, "block_bytes=8192, the store's chunks have 4096",
                create([](Options& o) { o.block_bytes = 8192; }, world.store.get()));
}

TEST(HostTierTest, ATailIsZeroedPrivateAndPinnable) {
  HostTierWorld world({.blocks = 1, .store_blocks = 0});
  for (int round = 0; round < 2; ++round) {  // the second tail gets the memory of the first
    BlockRef tail = world.tier->NewTail().value();
    EXPECT_EQ(world.tier->state(tail), BlockState::kTail);
    BlockPin pin = world.tier->Pin(tail).value();
    ASSERT_EQ(pin.bytes().size(), kTestBlockBytes);
    EXPECT_FALSE(pin.loaded());
    for (std::byte& byte : pin.bytes()) {
      ASSERT_EQ(byte, std::byte{0});
      byte = std::byte{7};
    }
    EXPECT_EQ(world.tier->used_blocks(), 1);
    EXPECT_OK(world.tier->CheckInvariants());
  }
  EXPECT_EQ(world.tier->used_blocks(), 0) << "a tail that is let go gives its memory back";
}

TEST(HostTierTest, NewTailSaysWhatFillsTheMemory) {
  HostTierWorld world({.blocks = 3, .store_blocks = 0});
  const BlockRef held = world.Make(1), pinned = world.Make(2);
  const BlockPin pin = world.tier->Pin(pinned).value();
  const BlockRef tail = world.tier->NewTail().value();
  EXPECT_STATUS(StatusCode::kOutOfSpace, "1 pinned, 1 being filled, 1 cannot be evicted because there is no store",
                world.tier->NewTail());
  EXPECT_EQ(world.tier->state(held), BlockState::kHost);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierTest, ATierWithoutMemoryHoldsNothing) {
  HostTierWorld world({.blocks = 0});
  EXPECT_EQ(world.tier->capacity_blocks(), 0);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "all 0 blocks", world.tier->NewTail());
}

TEST(HostTierTest, ASealedTailIsFoundByItsKey) {
  HostTierWorld world;
  BlockRef tail = world.Tail(1).value();
  EXPECT_FALSE(world.tier->Find(TestKey(1)).has_value());
  const BlockRef sealed = world.tier->Seal(tail, TestKey(1));
  EXPECT_EQ(sealed, tail);
  EXPECT_EQ(world.tier->state(sealed), BlockState::kHost);
  EXPECT_EQ(world.tier->Find(TestKey(1)), sealed);
  EXPECT_FALSE(world.tier->Find(TestKey(1, /*layer=*/1)).has_value());
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(sealed).value(), 1));
  EXPECT_EQ(world.Counter("host.hits"), 2);  // with the pin that filled it
}

TEST(HostTierTest, ASecondTailOfTheSameKeyGivesItsMemoryBack) {
  HostTierWorld world;
  const BlockRef first = world.Make(1);
  const BlockRef duplicate = world.Tail(1).value();
  EXPECT_EQ(world.tier->used_blocks(), 2);
  EXPECT_EQ(world.tier->Seal(duplicate, TestKey(1)), first);
  EXPECT_EQ(world.tier->used_blocks(), 1);
  EXPECT_EQ(world.Counter("host.duplicates"), 1);
  EXPECT_EQ(world.tier->state(duplicate), BlockState::kLost);
  EXPECT_STATUS(StatusCode::kNotFound, "use the block that Seal() returned", world.tier->Pin(duplicate));
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(first).value(), 1));
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierTest, ABlockThatNobodyHoldsStaysForReuseUntilItsMemoryIsWanted) {
  HostTierWorld world({.blocks = 2, .store_blocks = 0});
  world.Make(1);
  BlockRef found = world.tier->Find(TestKey(1)).value();
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(found).value(), 1));
  found = nullptr;
  const BlockRef second = world.Make(2);
  EXPECT_EQ(world.Counter("host.forgotten"), 0);
  const BlockRef third = world.Make(3);
  EXPECT_EQ(world.Counter("host.forgotten"), 1);
  EXPECT_FALSE(world.tier->Find(TestKey(1)).has_value());
  EXPECT_STATUS(StatusCode::kOutOfSpace, "no store", world.tier->NewTail());
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierTest, ATailThatIsNeverPinnedOrPinnedLastWithKeepIsKept) {
  HostTierWorld world({.blocks = 2});
  const BlockRef kept = world.tier->Seal(world.tier->NewTail().value(), TestKey(1));
  const BlockRef streamed = world.Make(2);
  world.Use(streamed, BlockUse::kStream);
  world.Make(3);
  EXPECT_EQ(world.tier->state(kept), BlockState::kHost);
  EXPECT_EQ(world.tier->state(streamed), BlockState::kStoreOnly);
}

TEST(HostTierTest, StreamedBlocksGoFirstTheLastUsedFirstThenKeptOnesTheLeastRecentlyUsedFirst) {
  HostTierWorld world({.blocks = 6});
  std::vector<BlockRef> blocks;
  for (int n = 0; n < 6; ++n) blocks.push_back(world.Make(n));
  for (const int n : {4, 0, 2}) world.Use(blocks[static_cast<size_t>(n)], BlockUse::kKeep);
  for (const int n : {1, 5, 3}) world.Use(blocks[static_cast<size_t>(n)], BlockUse::kStream);
  for (const size_t next : {3, 5, 1, 4, 0, 2}) {
    EXPECT_EQ(world.tier->state(blocks[next]), BlockState::kHost) << next;
    const BlockRef tail = world.tier->NewTail().value();
    EXPECT_EQ(world.tier->state(blocks[next]), BlockState::kStoreOnly) << next;
    blocks.push_back(tail);  // tails stay, so that each takes another block
    EXPECT_OK(world.tier->CheckInvariants());
  }
  EXPECT_EQ(world.Counter("host.evicted"), 6);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "0 pinned, 6 being filled;", world.tier->NewTail());
}

// What sequences that are over have left goes before what one needs that is not, however that was used.
TEST(HostTierTest, BlocksThatNobodyHoldsGoFirst) {
  HostTierWorld world({.blocks = 4});
  for (int n = 0; n < 2; ++n) world.Use(world.Make(n), BlockUse::kKeep);
  const BlockRef streamed = world.Make(2);
  world.Use(streamed, BlockUse::kStream);
  BlockRef let_go = world.Make(3);
  const BlockRef found = world.tier->Find(TestKey(1)).value();  // held again
  let_go = nullptr;
  world.background.Drain();
  const BlockRef first = world.tier->NewTail().value(), second = world.tier->NewTail().value();
  EXPECT_EQ(world.tier->state(streamed), BlockState::kHost);
  EXPECT_EQ(world.tier->state(found), BlockState::kHost);
  EXPECT_OK(world.tier->CheckInvariants());
  const BlockRef third = world.tier->NewTail().value();
  EXPECT_EQ(world.tier->state(streamed), BlockState::kStoreOnly) << "none is left that nobody holds";
  EXPECT_EQ(world.tier->state(found), BlockState::kHost);
}

TEST(HostTierTest, ThePinThatDiesLastDecidesHowABlockGoes) {
  HostTierWorld world({.blocks = 2});
  const BlockRef first = world.Make(1), second = world.Make(2);
  {
    std::optional<BlockPin> keep = world.tier->Pin(first, BlockUse::kKeep).value();
    const BlockPin stream = world.tier->Pin(first, BlockUse::kStream).value();
    keep.reset();
  }
  world.Make(3);
  EXPECT_EQ(world.tier->state(first), BlockState::kStoreOnly);
  EXPECT_EQ(world.tier->state(second), BlockState::kHost);
}

TEST(HostTierTest, PinnedBlocksStayWhereTheyAre) {
  HostTierWorld world({.blocks = 2});
  const BlockRef pinned = world.Make(1);
  const BlockPin pin = world.tier->Pin(pinned, BlockUse::kStream).value();
  for (int n = 2; n < 10; ++n) world.Make(n);
  EXPECT_TRUE(HoldsBytesOf(pin, 1));
  EXPECT_EQ(world.tier->state(pinned), BlockState::kHost);
  const BlockRef other = world.tier->Find(TestKey(9)).value();
  const BlockPin second = world.tier->Pin(other).value();
  EXPECT_STATUS(StatusCode::kOutOfSpace, "2 pinned, 0 being filled;", world.Sealed(10));
}

TEST(HostTierTest, APinMovesAndIsEmptyAfter) {
  HostTierWorld world({.blocks = 2});
  const BlockRef one = world.Make(1), two = world.Make(2);
  BlockPin pin = world.tier->Pin(one).value();
  BlockPin moved = std::move(pin);
  EXPECT_FALSE(pin);  // NOLINT: what a moved-from pin is, is the question
  EXPECT_TRUE(pin.bytes().empty());
  EXPECT_TRUE(HoldsBytesOf(moved, 1));
  EXPECT_EQ(world.Counter("host.pinned"), 1);
  moved = world.tier->Pin(two).value();  // lets `one` go
  EXPECT_EQ(world.Counter("host.pinned"), 1);
  EXPECT_TRUE(HoldsBytesOf(moved, 2));
  BlockPin& self = moved;
  moved = std::move(self);
  EXPECT_TRUE(HoldsBytesOf(moved, 2));
  moved = BlockPin();
  EXPECT_EQ(world.Counter("host.pinned"), 0);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierTest, APinHoldsTheBlockWithoutAnyOtherRef) {
  HostTierWorld world({.blocks = 2, .store_blocks = 0});
  std::optional<BlockPin> pin = world.tier->Pin(world.Make(1)).value();
  const BlockRef second = world.Make(2);
  EXPECT_FALSE(world.tier->NewTail().ok());
  EXPECT_TRUE(HoldsBytesOf(*pin, 1));
  pin.reset();
  EXPECT_OK(world.tier->NewTail());
}

TEST(HostTierTest, TryPinTakesOnlyWhatIsInMemory) {
  HostTierWorld world({.blocks = 1});
  const BlockRef first = world.Make(1);
  EXPECT_TRUE(HoldsBytesOf(world.tier->TryPin(first).value(), 1));
  world.Make(2);
  EXPECT_FALSE(world.tier->TryPin(first).has_value());
  EXPECT_EQ(world.faulty->gets(), 0);
  EXPECT_EQ(world.tier->state(first), BlockState::kStoreOnly);
}

TEST(HostTierTest, FindLooksIntoTheStoreWithoutReading) {
  HostTierWorld world({.blocks = 1});
  world.Make(1);
  world.Make(2);  // nobody holds the first: only the store knows it
  const BlockRef found = world.tier->Find(TestKey(1)).value();
  EXPECT_EQ(world.tier->state(found), BlockState::kStoreOnly);
  EXPECT_EQ(world.tier->Find(TestKey(1)), found);
  EXPECT_EQ(world.faulty->gets(), 0);
  EXPECT_FALSE(world.tier->Find(TestKey(3)).has_value());
  EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(found).value(), 1));
}

TEST(HostTierTest, NeverMoreMemoryThanTheBudget) {
  HostTierWorld world({.blocks = 3});
  std::vector<BlockRef> blocks;
  for (int n = 0; n < 50; ++n) {
    blocks.push_back(world.Make(n));
    EXPECT_LE(world.tier->used_blocks(), 3);
  }
  for (size_t n = 0; n < blocks.size(); ++n) {
    EXPECT_TRUE(HoldsBytesOf(world.tier->Pin(blocks[n]).value(), static_cast<int>(n)));
  }
  EXPECT_EQ(world.tier->capacity_blocks(), 3);
  EXPECT_EQ(world.Counter("host.peak_bytes"), 3 * kTestBlockBytes);
  EXPECT_EQ(world.Counter("host.capacity_bytes"), 3 * kTestBlockBytes);
  EXPECT_EQ(world.Counter("host.loads"), 50);
  EXPECT_EQ(world.Counter("host.load_bytes"), 50 * kTestBlockBytes);
  EXPECT_EQ(world.Counter("host.evicted"), 47 + 50);
  EXPECT_OK(world.tier->CheckInvariants());
}

TEST(HostTierDeathTest, SealsOnlyTailsThatNobodyPins) {
  HostTierWorld world;
  BlockRef tail = world.Tail(1).value();
  const BlockPin pin = world.tier->Pin(tail).value();
  EXPECT_DEATH(world.tier->Seal(tail, TestKey(1)), "pins == 0");
  const BlockRef sealed = world.Make(2);
  EXPECT_DEATH(world.tier->Seal(sealed, TestKey(2)), "known");
}

}  // namespace
}  // namespace prehoc
