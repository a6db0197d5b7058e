#include "tests/contract/device_memory_contract.h"

#include <thread>

#include "base/units.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {

TEST_P(DeviceMemoryContract, GivesZeroedAlignedMemory) {
  for (const size_t size : {1, 255, 256, 257, 4096, 10000}) {
    auto buffer = memory().Allocate(size, "rows");
    ASSERT_OK(buffer);
    EXPECT_GE(buffer->size(), size);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 256, 0u);
    EXPECT_EQ(world().Read(buffer->data(), buffer->size()), std::vector<std::byte>(buffer->size()));
    // Dirty, so that the next one shows whether it was zeroed.
    world().Write(buffer->data(), std::vector<std::byte>(buffer->size(), std::byte{0xee}));
  }
}

TEST_P(DeviceMemoryContract, KeepsWhatWasWritten) {
  auto a = memory().Allocate(1000, "a"), b = memory().Allocate(1000, "b");
  ASSERT_OK(a);
  ASSERT_OK(b);
  const std::vector<std::byte> ones(1000, std::byte{1}), twos(1000, std::byte{2});
  world().Write(a->data(), ones);
  world().Write(b->data(), twos);
  EXPECT_EQ(world().Read(a->data(), 1000), ones);
  EXPECT_EQ(world().Read(b->data(), 1000), twos);
}

TEST_P(DeviceMemoryContract, WriteAndReadReachTheSameBytes) {
  auto buffer = memory().Allocate(1000, "a");
  ASSERT_OK(buffer);
  std::vector<std::byte> some(300);
  for (size_t i = 0; i < some.size(); ++i) some[i] = static_cast<std::byte>(i * 7);
  ASSERT_OK(memory().Write(some.data(), some.size(), buffer->data() + 100));
  std::vector<std::byte> want(1000), got(1000, std::byte{9});
  std::copy(some.begin(), some.end(), want.begin() + 100);
  ASSERT_OK(memory().Read(buffer->data(), 1000, got.data()));
  EXPECT_EQ(got, want);
}

TEST_P(DeviceMemoryContract, ZeroBytesAreAnAllocation) {
  auto buffer = memory().Allocate(0, "empty");
  ASSERT_OK(buffer);
  EXPECT_NE(buffer->data(), nullptr);
}

TEST_P(DeviceMemoryContract, CountsEveryByteAndRemembersThePeak) {
  EXPECT_EQ(memory().budget(), kBudget);
  EXPECT_EQ(memory().used(), 0u);
  {
    auto a = memory().Allocate(1, "a");
    ASSERT_OK(a);
    EXPECT_EQ(memory().used(), a->size());
    auto b = memory().Allocate(5000, "b");
    ASSERT_OK(b);
    EXPECT_EQ(memory().used(), a->size() + b->size());
    EXPECT_EQ(memory().peak(), memory().used());
  }
  EXPECT_EQ(memory().used(), 0u);
  EXPECT_GE(memory().peak(), 5001u);
}

TEST_P(DeviceMemoryContract, RefusesWhatTheBudgetDoesNotHold) {
  auto most = memory().Allocate(kBudget - 256, "most");
  ASSERT_OK(most);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "codes", memory().Allocate(257, "codes"));
  EXPECT_EQ(memory().used(), kBudget - 256);
  auto rest = memory().Allocate(256, "rest");
  EXPECT_OK(rest);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "raise the device budget", memory().Allocate(1, "one byte"));
  most->Reset();
  EXPECT_OK(memory().Allocate(kBudget - 256, "again"));
}

TEST_P(DeviceMemoryContract, RefusesAbsurdSizes) {
  for (const size_t size : {kBudget + 1, SIZE_MAX / 2, SIZE_MAX - 255, SIZE_MAX - 1, SIZE_MAX}) {
    EXPECT_STATUS(StatusCode::kOutOfSpace, "absurd", memory().Allocate(size, "absurd")) << size;
  }
  EXPECT_EQ(memory().used(), 0u);
}

TEST_P(DeviceMemoryContract, BuffersMove) {
  auto made = memory().Allocate(512, "a");
  ASSERT_OK(made);
  DeviceBuffer a = std::move(*made);
  std::byte* const data = a.data();
  DeviceBuffer b = std::move(a);
  EXPECT_EQ(a.data(), nullptr);  // empty once moved from
  EXPECT_EQ(a.size(), 0u);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(memory().used(), 512u);
  auto other = memory().Allocate(256, "b");
  ASSERT_OK(other);
  b = std::move(*other);  // gives its own back
  EXPECT_EQ(memory().used(), 256u);
  DeviceBuffer& self = b;
  b = std::move(self);
  EXPECT_EQ(memory().used(), 256u);
  b.Reset();
  b.Reset();
  EXPECT_EQ(memory().used(), 0u);
}

TEST_P(DeviceMemoryContract, RandomUseMatchesTheModel) {
  SeededRng rng;
  std::vector<DeviceBuffer> held;
  std::vector<uint8_t> marks;
  size_t used = 0, peak = 0;  // the model
  for (int step = 0; step < 2000; ++step) {
    if (!held.empty() && rng.Chance(0.5)) {
      const auto i = static_cast<size_t>(rng.Int(0, static_cast<int64_t>(held.size()) - 1));
      const std::vector<std::byte> expected(held[i].size(), std::byte{marks[i]});
      ASSERT_EQ(world().Read(held[i].data(), held[i].size()), expected) << step;
      used -= held[i].size();
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(i));
      marks.erase(marks.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      const auto size = static_cast<size_t>(rng.Int(1, 9000));
      auto buffer = memory().Allocate(size, "random");
      const bool fits = used + RoundUp(size, 256) <= kBudget;
      ASSERT_EQ(buffer.ok(), fits) << step << ": " << buffer.status();
      if (!fits) continue;
      used += RoundUp(size, 256);
      peak = std::max(peak, used);
      marks.push_back(static_cast<uint8_t>(rng.Next()));
      world().Write(buffer->data(), std::vector<std::byte>(buffer->size(), std::byte{marks.back()}));
      held.push_back(std::move(*buffer));
    }
    ASSERT_EQ(memory().used(), used) << step;
    ASSERT_EQ(memory().peak(), peak) << step;
  }
}

TEST_P(DeviceMemoryContract, ThreadsShareTheBudget) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      std::vector<DeviceBuffer> held;
      for (int i = 0; i < 500; ++i) {
        auto buffer = memory().Allocate(3000, "shared");
        if (buffer.ok()) held.push_back(std::move(*buffer));
        if (held.size() > 8 || !buffer.ok()) held.clear();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(memory().used(), 0u);
  EXPECT_LE(memory().peak(), kBudget);
  EXPECT_GE(memory().peak(), 3000u);
}

}  // namespace prehoc
