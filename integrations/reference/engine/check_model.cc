#include "integrations/reference/engine/check_model.h"

#include <string>
#include <string_view>

namespace prehoc::reference {
namespace {

Status Invalid(std::string message) { return {StatusCode::kInvalid, "model: " + std::move(message)}; }

std::string Shape(int64_t rows, int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

Status CheckMatrix(const std::string& name, const WeightMatrix& matrix, int64_t rows, int64_t cols) {
  if (!matrix) return Invalid(name + " is missing");
  if (matrix.rows != rows || matrix.cols != cols) {
    return Invalid(name + " is " + Shape(matrix.rows, matrix.cols) + ", expected " + Shape(rows, cols));
  }
  PREHOC_ASSIGN_OR_RETURN(const size_t bytes, WeightRowBytes(matrix.type, cols));
  if (matrix.row_bytes == bytes) return {};
  return Invalid(name + " has rows of " + std::to_string(matrix.row_bytes) + " bytes, expected " +
                 std::to_string(bytes));
}

Status CheckVector(const std::string& name, const std::vector<float>& vector, int64_t size, bool optional) {
  if (optional && vector.empty()) return {};
  if (static_cast<int64_t>(vector.size()) == size) return {};
  return Invalid(name + " has " + std::to_string(vector.size()) + " elements, expected " + std::to_string(size));
}

Status CheckConfig(const ModelConfig& c) {
  const struct {
    std::string_view name;
    int64_t value;
  } positives[] = {{"layers", c.layers}, {"heads", c.heads}, {"kv_heads", c.kv_heads}, {"head_dim", c.head_dim},
                   {"hidden", c.hidden}, {"intermediate", c.intermediate}, {"vocab", c.vocab},
                   {"max_positions", c.max_positions}};
  for (const auto& field : positives) {
    if (field.value < 1) return Invalid(std::string(field.name) + " is " + std::to_string(field.value));
  }
  if (c.heads % c.kv_heads != 0) {
    return Invalid(std::to_string(c.heads) + " heads are not a multiple of " + std::to_string(c.kv_heads) +
                   " KV heads");
  }
  if (c.head_dim % 2 != 0) return Invalid("head_dim " + std::to_string(c.head_dim) + " is odd");
  const size_t pairs = static_cast<size_t>(c.head_dim / 2);
  if (!c.rope_freq_factors.empty() && c.rope_freq_factors.size() != pairs) {
    return Invalid("rope_freq_factors has " + std::to_string(c.rope_freq_factors.size()) + " elements, expected " +
                   std::to_string(pairs));
  }
  const RopeScaling& s = c.rope_scaling;
  if (s.type == RopeScaling::Type::kLongRope && (s.short_factor.size() != pairs || s.long_factor.size() != pairs)) {
    return Invalid("longrope has " + std::to_string(s.short_factor.size()) + " and " +
                   std::to_string(s.long_factor.size()) + " factors, expected " + std::to_string(pairs));
  }
  if (s.type == RopeScaling::Type::kDynamic && c.head_dim < 4) {
    return {StatusCode::kUnsupported, "model: dynamic RoPE with a head_dim of 2; use 4 or more"};
  }
  return {};
}

Status CheckLayer(const ModelConfig& c, const LayerWeights& w, const std::string& prefix) {
  const int64_t q_rows = int64_t{c.heads} * c.head_dim, kv_rows = int64_t{c.kv_heads} * c.head_dim;
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "q", w.q, q_rows, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "k", w.k, kv_rows, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "v", w.v, kv_rows, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "o", w.o, c.hidden, q_rows));
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "gate", w.gate, c.intermediate, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "up", w.up, c.intermediate, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckMatrix(prefix + "down", w.down, c.hidden, c.intermediate));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "attention_norm", w.attention_norm, c.hidden, false));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "ffn_norm", w.ffn_norm, c.hidden, false));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "q_bias", w.q_bias, q_rows, true));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "k_bias", w.k_bias, kv_rows, true));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "v_bias", w.v_bias, kv_rows, true));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "o_bias", w.o_bias, c.hidden, true));
  PREHOC_RETURN_IF_ERROR(CheckVector(prefix + "q_norm", w.q_norm, c.head_dim, true));
  return CheckVector(prefix + "k_norm", w.k_norm, c.head_dim, true);
}

}  // namespace

Status CheckModel(const Model& model) {
  const ModelConfig& c = model.config;
  PREHOC_RETURN_IF_ERROR(CheckConfig(c));
  PREHOC_RETURN_IF_ERROR(CheckMatrix("embedding", model.embedding, c.vocab, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckMatrix("output", model.output, c.vocab, c.hidden));
  PREHOC_RETURN_IF_ERROR(CheckVector("output_norm", model.output_norm, c.hidden, false));
  if (model.layers.size() != static_cast<size_t>(c.layers)) {
    return Invalid(std::to_string(model.layers.size()) + " layers of weights, expected " + std::to_string(c.layers));
  }
  for (size_t l = 0; l < model.layers.size(); ++l) {
    PREHOC_RETURN_IF_ERROR(CheckLayer(c, model.layers[l], "layer " + std::to_string(l) + " "));
  }
  return {};
}

}  // namespace prehoc::reference
