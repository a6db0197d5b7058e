#include "integrations/reference/engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace prehoc::reference {
namespace {

int64_t LongestInput(const ModelConfig& c) {
  return std::max({int64_t{c.hidden}, int64_t{c.intermediate}, int64_t{c.heads} * c.head_dim});
}

}  // namespace

template <class Fn>
auto Decoder::Timed(double EngineSeconds::*part, const Fn& fn) {
  struct Add {
    const Clock& clock;
    double& seconds;
    int64_t start = clock.NowNanos();
    ~Add() { seconds += clock.SecondsSince(start); }
  } add{*options_.clock, seconds_.*part};
  return fn();
}

Decoder::Decoder(const Model& model, const EngineOptions& options)
    : model_(model),
      config_(model.config),
      options_(options),
      kernels_(KernelsFor(options.simd)),
      q_width_(int64_t{config_.heads} * config_.head_dim),
      kv_width_(int64_t{config_.kv_heads} * config_.head_dim),
      rope_(config_, options.max_batch_tokens),
      products_(kernels_, *options.executor, options.max_batch_tokens, LongestInput(config_)) {
  const int64_t n = options.max_batch_tokens;
  hidden_ = AlignedFloats(n * config_.hidden);
  q_ = AlignedFloats(n * q_width_);
  if (options.keep_q_pre_rope) q_pre_rope_ = AlignedFloats(n * q_width_);
  attention_ = AlignedFloats(n * q_width_);
  gate_ = AlignedFloats(n * config_.intermediate);
  up_ = AlignedFloats(n * config_.intermediate);
  k_ = AlignedFloats(n * kv_width_);
  v_ = AlignedFloats(n * kv_width_);
}

size_t Decoder::bytes() const {
  size_t bytes = rope_.bytes() + products_.bytes();
  for (const AlignedFloats* a : {&hidden_, &q_, &q_pre_rope_, &attention_, &gate_, &up_, &k_, &v_, &kept_k_, &kept_v_}) {
    bytes += a->bytes();
  }
  return bytes;
}

Status Decoder::Run(AttentionBackend& backend, std::span<const int32_t> tokens, int64_t prompt_tokens) {
  first_ = backend.length();
  count_ = static_cast<int64_t>(tokens.size());
  kept_layer_ = -1;
  // A prompt's last token may be alone in its piece; it takes the same way as its neighbours, to the same bits.
  mode_ = count_ == 1 && prompt_tokens == 0 ? ProductMode::kVector : ProductMode::kMatrix;
  PREHOC_RETURN_IF_ERROR(
      Timed(&EngineSeconds::attention, [&] { return backend.Begin(tokens, prompt_tokens); }));
  Timed(&EngineSeconds::embedding, [&] {
    rope_.Prepare(first_, count_, std::max(prompt_tokens, first_ + count_));
    Embed(tokens);
  });
  Status status = RunLayers(backend);
  if (status.ok()) status = Timed(&EngineSeconds::attention, [&] { return backend.End(); });
  if (!status.ok()) backend.Rollback();
  return status;
}

Status Decoder::RunLayers(AttentionBackend& backend) {
  for (int32_t layer = 0; layer < config_.layers; ++layer) PREHOC_RETURN_IF_ERROR(RunLayer(backend, layer));
  return {};
}

void Decoder::Embed(std::span<const int32_t> tokens) {
  options_.executor->ParallelFor(count_, [&](int64_t t) {
    const WeightMatrix& w = model_.embedding;
    DequantizeRow(w.type, w.row(tokens[static_cast<size_t>(t)]), w.cols, hidden(t));
  });
}

Status Decoder::RunLayer(AttentionBackend& backend, int32_t layer) {
  const LayerWeights& w = model_.layers[static_cast<size_t>(layer)];
  const FreezeRule freeze = backend.Freeze(layer);
  const int64_t skip = std::clamp<int64_t>(freeze.frozen - first_, 0, count_);
  // The first layer has no earlier one to take K and V from.
  const int64_t kv_from = freeze.reuse_kv && layer > 0 ? skip : 0;
  PREHOC_RETURN_IF_ERROR(Timed(&EngineSeconds::projections, [&] {
    if (kv_from < count_) ProjectQkv(w, kv_from, skip);
    return freeze.reuse_kv && freeze.reuse_layer >= 0 ? ReuseKv(freeze, layer, skip) : Status();
  }));
  const AttendCall call{.layer = layer,
                        .first = first_,
                        .count = count_,
                        .q_skip = skip,
                        .q = q_.data() + skip * q_width_,
                        .q_pre_rope = options_.keep_q_pre_rope ? q_pre_rope_.data() + skip * q_width_ : nullptr,
                        .k = k_.data(),
                        .v = v_.data(),
                        .out = attention_.data() + skip * q_width_};
  PREHOC_RETURN_IF_ERROR(Timed(&EngineSeconds::attention, [&] { return backend.Attend(call); }));
  if (skip == count_) return {};
  Timed(&EngineSeconds::projections, [&] {
    AddAttention(w, skip);
    AddMlp(w, skip);
  });
  return {};
}

Status Decoder::ReuseKv(const FreezeRule& freeze, int32_t layer, int64_t frozen) {
  if (layer == freeze.reuse_layer) {
    const int64_t size = options_.max_batch_tokens * kv_width_;
    if (kept_k_.bytes() == 0) kept_k_ = AlignedFloats(size), kept_v_ = AlignedFloats(size);
    std::copy_n(k_.data(), count_ * kv_width_, kept_k_.data());
    std::copy_n(v_.data(), count_ * kv_width_, kept_v_.data());
    kept_layer_ = layer;
  } else if (layer > freeze.reuse_layer && frozen > 0) {
    if (kept_layer_ != freeze.reuse_layer) {
      return {StatusCode::kInvalid, "layer " + std::to_string(layer) + " reuses K and V of layer " +
                                        std::to_string(freeze.reuse_layer) + ", whose own rule does not name it"};
    }
    std::copy_n(kept_k_.data(), frozen * kv_width_, k_.data());
    std::copy_n(kept_v_.data(), frozen * kv_width_, v_.data());
  }
  return {};
}

void Decoder::Norm(const float* x, const std::vector<float>& weight, float* out) const {
  const auto n = static_cast<int64_t>(weight.size());
  const float scale = 1.0f / std::sqrt(kernels_.dot(x, x, n) / static_cast<float>(n) + config_.rms_eps);
  for (int64_t i = 0; i < n; ++i) out[i] = weight[static_cast<size_t>(i)] * (x[i] * scale);
}

void Decoder::ProjectQkv(const LayerWeights& w, int64_t kv_from, int64_t q_from) {
  products_.SetInput(mode_, count_ - kv_from, config_.hidden,
                     [&](int64_t row, float* out) { Norm(hidden(kv_from + row), w.attention_norm, out); });
  float* k = k_.data() + kv_from * kv_width_;
  float* v = v_.data() + kv_from * kv_width_;
  float* q = q_.data() + kv_from * q_width_;
  const Product products[] = {
      {.weights = &w.k, .bias = w.k_bias, .out = k, .stride = kv_width_},
      {.weights = &w.v, .bias = w.v_bias, .out = v, .stride = kv_width_},
      {.weights = &w.q, .bias = w.q_bias, .out = q, .stride = q_width_, .first_row = q_from - kv_from}};
  products_.Run(std::span(products, q_from < count_ ? 3 : 2));
  RotateHeads(w, kv_from, q_from);
}

void Decoder::RotateHeads(const LayerWeights& w, int64_t kv_from, int64_t q_from) {
  const int64_t d = config_.head_dim;
  const auto heads = [&](int64_t index, float* x, int32_t count, const std::vector<float>& norm, float* before) {
    if (!norm.empty()) {
      for (int32_t h = 0; h < count; ++h) Norm(x + h * d, norm, x + h * d);
    }
    if (before != nullptr) std::copy(x, x + count * d, before);
    for (int32_t h = 0; h < count; ++h) rope_.Rotate(index, x + h * d);
  };
  options_.executor->ParallelFor(count_ - kv_from, [&](int64_t i) {
    const int64_t index = kv_from + i;
    heads(index, k_.data() + index * kv_width_, config_.kv_heads, w.k_norm, nullptr);
    if (index < q_from) return;
    float* before = options_.keep_q_pre_rope ? q_pre_rope_.data() + index * q_width_ : nullptr;
    heads(index, q_.data() + index * q_width_, config_.heads, w.q_norm, before);
  });
}

void Decoder::AddAttention(const LayerWeights& w, int64_t from) {
  products_.SetInput(mode_, count_ - from, q_width_, [&](int64_t row, float* out) {
    const float* in = attention_.data() + (from + row) * q_width_;
    std::copy(in, in + q_width_, out);
  });
  const Product product{.weights = &w.o, .bias = w.o_bias, .out = hidden(from), .stride = config_.hidden, .add = true};
  products_.Run({&product, 1});
}

void Decoder::AddMlp(const LayerWeights& w, int64_t from) {
  const int64_t rows = count_ - from, width = config_.intermediate;
  products_.SetInput(mode_, rows, config_.hidden,
                     [&](int64_t row, float* out) { Norm(hidden(from + row), w.ffn_norm, out); });
  const Product gate_up[] = {{.weights = &w.gate, .out = gate_.data(), .stride = width},
                             {.weights = &w.up, .out = up_.data(), .stride = width}};
  products_.Run(gate_up);
  products_.SetInput(mode_, rows, width, [&](int64_t row, float* out) {
    kernels_.silu_multiply(gate_.data() + row * width, up_.data() + row * width, width, out);
  });
  const Product down{.weights = &w.down, .out = hidden(from), .stride = config_.hidden, .add = true};
  products_.Run({&down, 1});
}

Status Decoder::LogitsOf(int64_t index, float* logits) {
  Timed(&EngineSeconds::logits, [&] {
    products_.SetInput(ProductMode::kVector, 1, config_.hidden,
                       [&](int64_t, float* out) { Norm(hidden(index), model_.output_norm, out); });
    const Product output{.weights = &model_.output, .out = logits, .stride = config_.vocab};
    products_.Run({&output, 1});
  });
  return {};
}

Status Decoder::AllLogits(float* logits) {
  if (count_ == 1) return LogitsOf(0, logits);
  Timed(&EngineSeconds::logits, [&] {
    products_.SetInput(ProductMode::kMatrix, count_, config_.hidden,
                       [&](int64_t row, float* out) { Norm(hidden(row), model_.output_norm, out); });
    const Product output{.weights = &model_.output, .out = logits, .stride = config_.vocab};
    products_.Run({&output, 1});
  });
  return {};
}

}  // namespace prehoc::reference
