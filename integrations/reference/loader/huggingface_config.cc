#include "integrations/reference/loader/huggingface_config.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "integrations/reference/loader/huggingface_rope.h"
#include "integrations/reference/loader/json.h"
#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// What transformers assumes where a file is silent; kv_heads 0 = as many as heads.
struct Family {
  std::string_view name;
  int64_t max_positions;
  int32_t kv_heads;
  int32_t head_dim;    // 0 = hidden / heads
  int64_t window;      // of sliding attention; only Mistral uses one unasked
};
constexpr Family kFamilies[] = {
    {"llama", 2048, 0, 0, 0},
    {"mistral", 131072, 8, 0, 4096},
    {"qwen2", 32768, 32, 0, 4096},
    {"qwen3", 32768, 32, 128, 4096},
};

class ConfigReader {
 public:
  explicit ConfigReader(const JsonFields& fields) : f_(fields) {}

  Result<HuggingFaceConfig> Read() {
    PREHOC_RETURN_IF_ERROR(ReadFamily());
    PREHOC_RETURN_IF_ERROR(RefuseWhatWeLack());
    PREHOC_RETURN_IF_ERROR(ReadShape());
    PREHOC_RETURN_IF_ERROR(ReadParts());
    PREHOC_RETURN_IF_ERROR(ReadRope(f_, &c_));
    PREHOC_RETURN_IF_ERROR(ReadWindow());
    PREHOC_ASSIGN_OR_RETURN(out_.bos_id, f_.Integer("bos_token_id", -1, kMaxInt32));
    PREHOC_ASSIGN_OR_RETURN(out_.eos_ids, f_.IntegerOrList("eos_token_id", -1, kMaxInt32));
    PREHOC_RETURN_IF_ERROR(ValidateConfig(c_, f_.file()));
    out_.model = std::move(c_);
    return std::move(out_);
  }

 private:
  bool Is(std::string_view family) const { return family_->name == family; }

  Status ReadFamily() {
    PREHOC_ASSIGN_OR_RETURN(const auto type, f_.String("model_type"));
    if (!type) return FileError(StatusCode::kInvalid, f_.file(), "'model_type' is missing");
    family_ = std::ranges::find(kFamilies, *type, &Family::name);
    if (family_ == std::end(kFamilies)) {
      return FileError(StatusCode::kUnsupported, f_.file(), "model type ", Quoted(*type),
                       "; supported: llama, mistral, qwen2, qwen3");
    }
    c_.architecture = *type;
    c_.rope_layout = RopeLayout::kHalf;
    return {};
  }

  Status RefuseWhatWeLack() {
    PREHOC_ASSIGN_OR_RETURN(const auto activation, f_.String("hidden_act"));
    if (activation.value_or("silu") != "silu") {
      return FileError(StatusCode::kUnsupported, f_.file(), "'hidden_act' is ", Quoted(*activation), "; supported: silu");
    }
    PREHOC_ASSIGN_OR_RETURN(const auto mlp_bias, f_.Bool("mlp_bias"));
    if (mlp_bias.value_or(false)) {
      return FileError(StatusCode::kUnsupported, f_.file(), "'mlp_bias' is true; supported: false");
    }
    if (!f_.Has("quantization_config")) return {};
    return FileError(StatusCode::kUnsupported, f_.file(),
                     "'quantization_config': quantised safetensors; supported: F32, F16 and BF16, or a GGUF file");
  }

  Result<int32_t> Required(const char* key) {
    PREHOC_ASSIGN_OR_RETURN(const auto value, f_.Integer(key, 1, kMaxInt32));
    if (!value) return FileError(StatusCode::kInvalid, f_.file(), Quoted(key), " is missing");
    return static_cast<int32_t>(*value);
  }
  Result<int32_t> Or(const char* key, int32_t fallback) {
    PREHOC_ASSIGN_OR_RETURN(const auto value, f_.Integer(key, 1, kMaxInt32));
    return value ? static_cast<int32_t>(*value) : fallback;
  }

  Status ReadShape() {
    PREHOC_ASSIGN_OR_RETURN(c_.layers, Required("num_hidden_layers"));
    PREHOC_ASSIGN_OR_RETURN(c_.hidden, Required("hidden_size"));
    PREHOC_ASSIGN_OR_RETURN(c_.intermediate, Required("intermediate_size"));
    PREHOC_ASSIGN_OR_RETURN(c_.heads, Required("num_attention_heads"));
    PREHOC_ASSIGN_OR_RETURN(c_.vocab, Required("vocab_size"));
    PREHOC_ASSIGN_OR_RETURN(c_.kv_heads, Or("num_key_value_heads", family_->kv_heads > 0 ? family_->kv_heads : c_.heads));
    PREHOC_ASSIGN_OR_RETURN(c_.head_dim, Or("head_dim", family_->head_dim > 0 ? family_->head_dim : c_.hidden / c_.heads));
    PREHOC_ASSIGN_OR_RETURN(const auto positions, f_.Integer("max_position_embeddings", 1, kMaxInt32));
    c_.max_positions = positions.value_or(family_->max_positions);
    PREHOC_ASSIGN_OR_RETURN(const auto eps, f_.Float("rms_norm_eps"));
    c_.rms_eps = static_cast<float>(eps.value_or(1e-6));
    return {};
  }

  Status ReadParts() {
    PREHOC_ASSIGN_OR_RETURN(const auto tied, f_.Bool("tie_word_embeddings"));
    c_.tied_embeddings = tied.value_or(false);
    PREHOC_ASSIGN_OR_RETURN(const auto bias, f_.Bool("attention_bias"));
    // Mistral and Qwen2 have no such choice.
    const bool all_biased = bias.value_or(false) && (Is("llama") || Is("qwen3"));
    out_.parts.qkv_bias = all_biased || Is("qwen2") ? Presence::kRequired : Presence::kAbsent;
    out_.parts.o_bias = all_biased ? Presence::kRequired : Presence::kAbsent;
    out_.parts.qk_norm = Is("qwen3") ? Presence::kRequired : Presence::kAbsent;
    return {};
  }

  Status ReadWindow() {
    if (Is("llama")) return {};
    PREHOC_ASSIGN_OR_RETURN(const auto use, f_.Bool("use_sliding_window"));
    PREHOC_ASSIGN_OR_RETURN(const auto window, f_.Integer("sliding_window", 1, kMaxInt32));
    // A null window means none, an absent one the default.
    const int64_t wanted = window.value_or(f_.Names("sliding_window") ? 0 : family_->window);
    const bool used = Is("mistral") || use.value_or(false);
    PREHOC_ASSIGN_OR_RETURN(const int32_t sliding, SlidingLayers(used && wanted > 0));
    if (!used || sliding == 0 || wanted >= c_.max_positions) return {};
    if (sliding != c_.layers) {
      return FileError(StatusCode::kUnsupported, f_.file(), "a sliding window in ", sliding, " of ", c_.layers,
                       " layers; supported: in all or none");
    }
    c_.sliding_window = wanted;
    return {};
  }

  // How many layers attend through a window, if there is one.
  Result<int32_t> SlidingLayers(bool has_window) {
    PREHOC_ASSIGN_OR_RETURN(const auto types, f_.Strings("layer_types"));
    if (!types) {
      if (!has_window) return 0;
      if (Is("mistral")) return c_.layers;
      PREHOC_ASSIGN_OR_RETURN(const auto full, f_.Integer("max_window_layers", 0, kMaxInt32));
      return c_.layers - static_cast<int32_t>(std::min<int64_t>(full.value_or(28), c_.layers));
    }
    if (types->size() != static_cast<size_t>(c_.layers)) {
      return FileError(StatusCode::kInvalid, f_.file(), "'layer_types' has ", types->size(), " entries for ", c_.layers, " layers");
    }
    const auto sliding = std::ranges::count(*types, "sliding_attention");
    const auto other = c_.layers - sliding - std::ranges::count(*types, "full_attention");
    if (other != 0) {
      return FileError(StatusCode::kUnsupported, f_.file(),
                       "'layer_types' has other kinds than full_attention and sliding_attention");
    }
    if (sliding != 0 && !has_window) {
      return FileError(StatusCode::kInvalid, f_.file(), "'layer_types' has sliding_attention without a 'sliding_window' in use");
    }
    return static_cast<int32_t>(sliding);
  }

  const JsonFields& f_;
  const Family* family_ = nullptr;
  ModelConfig c_;
  HuggingFaceConfig out_;
};

}  // namespace

Result<HuggingFaceConfig> ReadHuggingFaceConfig(std::string_view json, std::string_view file) {
  PREHOC_ASSIGN_OR_RETURN(const Json object, ParseJsonObject(json, file));
  return ConfigReader(JsonFields(object, file)).Read();
}

Status ApplyConfigOverrides(std::string_view json, std::string_view file, ModelConfig* config) {
  constexpr std::string_view kKnown[] = {"rope_theta", "max_position_embeddings", "original_max_position_embeddings",
                                         "rope_scaling", "rope_parameters"};
  PREHOC_ASSIGN_OR_RETURN(const Json object, ParseJsonObject(json, file));
  const JsonFields fields(object, file);
  for (const std::string& key : fields.Keys()) {
    if (std::ranges::find(kKnown, key) != std::end(kKnown)) continue;
    return FileError(StatusCode::kUnsupported, file, Quoted(key),
                     " cannot be overridden; supported: rope_theta, max_position_embeddings, "
                     "original_max_position_embeddings, rope_scaling, rope_parameters");
  }
  ModelConfig changed = *config;
  PREHOC_ASSIGN_OR_RETURN(const auto positions, fields.Integer("max_position_embeddings", 1, kMaxInt32));
  if (positions) changed.max_positions = *positions;
  PREHOC_RETURN_IF_ERROR(ReadRope(fields, &changed));
  PREHOC_RETURN_IF_ERROR(ValidateConfig(changed, file));
  *config = std::move(changed);
  return {};
}

}  // namespace prehoc::reference::loader
