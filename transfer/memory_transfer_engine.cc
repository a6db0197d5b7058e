#include "transfer/memory_transfer_engine.h"

#include <cstring>

#include "base/mutex.h"
#include "base/test_point.h"

namespace prehoc {
namespace {

// Shared by the request and by the job, which may come after the request died.
//   waiting --(job or waiter, whoever is first)--> copying --> done
struct Copy {
  enum class State : unsigned char { kWaiting, kCopying, kDone };
  std::span<const TransferPiece> pieces;  // the request's; valid until done, and not read after
  Mutex mutex;
  CondVar done_cv;
  State state PREHOC_GUARDED_BY(mutex) = State::kWaiting;

  void RunIfWaiting() {
    {
      MutexLock lock(mutex);
      if (state != State::kWaiting) return;
      state = State::kCopying;
    }
    PREHOC_TEST_POINT("memory_transfer.copy");
    for (const TransferPiece& piece : pieces) {
      if (piece.bytes > 0) std::memcpy(piece.dst, piece.src, piece.bytes);
    }
    MutexLock lock(mutex);
    state = State::kDone;
    done_cv.NotifyAll();
  }
};

}  // namespace

class MemoryTransferEngine::CopyOperation final : public TransferEngine::Operation {
 public:
  explicit CopyOperation(std::shared_ptr<Copy> copy) : copy_(std::move(copy)) {}
  Status Poll() override {
    MutexLock lock(copy_->mutex);
    if (copy_->state != Copy::State::kDone) return {StatusCode::kBusy, "transfer: under way"};
    return {};
  }
  Status Wait() override {
    copy_->RunIfWaiting();
    MutexLock lock(copy_->mutex);
    while (copy_->state != Copy::State::kDone) copy_->done_cv.Wait(copy_->mutex);
    return {};
  }

 private:
  std::shared_ptr<Copy> copy_;
};

Result<std::unique_ptr<TransferEngine::Operation>> MemoryTransferEngine::DoPost(std::span<const TransferPiece> pieces) {
  auto copy = std::make_shared<Copy>();
  copy->pieces = pieces;
  auto operation = std::make_unique<CopyOperation>(copy);  // before a job knows the pieces
  uint64_t bytes = 0;
  for (const TransferPiece& piece : pieces) bytes += piece.bytes;
  requests_.fetch_add(1, std::memory_order_relaxed);
  pieces_.fetch_add(pieces.size(), std::memory_order_relaxed);
  bytes_.fetch_add(bytes, std::memory_order_relaxed);
  if (executor_ == nullptr || !executor_->Post([copy] { copy->RunIfWaiting(); }).ok()) {
    inline_.fetch_add(1, std::memory_order_relaxed);
    copy->RunIfWaiting();
  }
  return std::unique_ptr<Operation>(std::move(operation));
}

void MemoryTransferEngine::DoVisitCounters(const CounterVisitor& visit) const {
  const auto show = [&](const char* name, const std::atomic<uint64_t>& value) {
    visit(name, static_cast<double>(value.load(std::memory_order_relaxed)));
  };
  show("transfer.requests", requests_);
  visit("transfer.failed", 0);
  show("transfer.pieces", pieces_);
  show("transfer.bytes", bytes_);
  show("transfer.inline", inline_);
}

}  // namespace prehoc
