#include "integrations/reference/cache_backend.h"

#include <string>
#include <vector>

namespace prehoc::reference {
namespace {
LayerInput InputOf(const AttendCall& call) {
  return {.q = call.q, .q_pre_rope = call.q_pre_rope, .k = call.k, .v = call.v, .out = call.out, .q_skip = call.q_skip,
          .on_device = call.on_device, .stream = call.stream};
}

FreezeRule RuleOf(const PrefillRule& rule) {
  return {.frozen = rule.frozen, .reuse_kv = rule.reuse_kv, .reuse_layer = rule.reuse_layer};
}

// A chunk can be lost while another is made anew; more rounds than this mean that the tiers do not hold the sequence.
constexpr int kMaxRepairRounds = 8;

Status Repair(Engine& engine, Sequence& sequence, std::span<const ChunkIndex> lost) {
  const int32_t size = sequence.chunk_tokens();
  for (const ChunkIndex chunk : lost) {
    RepairBackend backend(&sequence, chunk, size);
    const auto first = static_cast<size_t>(chunk.value()) * static_cast<size_t>(size);
    const std::vector<int32_t> tokens(sequence.tokens().begin() + static_cast<std::ptrdiff_t>(first),
                                      sequence.tokens().begin() + static_cast<std::ptrdiff_t>(first) + size);
    const int64_t prompt = std::max<int64_t>(sequence.prompt_length(), static_cast<int64_t>(first) + size);
    PREHOC_RETURN_IF_ERROR(engine.Forward(backend, tokens, prompt, {}));
  }
  return {};
}
}  // namespace

Status CacheBackend::Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) {
  decode_ = prompt_tokens == 0;
  return sequence_->Begin(tokens, prompt_tokens);
}

FreezeRule CacheBackend::Freeze(int32_t layer) const { return RuleOf(sequence_->FreezeRule(LayerId(layer))); }

Status CacheBackend::Attend(const AttendCall& call) {
  const LayerId layer(call.layer);
  return decode_ ? sequence_->Attend(layer, InputOf(call)) : sequence_->Prefill(layer, InputOf(call));
}

Result<StepPlan> CacheBackend::Plan(const AttendCall& io) {
  PREHOC_ASSIGN_OR_RETURN(const Sequence::StepPlan plan, sequence_->PlanStep(InputOf(io)));
  return StepPlan{.id = plan.id, .pause = plan.pause};
}

Status RepairBackend::Begin(std::span<const int32_t> tokens, int64_t) {
  if (static_cast<int64_t>(tokens.size()) != chunk_tokens_) {
    return {StatusCode::kInvalid, "a repair needs the " + std::to_string(chunk_tokens_) + " tokens of its chunk at once, not " +
                                      std::to_string(tokens.size()) + ": raise max_batch_tokens"};
  }
  return sequence_->BeginRepair(chunk_);
}

FreezeRule RepairBackend::Freeze(int32_t layer) const { return RuleOf(sequence_->FreezeRule(LayerId(layer))); }

Status RepairBackend::Attend(const AttendCall& call) { return sequence_->Prefill(LayerId(call.layer), InputOf(call)); }

Status RunWithRepair(Engine& engine, Sequence& sequence, std::span<const int32_t> tokens, int64_t prompt_tokens,
                     std::span<float> logits) {
  CacheBackend backend(&sequence);
  const int64_t begin = sequence.length();
  for (int round = 0;; ++round) {
    const auto done = static_cast<size_t>(sequence.length() - begin);
    const Status status = engine.Forward(backend, tokens.subspan(done), prompt_tokens, logits);
    if (status.ok() || round == kMaxRepairRounds) return status;
    const std::vector<ChunkIndex> lost = sequence.LostChunks();
    if (lost.empty()) return status;
    const Status repaired = Repair(engine, sequence, lost);
    // What was lost meanwhile shows in the next round.
    if (!repaired.ok() && sequence.LostChunks().empty()) return repaired;
  }
}

}  // namespace prehoc::reference
