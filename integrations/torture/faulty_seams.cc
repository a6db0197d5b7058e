#include "integrations/torture/faulty_seams.h"

namespace prehoc::torture {

Status FaultyJobs::DoPost(std::function<void()> job) {
  constexpr size_t kMostHeld = 16;
  if (plan_->Draw(Fault::kJobRefused, rate_)) {
    plan_->Injected(Fault::kJobRefused);
    return {StatusCode::kBusy, "the job was refused on purpose"};
  }
  std::function<void()> next = std::move(job);
  if (plan_->Draw(Fault::kJobLate, rate_)) {
    plan_->Injected(Fault::kJobLate);
    const uint64_t pick = plan_->Next();
    MutexLock lock(mutex_);
    held_.push_back(std::move(next));
    if (held_.size() < kMostHeld && pick % 2 == 0) return {};
    std::swap(held_[pick / 2 % held_.size()], held_.back());
    next = std::move(held_.back());
    held_.pop_back();
  }
  const Status taken = base_->Post(next);
  // It may be a job that was taken long ago.
  if (!taken.ok()) next();
  return {};
}

void FaultyJobs::LetGo() {
  std::vector<std::function<void()>> jobs;
  {
    MutexLock lock(mutex_);
    jobs.swap(held_);
  }
  for (auto& job : jobs) job();
}

void FaultyJobs::DoDrain() {
  base_->Drain();
  LetGo();
  base_->Drain();
}

class FaultyCopies::HalfCopy final : public Operation {
 public:
  explicit HalfCopy(TransferRequest request, Status with) : request_(std::move(request)), with_(std::move(with)) {}
  Status Poll() override { return Outcome(request_.Poll()); }
  Status Wait() override { return Outcome(request_.Wait()); }

 private:
  Status Outcome(const Status& below) const { return below.ok() ? with_ : below; }
  TransferRequest request_;
  const Status with_;
};

Result<std::unique_ptr<TransferEngine::Operation>> FaultyCopies::DoPost(std::span<const TransferPiece> pieces) {
  if (plan_->Draw(Fault::kCopyError, rate_)) {
    plan_->Injected(Fault::kCopyError);
    return {StatusCode::kIoError, "the copy failed on purpose"};
  }
  std::vector<TransferPiece> copied(pieces.begin(), pieces.end());
  Status with;
  if (plan_->Draw(Fault::kCopyHalf, rate_)) {
    plan_->Injected(Fault::kCopyHalf);
    copied.resize(copied.size() / 2);
    with = {StatusCode::kIoError, "the copy stopped halfway on purpose"};
  }
  PREHOC_ASSIGN_OR_RETURN(TransferRequest request, base_->Prepare(std::move(copied)));
  PREHOC_RETURN_IF_ERROR(request.Post());
  return std::unique_ptr<Operation>(std::make_unique<HalfCopy>(std::move(request), std::move(with)));
}

Result<std::byte*> FaultyDevice::DoAllocate(size_t size) {
  if (plan_->Draw(Fault::kDevice, rate_)) {
    plan_->Injected(Fault::kDevice);
    return {StatusCode::kOutOfSpace, "the device has no memory left, on purpose"};
  }
  PREHOC_ASSIGN_OR_RETURN(DeviceBuffer buffer, base_->Allocate(size, "torture"));
  std::byte* const data = buffer.data();
  MutexLock lock(buffers_mutex_);
  buffers_.emplace(data, std::move(buffer));
  return data;
}

void FaultyDevice::DoFree(std::byte* data, size_t) {
  DeviceBuffer freed;
  MutexLock lock(buffers_mutex_);
  const auto found = buffers_.find(data);
  freed = std::move(found->second);
  buffers_.erase(found);
}

int64_t LeapingClock::DoNowNanos() const {
  if (plan_->Draw(Fault::kClock, rate_)) {
    plan_->Injected(Fault::kClock);
    offset_.fetch_add(static_cast<int64_t>(plan_->Next() % 10'000'000'000u), std::memory_order_relaxed);
  }
  return base_->NowNanos() + offset_.load(std::memory_order_relaxed);
}

}  // namespace prehoc::torture
