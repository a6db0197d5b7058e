// One run as spans of time: what was done when, and for how long. Switched off, a span costs the test of a pointer.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/clock.h"

namespace prehoc {

// Only a string literal becomes one, so that nothing of a prompt, key or path can get into a trace.
class TraceWord {
 public:
  consteval TraceWord(const char* literal) : text_(literal) {}  // NOLINT: implicit on purpose
  const char* text() const { return text_; }

 private:
  const char* text_;
};

struct TraceSpan {
  static constexpr size_t kMaxArgs = 4;
  struct Arg {
    const char* name;
    int64_t value;
  };
  const char* name = nullptr;
  int64_t begin_nanos = 0, end_nanos = 0;  // of Tracer::NowNanos()
  std::array<Arg, kMaxArgs> args;  // the first num_args
  size_t num_args = 0;
};

// Told of every span when it ends: inner ones first, from whichever thread it was in.
class Tracer {
 public:
  explicit Tracer(const Clock* clock) : clock_(clock) {}  // outlives this
  virtual ~Tracer() = default;
  int64_t NowNanos() const { return clock_->NowNanos(); }
  virtual void OnSpan(const TraceSpan& span) = 0;  // safe from any thread; must be quick, and throw nothing

 private:
  const Clock* const clock_;
};

// A span from here to the end of the scope; nothing where `tracer` is null.
class TraceScope {
 public:
  TraceScope(Tracer* tracer, TraceWord name) : tracer_(tracer) {
    if (tracer_ == nullptr) return;
    span_.name = name.text();
    span_.begin_nanos = tracer_->NowNanos();
  }
  ~TraceScope() {
    if (tracer_ == nullptr) return;
    span_.end_nanos = tracer_->NowNanos();
    tracer_->OnSpan(span_);
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

  // What is said beyond kMaxArgs is left out.
  TraceScope& Say(TraceWord name, int64_t value) {
    if (tracer_ != nullptr && span_.num_args < TraceSpan::kMaxArgs) span_.args[span_.num_args++] = {name.text(), value};
    return *this;
  }

 private:
  Tracer* const tracer_;
  TraceSpan span_;
};

}  // namespace prehoc
