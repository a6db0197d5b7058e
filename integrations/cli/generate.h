// Greedy decoding over anything that turns tokens into logits; knows neither model nor cache.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/result.h"

namespace prehoc::cli {

// Runs `tokens`, which follow what was run before, and fills `logits` [vocab] of the last one (empty: not wanted).
// `prompt_tokens` is the whole prompt's length during prefill, 0 in decode.
using Forward = std::function<Status(std::span<const int32_t> tokens, int64_t prompt_tokens, std::span<float> logits)>;

struct GenerateRequest {
  std::span<const int32_t> prompt;
  int64_t restored = 0;          // prompt tokens that are in place already; less than the prompt has
  int64_t piece_tokens = 512;    // prefill goes in pieces that end at multiples of this
  int64_t max_new_tokens = 0;    // at least 1
  int32_t vocab = 0;
  std::span<const int32_t> forced;  // if not empty: these decisions are fed instead of our own, as many as there are
};

// All may be empty.
struct GenerateHooks {
  std::function<void(int64_t prompt_done)> on_prefill;
  std::function<bool(int32_t token)> is_end;                // ends the answer; never given to on_token
  std::function<Status(int32_t token)> on_token;            // an error stops the generation and is returned
  std::function<void(std::span<const float> logits)> on_logits;  // of every decision, the first included
  std::function<bool()> stop_requested;                     // asked before every piece and step
};

enum class StopReason { kEnd, kLimit, kInterrupted };
const char* StopReasonName(StopReason reason);  // "end", "limit", "interrupted"

struct Generated {
  std::vector<int32_t> decisions;  // most likely token at each step, the end token included; also where others were forced
  int64_t answer_tokens = 0;       // decisions before the end token
  StopReason stop = StopReason::kLimit;
  int64_t prefill_tokens = 0;      // computed, without the restored ones
  double prefill_seconds = 0;      // until the first decision
  int64_t decode_steps = 0;
  double decode_seconds = 0;
};

// Returns the first error of `forward` or on_token. An interruption is not an error.
Result<Generated> Generate(const GenerateRequest& request, const Forward& forward, const GenerateHooks& hooks,
                           const Clock& clock);

// The lowest id of the largest logit. Requires at least one; NaN is never chosen while there is a number.
int32_t MostLikely(std::span<const float> logits);

}  // namespace prehoc::cli
