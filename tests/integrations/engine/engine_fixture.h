// What the engine's tests share: an engine over a model, a dense backend of its shape, logits by row.
#pragma once
#include <gtest/gtest.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "integrations/reference/engine/engine.h"
#include "tests/support/status_matchers.h"

namespace prehoc::reference {

inline std::vector<SimdLevel> AvailableLevels() {
  std::vector<SimdLevel> levels;
  for (const SimdLevel level : {SimdLevel::kPlain, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (SimdLevelAvailable(level)) levels.push_back(level);
  }
  return levels;
}

inline DenseBackend DenseFor(const ModelConfig& c, Executor* executor = nullptr) {
  return DenseBackend(c.layers, c.heads, c.kv_heads, c.head_dim, 4096, executor);
}

// Logits [tokens, vocab] of a prompt, or of decode steps where prompt_tokens is 0.
inline std::vector<float> AllLogits(Engine& engine, AttentionBackend& backend, std::span<const int32_t> tokens,
                                    int64_t prompt_tokens) {
  std::vector<float> logits(tokens.size() * static_cast<size_t>(engine.config().vocab));
  EXPECT_OK(engine.ForwardAll(backend, tokens, prompt_tokens, logits));
  return logits;
}
inline std::span<const float> RowOf(const std::vector<float>& logits, size_t row, int64_t vocab) {
  const auto width = static_cast<size_t>(vocab);
  return std::span(logits).subspan(row * width, width);
}

// A dense backend that follows a table of freeze rules while a prompt is read, and may fail in one layer.
class RuledBackend final : public AttentionBackend {
 public:
  RuledBackend(DenseBackend dense, std::vector<FreezeRule> rules) : dense_(std::move(dense)), rules_(std::move(rules)) {}
  int64_t length() const override { return dense_.length(); }
  Status Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) override {
    in_prompt_ = prompt_tokens > 0;
    return dense_.Begin(tokens, prompt_tokens);
  }
  FreezeRule Freeze(int32_t layer) const override {
    return in_prompt_ ? rules_[static_cast<size_t>(layer)] : FreezeRule();
  }
  Status Attend(const AttendCall& call) override {
    if (call.layer == fail_layer) return {StatusCode::kIoError, "attention failed"};
    calls.push_back(call);
    if (call.q_pre_rope != nullptr) {
      q_pre_rope.assign(call.q_pre_rope, call.q_pre_rope + (call.count - call.q_skip) * q_width);
      q.assign(call.q, call.q + (call.count - call.q_skip) * q_width);
    }
    return dense_.Attend(call);
  }
  Status End() override { return fail_end ? Status(StatusCode::kOutOfSpace, "end failed") : dense_.End(); }
  void Rollback() override {
    ++rollbacks;
    dense_.Rollback();
  }

  int32_t fail_layer = -1;
  bool fail_end = false;
  int rollbacks = 0;
  int64_t q_width = 0;                // [floats], for the copies below
  std::vector<AttendCall> calls;      // their pointers are dead
  std::vector<float> q_pre_rope, q;   // of the last call

 private:
  DenseBackend dense_;
  std::vector<FreezeRule> rules_;
  bool in_prompt_ = false;
};

}  // namespace prehoc::reference
