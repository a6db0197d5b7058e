#include "transfer/cuda_transfer_engine.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/stream.h"
#include "base/mutex.h"
#include "kernels/cuda/run_kernels.h"

namespace prehoc {

struct CudaTransferEngine::Impl {
  Impl(CudaStream own_stream, const Options& own_options) : stream(std::move(own_stream)), options(own_options) {}
  const CudaStream stream;
  const Options options;
  mutable Mutex mutex;
  std::vector<CudaBytes> lists PREHOC_GUARDED_BY(mutex);  // pinned, not in use
  uint64_t requests PREHOC_GUARDED_BY(mutex) = 0, failed PREHOC_GUARDED_BY(mutex) = 0, pieces PREHOC_GUARDED_BY(mutex) = 0,
           bytes PREHOC_GUARDED_BY(mutex) = 0;

  // A pinned list of at least `size` bytes: making one waits for the device, so they are kept.
  Result<CudaBytes> TakeList(size_t size) {
    {
      MutexLock lock(mutex);
      const auto found = std::find_if(lists.begin(), lists.end(), [&](const CudaBytes& list) { return list.size() >= size; });
      if (found != lists.end()) {
        CudaBytes list = std::move(*found);
        std::swap(*found, lists.back());
        lists.pop_back();
        return list;
      }
    }
    return CudaBytes::Create(CudaPlace::kPinned, std::max<size_t>(size, size_t{1} << 16));
  }
  void GiveBack(CudaBytes list) {
    MutexLock lock(mutex);
    lists.push_back(std::move(list));
  }
};

// Done when the event behind its copies is.
class CudaTransferEngine::CopyOperation final : public TransferEngine::Operation {
 public:
  CopyOperation(std::shared_ptr<Impl> impl, CudaEvent event) : impl_(std::move(impl)), event_(std::move(event)) {}
  ~CopyOperation() override {
    if (list) impl_->GiveBack(std::move(*list));
  }
  Status Poll() override {
    if (!failed.ok()) return Finish(failed);
    const Result<bool> done = event_.Done();
    if (!done.ok()) return Finish(done.status());
    return *done ? OkStatus() : Status(StatusCode::kBusy, "transfer: under way");
  }
  Status Wait() override {
    const Status waited = event_.Synchronize();
    return Finish(failed.ok() ? waited : failed);
  }
  const CudaEvent& event() const { return event_; }
  std::optional<CudaBytes> list;
  Status failed;

 private:
  Status Finish(const Status& status) {
    if (!status.ok() && !counted_) {
      MutexLock lock(impl_->mutex);
      ++impl_->failed;
      counted_ = true;
    }
    return status;
  }
  const std::shared_ptr<Impl> impl_;
  CudaEvent event_;
  bool counted_ = false;
};

namespace {
constexpr size_t kMostRowBytes = 1024;  // that a kernel moves as one; larger pieces are several

bool Reachable(const std::byte* at) {
  cudaPointerAttributes attributes{};
  if (!CudaStatus(cudaPointerGetAttributes(&attributes, at), PREHOC_CUDA_HERE(cudaPointerGetAttributes)).ok()) return false;
  return attributes.type != cudaMemoryTypeUnregistered;
}
bool Aligned(const std::byte* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// Pieces of one size that a kernel can read and write, as rows of the size returned; 0 if they are not.
size_t RowBytesOf(std::span<const TransferPiece> pieces, size_t copy_engine_bytes) {
  if (pieces.empty()) return 0;
  const size_t bytes = pieces.front().bytes;
  if (bytes == 0 || bytes >= copy_engine_bytes || bytes % 64 != 0) return 0;
  size_t row = bytes <= kMostRowBytes ? bytes : kMostRowBytes;
  while (bytes % row != 0) row /= 2;
  const bool alike = std::all_of(pieces.begin(), pieces.end(), [&](const TransferPiece& piece) {
    return piece.bytes == bytes && Aligned(piece.src) && Aligned(piece.dst);
  });
  const bool reachable = alike && std::all_of(pieces.begin(), pieces.end(), [](const TransferPiece& p) { return Reachable(p.src) && Reachable(p.dst); });
  return reachable ? row : 0;
}
}  // namespace

CudaTransferEngine::CudaTransferEngine(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
CudaTransferEngine::~CudaTransferEngine() { impl_->stream.Synchronize().IgnoreError(); }

Result<std::unique_ptr<CudaTransferEngine>> CudaTransferEngine::Create(const Options& options) {
  PREHOC_RETURN_IF_ERROR(CurrentCudaDevice().status());
  PREHOC_ASSIGN_OR_RETURN(CudaStream stream, CudaStream::Create());
  return std::unique_ptr<CudaTransferEngine>(new CudaTransferEngine(std::make_shared<Impl>(std::move(stream), options)));
}

Result<CudaTransferEngine::Calibration> CudaTransferEngine::Calibrate(const Clock& clock) {
  constexpr size_t kBytes = size_t{16} << 20, kSizes[] = {size_t{4} << 10, size_t{16} << 10, size_t{64} << 10, size_t{256} << 10, size_t{1} << 20};
  PREHOC_ASSIGN_OR_RETURN(const auto copies, Create(Options{.copy_engine_bytes = 0}));
  PREHOC_ASSIGN_OR_RETURN(const auto kernel, Create(Options{.copy_engine_bytes = SIZE_MAX}));
  PREHOC_ASSIGN_OR_RETURN(const CudaBytes host, CudaBytes::Create(CudaPlace::kPinned, kBytes));
  PREHOC_ASSIGN_OR_RETURN(const CudaBytes device, CudaBytes::Create(CudaPlace::kDevice, kBytes));
  Calibration made;
  PREHOC_ASSIGN_OR_RETURN(made.rates, MeasurePieces(*copies, *kernel, {host.data(), kBytes}, {device.data(), kBytes}, kSizes, clock));
  if (const size_t from = FewFrom(made.rates); from != SIZE_MAX) made.options.copy_engine_bytes = from;
  return made;
}

const CudaTransferEngine::Options& CudaTransferEngine::options() const { return impl_->options; }

Result<std::unique_ptr<TransferEngine::Operation>> CudaTransferEngine::DoPost(std::span<const TransferPiece> pieces) {
  PREHOC_ASSIGN_OR_RETURN(CudaEvent event, CudaEvent::Create());
  auto operation = std::make_unique<CopyOperation>(impl_, std::move(event));
  uint64_t bytes = 0;
  for (const TransferPiece& piece : pieces) bytes += piece.bytes;
  const size_t row = RowBytesOf(pieces, impl_->options.copy_engine_bytes), num_rows = row == 0 ? 0 : pieces.size() * (pieces.front().bytes / row);
  if (row > 0 && num_rows <= std::numeric_limits<int32_t>::max()) {
    PREHOC_ASSIGN_OR_RETURN(CudaBytes list, impl_->TakeList(num_rows * sizeof(cuda::RowMove)));
    auto* move = reinterpret_cast<cuda::RowMove*>(list.data());
    const cuda::RowMove* const moves = move;
    for (const TransferPiece& piece : pieces) {
      for (size_t at = 0; at < piece.bytes; at += row) {
        *move++ = {piece.src + at, reinterpret_cast<Half*>(piece.dst + at)};
      }
    }
    operation->list.emplace(std::move(list));
    operation->failed = cuda::MoveRows(moves, static_cast<int32_t>(num_rows), static_cast<int32_t>(row / 4), impl_->stream.get());
  } else {
    for (const TransferPiece& piece : pieces) {
      if (piece.bytes == 0 || !operation->failed.ok()) continue;
      operation->failed = CudaStatus(cudaMemcpyAsync(piece.dst, piece.src, piece.bytes, cudaMemcpyDefault, impl_->stream.get()),
                                     PREHOC_CUDA_HERE(cudaMemcpyAsync));
    }
  }
  // Recorded after a failure, too: what was enqueued before it still runs.
  const Status recorded = operation->event().Record(impl_->stream.get());
  if (!recorded.ok()) {
    impl_->stream.Synchronize().IgnoreError();
    return recorded;
  }
  MutexLock lock(impl_->mutex);
  ++impl_->requests;
  impl_->pieces += pieces.size();
  impl_->bytes += bytes;
  return std::unique_ptr<Operation>(std::move(operation));
}

void CudaTransferEngine::DoVisitCounters(const CounterVisitor& visit) const {
  MutexLock lock(impl_->mutex);
  visit("transfer.requests", static_cast<double>(impl_->requests));
  visit("transfer.failed", static_cast<double>(impl_->failed));
  visit("transfer.pieces", static_cast<double>(impl_->pieces));
  visit("transfer.bytes", static_cast<double>(impl_->bytes));
  visit("transfer.inline", 0);
  visit("transfer.copy_engine_bytes", static_cast<double>(impl_->options.copy_engine_bytes));
}

}  // namespace prehoc
