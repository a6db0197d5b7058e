// An Executor that refuses, delays and reorders on request, over any implementation.
#pragma once
#include <algorithm>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "base/executor.h"
#include "base/mutex.h"
#include "base/rng.h"

namespace prehoc {

// Without faults it only forwards. Safe from any thread. Jobs that are held run, at the latest, in Drain() or when this
// dies, as jobs of any executor do.
class FaultyExecutor final : public Executor {
 public:
  explicit FaultyExecutor(Executor* base) : base_(base) {}
  ~FaultyExecutor() override { LetGo(); }

  // The n-th Post() from now on, and `more` after it, return kBusy.
  void RefusePost(int nth, int more = 0) {
    MutexLock lock(mutex_);
    refuse_from_ = posts_ + nth;
    refuse_to_ = refuse_from_ + more;
  }
  // Jobs posted from now on wait until LetGo() or Drain(), which hands them over in an order of this seed.
  void Hold(uint64_t seed) {
    MutexLock lock(mutex_);
    order_.emplace(seed);
  }
  void LetGo() {
    while (ReleaseHeld()) {
    }
  }
  // Loops run their bodies on the caller, in an order of this seed.
  void ShuffleLoops(uint64_t seed) {
    MutexLock lock(mutex_);
    loops_.emplace(seed);
  }
  int refused() const {
    MutexLock lock(mutex_);
    return refused_;
  }
  size_t held() const {
    MutexLock lock(mutex_);
    return held_.size();
  }

 private:
  Status DoPost(std::function<void()> job) override {
    {
      MutexLock lock(mutex_);
      ++posts_;
      if (posts_ >= refuse_from_ && posts_ <= refuse_to_) {
        ++refused_;
        return {StatusCode::kBusy, "refused on request"};
      }
      if (order_) {
        held_.push_back(std::move(job));
        return {};
      }
    }
    return base_->Post(std::move(job));
  }
  void DoParallelFor(int64_t count, LoopBody body) override {
    std::vector<int64_t> order;
    {
      MutexLock lock(mutex_);
      if (loops_) {
        for (int64_t i = 0; i < count; ++i) order.push_back(i);
        loops_->Shuffle(order);
      }
    }
    if (order.empty()) return base_->ParallelFor(count, body);
    for (const int64_t i : order) body(i);
  }
  void DoDrain() override {
    do {
      base_->Drain();
    } while (ReleaseHeld());
  }
  int DoConcurrency() const override { return base_->concurrency(); }

  // Hands over what is held, in a random order; a job that the base refuses runs here. False if there was nothing.
  bool ReleaseHeld() {
    std::vector<std::function<void()>> jobs;
    {
      MutexLock lock(mutex_);
      jobs.swap(held_);
      if (order_) order_->Shuffle(jobs);
      if (jobs.empty()) order_.reset();
    }
    for (auto& job : jobs) {
      if (!base_->Post(job).ok()) job();
    }
    const bool any = !jobs.empty();
    jobs.clear();
    return any;
  }

  Executor* const base_;
  mutable Mutex mutex_;
  int posts_ PREHOC_GUARDED_BY(mutex_) = 0;
  int refuse_from_ PREHOC_GUARDED_BY(mutex_) = 0;
  int refuse_to_ PREHOC_GUARDED_BY(mutex_) = -1;
  int refused_ PREHOC_GUARDED_BY(mutex_) = 0;
  std::optional<Rng> order_ PREHOC_GUARDED_BY(mutex_);  // set while jobs are held
  std::optional<Rng> loops_ PREHOC_GUARDED_BY(mutex_);
  std::vector<std::function<void()>> held_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc
