// Decoder: the layers of a model applied to one piece of tokens, on the CPU. The scratch memory of the engine lies here.
#pragma once
#include <cstdint>
#include <span>

#include "integrations/reference/attention_backend.h"
#include "integrations/reference/engine/engine.h"
#include "integrations/reference/engine/products.h"
#include "integrations/reference/engine/rope.h"

namespace prehoc::reference {

class Decoder final : public TokenDecoder {
 public:
  // `model` passed CheckModel(); it and what `options` points to outlive this.
  Decoder(const Model& model, const EngineOptions& options);

  Status Run(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens) override;
  Status LogitsOf(int64_t index, float* logits) override;
  Status AllLogits(float* logits) override;

  const EngineSeconds& seconds() const override { return seconds_; }
  size_t bytes() const override;

 private:
  Status RunLayers(AttentionBackend& backend);
  Status RunLayer(AttentionBackend& backend, int32_t layer);
  void Embed(std::span<const int32_t> tokens);
  void ProjectQkv(const LayerWeights& w, int64_t kv_from, int64_t q_from);
  void RotateHeads(const LayerWeights& w, int64_t kv_from, int64_t q_from);
  // Keeps K and V of the layer that frozen tokens reuse; puts them back in the layers above it. Returns kInvalid if
  // that layer's own rule did not ask for it.
  Status ReuseKv(const FreezeRule& freeze, int32_t layer, int64_t frozen);
  void AddAttention(const LayerWeights& w, int64_t from);
  void AddMlp(const LayerWeights& w, int64_t from);
  // The norm of `x` [hidden] times `weight`, as in RMSNorm.
  void Norm(const float* x, const std::vector<float>& weight, float* out) const;
  float* hidden(int64_t index) { return hidden_.data() + index * config_.hidden; }
  template <class Fn>
  auto Timed(double EngineSeconds::*part, const Fn& fn);

  const Model& model_;
  const ModelConfig& config_;
  const EngineOptions options_;
  const EngineKernels& kernels_;
  const int64_t q_width_, kv_width_;  // [floats] of a token's q, and of its k or v
  RopeTables rope_;
  Products products_;
  // Of the piece, [max_batch_tokens, width].
  AlignedFloats hidden_, q_, q_pre_rope_, attention_, gate_, up_;
  // A frozen token's K and V stay here from the last layer that computed them: reuse_kv gives those away, or the kept ones.
  AlignedFloats k_, v_;
  AlignedFloats kept_k_, kept_v_;  // of reuse_layer; empty until a rule names one
  // The piece being run.
  int64_t first_ = 0, count_ = 0;
  int32_t kept_layer_ = -1;
  ProductMode mode_ = ProductMode::kVector;
  EngineSeconds seconds_;
};

}  // namespace prehoc::reference
