// The layers of a model applied to one piece of tokens: the seam between the engine and what computes, on the CPU or on a GPU.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/result.h"
#include "integrations/reference/attention_backend.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

struct EngineOptions;

// Where the time of all Forward() calls went.
struct EngineSeconds {
  double projections = 0;  // q, k, v, o, gate, up, down, with their norms, RoPE and activation
  double attention = 0;    // inside the backend: Begin, Attend, End; of a prompt on a device also what is left of the products before
  double logits = 0;       // final norm and output matrix
  double embedding = 0;    // embedding rows, RoPE tables
  double steps = 0;        // whole decode steps on a device, all of the above at once
  double total() const { return projections + attention + logits + embedding + steps; }
};

class TokenDecoder {
 public:
  virtual ~TokenDecoder() = default;
  // Begin(), every layer, End(). Rolls the backend back on error. Requires valid tokens, at most max_batch_tokens.
  virtual Status Run(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens) = 0;
  // Logits [vocab] of one token of the piece that Run() has just done, or [tokens, vocab] of all.
  virtual Status LogitsOf(int64_t index, float* logits) = 0;
  virtual Status AllLogits(float* logits) = 0;
  virtual const EngineSeconds& seconds() const = 0;
  virtual size_t bytes() const = 0;  // of scratch memory
};

// `model` passed CheckModel(); it and what the options point to outlive the decoder.
using MakeDecoder = std::function<Result<std::unique_ptr<TokenDecoder>>(const Model& model, const EngineOptions& options)>;

}  // namespace prehoc::reference
