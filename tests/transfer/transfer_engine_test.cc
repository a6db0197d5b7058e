// The contract of TransferEngine, over every implementation, plain and behind its fault decorator; then what each adds.
#include "transfer/transfer_engine.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "base/executor.h"
#include "base/test_point.h"
#include "tests/contract/transfer_engine_contract.h"
#include "tests/fakes/faulty_executor.h"
#include "tests/fakes/faulty_transfer_engine.h"
#include "tests/support/status_matchers.h"
#include "transfer/memory_transfer_engine.h"

namespace prehoc {
namespace {

class PoolWorld final : public TransferEngineUnderTest {
 public:
  TransferEngine& engine() override { return engine_; }

 private:
  std::unique_ptr<ThreadPool> pool_ = ThreadPool::Create({.loop_threads = 1, .job_threads = 2}).value();
  MemoryTransferEngine engine_{pool_.get()};
};

class InlineWorld final : public TransferEngineUnderTest {
 public:
  TransferEngine& engine() override { return engine_; }

 private:
  MemoryTransferEngine engine_{nullptr};
};

class RefusingWorld final : public TransferEngineUnderTest {
 public:
  RefusingWorld() { executor_.RefusePost(1, 1 << 20); }
  TransferEngine& engine() override { return engine_; }

 private:
  ManualExecutor base_;
  FaultyExecutor executor_{&base_};
  MemoryTransferEngine engine_{&executor_};
};

template <class Base, int kLatePolls>
class Decorated final : public TransferEngineUnderTest {
 public:
  Decorated() { faulty_.CompleteLate(kLatePolls); }
  TransferEngine& engine() override { return faulty_; }

 private:
  Base base_;
  FaultyTransferEngine faulty_{&base_.engine()};
};

template <class World>
TransferEngineWorld Make(const char* name) {
  return {name, [] { return std::make_unique<World>(); }};
}

INSTANTIATE_TEST_SUITE_P(Worlds, TransferEngineContract,
                         ::testing::Values(Make<PoolWorld>("Pool"), Make<InlineWorld>("Inline"),
                                           Make<RefusingWorld>("Refusing"),
                                           Make<Decorated<PoolWorld, 0>>("FaultyPool"),
                                           Make<Decorated<PoolWorld, 7>>("LatePool"),
                                           Make<Decorated<InlineWorld, 3>>("LateInline")),
                         TransferEngineWorldName);

struct Copy {
  std::vector<std::byte> src = std::vector<std::byte>(100, std::byte{1});
  std::vector<std::byte> dst = std::vector<std::byte>(100, std::byte{2});
  std::vector<TransferPiece> Halves() { return {{src.data(), dst.data(), 50}, {src.data() + 50, dst.data() + 50, 50}}; }
};

double CounterOf(const TransferEngine& engine, std::string_view name) {
  double found = -1;
  engine.VisitCounters([&](std::string_view shown, double value) {
    if (shown == name) found = value;
  });
  return found;
}

TEST(MemoryTransferEngineTest, IsBusyUntilItsJobRan) {
  ManualExecutor executor;
  MemoryTransferEngine engine(&executor);
  Copy copy;
  auto request = engine.Prepare(copy.Halves());
  ASSERT_OK(request);
  ASSERT_OK(request->Post());
  EXPECT_EQ(request->Poll().code(), StatusCode::kBusy);
  EXPECT_STATUS(StatusCode::kBusy, "under way", request->Post());
  EXPECT_NE(copy.dst, copy.src);
  executor.RunNext();
  EXPECT_OK(request->Poll());
  EXPECT_EQ(copy.dst, copy.src);
  EXPECT_EQ(CounterOf(engine, "transfer.inline"), 0);
}

TEST(MemoryTransferEngineTest, WhoWaitsCopiesWhatNobodyBegan) {
  ManualExecutor executor;
  MemoryTransferEngine engine(&executor);
  Copy copy;
  {
    auto request = engine.Prepare(copy.Halves());
    ASSERT_OK(request);
    ASSERT_OK(request->Post());
    ASSERT_OK(request->Wait());
    EXPECT_EQ(copy.dst, copy.src);
  }
  // The job comes after the request died, and finds nothing to do.
  std::fill(copy.dst.begin(), copy.dst.end(), std::byte{9});
  EXPECT_EQ(executor.queued(), 1u);
  executor.Drain();
  EXPECT_EQ(copy.dst[0], std::byte{9});
}

TEST(MemoryTransferEngineTest, CountsCopiesThatNoThreadTook) {
  ManualExecutor full(/*max_queued_jobs=*/0);
  MemoryTransferEngine engine(&full);
  Copy copy;
  auto request = engine.Prepare(copy.Halves());
  ASSERT_OK(request);
  ASSERT_OK(request->Post());
  EXPECT_OK(request->Poll()) << "copied before Post() returned";
  EXPECT_EQ(CounterOf(engine, "transfer.inline"), 1);
}

#ifdef PREHOC_TEST_POINTS
TEST(MemoryTransferEngineTest, AWaiterWaitsForTheJobThatBegan) {
  auto pool = ThreadPool::Create({.loop_threads = 1}).value();
  MemoryTransferEngine engine(pool.get());
  Copy copy;
  std::atomic<bool> begun{false}, go{false};
  TestPointHook hook("memory_transfer.copy", [&] {
    begun = true;
    while (!go) std::this_thread::yield();
  });
  auto request = engine.Prepare(copy.Halves());
  ASSERT_OK(request);
  ASSERT_OK(request->Post());
  while (!begun) std::this_thread::yield();
  EXPECT_EQ(request->Poll().code(), StatusCode::kBusy);
  std::thread opener([&] { go = true; });
  EXPECT_OK(request->Wait());
  EXPECT_EQ(copy.dst, copy.src);
  opener.join();
}
#endif

// --- the decorator ---

TEST(FaultyTransferEngineTest, CompletesLate) {
  MemoryTransferEngine base(nullptr);
  FaultyTransferEngine engine(&base);
  engine.CompleteLate(2);
  Copy copy;
  auto request = engine.Prepare(copy.Halves());
  ASSERT_OK(request);
  ASSERT_OK(request->Post());
  EXPECT_STATUS(StatusCode::kBusy, "late", request->Poll());
  EXPECT_STATUS(StatusCode::kBusy, "still under way", request->Post());  // looks, too
  EXPECT_OK(request->Poll());
  ASSERT_OK(request->Post());
  EXPECT_OK(request->Wait()) << "waiting is not late";
}

TEST(FaultyTransferEngineTest, FailsHalfABatchAndGoesOn) {
  MemoryTransferEngine base(nullptr);
  FaultyTransferEngine engine(&base);
  engine.FailHalf(1, {StatusCode::kIoError, "the link broke"});
  Copy copy;
  auto request = engine.Prepare(copy.Halves());
  ASSERT_OK(request);
  ASSERT_OK(request->Post());
  EXPECT_STATUS(StatusCode::kIoError, "the link broke", request->Wait());
  EXPECT_STATUS(StatusCode::kIoError, "the link broke", request->Poll());
  EXPECT_EQ(copy.dst[49], std::byte{1});
  EXPECT_EQ(copy.dst[50], std::byte{2});
  EXPECT_EQ(CounterOf(engine, "transfer.failed"), 1);
  ASSERT_OK(request->Post());
  EXPECT_OK(request->Wait());
  EXPECT_EQ(copy.dst, copy.src);
}

TEST(FaultyTransferEngineTest, APostThatFailsLeavesTheRequestAsItWas) {
  MemoryTransferEngine base(nullptr);
  FaultyTransferEngine engine(&base);
  engine.FailPost(1, {StatusCode::kBusy, "no queue"});
  Copy copy;
  auto request = engine.Prepare(copy.Halves());
  ASSERT_OK(request);
  EXPECT_STATUS(StatusCode::kBusy, "no queue", request->Post());
  EXPECT_STATUS(StatusCode::kInvalid, "never posted", request->Poll());
  EXPECT_EQ(copy.dst[0], std::byte{2});
  ASSERT_OK(request->Post());
  EXPECT_OK(request->Wait());
}

}  // namespace
}  // namespace prehoc
