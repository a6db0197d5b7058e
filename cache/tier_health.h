// Whether the store below the host tier is worth asking: a circuit breaker, and what reading and computing have cost so far.
#pragma once
#include <cstdint>

#include "base/clock.h"
#include "base/counters.h"
#include "base/mutex.h"
#include "base/status.h"

namespace prehoc {

// Safe from any thread; never waits.
//
//   closed --(`failures` in a row, or one deadline)--> open --(`backoff` has passed)--> half open: one request may try
//     ^                                                 ^                                   |
//     '---------------------(it succeeds)---------------+-----------(it fails: backoff x 2)-'
class TierHealth {
 public:
  struct Options {
    int32_t failures = 3;                         // in a row, of reads and writes together
    int64_t backoff_nanos = 1'000'000'000;        // the first; it doubles
    int64_t max_backoff_nanos = 60'000'000'000;
    int64_t probe_nanos = 10'000'000'000;         // a store that is too slow is tried again after that, by one chunk
    Status Validate() const;                      // kInvalid, naming the field and its value
  };
  explicit TierHealth(const Options& options, const Clock* clock) : options_(options), clock_(clock) {}

  // True if a request may go to the store now. After true in the half-open state nobody else may until its End().
  bool Begin();
  // What became of a request that Begin() allowed. Only errors of the store count: kIoError and kDeadline.
  void End(const Status& status);
  // True if Begin() would say yes; changes nothing.
  bool Available() const;

  // What was measured: blocks that came from the store for one prefix, while all of it waited; prompt tokens that were computed,
  // with the number of tokens before them.
  void OnRestore(int64_t blocks, int64_t nanos);
  void OnPrefill(int64_t first, int64_t tokens, int64_t nanos);
  // Predictions; negative as long as nothing was measured.
  double RestoreNanos(int64_t blocks) const;
  double PrefillNanos(int64_t first, int64_t tokens) const;

  // How many of `chunks` chunks to restore that need `blocks` reads of the store, in the place of computing `tokens` tokens after
  // `first`: all of them if that is predicted to be faster or one of both is not known yet; none if not; one if it is time to see
  // whether the store has become faster.
  int64_t WorthRestoring(int64_t chunks, int64_t blocks, int64_t first, int64_t tokens);

  // health.{state (0 closed, 1 open, 2 half open), opened, refused, failures, deadlines, bypassed_chunks, probes,
  // restore_nanos_per_block, prefill_nanos_per_token}
  void VisitCounters(const CounterVisitor& visit) const;

 private:
  enum class State : uint8_t { kClosed, kOpen, kHalfOpen };
  double PrefillNanosLocked(int64_t first, int64_t tokens) const PREHOC_REQUIRES(mutex_);

  const Options options_;
  const Clock* const clock_;
  mutable Mutex mutex_;
  State state_ PREHOC_GUARDED_BY(mutex_) = State::kClosed;
  bool trying_ PREHOC_GUARDED_BY(mutex_) = false;  // half open, and the one request is under way
  int32_t in_a_row_ PREHOC_GUARDED_BY(mutex_) = 0;
  int64_t backoff_ PREHOC_GUARDED_BY(mutex_) = 0;
  int64_t retry_at_ PREHOC_GUARDED_BY(mutex_) = 0;
  double block_nanos_ PREHOC_GUARDED_BY(mutex_) = -1;
  int64_t restored_at_ PREHOC_GUARDED_BY(mutex_) = 0;
  // Nanoseconds a token as a line over the position, by sums in which a measurement counts less with every later one.
  double weight_ PREHOC_GUARDED_BY(mutex_) = 0;
  double sum_x_ PREHOC_GUARDED_BY(mutex_) = 0, sum_y_ PREHOC_GUARDED_BY(mutex_) = 0;
  double sum_xx_ PREHOC_GUARDED_BY(mutex_) = 0, sum_xy_ PREHOC_GUARDED_BY(mutex_) = 0;
  uint64_t opened_ PREHOC_GUARDED_BY(mutex_) = 0, refused_ PREHOC_GUARDED_BY(mutex_) = 0, failures_ PREHOC_GUARDED_BY(mutex_) = 0;
  uint64_t deadlines_ PREHOC_GUARDED_BY(mutex_) = 0, bypassed_ PREHOC_GUARDED_BY(mutex_) = 0, probes_ PREHOC_GUARDED_BY(mutex_) = 0;
};

}  // namespace prehoc
