// The engine's attention in a tiered KV cache: Sequence behind AttentionBackend.
#pragma once
#include <cstdint>
#include <span>

#include "cache/kv_cache.h"
#include "integrations/reference/attention_backend.h"
#include "integrations/reference/engine/engine.h"

namespace prehoc::reference {

// Prompt pieces go to Sequence::Prefill(), single tokens of decode to Sequence::Attend(). `sequence` outlives this.
class CacheBackend final : public AttentionBackend {
 public:
  explicit CacheBackend(Sequence* sequence) : sequence_(sequence) {}
  int64_t length() const override { return sequence_->length(); }
  Status Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) override;
  bool takes_device_memory() const override { return sequence_->takes_device_memory(); }
  Status WhileOthersWork() override { return sequence_->WhileOthersWork(); }
  FreezeRule Freeze(int32_t layer) const override;
  Status Attend(const AttendCall& call) override;
  Result<StepPlan> Plan(const AttendCall& io) override;
  Status EnqueueBehind(void* stream) override { return sequence_->EnqueueBehind(stream); }
  Status EnqueueLayer(int32_t layer, void* stream) override { return sequence_->EnqueueLayer(LayerId(layer), stream); }
  Status EnqueueLast(void* stream) override { return sequence_->EnqueueLast(stream); }
  Status AfterLayer(int32_t layer) override { return sequence_->AfterLayer(LayerId(layer)); }
  Status End() override { return sequence_->End(); }
  void Rollback() override { sequence_->Rollback(); }

 private:
  Sequence* sequence_;
  bool decode_ = false;
};

// Makes one lost chunk anew: the engine runs its tokens, the sequence takes their rows.
class RepairBackend final : public AttentionBackend {
 public:
  RepairBackend(Sequence* sequence, ChunkIndex chunk, int32_t chunk_tokens)
      : sequence_(sequence), chunk_(chunk), chunk_tokens_(chunk_tokens) {}
  int64_t length() const override { return int64_t{chunk_.value()} * chunk_tokens_; }
  // kInvalid unless all tokens of the chunk come at once.
  Status Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) override;
  bool takes_device_memory() const override { return sequence_->takes_device_memory(); }
  FreezeRule Freeze(int32_t layer) const override;
  Status Attend(const AttendCall& call) override;
  Status End() override { return sequence_->EndRepair(); }
  void Rollback() override { sequence_->Rollback(); }

 private:
  Sequence* sequence_;
  const ChunkIndex chunk_;
  const int32_t chunk_tokens_;
};

// Engine::Forward() over `sequence`. If rows turn out to be lost on the way (damaged, or shed by a full store), their chunks
// are recomputed and the rest is run again; the result is the same as if nothing had been lost. `tokens` follow
// sequence.length(). Returns the engine's error if nothing is lost, or if chunks are lost faster than they are made.
// Requires EngineOptions::max_batch_tokens >= chunk_tokens of the cache for a repair.
Status RunWithRepair(Engine& engine, Sequence& sequence, std::span<const int32_t> tokens, int64_t prompt_tokens,
                     std::span<float> logits);

}  // namespace prehoc::reference
