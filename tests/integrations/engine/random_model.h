// Tiny random models in memory, with weights of any type.
#pragma once
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/half.h"
#include "base/rng.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

// Random codes with scales that keep every weight near `size`. Any bytes are a valid row once the scales are.
inline std::vector<std::byte> RandomRows(Rng& rng, WeightType type, int64_t rows, int64_t cols, double size) {
  const size_t row_bytes = WeightRowBytes(type, cols).value();
  std::vector<std::byte> bytes(row_bytes * static_cast<size_t>(rows));
  for (std::byte& b : bytes) b = static_cast<std::byte>(rng.Next());
  const auto put_half = [&](size_t at, double value) {
    const Half half = FloatToHalf(static_cast<float>(value));
    std::memcpy(&bytes[at], &half, sizeof half);
  };
  const auto scale = [&](double divisor) { return size * rng.Uniform(0.2, 1.0) / divisor; };
  const auto for_blocks = [&](size_t block, const auto& fn) {
    for (size_t at = 0; at < bytes.size(); at += block) fn(at);
  };
  switch (type) {
    case WeightType::kF32:
      for_blocks(4, [&](size_t at) {
        const auto value = static_cast<float>(size * rng.Normal());
        std::memcpy(&bytes[at], &value, sizeof value);
      });
      break;
    case WeightType::kF16: for_blocks(2, [&](size_t at) { put_half(at, size * rng.Normal()); }); break;
    case WeightType::kBF16:
      for_blocks(2, [&](size_t at) {
        const uint16_t value = FloatToBFloat16(static_cast<float>(size * rng.Normal()));
        std::memcpy(&bytes[at], &value, sizeof value);
      });
      break;
    case WeightType::kQ8_0: for_blocks(34, [&](size_t at) { put_half(at, scale(64)); }); break;
    case WeightType::kQ4_0: for_blocks(18, [&](size_t at) { put_half(at, scale(4)); }); break;
    case WeightType::kQ4_1:
      for_blocks(20, [&](size_t at) {
        const double d = scale(4);
        put_half(at, d);
        put_half(at + 2, -d * rng.Uniform(5, 10));
      });
      break;
    case WeightType::kQ4_K:
      for_blocks(144, [&](size_t at) {
        put_half(at, scale(128));
        put_half(at + 2, scale(32));
      });
      break;
    case WeightType::kQ6_K: for_blocks(210, [&](size_t at) { put_half(at + 208, scale(1024)); }); break;
  }
  return bytes;
}

// A matrix and the bytes it points to.
struct OwnedMatrix {
  std::shared_ptr<std::vector<std::byte>> bytes;
  WeightMatrix matrix;
};
inline OwnedMatrix RandomMatrix(Rng& rng, WeightType type, int64_t rows, int64_t cols, double size) {
  auto bytes = std::make_shared<std::vector<std::byte>>(RandomRows(rng, type, rows, cols, size));
  const WeightMatrix matrix{type, rows, cols, bytes->data(), bytes->size() / static_cast<size_t>(rows)};
  return {std::move(bytes), matrix};
}
inline std::vector<float> Expanded(const WeightMatrix& w) {
  std::vector<float> values(static_cast<size_t>(w.rows * w.cols));
  for (int64_t r = 0; r < w.rows; ++r) DequantizeRow(w.type, w.row(r), w.cols, values.data() + r * w.cols);
  return values;
}

struct ModelShape {
  int32_t layers = 4, heads = 4, kv_heads = 2, head_dim = 16, hidden = 64, intermediate = 96, vocab = 90;
  WeightType type = WeightType::kQ4_1;
  bool biases = true, qk_norm = true;
  RopeLayout layout = RopeLayout::kHalf;
};

inline std::shared_ptr<Model> RandomModel(Rng& rng, const ModelShape& s) {
  auto model = std::make_shared<Model>();
  ModelConfig& c = model->config;
  c.architecture = "llama";
  c.layers = s.layers, c.heads = s.heads, c.kv_heads = s.kv_heads, c.head_dim = s.head_dim, c.hidden = s.hidden;
  c.intermediate = s.intermediate, c.vocab = s.vocab, c.max_positions = 1024, c.rope_layout = s.layout;
  const auto matrix = [&](int64_t rows, int64_t cols) {
    OwnedMatrix owned = RandomMatrix(rng, s.type, rows, cols, 1 / std::sqrt(static_cast<double>(cols)));
    model->owners.push_back(owned.bytes);
    model->weight_bytes += owned.bytes->size();
    return owned.matrix;
  };
  const auto vector = [&](bool wanted, int64_t size, double mean, double spread) {
    std::vector<float> values = rng.Normals(wanted ? static_cast<size_t>(size) : 0, spread);
    for (float& v : values) v += static_cast<float>(mean);
    return values;
  };
  const int64_t q = int64_t{s.heads} * s.head_dim, kv = int64_t{s.kv_heads} * s.head_dim;
  model->embedding = matrix(s.vocab, s.hidden);
  model->output = matrix(s.vocab, s.hidden);
  model->output_norm = vector(true, s.hidden, 1, 0.3);
  for (int32_t l = 0; l < s.layers; ++l) {
    LayerWeights w;
    w.q = matrix(q, s.hidden), w.k = matrix(kv, s.hidden), w.v = matrix(kv, s.hidden), w.o = matrix(s.hidden, q);
    w.gate = matrix(s.intermediate, s.hidden), w.up = matrix(s.intermediate, s.hidden);
    w.down = matrix(s.hidden, s.intermediate);
    w.attention_norm = vector(true, s.hidden, 1, 0.3), w.ffn_norm = vector(true, s.hidden, 1, 0.3);
    w.q_bias = vector(s.biases, q, 0, 0.5), w.k_bias = vector(s.biases, kv, 0, 0.5);
    w.v_bias = vector(s.biases, kv, 0, 0.5), w.o_bias = vector(s.biases, s.hidden, 0, 0.2);
    w.q_norm = vector(s.qk_norm, s.head_dim, 1.5, 0.3), w.k_norm = vector(s.qk_norm, s.head_dim, 1.5, 0.3);
    model->layers.push_back(std::move(w));
  }
  return model;
}

inline std::vector<int32_t> RandomTokens(Rng& rng, const ModelConfig& config, int64_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng.Int(0, config.vocab - 1));
  return tokens;
}

}  // namespace prehoc::reference
