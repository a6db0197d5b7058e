#include "integrations/reference/loader/assemble.h"

#include <cmath>
#include <limits>

#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

// Largest values that a real model might have; beyond them a file is damaged or hostile.
constexpr int64_t kMaxLayers = 1024, kMaxHeads = 1024, kMaxHeadDim = 1024, kMaxHidden = 1 << 18,
                  kMaxIntermediate = 1 << 20, kMaxVocab = 1 << 22, kMaxPositions = int64_t{1} << 31;

Status CheckRange(std::string_view file, std::string_view field, int64_t value, int64_t max) {
  if (value >= 1 && value <= max) return {};
  return FileError(StatusCode::kInvalid, file, field, " is ", value, ", expected 1 to ", max);
}

Status CheckFinite(std::string_view file, std::string_view field, double value, bool positive) {
  if (std::isfinite(value) && (!positive || value > 0)) return {};
  return FileError(StatusCode::kInvalid, file, field, " is ", value, ", expected a finite",
                   positive ? ", positive" : "", " number");
}

Status ValidateRope(const ModelConfig& c, std::string_view file) {
  const RopeScaling& s = c.rope_scaling;
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE theta", c.rope_theta, true));
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE factor", s.factor, true));
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE low_freq_factor", s.low_freq_factor, true));
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE high_freq_factor", s.high_freq_factor, true));
  if (s.type == RopeScaling::Type::kLlama3 && s.high_freq_factor <= s.low_freq_factor) {
    return FileError(StatusCode::kInvalid, file, "RoPE high_freq_factor ", s.high_freq_factor,
                     " must be above low_freq_factor ", s.low_freq_factor);
  }
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE beta_fast", s.beta_fast, true));
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE beta_slow", s.beta_slow, true));
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE mscale", s.mscale, false));
  PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE mscale_all_dim", s.mscale_all_dim, false));
  if (s.attention_factor) PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE attention_factor", *s.attention_factor, true));
  if (s.original_max_positions < 0 || s.original_max_positions > kMaxPositions) {
    return FileError(StatusCode::kInvalid, file, "RoPE original positions are ", s.original_max_positions,
                     ", expected 0 to ", kMaxPositions);
  }
  const auto pairs = static_cast<size_t>(c.head_dim / 2);
  for (const auto* factors : {&s.short_factor, &s.long_factor}) {
    if (s.type != RopeScaling::Type::kLongRope) break;
    if (factors->size() != pairs) {
      return FileError(StatusCode::kInvalid, file, "longrope has ", factors->size(), " factors, expected ", pairs);
    }
    for (const double f : *factors) PREHOC_RETURN_IF_ERROR(CheckFinite(file, "longrope factor", f, true));
  }
  for (const float f : c.rope_freq_factors) PREHOC_RETURN_IF_ERROR(CheckFinite(file, "RoPE frequency factor", f, true));
  return {};
}

class LayerReader {
 public:
  LayerReader(const ModelConfig& config, const TensorNames& names, const ModelParts& parts, TensorTable* tensors)
      : c_(config), n_(names), parts_(parts), tensors_(tensors) {}

  Result<LayerWeights> Read(int32_t layer) {
    prefix_ = Cat(n_.layer_prefix, layer, ".");
    const int64_t q_rows = int64_t{c_.heads} * c_.head_dim, kv_rows = int64_t{c_.kv_heads} * c_.head_dim;
    LayerWeights w;
    PREHOC_ASSIGN_OR_RETURN(w.attention_norm, tensors_->Vector(Name(n_.attention_norm, "weight"), c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.ffn_norm, tensors_->Vector(Name(n_.ffn_norm, "weight"), c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.q, tensors_->Matrix(Name(n_.q, "weight"), q_rows, c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.k, tensors_->Matrix(Name(n_.k, "weight"), kv_rows, c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.v, tensors_->Matrix(Name(n_.v, "weight"), kv_rows, c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.o, tensors_->Matrix(Name(n_.o, "weight"), c_.hidden, q_rows));
    PREHOC_ASSIGN_OR_RETURN(w.gate, tensors_->Matrix(Name(n_.gate, "weight"), c_.intermediate, c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.up, tensors_->Matrix(Name(n_.up, "weight"), c_.intermediate, c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.down, tensors_->Matrix(Name(n_.down, "weight"), c_.hidden, c_.intermediate));
    PREHOC_ASSIGN_OR_RETURN(w.q_bias, Maybe(parts_.qkv_bias, Name(n_.q, "bias"), q_rows));
    PREHOC_ASSIGN_OR_RETURN(w.k_bias, Maybe(parts_.qkv_bias, Name(n_.k, "bias"), kv_rows));
    PREHOC_ASSIGN_OR_RETURN(w.v_bias, Maybe(parts_.qkv_bias, Name(n_.v, "bias"), kv_rows));
    PREHOC_ASSIGN_OR_RETURN(w.o_bias, Maybe(parts_.o_bias, Name(n_.o, "bias"), c_.hidden));
    PREHOC_ASSIGN_OR_RETURN(w.q_norm, Maybe(parts_.qk_norm, Name(n_.q_norm, "weight"), c_.head_dim));
    PREHOC_ASSIGN_OR_RETURN(w.k_norm, Maybe(parts_.qk_norm, Name(n_.k_norm, "weight"), c_.head_dim));
    return w;
  }

 private:
  std::string Name(std::string_view part, std::string_view suffix) const { return Cat(prefix_, part, ".", suffix); }
  Result<std::vector<float>> Maybe(Presence presence, const std::string& name, int64_t n) {
    const bool wanted =
        presence == Presence::kRequired || (presence == Presence::kOptional && tensors_->Has(name));
    if (!wanted) return std::vector<float>();
    return tensors_->Vector(name, n);
  }

  const ModelConfig& c_;
  const TensorNames& n_;
  const ModelParts& parts_;
  TensorTable* tensors_;
  std::string prefix_;
};

}  // namespace

const TensorNames kGgufNames = {
    .embedding = "token_embd.weight", .output = "output.weight", .output_norm = "output_norm.weight",
    .layer_prefix = "blk.", .attention_norm = "attn_norm", .ffn_norm = "ffn_norm", .q = "attn_q", .k = "attn_k",
    .v = "attn_v", .o = "attn_output", .gate = "ffn_gate", .up = "ffn_up", .down = "ffn_down",
    .q_norm = "attn_q_norm", .k_norm = "attn_k_norm"};

const TensorNames kHuggingFaceNames = {
    .embedding = "model.embed_tokens.weight", .output = "lm_head.weight", .output_norm = "model.norm.weight",
    .layer_prefix = "model.layers.", .attention_norm = "input_layernorm", .ffn_norm = "post_attention_layernorm",
    .q = "self_attn.q_proj", .k = "self_attn.k_proj", .v = "self_attn.v_proj", .o = "self_attn.o_proj",
    .gate = "mlp.gate_proj", .up = "mlp.up_proj", .down = "mlp.down_proj",
    .q_norm = "self_attn.q_norm", .k_norm = "self_attn.k_norm"};

Status ValidateConfig(const ModelConfig& c, std::string_view file) {
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "number of layers", c.layers, kMaxLayers));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "number of heads", c.heads, kMaxHeads));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "number of KV heads", c.kv_heads, kMaxHeads));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "head size", c.head_dim, kMaxHeadDim));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "hidden size", c.hidden, kMaxHidden));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "intermediate size", c.intermediate, kMaxIntermediate));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "vocabulary size", c.vocab, kMaxVocab));
  PREHOC_RETURN_IF_ERROR(CheckRange(file, "number of positions", c.max_positions, kMaxPositions));
  if (c.heads % c.kv_heads != 0) {
    return FileError(StatusCode::kInvalid, file, c.heads, " heads are not a multiple of ", c.kv_heads, " KV heads");
  }
  if (c.head_dim % 2 != 0) return FileError(StatusCode::kInvalid, file, "head size ", c.head_dim, " is odd");
  if (!(c.rms_eps > 0 && c.rms_eps < 1)) {
    return FileError(StatusCode::kInvalid, file, "RMS norm epsilon is ", c.rms_eps, ", expected above 0 and below 1");
  }
  if (c.sliding_window < 0) return FileError(StatusCode::kInvalid, file, "sliding window is ", c.sliding_window);
  return ValidateRope(c, file);
}

Result<std::shared_ptr<Model>> AssembleModel(const ModelConfig& config, const TensorNames& names,
                                             const ModelParts& parts, TensorTable* tensors) {
  auto model = std::make_shared<Model>();
  model->config = config;
  PREHOC_ASSIGN_OR_RETURN(model->embedding, tensors->Matrix(names.embedding, config.vocab, config.hidden));
  PREHOC_ASSIGN_OR_RETURN(model->output_norm, tensors->Vector(names.output_norm, config.hidden));
  if (config.tied_embeddings) {
    model->output = model->embedding;
    tensors->Ignore(names.output);
  } else {
    PREHOC_ASSIGN_OR_RETURN(model->output, tensors->Matrix(names.output, config.vocab, config.hidden));
  }
  LayerReader reader(config, names, parts, tensors);
  for (int32_t layer = 0; layer < config.layers; ++layer) {
    PREHOC_ASSIGN_OR_RETURN(auto weights, reader.Read(layer));
    model->layers.push_back(std::move(weights));
  }
  PREHOC_RETURN_IF_ERROR(tensors->CheckAllUsed());
  model->owners = tensors->TakeOwners();
  model->weight_bytes = WeightBytes(*model);
  return model;
}

size_t WeightBytes(const Model& model) {
  const auto matrix = [](const WeightMatrix& m) { return m.row_bytes * static_cast<size_t>(m.rows); };
  size_t bytes = matrix(model.embedding) + 4 * model.output_norm.size();
  if (model.output.data != model.embedding.data) bytes += matrix(model.output);
  for (const LayerWeights& w : model.layers) {
    for (const auto* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) bytes += matrix(*m);
    for (const auto* v : {&w.attention_norm, &w.ffn_norm, &w.q_bias, &w.k_bias, &w.v_bias, &w.o_bias, &w.q_norm,
                          &w.k_norm}) {
      bytes += 4 * v->size();
    }
  }
  return bytes;
}

}  // namespace prehoc::reference::loader
