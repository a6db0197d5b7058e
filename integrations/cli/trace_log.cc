#include "integrations/cli/trace_log.h"

#include <fmt/format.h>

#include <iterator>
#include <new>

namespace prehoc::cli {

TraceLog::TraceLog(const Clock* clock, size_t max_spans) : Tracer(clock), start_(clock->NowNanos()), max_spans_(max_spans) {
  MutexLock lock(mutex_);
  threads_.emplace(std::this_thread::get_id(), 1);
}

void TraceLog::OnSpan(const TraceSpan& span) {
  MutexLock lock(mutex_);
  if (spans_.size() >= max_spans_) {
    ++dropped_;
    return;
  }
  try {
    const auto [thread, fresh] = threads_.emplace(std::this_thread::get_id(), static_cast<int>(threads_.size()) + 1);
    spans_.push_back({span, thread->second});
  } catch (const std::bad_alloc&) {
    ++dropped_;
  }
}

// Names and argument names are literals of ours: nothing in them needs an escape.
std::string TraceLog::Json() const {
  MutexLock lock(mutex_);
  std::string text = "{\"displayTimeUnit\":\"ms\",\"otherData\":{\"dropped_spans\":" + std::to_string(dropped_) + "},\"traceEvents\":[\n";
  const auto out = std::back_inserter(text);
  for (const auto& [id, number] : threads_) {
    fmt::format_to(out, "{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":1,\"tid\":{},\"args\":{{\"name\":\"{}\"}}}},\n", number,
                   number == 1 ? "main" : fmt::format("worker {}", number - 1));
  }
  for (const Kept& kept : spans_) {
    const TraceSpan& span = kept.span;
    fmt::format_to(out, "{{\"ph\":\"X\",\"name\":\"{}\",\"pid\":1,\"tid\":{},\"ts\":{:.3f},\"dur\":{:.3f},\"args\":{{", span.name, kept.thread,
                   static_cast<double>(span.begin_nanos - start_) * 1e-3, static_cast<double>(span.end_nanos - span.begin_nanos) * 1e-3);
    for (size_t i = 0; i < span.num_args; ++i) {
      fmt::format_to(out, "{}\"{}\":{}", i > 0 ? "," : "", span.args[i].name, span.args[i].value);
    }
    text += "}},\n";
  }
  fmt::format_to(out, "{{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":1,\"args\":{{\"name\":\"prehoc\"}}}}\n]}}\n");
  return text;
}

}  // namespace prehoc::cli
