// The time seam. Everything that measures or waits asks a Clock.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace prehoc {

// Nanoseconds since some fixed point; never goes backwards in SteadyClock.
class Clock {
 public:
  virtual ~Clock() = default;
  int64_t NowNanos() const { return DoNowNanos(); }
  double SecondsSince(int64_t start_nanos) const {
    return static_cast<double>(NowNanos() - start_nanos) * 1e-9;
  }

 private:
  virtual int64_t DoNowNanos() const = 0;
};

class SteadyClock final : public Clock {
 public:
  static const SteadyClock& Get();

 private:
  int64_t DoNowNanos() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
};

// Time stands still until the test moves it. Safe from any thread.
class ManualClock final : public Clock {
 public:
  explicit ManualClock(int64_t start_nanos = 0) : now_(start_nanos) {}
  void Advance(int64_t nanos) { now_.fetch_add(nanos, std::memory_order_relaxed); }

 private:
  int64_t DoNowNanos() const override { return now_.load(std::memory_order_relaxed); }
  std::atomic<int64_t> now_;
};

}  // namespace prehoc
