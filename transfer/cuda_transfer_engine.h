// Copies between pinned host memory and the device on a stream of their own: the GPU's transfer engine.
#pragma once
#include <cstdint>
#include <memory>

#include "base/clock.h"
#include "transfer/transfer_engine.h"
#include "transfer/transfer_speed.h"

namespace prehoc {

// Pieces of one size (a multiple of 64 bytes) below Options::copy_engine_bytes that lie in pinned or device memory go in one launch of a gather kernel,
// which reads them where they lie; all others one by one through the copy engine, which also takes pageable memory (and then Post() may wait for it). Nothing on other streams
// orders the copies: the caller waits for who writes a source, and uses a destination once the request is done.
class CudaTransferEngine final : public TransferEngine {
 public:
  struct Options {
    // From here on the copy engine is as fast as a kernel, and takes no multiprocessor. On an H200 it starts 0.3 million copies a second, and a
    // kernel reads scattered pieces of 2 KiB at 51 GB/s (bench/results/h200/, transfer).
    size_t copy_engine_bytes = size_t{256} << 10;
  };
  // Of the current device. Returns kNotFound, kUnsupported or kCuda.
  static Result<std::unique_ptr<CudaTransferEngine>> Create() { return Create(Options()); }
  static Result<std::unique_ptr<CudaTransferEngine>> Create(const Options& options);

  // Both ways over pieces of 4 KiB to 1 MiB between pinned memory and the current device, 16 MiB of each.
  // Returns kNotFound, kUnsupported, kCuda or kOutOfSpace.
  struct Calibration {
    std::vector<PieceRate> rates;  // few: the copy engine; many: the gather kernel
    Options options;               // copy_engine_bytes as measured; the default if that is beyond every size
  };
  static Result<Calibration> Calibrate(const Clock& clock);

  const Options& options() const;
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
