// The contract of Executor, over every implementation, plain and behind its fault decorator; then what each adds.
#include "base/executor.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "tests/contract/executor_contract.h"
#include "tests/fakes/faulty_executor.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

std::unique_ptr<ThreadPool> MakePool(int loop_threads, int job_threads, int spin_iterations = 20000, int queue = 4096) {
  return ThreadPool::Create({loop_threads, job_threads, queue, spin_iterations}).value();
}

template <int kLoopThreads, int kJobThreads, int kSpins>
class PoolWorld final : public ExecutorUnderTest {
 public:
  Executor& executor() override { return *pool_; }

 private:
  std::unique_ptr<ThreadPool> pool_ = MakePool(kLoopThreads, kJobThreads, kSpins);
};

class ManualWorld final : public ExecutorUnderTest {
 public:
  Executor& executor() override { return executor_; }

 private:
  ManualExecutor executor_;
};

template <class Base>
class Decorated final : public ExecutorUnderTest {
 public:
  Executor& executor() override { return faulty_; }

 protected:
  Base base_;
  FaultyExecutor faulty_{&base_.executor()};
};

// Legal faults: whoever keeps to the contract cannot tell.
template <class Base>
class Reordered final : public ExecutorUnderTest {
 public:
  Reordered() {
    faulty_.Hold(1);
    faulty_.ShuffleLoops(2);
  }
  Executor& executor() override { return faulty_; }

 private:
  Base base_;
  FaultyExecutor faulty_{&base_.executor()};
};

template <class World>
ExecutorWorld Make(const char* name) {
  return {name, [] { return std::make_unique<World>(); }};
}

using Pool = PoolWorld<4, 2, 2000>;
INSTANTIATE_TEST_SUITE_P(Worlds, ExecutorContract,
                         ::testing::Values(Make<Pool>("Pool"), Make<PoolWorld<1, 1, 0>>("PoolOfOne"),
                                           Make<PoolWorld<3, 1, 0>>("PoolThatSleepsAtOnce"),
                                           Make<ManualWorld>("Manual"), Make<Decorated<Pool>>("FaultyPool"),
                                           Make<Decorated<ManualWorld>>("FaultyManual"),
                                           Make<Reordered<Pool>>("ReorderedPool"),
                                           Make<Reordered<ManualWorld>>("ReorderedManual")),
                         ExecutorWorldName);

// A gate that threads wait at: no test sleeps.
class Gate {
 public:
  void Open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    cv_.notify_all();
  }
  void Wait() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    cv_.notify_all();
    cv_.wait(lock, [&] { return open_; });
  }
  void WaitForArrivals(int count) {
    std::unique_lock lock(mutex_);
    cv_.wait(lock, [&] { return waiting_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable cv_;
  bool open_ = false;
  int waiting_ = 0;
};

// --- ThreadPool ---

TEST(ThreadPoolTest, RefusesOptionsThatMakeNoSense) {
  EXPECT_STATUS(StatusCode::kInvalid, "loop_threads=-1", ThreadPool::Create({-1, 1, 1, 0}));
  EXPECT_STATUS(StatusCode::kInvalid, "loop_threads=1025", ThreadPool::Create({1025, 1, 1, 0}));
  EXPECT_STATUS(StatusCode::kInvalid, "job_threads=0", ThreadPool::Create({1, 0, 1, 0}));
  EXPECT_STATUS(StatusCode::kInvalid, "max_queued_jobs=0", ThreadPool::Create({1, 1, 0, 0}));
  EXPECT_STATUS(StatusCode::kInvalid, "spin_iterations=-1", ThreadPool::Create({1, 1, 1, -1}));
}

TEST(ThreadPoolTest, HasTheThreadsItWasAskedFor) {
  EXPECT_EQ(MakePool(1, 1)->concurrency(), 1);
  EXPECT_EQ(MakePool(5, 1)->concurrency(), 5);
  EXPECT_EQ(MakePool(0, 1)->concurrency(), std::max(1u, std::thread::hardware_concurrency()));
}

TEST(ThreadPoolTest, ALoopUsesItsThreads) {
  // Three bodies that wait for each other end only if three threads run them.
  auto pool = MakePool(3, 1);
  for (int round = 0; round < 50; ++round) {
    std::atomic<int> arrived{0};
    pool->ParallelFor(3, [&](int64_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 3) std::this_thread::yield();
    });
    EXPECT_EQ(arrived.load(), 3);
  }
}

TEST(ThreadPoolTest, WorkersThatSleepAreWoken) {
  auto pool = MakePool(3, 1, /*spin_iterations=*/0);
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> arrived{0};
    pool->ParallelFor(3, [&](int64_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 3) std::this_thread::yield();
    });
  }
}

TEST(ThreadPoolTest, ACallerThatSleepsIsWoken) {
  // The worker holds the last body for as long as the caller needs to give up spinning.
  auto pool = MakePool(2, 1, /*spin_iterations=*/0);
  const std::thread::id caller = std::this_thread::get_id();
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> arrived{0};
    std::atomic<uint64_t> sum{0};
    pool->ParallelFor(2, [&](int64_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 2) std::this_thread::yield();
      if (std::this_thread::get_id() == caller) return;
      for (uint64_t i = 0; i < 20'000; ++i) sum.fetch_add(i, std::memory_order_relaxed);
    });
    EXPECT_EQ(sum.load(), uint64_t{20'000} * 19'999 / 2);
  }
}

TEST(ThreadPoolTest, ALoopDoesNotWaitForWorkersThatNeverBegan) {
  // The pool's only worker is held by a body of another thread's loop; this thread's loops go on.
  auto pool = MakePool(2, 1);
  Gate gate;
  std::thread holder([&] { pool->ParallelFor(2, [&](int64_t) { gate.Wait(); }); });
  gate.WaitForArrivals(2);
  for (int loop = 0; loop < 100; ++loop) {
    int64_t sum = 0;  // plain: the loop runs here alone
    pool->ParallelFor(4, [&](int64_t i) { sum += i; });
    ASSERT_EQ(sum, 6);
  }
  gate.Open();
  holder.join();
}

TEST(ThreadPoolTest, ManySmallLoopsUnderContention) {
  // More loop threads than CPUs, jobs beside them, another thread with loops of its own: sums stay right.
  auto pool = MakePool(6, 2, 500);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> jobs{0}, other_loops{0}, wrong{0};
  std::thread poster([&] {
    while (!stop) {
      if (!pool->Post([&] { ++jobs; }).ok()) std::this_thread::yield();
    }
  });
  std::thread other([&] {
    while (!stop) {
      std::atomic<int64_t> sum{0};
      pool->ParallelFor(3, [&](int64_t i) { sum += i; });
      wrong += sum != 3;
      ++other_loops;
    }
  });
  for (int64_t loop = 0; loop < 5000 || jobs < 500 || other_loops < 500; ++loop) {
    const int64_t count = 2 + loop % 5;
    std::atomic<int64_t> sum{0};
    pool->ParallelFor(count, [&](int64_t i) { sum += i + loop; });
    wrong += sum != count * (count - 1) / 2 + count * loop;
  }
  stop = true;
  poster.join();
  other.join();
  pool->Drain();
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadPoolTest, RefusesJobsWhenTheQueueIsFull) {
  auto pool = MakePool(1, 1, 0, /*queue=*/3);
  Gate gate;
  std::atomic<int> runs{0};
  ASSERT_OK(pool->Post([&] { gate.Wait(); }));
  gate.WaitForArrivals(1);  // the thread is taken, the queue empty
  for (int i = 0; i < 3; ++i) ASSERT_OK(pool->Post([&] { runs.fetch_add(1); }));
  EXPECT_STATUS(StatusCode::kBusy, "queue full (3)", pool->Post([&] { runs.fetch_add(100); }));
  // Loops do not need the job thread.
  std::atomic<int> bodies{0};
  pool->ParallelFor(10, [&](int64_t) { bodies.fetch_add(1); });
  EXPECT_EQ(bodies.load(), 10);
  gate.Open();
  pool->Drain();
  EXPECT_EQ(runs.load(), 3);
  EXPECT_OK(pool->Post([] {}));
}

TEST(ThreadPoolTest, EndingRunsWhatIsQueued) {
  std::atomic<int> runs{0};
  {
    auto pool = MakePool(2, 1);
    Gate gate;
    ASSERT_OK(pool->Post([&] { gate.Wait(); }));
    gate.WaitForArrivals(1);
    for (int i = 0; i < 50; ++i) ASSERT_OK(pool->Post([&] { runs.fetch_add(1); }));
    gate.Open();
  }
  EXPECT_EQ(runs.load(), 50);
}

TEST(ThreadPoolTest, JobsOfSeveralThreadsRunAtOnce) {
  auto pool = MakePool(1, 3);
  std::atomic<int> arrived{0};
  for (int i = 0; i < 3; ++i) {
    ASSERT_OK(pool->Post([&] {
      arrived.fetch_add(1);
      while (arrived.load() < 3) std::this_thread::yield();
    }));
  }
  pool->Drain();
  EXPECT_EQ(arrived.load(), 3);
}

// --- ManualExecutor ---

TEST(ManualExecutorTest, RunsJobsWhenAndInTheOrderTheTestSays) {
  ManualExecutor executor;
  std::vector<int> order;
  for (int i = 0; i < 4; ++i) ASSERT_OK(executor.Post([&order, i] { order.push_back(i); }));
  EXPECT_EQ(executor.queued(), 4u);
  EXPECT_TRUE(order.empty());
  EXPECT_TRUE(executor.RunAt(2));
  EXPECT_TRUE(executor.RunNext());
  EXPECT_FALSE(executor.RunAt(2));
  EXPECT_EQ(order, (std::vector<int>{2, 0}));
  executor.Drain();
  EXPECT_EQ(order, (std::vector<int>{2, 0, 1, 3}));
  EXPECT_FALSE(executor.RunNext());
  EXPECT_EQ(executor.queued(), 0u);
}

TEST(ManualExecutorTest, RefusesWhatDoesNotFit) {
  ManualExecutor executor(/*max_queued_jobs=*/2);
  ASSERT_OK(executor.Post([] {}));
  ASSERT_OK(executor.Post([] {}));
  EXPECT_STATUS(StatusCode::kBusy, "queue full", executor.Post([] {}));
  executor.RunNext();
  EXPECT_OK(executor.Post([] {}));
}

TEST(ManualExecutorTest, LoopsRunInOrder) {
  ManualExecutor executor;
  std::vector<int64_t> order;
  executor.ParallelFor(5, [&](int64_t i) { order.push_back(i); });
  EXPECT_EQ(order, (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(executor.concurrency(), 1);
}

// --- the decorator ---

TEST(FaultyExecutorTest, RefusesThePostItWasToldTo) {
  ManualExecutor base;
  FaultyExecutor executor(&base);
  executor.RefusePost(2, 1);
  EXPECT_OK(executor.Post([] {}));
  EXPECT_STATUS(StatusCode::kBusy, "refused", executor.Post([] { ADD_FAILURE(); }));
  EXPECT_STATUS(StatusCode::kBusy, "refused", executor.Post([] { ADD_FAILURE(); }));
  EXPECT_OK(executor.Post([] {}));
  EXPECT_EQ(base.queued(), 2u);
  EXPECT_EQ(executor.refused(), 2);
  executor.Drain();
}

TEST(FaultyExecutorTest, HoldsJobsBackAndReordersThem) {
  ManualExecutor base;
  FaultyExecutor executor(&base);
  executor.Hold(/*seed=*/3);
  std::vector<int> order, posted(20);
  std::iota(posted.begin(), posted.end(), 0);
  for (const int i : posted) ASSERT_OK(executor.Post([&order, i] { order.push_back(i); }));
  base.Drain();
  EXPECT_TRUE(order.empty());
  EXPECT_EQ(executor.held(), 20u);
  executor.LetGo();
  base.Drain();
  EXPECT_NE(order, posted);
  std::sort(order.begin(), order.end());
  EXPECT_EQ(order, posted);
  // And forwards again.
  ASSERT_OK(executor.Post([] {}));
  EXPECT_EQ(base.queued(), 1u);
  base.Drain();
}

TEST(FaultyExecutorTest, ShufflesLoops) {
  ManualExecutor base;
  FaultyExecutor executor(&base);
  executor.ShuffleLoops(/*seed=*/5);
  std::vector<int64_t> order, sorted(30);
  std::iota(sorted.begin(), sorted.end(), 0);
  executor.ParallelFor(30, [&](int64_t i) { order.push_back(i); });
  EXPECT_NE(order, sorted);
  std::sort(order.begin(), order.end());
  EXPECT_EQ(order, sorted);
}

}  // namespace
}  // namespace prehoc
