// A Clock that stalls and jumps on request, over any implementation.
#pragma once
#include <algorithm>

#include "base/clock.h"
#include "base/mutex.h"

namespace prehoc {

// As a process sees time that was stopped, or moved to another machine: it may stand still and leap ahead, but, as
// every Clock, never goes back. Without faults it only forwards. Safe from any thread.
class FaultyClock final : public Clock {
 public:
  explicit FaultyClock(const Clock* base) : base_(base) {}

  // Time stands still until Resume(), which goes on from there: what passed meanwhile never happened.
  void Stall() {
    MutexLock lock(mutex_);
    if (!stalled_) last_ = std::max(last_, base_->NowNanos() + offset_);
    stalled_ = true;
  }
  void Resume() {
    MutexLock lock(mutex_);
    if (stalled_) offset_ = last_ - base_->NowNanos();
    stalled_ = false;
  }
  // Leaps ahead, also while stalled. Requires nanos >= 0.
  void Jump(int64_t nanos) {
    MutexLock lock(mutex_);
    if (stalled_) last_ += nanos;
    offset_ += nanos;
  }

 private:
  int64_t DoNowNanos() const override {
    MutexLock lock(mutex_);
    if (!stalled_) last_ = std::max(last_, base_->NowNanos() + offset_);
    return last_;
  }

  const Clock* const base_;
  mutable Mutex mutex_;
  bool stalled_ PREHOC_GUARDED_BY(mutex_) = false;
  int64_t offset_ PREHOC_GUARDED_BY(mutex_) = 0;
  mutable int64_t last_ PREHOC_GUARDED_BY(mutex_) = INT64_MIN;  // the latest time that was told
};

}  // namespace prehoc
