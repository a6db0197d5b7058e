// Copies between pinned host memory and the device on a stream of their own: the GPU's transfer engine.
#pragma once
#include <cstdint>
#include <memory>

#include "transfer/transfer_engine.h"

namespace prehoc {

// Pieces of one size below 256 KiB (a multiple of 64 bytes) that lie in pinned or device memory go in one launch of a gather kernel, which reads
// them where they lie; all others one by one through the copy engine, which also takes pageable memory (and then Post() may wait for it). Nothing on other streams
// orders the copies: the caller waits for who writes a source, and uses a destination once the request is done.
class CudaTransferEngine final : public TransferEngine {
 public:
  // Of the current device. Returns kNotFound, kUnsupported or kCuda.
  static Result<std::unique_ptr<CudaTransferEngine>> Create();
  ~CudaTransferEngine() override;

 private:
  struct Impl;
  class CopyOperation;
  explicit CudaTransferEngine(std::shared_ptr<Impl> impl);
  Result<std::unique_ptr<Operation>> DoPost(std::span<const TransferPiece> pieces) override;
  void DoVisitCounters(const CounterVisitor& visit) const override;
  const std::shared_ptr<Impl> impl_;
};

}  // namespace prehoc
