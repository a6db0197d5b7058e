// Where the engine's attention happens: the one call per layer that the engine hands to a KV cache.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "base/executor.h"
#include "base/result.h"
#include "base/status.h"

namespace prehoc::reference {

// One layer's work for tokens [first, first + count) of one sequence. fp32, contiguous, row-major; K after RoPE.
struct AttendCall {
  int32_t layer = 0;
  int64_t first = 0;   // position of the first token; all earlier positions have been given before
  int64_t count = 0;   // tokens; 1 = decode
  int64_t q_skip = 0;  // the first q_skip tokens only leave their K and V (frozen by ETF); < count, except that all may be skipped
  const float* q = nullptr;  // [count - q_skip, heads, head_dim], after RoPE
  const float* q_pre_rope = nullptr;  // as q, before RoPE; null = not kept (wanted by cis.cos_stage=pre_rope only)
  const float* k = nullptr;  // [count, kv_heads, head_dim], after RoPE
  const float* v = nullptr;  // [count, kv_heads, head_dim]
  float* out = nullptr;      // [count - q_skip, heads, head_dim]
  bool on_device = false;    // all pointers are to memory of a device, see takes_device_memory()
  void* stream = nullptr;    // on_device: of that device; what writes q, k and v was enqueued there
};

// What a method leaves out of prefill in one layer (docs/selectors/etf.md).
struct FreezeRule {
  int64_t frozen = 0;      // positions [0, frozen) pass through the layer unchanged
  bool reuse_kv = false;   // frozen tokens take K and V of an earlier layer, instead of projecting:
  // Of this one, whose own rule names it too and freezes nothing; -1 = of the last that computed them, for each token
  // its own.
  int32_t reuse_layer = -1;
};

// A decode step whose attention is work of the device alone: PlanStep() and what follows, of cache/kv_cache.h.
struct StepPlan {
  uint64_t id = 0;     // 0: not offered for this step; what was captured for an id may be replayed for the same one
  bool pause = false;  // nothing is replayed, and each layer's work is waited for, then AfterLayer() called
};

// One sequence. Not safe for two threads at once.
class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  virtual int64_t length() const = 0;  // tokens that every layer has

  // Announces tokens [length(), length() + tokens.size()), before the first Attend() of them. `prompt_tokens` is
  // the whole prompt's length during prefill, 0 in decode.
  virtual Status Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) = 0;
  // Whether prompts may have q, k, v and out in the memory of the device that this keeps K and V on. Attend() follows the stream that it is
  // given, and out is complete when it returns.
  virtual bool takes_device_memory() const { return false; }
  // The engine waits for what it has given to the device between two layers of a prompt: time for what can wait until then.
  virtual Status WhileOthersWork() { return {}; }
  virtual FreezeRule Freeze(int32_t layer) const = 0;  // for the tokens announced
  virtual Status Attend(const AttendCall& call) = 0;   // appends K and V, then attends causally
  // In the place of Attend(), for a decode step on a device: `io` names buffers there that all layers use. Streams are the device's.
  virtual Result<StepPlan> Plan(const AttendCall&) { return StepPlan{}; }
  virtual Status EnqueueBehind(void*) { return NotPlanned(); }
  virtual Status EnqueueLayer(int32_t, void*) { return NotPlanned(); }
  virtual Status EnqueueLast(void*) { return NotPlanned(); }
  virtual Status AfterLayer(int32_t) { return NotPlanned(); }
  virtual Status End() = 0;                            // every layer has been given; length() grows
  // After an error between Begin() and End(): forgets the announced tokens, so that they can be run again.
  virtual void Rollback() = 0;

 protected:
  static Status NotPlanned() { return {StatusCode::kUnsupported, "this attention offers no steps on a device"}; }
};

// All K and V in fp32 memory, every position attended: the reference that everything is compared with. Scores, weights
// and sums are fp32 too. Memory grows with the sequence: 8 * layers * kv_heads * head_dim bytes a token.
class DenseBackend final : public AttentionBackend {
 public:
  // Requires heads to be a multiple of kv_heads. `executor` shares a call's queries out and outlives this; null = the
  // calling thread alone.
  DenseBackend(int32_t layers, int32_t heads, int32_t kv_heads, int32_t head_dim, int64_t max_tokens,
               Executor* executor = nullptr);
  int64_t length() const override { return length_; }
  // Returns kOutOfSpace beyond max_tokens, kInvalid while other tokens are announced.
  Status Begin(std::span<const int32_t> tokens, int64_t prompt_tokens) override;
  FreezeRule Freeze(int32_t) const override { return {}; }
  // Returns kInvalid for a layer or tokens that were not announced.
  Status Attend(const AttendCall& call) override;
  Status End() override;
  void Rollback() override { pending_ = 0; }

 private:
  void Append(const AttendCall& call);
  void AttendOne(const AttendCall& call, int64_t token, int32_t head, std::vector<float>& scores) const;

  const int32_t layers_, heads_, kv_heads_, head_dim_;
  const int64_t max_tokens_;
  Executor* const executor_;
  int64_t length_ = 0, pending_ = 0;
  std::vector<std::vector<float>> k_, v_;  // by layer: [tokens, kv_heads, head_dim]
};

}  // namespace prehoc::reference
