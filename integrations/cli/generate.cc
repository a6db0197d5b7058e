#include "integrations/cli/generate.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "base/check.h"

namespace prehoc::cli {
namespace {

class Generation {
 public:
  Generation(const GenerateRequest& request, const Forward& forward, const GenerateHooks& hooks, const Clock& clock)
      : request_(request), forward_(forward), hooks_(hooks), clock_(clock), logits_(static_cast<size_t>(request.vocab)) {}

  Result<Generated> Run() {
    PREHOC_RETURN_IF_ERROR(Prefill());
    if (result_.stop != StopReason::kInterrupted) PREHOC_RETURN_IF_ERROR(Decode());
    return std::move(result_);
  }

 private:
  bool Interrupted() {
    if (!hooks_.stop_requested || !hooks_.stop_requested()) return false;
    result_.stop = StopReason::kInterrupted;
    return true;
  }

  Status Prefill() {
    const int64_t start = clock_.NowNanos();
    const auto total = static_cast<int64_t>(request_.prompt.size());
    for (int64_t done = request_.restored; done < total;) {
      if (Interrupted()) break;
      const int64_t end = std::min(total, (done / request_.piece_tokens + 1) * request_.piece_tokens);
      const auto piece = request_.prompt.subspan(static_cast<size_t>(done), static_cast<size_t>(end - done));
      PREHOC_RETURN_IF_ERROR(forward_(piece, total, end == total ? std::span<float>(logits_) : std::span<float>()));
      result_.prefill_tokens += end - done;
      done = end;
      if (hooks_.on_prefill) hooks_.on_prefill(done);
    }
    result_.prefill_seconds = clock_.SecondsSince(start);
    return {};
  }

  // Takes a decision from the logits; true if the answer goes on.
  Result<bool> Decide() {
    if (hooks_.on_logits) hooks_.on_logits(logits_);
    const int32_t own = MostLikely(logits_);
    if (std::isnan(logits_[static_cast<size_t>(own)])) {
      return Status(StatusCode::kCorrupt, "decision " + std::to_string(result_.decisions.size() + 1) +
                                              ": no logit is a number. Some K or V of the prompt may be beyond its format: fp16 has 65,504, --rows e4m3 464");
    }
    result_.decisions.push_back(own);
    const size_t count = result_.decisions.size();
    if (!request_.forced.empty()) {
      next_ = request_.forced[count - 1];
      ++result_.answer_tokens;
      return count < request_.forced.size();
    }
    next_ = own;
    if (hooks_.is_end && hooks_.is_end(own)) {
      result_.stop = StopReason::kEnd;
      return false;
    }
    ++result_.answer_tokens;
    if (hooks_.on_token) PREHOC_RETURN_IF_ERROR(hooks_.on_token(own));
    return static_cast<int64_t>(count) < request_.max_new_tokens;
  }

  Status Decode() {
    PREHOC_ASSIGN_OR_RETURN(bool more, Decide());
    while (more && !Interrupted()) {
      const int64_t start = clock_.NowNanos();
      PREHOC_RETURN_IF_ERROR(forward_(std::span<const int32_t>(&next_, 1), 0, logits_));
      result_.decode_seconds += clock_.SecondsSince(start);
      ++result_.decode_steps;
      PREHOC_ASSIGN_OR_RETURN(more, Decide());
    }
    return {};
  }

  const GenerateRequest& request_;
  const Forward& forward_;
  const GenerateHooks& hooks_;
  const Clock& clock_;
  std::vector<float> logits_;
  int32_t next_ = 0;
  Generated result_;
};

}  // namespace

const char* StopReasonName(StopReason reason) {
  switch (reason) {
    case StopReason::kEnd: return "end";
    case StopReason::kLimit: return "limit";
    case StopReason::kInterrupted: return "interrupted";
  }
  return "unknown";
}

int32_t MostLikely(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best] || (std::isnan(logits[best]) && !std::isnan(logits[i]))) best = i;
  }
  return static_cast<int32_t>(best);
}

Result<Generated> Generate(const GenerateRequest& request, const Forward& forward, const GenerateHooks& hooks,
                           const Clock& clock) {
  PREHOC_CHECK(request.restored < static_cast<int64_t>(request.prompt.size()));
  PREHOC_CHECK(request.max_new_tokens > 0 && request.vocab > 0 && request.piece_tokens > 0);
  return Generation(request, forward, hooks, clock).Run();
}

}  // namespace prehoc::cli
