// Engine: runs tokens through a Llama-family model on the CPU; K, V and attention belong to an AttentionBackend.
//
// Per layer: RMSNorm; q, k, v (+ bias); optional norm of each q and k head; RoPE; backend.Attend(); output
// projection; residual; RMSNorm; down(silu(gate) * up); residual. Then a final norm and the output matrix.
// Activations are fp32. A decode step multiplies quantised weights as stored, with its activations rounded to 16 bits
// (to within 2^-16 of the largest of 32 neighbours); a prompt multiplies weights expanded to fp32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/clock.h"
#include "base/counters.h"
#include "base/executor.h"
#include "base/precision.h"
#include "base/result.h"
#include "base/status.h"
#include "integrations/reference/attention_backend.h"
#include "integrations/reference/engine/simd_level.h"
#include "integrations/reference/engine/token_decoder.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

struct EngineOptions {
  Executor* executor = nullptr;     // required; outlives the engine. Loops run on it, its jobs are not used
  int32_t max_batch_tokens = 512;   // [tokens] of a piece, 1 to 65536: one Begin()/End() each. Scratch grows with it
  int64_t max_tokens = 0;           // longest sequence; 0 = what the model was made for. More is allowed: quality is then
                                    // the caller's affair. Never more than a sliding window, see Engine::max_tokens()
  bool keep_q_pre_rope = false;     // fills AttendCall::q_pre_rope (after QK norm, before RoPE)
  SimdLevel simd = BestSimdLevel(); // lower ones are for tests; Create() refuses what this CPU lacks
  const Clock* clock = &SteadyClock::Get();  // for EngineSeconds
  MakeDecoder make_decoder;         // where the layers run; empty = on the CPU
  PromptPrecision prompt_precision = PromptPrecision::kSplit;  // of a prompt's products on a GPU; the CPU computes in fp32
  Status Validate() const;          // kInvalid, naming the field and its value
};

// Not safe for two threads at once; may serve any number of sequences in turn.
class Engine {
 public:
  // Returns kInvalid (options, or a model whose shapes disagree), kUnsupported (simd level, head size) or what make_decoder says.
  static Result<std::unique_ptr<Engine>> Create(std::shared_ptr<const Model> model, const EngineOptions& options);
  ~Engine();

  // Runs `tokens`, which follow backend.length(), through all layers, in pieces of max_batch_tokens; then `logits`
  // [vocab] of the last token are filled, unless the span is empty. `prompt_tokens` is the whole prompt's length
  // while it is being read, 0 in decode (AttentionBackend::Begin).
  // A prompt (prompt_tokens > 0) leaves the same bits of K and V however it is split into pieces and calls, provided
  // that RoPE does not depend on length (see RopeVariant()) and the backend's attention is as indifferent. A decode
  // step agrees with the prompt's way to a few 1e-4 of the largest logit (7e-5 measured on SmolLM2-135M).
  // Returns kInvalid (no tokens, an id outside the vocabulary, size of logits, more than max_tokens()) with nothing
  // announced to the backend, or the backend's error after Rollback() of the piece: the backend then holds the
  // pieces before, as backend.length() says, and the rest may be run again.
  Status Forward(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens,
                 std::span<float> logits);
  // As Forward(), with `logits` [tokens, vocab] of every token.
  Status ForwardAll(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens,
                    std::span<float> logits);

  const ModelConfig& config() const;
  // Longest sequence: EngineOptions::max_tokens or the model's positions, but not above a sliding window: up to its
  // length such a model attends to everything, beyond it is not offered here.
  int64_t max_tokens() const;
  // With RoPE scaling of the kinds dynamic and longrope, the frequencies of a piece depend on max(prompt_tokens, end
  // of the piece), as in transformers, which rotates all tokens of a call alike. Two prompts whose K may stand for
  // each other have the same value here; it is 0 for all other models and for prompts within the original length.
  int64_t RopeVariant(int64_t prompt_tokens) const;

  size_t scratch_bytes() const;  // allocated now, beside the model's weight_bytes
  const EngineSeconds& seconds() const;
  // engine.tokens, engine.pieces, engine.scratch_bytes, engine.weight_bytes, engine.seconds.*
  void VisitCounters(const CounterVisitor& visit) const;

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace prehoc::reference
