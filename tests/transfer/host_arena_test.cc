#include "transfer/host_arena.h"

#include <cstring>
#include <thread>
#include <vector>

#include "base/test_point.h"
#include "base/units.h"
#include "tests/fakes/faulty_executor.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

constexpr size_t kBlock = 5000;  // two pages in memory
constexpr uint64_t kStride = 8192;

HostArena::Options Small(int64_t blocks, int64_t extent_blocks) {
  HostArena::Options options;
  options.block_bytes = kBlock;
  options.budget = static_cast<uint64_t>(blocks) * kStride;
  options.extent_bytes = static_cast<uint64_t>(extent_blocks) * kStride;
  options.huge_pages = false;
  return options;
}

double CounterOf(const HostArena& arena, std::string_view name) {
  double found = -1;
  arena.VisitCounters([&](std::string_view shown, double value) {
    if (shown == name) found = value;
  });
  return found;
}

void Fill(std::span<std::byte> block, uint8_t mark) { std::memset(block.data(), mark, block.size()); }
bool Holds(std::span<const std::byte> block, uint8_t mark) {
  return std::all_of(block.begin(), block.end(), [&](std::byte b) { return b == std::byte{mark}; });
}

TEST(HostArenaTest, RefusesOptionsThatMakeNoSense) {
  ManualExecutor executor;
  HostArena::Options options = Small(4, 2);
  options.block_bytes = 0;
  EXPECT_STATUS(StatusCode::kInvalid, "block_bytes=0", HostArena::Create(options, &executor));
  options.block_bytes = SIZE_MAX;
  EXPECT_STATUS(StatusCode::kInvalid, "over 64 TiB", HostArena::Create(options, &executor));
  options = Small(4, 2), options.budget = UINT64_MAX;
  EXPECT_STATUS(StatusCode::kInvalid, "budget=", HostArena::Create(options, &executor));
  options = Small(4, 2), options.budget = kStride - 1;
  EXPECT_STATUS(StatusCode::kInvalid, "holds no block", HostArena::Create(options, &executor));
  options = Small(4, 2), options.unit_bytes = 144;
  EXPECT_STATUS(StatusCode::kInvalid, "unit_bytes=144", HostArena::Create(options, &executor));
  options = Small(4, 2), options.extent_bytes = 0;
  EXPECT_STATUS(StatusCode::kInvalid, "extent_bytes=0", HostArena::Create(options, &executor));
}

TEST(HostArenaTest, BlocksMayLieWholeUnitsApart) {
  ManualExecutor executor;
  HostArena::Options options = Small(0, 1);
  options.block_bytes = 18432, options.unit_bytes = 144;  // 4.5 pages, 128 units
  options.budget = 3 * 36864, options.extent_bytes = 36864;
  auto arena = HostArena::Create(options, &executor);
  ASSERT_OK(arena);
  EXPECT_EQ((*arena)->capacity_blocks(), 3);
  EXPECT_EQ((*arena)->block_stride() % 144, 0u);
  EXPECT_EQ((*arena)->block_stride() % 4096, 0u);
  // Where blocks are whole pages and units already, nothing is lost.
  options.block_bytes = 272 * 256 * 8, options.unit_bytes = 272, options.budget = 2 * options.block_bytes;
  arena = HostArena::Create(options, &executor);
  ASSERT_OK(arena);
  EXPECT_EQ((*arena)->block_stride(), options.block_bytes);
}

TEST(HostArenaTest, ABudgetOfZeroHasNoBlocks) {
  ManualExecutor executor;
  auto arena = HostArena::Create(Small(0, 1), &executor);
  ASSERT_OK(arena);
  EXPECT_EQ((*arena)->capacity_blocks(), 0);
  EXPECT_EQ((*arena)->Allocate().status().code(), StatusCode::kOutOfSpace);
  EXPECT_EQ((*arena)->mapped_bytes(), 0u);
  EXPECT_OK((*arena)->CheckInvariants());
}

TEST(HostArenaTest, HandsOutDistinctAlignedBlocksUntilTheBudgetIsFull) {
  ManualExecutor executor;
  auto arena = std::move(HostArena::Create(Small(10, 3), &executor)).value();
  std::vector<BlockId> blocks;
  for (int i = 0; i < 10; ++i) {
    auto block = arena->Allocate();
    ASSERT_OK(block);
    const auto bytes = arena->block(*block);
    EXPECT_EQ(bytes.size(), kBlock);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(bytes.data()) % 4096, 0u);
    Fill(bytes, static_cast<uint8_t>(i + 1));
    blocks.push_back(*block);
    EXPECT_LE(arena->mapped_bytes(), 10 * kStride);
  }
  EXPECT_STATUS(StatusCode::kOutOfSpace, "all 10 blocks", arena->Allocate());
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(Holds(arena->block(blocks[static_cast<size_t>(i)]), static_cast<uint8_t>(i + 1)));
  EXPECT_EQ(arena->used_bytes(), 10 * kStride);
  arena->Free(blocks[4]);
  EXPECT_EQ(arena->Allocate().value(), blocks[4]);
  EXPECT_OK(arena->CheckInvariants());
}

TEST(HostArenaTest, ABudgetThatIsNoMultipleIsNeverExceeded) {
  ManualExecutor executor;
  HostArena::Options options = Small(3, 2);
  options.budget += kStride - 1;
  auto arena = std::move(HostArena::Create(options, &executor)).value();
  EXPECT_EQ(arena->capacity_blocks(), 3);
  for (int i = 0; i < 3; ++i) ASSERT_OK(arena->Allocate());
  executor.Drain();
  EXPECT_FALSE(arena->Allocate().ok());
  EXPECT_LE(arena->peak_bytes(), options.budget);
}

TEST(HostArenaTest, GrowsInTheBackgroundBeforeItIsNeeded) {
  ManualExecutor executor;
  auto arena = std::move(HostArena::Create(Small(12, 4), &executor)).value();
  EXPECT_EQ(arena->mapped_bytes(), 4 * kStride);
  EXPECT_EQ(executor.queued(), 0u);
  for (int i = 0; i < 3; ++i) ASSERT_OK(arena->Allocate());
  // Less than half an extent is left: one job, however many allocations ask for it.
  EXPECT_EQ(executor.queued(), 1u);
  EXPECT_EQ(arena->mapped_bytes(), 4 * kStride);
  executor.Drain();
  EXPECT_EQ(arena->mapped_bytes(), 8 * kStride);
  EXPECT_OK(arena->CheckInvariants());
  for (int i = 0; i < 5; ++i) ASSERT_OK(arena->Allocate());
  executor.Drain();
  EXPECT_EQ(arena->mapped_bytes(), 12 * kStride);
  executor.Drain();
  EXPECT_EQ(executor.queued(), 0u);
}

TEST(HostArenaTest, TouchesForItselfWhenTheBackgroundDoesNotKeepUp) {
  ManualExecutor executor;
  auto arena = std::move(HostArena::Create(Small(9, 2), &executor)).value();
  for (int i = 0; i < 9; ++i) ASSERT_OK(arena->Allocate()) << i;
  EXPECT_OK(arena->CheckInvariants());
  executor.Drain();  // late jobs find nothing to do
  EXPECT_EQ(arena->mapped_bytes(), 9 * kStride);
  EXPECT_OK(arena->CheckInvariants());
}

TEST(HostArenaTest, DoesWithoutAnExecutorThatRefuses) {
  ManualExecutor base;
  FaultyExecutor executor(&base);
  executor.RefusePost(1, 1000);
  auto arena = std::move(HostArena::Create(Small(9, 2), &executor)).value();
  for (int i = 0; i < 9; ++i) ASSERT_OK(arena->Allocate()) << i;
  EXPECT_GT(executor.refused(), 0);
  EXPECT_OK(arena->CheckInvariants());
}

TEST(HostArenaTest, AJobMayComeAfterTheArenaDied) {
  ManualExecutor executor;
  {
    auto arena = std::move(HostArena::Create(Small(12, 4), &executor)).value();
    for (int i = 0; i < 3; ++i) ASSERT_OK(arena->Allocate());
    ASSERT_EQ(executor.queued(), 1u);
  }
  executor.Drain();
}

TEST(HostArenaTest, HugePagesAndLockingAreOptional) {
  ManualExecutor executor;
  HostArena::Options options;
  options.block_bytes = 1 << 20;
  options.budget = 8 << 20;
  options.extent_bytes = 4 << 20;
  for (const bool huge : {false, true}) {
    for (const bool lock : {false, true}) {
      options.huge_pages = huge;
      options.lock_memory = lock;
      auto arena = HostArena::Create(options, &executor);
      ASSERT_OK(arena);  // whatever the system grants
      for (int i = 0; i < 8; ++i) ASSERT_OK((*arena)->Allocate());
      if (!huge) {
        EXPECT_EQ(CounterOf(**arena, "host.huge_page_bytes"), 0);
      }
      if (!lock) {
        EXPECT_EQ(CounterOf(**arena, "host.lock_failures"), 0);
      }
      EXPECT_EQ(CounterOf(**arena, "host.used_bytes"), 8 << 20);
      EXPECT_EQ(CounterOf(**arena, "host.capacity_bytes"), 8 << 20);
      EXPECT_EQ(CounterOf(**arena, "host.peak_bytes"), 8 << 20);
      executor.Drain();
    }
  }
}

TEST(HostArenaTest, RandomUseMatchesTheModel) {
  SeededRng rng;
  ManualExecutor executor;
  const HostArena::Options options = Small(50, 7);
  auto arena = std::move(HostArena::Create(options, &executor)).value();
  std::vector<std::pair<BlockId, uint8_t>> held;  // the model: what is out, and the mark in it
  for (int step = 0; step < 4000; ++step) {
    if (rng.Chance(0.1)) executor.RunNext();
    if (!held.empty() && rng.Chance(held.size() > 40 ? 0.6 : 0.45)) {
      const auto i = static_cast<size_t>(rng.Int(0, static_cast<int64_t>(held.size()) - 1));
      ASSERT_TRUE(Holds(arena->block(held[i].first), held[i].second)) << step;
      arena->Free(held[i].first);
      std::swap(held[i], held.back());
      held.pop_back();
    } else {
      auto block = arena->Allocate();
      ASSERT_EQ(block.ok(), held.size() < 50) << step;
      if (!block.ok()) continue;
      const auto mark = static_cast<uint8_t>(rng.Next());
      Fill(arena->block(*block), mark);
      held.emplace_back(*block, mark);
    }
    ASSERT_EQ(arena->used_blocks(), static_cast<int64_t>(held.size()));
    ASSERT_LE(arena->mapped_bytes(), options.budget);
    ASSERT_LE(arena->peak_bytes(), options.budget);
    ASSERT_OK(arena->CheckInvariants()) << step;
  }
}

TEST(HostArenaTest, ThreadsShareTheBlocks) {
  auto pool = ThreadPool::Create({.loop_threads = 2, .job_threads = 2}).value();
  auto arena = std::move(HostArena::Create(Small(64, 4), pool.get())).value();
  std::vector<std::thread> threads;
  std::vector<int> wrong(3, 0);
  for (size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      const auto mark = static_cast<uint8_t>(t + 1);
      std::vector<BlockId> held;
      for (int i = 0; i < 600; ++i) {
        auto block = arena->Allocate();
        if (block.ok()) {
          Fill(arena->block(*block), mark);
          held.push_back(*block);
        }
        if (!block.ok() || held.size() > 20) {
          for (const BlockId id : held) {
            wrong[t] += !Holds(arena->block(id), mark);
            arena->Free(id);
          }
          held.clear();
        }
      }
      for (const BlockId id : held) arena->Free(id);
    });
  }
  for (std::thread& thread : threads) thread.join();
  pool->Drain();
  for (const int count : wrong) EXPECT_EQ(count, 0);
  EXPECT_EQ(arena->used_blocks(), 0);
  EXPECT_OK(arena->CheckInvariants());
}

#ifdef PREHOC_TEST_POINTS
TEST(HostArenaTest, AllocateWaitsOnlyForTheExtentThatIsBeingTouched) {
  auto pool = ThreadPool::Create({.loop_threads = 1}).value();
  auto arena = std::move(HostArena::Create(Small(4, 2), pool.get())).value();
  std::atomic<bool> growing{false}, go{false};
  TestPointHook hook("host_arena.grow", [&] {
    growing = true;
    while (!go) std::this_thread::yield();
  });
  ASSERT_OK(arena->Allocate());
  ASSERT_OK(arena->Allocate());  // asks for the next extent
  while (!growing) std::this_thread::yield();
  std::thread opener([&] { go = true; });
  EXPECT_OK(arena->Allocate());
  opener.join();
  EXPECT_OK(arena->CheckInvariants());
}
#endif

TEST(HostArenaDeathTest, FreeingTwiceIsOurOwnBug) {
  ManualExecutor executor;
  auto arena = std::move(HostArena::Create(Small(4, 2), &executor)).value();
  const BlockId block = arena->Allocate().value();
  arena->Free(block);
  EXPECT_DEATH(arena->Free(block), "in_use");
  EXPECT_DEATH(arena->Free(BlockId(1000)), "in_use");
}

}  // namespace
}  // namespace prehoc
