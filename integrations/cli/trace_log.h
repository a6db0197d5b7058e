// The spans of one run, kept in memory, as a Chrome trace: chrome://tracing and https://ui.perfetto.dev show it.
#pragma once
#include <cstddef>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/trace.h"

namespace prehoc::cli {

// Safe from any thread. Time begins with this.
class TraceLog final : public Tracer {
 public:
  // What comes after `max_spans` (about 120 bytes each) is counted and left out.
  explicit TraceLog(const Clock* clock, size_t max_spans = size_t{1} << 20);
  void OnSpan(const TraceSpan& span) override;

  // JSON object format of the Trace Event Format: complete events ("ph":"X") in microseconds, one thread id for each thread in
  // the order of their first span, and `otherData.dropped_spans`.
  std::string Json() const;

 private:
  struct Kept {
    TraceSpan span;
    int thread;
  };
  const int64_t start_;
  const size_t max_spans_;
  mutable Mutex mutex_;
  std::map<std::thread::id, int> threads_ PREHOC_GUARDED_BY(mutex_);
  std::vector<Kept> spans_ PREHOC_GUARDED_BY(mutex_);
  size_t dropped_ PREHOC_GUARDED_BY(mutex_) = 0;
};

}  // namespace prehoc::cli
