// The other seams with faults of a plan: background jobs, copies, device memory, time.
#pragma once
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/device_memory.h"
#include "base/executor.h"
#include "base/mutex.h"
#include "integrations/torture/fault_plan.h"
#include "transfer/transfer_engine.h"

namespace prehoc::torture {

// Jobs are refused, or held back and let go in another order when a later one comes. What is still held runs at Drain() and
// at the end.
class FaultyJobs final : public Executor {
 public:
  FaultyJobs(Executor* base, FaultPlan* plan, double rate) : base_(base), plan_(plan), rate_(rate) {}
  ~FaultyJobs() override { LetGo(); }

 private:
  Status DoPost(std::function<void()> job) override;
  void DoParallelFor(int64_t count, LoopBody body) override { base_->ParallelFor(count, body); }
  void DoDrain() override;
  int DoConcurrency() const override { return base_->concurrency(); }
  void LetGo();

  Executor* const base_;
  FaultPlan* const plan_;
  const double rate_;
  Mutex mutex_;
  std::vector<std::function<void()>> held_ PREHOC_GUARDED_BY(mutex_);
};

class FaultyCopies final : public TransferEngine {
 public:
  FaultyCopies(TransferEngine* base, FaultPlan* plan, double rate) : base_(base), plan_(plan), rate_(rate) {}

 private:
  class HalfCopy;
  Result<std::unique_ptr<Operation>> DoPost(std::span<const TransferPiece> pieces) override;
  void DoVisitCounters(const CounterVisitor& visit) const override { base_->VisitCounters(visit); }

  TransferEngine* const base_;
  FaultPlan* const plan_;
  const double rate_;
};

class FaultyDevice final : public DeviceMemory {
 public:
  FaultyDevice(DeviceMemory* base, FaultPlan* plan, double rate) : DeviceMemory(base->budget()), base_(base), plan_(plan), rate_(rate) {}

 private:
  Result<std::byte*> DoAllocate(size_t size) override;
  void DoFree(std::byte* data, size_t size) override;

  DeviceMemory* const base_;
  FaultPlan* const plan_;
  const double rate_;
  Mutex buffers_mutex_;
  std::map<std::byte*, DeviceBuffer> buffers_ PREHOC_GUARDED_BY(buffers_mutex_);
};

class LeapingClock final : public Clock {
 public:
  LeapingClock(const Clock* base, FaultPlan* plan, double rate) : base_(base), plan_(plan), rate_(rate) {}

 private:
  int64_t DoNowNanos() const override;

  const Clock* const base_;
  FaultPlan* const plan_;
  const double rate_;
  mutable std::atomic<int64_t> offset_{0};
};

}  // namespace prehoc::torture
