#include "tests/contract/executor_contract.h"

#include <atomic>
#include <thread>
#include <vector>

#include "tests/support/status_matchers.h"

namespace prehoc {

TEST_P(ExecutorContract, RunsEachJobOnce) {
  std::vector<std::atomic<int>> runs(kContractJobs);
  for (int i = 0; i < kContractJobs; ++i) {
    ASSERT_OK(executor().Post([&runs, i] { runs[static_cast<size_t>(i)].fetch_add(1); }));
  }
  executor().Drain();
  for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
}

TEST_P(ExecutorContract, DrainShowsWhatJobsWrote) {
  // Plain memory: Drain() orders it, or ThreadSanitizer complains.
  std::vector<int> written(64, 0);
  for (int round = 1; round <= 10; ++round) {
    for (size_t i = 0; i < written.size(); ++i) ASSERT_OK(executor().Post([&written, i, round] { written[i] = round; }));
    executor().Drain();
    EXPECT_EQ(written, std::vector<int>(written.size(), round));
  }
}

TEST_P(ExecutorContract, DrainWithNothingToDoReturns) {
  executor().Drain();
  executor().Drain();
}

TEST_P(ExecutorContract, JobsMayPostJobs) {
  std::atomic<int> runs{0};
  ASSERT_OK(executor().Post([&] {
    runs.fetch_add(1);
    EXPECT_OK(executor().Post([&] { runs.fetch_add(1); }));
  }));
  executor().Drain();
  EXPECT_EQ(runs.load(), 2);
}

TEST_P(ExecutorContract, AJobIsDestroyedOnceItHasRun) {
  const auto held = std::make_shared<int>(7);
  ASSERT_OK(executor().Post([held] {}));
  executor().Drain();
  EXPECT_EQ(held.use_count(), 1);
}

TEST_P(ExecutorContract, LoopsRunEachIndexOnce) {
  for (const int64_t count : {0, 1, 2, 3, 6, 7, 64, 1000, 10007}) {
    std::vector<int> runs(static_cast<size_t>(count), 0);  // plain: each index is one thread's, the end orders them
    executor().ParallelFor(count, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
    ASSERT_EQ(runs, std::vector<int>(static_cast<size_t>(count), 1)) << count;
  }
}

TEST_P(ExecutorContract, ANegativeCountIsAnEmptyLoop) {
  executor().ParallelFor(-5, [](int64_t) { ADD_FAILURE() << "a body ran"; });
}

TEST_P(ExecutorContract, ABodyWithoutMemoryEndsItsLoopAndNoOther) {
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> running{0};
    EXPECT_THROW(executor().ParallelFor(64,
                                        [&](int64_t i) {
                                          ++running;
                                          const bool none = i == round;
                                          --running;
                                          if (none) throw std::bad_alloc();
                                        }),
                 std::bad_alloc);
    EXPECT_EQ(running, 0);
    std::atomic<int> ran{0};
    executor().ParallelFor(64, [&](int64_t) { ++ran; });
    EXPECT_EQ(ran, 64);
  }
}

TEST_P(ExecutorContract, LoopsMayNest) {
  std::vector<std::atomic<int>> runs(5 * 7);
  executor().ParallelFor(5, [&](int64_t i) {
    executor().ParallelFor(7, [&, i](int64_t j) { runs[static_cast<size_t>(i * 7 + j)].fetch_add(1); });
  });
  for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
}

TEST_P(ExecutorContract, JobsMayRunLoops) {
  std::vector<int> runs(100, 0);
  ASSERT_OK(executor().Post(
      [&] { executor().ParallelFor(100, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; }); }));
  executor().Drain();
  EXPECT_EQ(runs, std::vector<int>(100, 1));
}

TEST_P(ExecutorContract, LoopsOfSeveralThreadsDoNotMix) {
  constexpr int kThreads = 3, kLoops = 300;
  std::vector<std::thread> threads;
  std::vector<int64_t> wrong(kThreads, 0);
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int64_t loop = 0; loop < kLoops; ++loop) {
        const int64_t count = 2 + loop % 5;
        std::vector<int64_t> seen(static_cast<size_t>(count), -1);
        executor().ParallelFor(count, [&](int64_t i) { seen[static_cast<size_t>(i)] = loop * 10 + i; });
        for (int64_t i = 0; i < count; ++i) wrong[t] += seen[static_cast<size_t>(i)] != loop * 10 + i;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int64_t count : wrong) EXPECT_EQ(count, 0);
}

TEST_P(ExecutorContract, HasAtLeastOneThread) { EXPECT_GE(executor().concurrency(), 1); }

}  // namespace prehoc
