// A TransferEngine that completes late and fails half a batch on request, over any implementation.
#pragma once
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "transfer/transfer_engine.h"

namespace prehoc {

// Faults count posted batches from 1, after they were set; 0 = none. Without faults it only forwards. Safe from any
// thread.
class FaultyTransferEngine final : public TransferEngine {
 public:
  explicit FaultyTransferEngine(TransferEngine* base) : base_(base) {}

  // The n-th Post() itself fails: nothing is copied, the request stays as it was.
  void FailPost(int nth, Status with) {
    MutexLock lock(mutex_);
    fail_post_ = posts_ + nth;
    post_status_ = std::move(with);
  }
  // The n-th batch copies the first half of its pieces and then fails.
  void FailHalf(int nth, Status with) {
    MutexLock lock(mutex_);
    fail_half_ = posts_ + nth;
    half_status_ = std::move(with);
  }
  // Of every batch from now on, the first `polls` calls of Poll() say kBusy, whatever the copies do. Wait() is not
  // late.
  void CompleteLate(int polls) {
    MutexLock lock(mutex_);
    late_polls_ = polls;
  }
  int posts() const {
    MutexLock lock(mutex_);
    return posts_;
  }

 private:
  class LateOperation final : public Operation {
   public:
    LateOperation(TransferRequest request, int polls, Status with)
        : request_(std::move(request)), polls_(polls), with_(std::move(with)) {}
    Status Poll() override {
      if (polls_ > 0) {
        --polls_;
        return {StatusCode::kBusy, "late on request"};
      }
      return Outcome(request_.Poll());
    }
    Status Wait() override { return Outcome(request_.Wait()); }

   private:
    Status Outcome(Status below) const { return below.ok() ? with_ : below; }
    TransferRequest request_;
    int polls_;
    const Status with_;  // what is said once the copies are done
  };

  Result<std::unique_ptr<Operation>> DoPost(std::span<const TransferPiece> pieces) override {
    std::vector<TransferPiece> copied(pieces.begin(), pieces.end());
    Status with;
    int polls = 0;
    {
      MutexLock lock(mutex_);
      ++posts_;
      if (posts_ == fail_post_) return post_status_;
      if (posts_ == fail_half_) {
        with = half_status_;
        copied.resize(copied.size() / 2);
        ++failed_;
      }
      polls = late_polls_;
    }
    PREHOC_ASSIGN_OR_RETURN(TransferRequest request, base_->Prepare(std::move(copied)));
    PREHOC_RETURN_IF_ERROR(request.Post());
    return std::unique_ptr<Operation>(std::make_unique<LateOperation>(std::move(request), polls, std::move(with)));
  }
  void DoVisitCounters(const CounterVisitor& visit) const override {
    double failed = 0;
    {
      MutexLock lock(mutex_);
      failed = failed_;
    }
    base_->VisitCounters([&](std::string_view name, double value) {
      visit(name, name == "transfer.failed" ? value + failed : value);
    });
  }

  TransferEngine* const base_;
  mutable Mutex mutex_;
  int posts_ PREHOC_GUARDED_BY(mutex_) = 0;
  int failed_ PREHOC_GUARDED_BY(mutex_) = 0;
  int fail_post_ PREHOC_GUARDED_BY(mutex_) = 0;
  int fail_half_ PREHOC_GUARDED_BY(mutex_) = 0;
  int late_polls_ PREHOC_GUARDED_BY(mutex_) = 0;
  Status post_status_ PREHOC_GUARDED_BY(mutex_);
  Status half_status_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc
