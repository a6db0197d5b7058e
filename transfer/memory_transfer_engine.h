// Host-to-host copies on an executor: the CPU build's transfer engine, and the twin of the GPU's.
#pragma once
#include <atomic>
#include <cstdint>

#include "base/executor.h"
#include "transfer/transfer_engine.h"

namespace prehoc {

// A posted batch runs as one job. Whoever waits for a batch that no thread has begun copies it itself, so waiting
// needs no free thread. Without an executor, or when it refuses the job, Post() copies before it returns (counted).
class MemoryTransferEngine final : public TransferEngine {
 public:
  // `executor` may be null; otherwise it outlives the engine.
  explicit MemoryTransferEngine(Executor* executor) : executor_(executor) {}

 private:
  class CopyOperation;
  Result<std::unique_ptr<Operation>> DoPost(std::span<const TransferPiece> pieces) override;
  void DoVisitCounters(const CounterVisitor& visit) const override;

  Executor* const executor_;
  // Statistics only: nothing is ordered by them.
  std::atomic<uint64_t> requests_{0}, pieces_{0}, bytes_{0}, inline_{0};
};

}  // namespace prehoc
