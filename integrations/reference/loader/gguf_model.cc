#include "integrations/reference/loader/gguf_model.h"

#include <cmath>
#include <limits>

#include "integrations/reference/loader/assemble.h"
#include "integrations/reference/loader/gguf_file.h"
#include "integrations/reference/loader/gguf_tokenizer.h"
#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

class ConfigReader {
 public:
  explicit ConfigReader(GgufFile* gguf) : gguf_(*gguf) {}

  Result<ModelConfig> Read() {
    PREHOC_RETURN_IF_ERROR(ReadArchitecture());
    PREHOC_RETURN_IF_ERROR(ReadShape());
    PREHOC_RETURN_IF_ERROR(ReadRope());
    PREHOC_RETURN_IF_ERROR(RefuseWhatWeLack());
    c_.tied_embeddings = !gguf_.tensors().Has(kGgufNames.output);
    PREHOC_RETURN_IF_ERROR(ValidateConfig(c_, gguf_.path()));
    return c_;
  }

 private:
  std::string Key(std::string_view suffix) const { return Cat(c_.architecture, ".", suffix); }

  Status ReadArchitecture() {
    PREHOC_ASSIGN_OR_RETURN(const auto architecture, gguf_.String("general.architecture"));
    if (!architecture) {
      return FileError(StatusCode::kCorrupt, gguf_.path(), "metadata 'general.architecture' is missing");
    }
    if (*architecture != "llama" && *architecture != "qwen2" && *architecture != "qwen3") {
      return FileError(StatusCode::kUnsupported, gguf_.path(), "architecture ", Quoted(*architecture),
                       "; supported: llama (also Mistral), qwen2, qwen3");
    }
    c_.architecture = *architecture;
    c_.rope_layout = *architecture == "llama" ? RopeLayout::kInterleaved : RopeLayout::kHalf;
    PREHOC_ASSIGN_OR_RETURN(const auto name, gguf_.String("general.name"));
    c_.name = name.value_or(*architecture);
    return {};
  }

  Result<int32_t> Required(std::string_view suffix) {
    PREHOC_ASSIGN_OR_RETURN(const auto value, gguf_.Integer(Key(suffix), 1, kMaxInt32));
    if (!value) return FileError(StatusCode::kCorrupt, gguf_.path(), "metadata ", Quoted(Key(suffix)), " is missing");
    return static_cast<int32_t>(*value);
  }
  Result<int32_t> Or(std::string_view suffix, int32_t fallback) {
    PREHOC_ASSIGN_OR_RETURN(const auto value, gguf_.Integer(Key(suffix), 1, kMaxInt32));
    return value ? static_cast<int32_t>(*value) : fallback;
  }
  Result<double> FloatOr(std::string_view suffix, double fallback) {
    PREHOC_ASSIGN_OR_RETURN(const auto value, gguf_.Float(Key(suffix)));
    return value.value_or(fallback);
  }

  Status ReadShape() {
    PREHOC_ASSIGN_OR_RETURN(c_.layers, Required("block_count"));
    PREHOC_ASSIGN_OR_RETURN(c_.hidden, Required("embedding_length"));
    PREHOC_ASSIGN_OR_RETURN(c_.intermediate, Required("feed_forward_length"));
    PREHOC_ASSIGN_OR_RETURN(c_.heads, Required("attention.head_count"));
    PREHOC_ASSIGN_OR_RETURN(c_.kv_heads, Or("attention.head_count_kv", c_.heads));
    PREHOC_ASSIGN_OR_RETURN(c_.max_positions, Required("context_length"));
    PREHOC_ASSIGN_OR_RETURN(const double eps, FloatOr("attention.layer_norm_rms_epsilon", 1e-5));
    c_.rms_eps = static_cast<float>(eps);
    PREHOC_ASSIGN_OR_RETURN(c_.head_dim, Or("attention.key_length", c_.hidden / c_.heads));
    PREHOC_ASSIGN_OR_RETURN(const int32_t value_length, Or("attention.value_length", c_.head_dim));
    if (value_length != c_.head_dim) {
      return FileError(StatusCode::kUnsupported, gguf_.path(), "keys of ", c_.head_dim, " and values of ",
                       value_length, " elements; supported: both the same");
    }
    PREHOC_ASSIGN_OR_RETURN(const auto window, gguf_.Integer(Key("attention.sliding_window"), 0, kMaxInt32));
    c_.sliding_window = window.value_or(0) < c_.max_positions ? window.value_or(0) : 0;
    return ReadVocabularySize();
  }

  // The embedding decides; the key is optional and must agree.
  Status ReadVocabularySize() {
    const Tensor* embedding = gguf_.tensors().Find(kGgufNames.embedding);
    if (embedding == nullptr || embedding->shape.size() != 2 || embedding->shape[0] > kMaxInt32) {
      return FileError(StatusCode::kCorrupt, gguf_.path(), "tensor '", kGgufNames.embedding,
                       "' is missing or not a matrix [vocabulary, ", c_.hidden, "]");
    }
    c_.vocab = static_cast<int32_t>(embedding->shape[0]);
    PREHOC_ASSIGN_OR_RETURN(const int32_t declared, Or("vocab_size", c_.vocab));
    if (declared == c_.vocab) return {};
    return FileError(StatusCode::kCorrupt, gguf_.path(), "metadata ", Quoted(Key("vocab_size")), " is ", declared,
                     ", tensor '", kGgufNames.embedding, "' has ", c_.vocab, " rows");
  }

  Status ReadRope() {
    PREHOC_ASSIGN_OR_RETURN(c_.rope_theta, FloatOr("rope.freq_base", 10000));
    PREHOC_ASSIGN_OR_RETURN(const int32_t rotated, Or("rope.dimension_count", c_.head_dim));
    if (rotated != c_.head_dim) {
      return FileError(StatusCode::kUnsupported, gguf_.path(), "RoPE over ", rotated, " of ", c_.head_dim,
                       " elements of a head; supported: all");
    }
    if (gguf_.tensors().Has("rope_freqs.weight")) {
      PREHOC_ASSIGN_OR_RETURN(c_.rope_freq_factors, gguf_.tensors().Vector("rope_freqs.weight", c_.head_dim / 2));
    }
    PREHOC_ASSIGN_OR_RETURN(const auto type, gguf_.String(Key("rope.scaling.type")));
    PREHOC_ASSIGN_OR_RETURN(const auto old_factor, gguf_.Float(Key("rope.scale_linear")));
    RopeScaling& s = c_.rope_scaling;
    PREHOC_ASSIGN_OR_RETURN(s.factor, FloatOr("rope.scaling.factor", old_factor.value_or(1)));
    // Files from before the type key scale linearly.
    const std::string name = type.value_or(s.factor != 1 ? "linear" : "none");
    if (name == "none") {
      s = {};
    } else if (name == "linear") {
      s.type = RopeScaling::Type::kLinear;
    } else if (name == "yarn") {
      PREHOC_RETURN_IF_ERROR(ReadYarn(&s));
    } else {
      return FileError(StatusCode::kUnsupported, gguf_.path(), "RoPE scaling ", Quoted(name),
                       "; supported: none, linear, yarn, and rope_freqs.weight");
    }
    return {};
  }

  Status ReadYarn(RopeScaling* s) {
    s->type = RopeScaling::Type::kYarn;
    PREHOC_ASSIGN_OR_RETURN(const auto original,
                            gguf_.Integer(Key("rope.scaling.original_context_length"), 1, kMaxInt32));
    s->original_max_positions = original.value_or(c_.max_positions);
    PREHOC_ASSIGN_OR_RETURN(s->beta_fast, FloatOr("rope.scaling.yarn_beta_fast", 32));
    PREHOC_ASSIGN_OR_RETURN(s->beta_slow, FloatOr("rope.scaling.yarn_beta_slow", 1));
    PREHOC_ASSIGN_OR_RETURN(const double extrapolation, FloatOr("rope.scaling.yarn_ext_factor", 1));
    PREHOC_ASSIGN_OR_RETURN(const double log_multiplier, FloatOr("rope.scaling.yarn_log_multiplier", 0));
    if (extrapolation != 1 || log_multiplier != 0) {
      return FileError(StatusCode::kUnsupported, gguf_.path(), "yarn_ext_factor ", extrapolation,
                       " and yarn_log_multiplier ", log_multiplier, "; supported: 1 and 0");
    }
    // The format's attention factor multiplies yarn's own magnitude; ours replaces it.
    PREHOC_ASSIGN_OR_RETURN(const double old_name, FloatOr("rope.scaling.attn_factor", 1));
    PREHOC_ASSIGN_OR_RETURN(const double multiplier, FloatOr("rope.scaling.yarn_attn_factor", old_name));
    if (multiplier != 1) s->attention_factor = multiplier * (s->factor > 1 ? 0.1 * std::log(s->factor) + 1 : 1);
    return {};
  }

  Status RefuseWhatWeLack() {
    PREHOC_ASSIGN_OR_RETURN(const auto experts, gguf_.Integer(Key("expert_count"), 0, kMaxInt32));
    if (experts.value_or(0) == 0) return {};
    return FileError(StatusCode::kUnsupported, gguf_.path(), "a mixture of ", *experts,
                     " experts; supported: dense models");
  }

  GgufFile& gguf_;
  ModelConfig c_;
};

ModelParts PartsOf(const std::string& architecture) {
  if (architecture == "qwen2") return {Presence::kRequired, Presence::kOptional, Presence::kAbsent};
  if (architecture == "qwen3") return {Presence::kOptional, Presence::kOptional, Presence::kRequired};
  return {Presence::kOptional, Presence::kOptional, Presence::kAbsent};
}

}  // namespace

Result<std::shared_ptr<Model>> LoadGguf(std::shared_ptr<const MappedFile> file) {
  PREHOC_ASSIGN_OR_RETURN(auto gguf, GgufFile::Parse(file));
  PREHOC_ASSIGN_OR_RETURN(const ModelConfig config, ConfigReader(&gguf).Read());
  PREHOC_ASSIGN_OR_RETURN(TokenizerSpec tokenizer, GgufTokenizer(gguf));
  if (!tokenizer.tokens.empty() && tokenizer.tokens.size() != static_cast<size_t>(config.vocab)) {
    return FileError(StatusCode::kCorrupt, file->path(), "the tokenizer has ", tokenizer.tokens.size(),
                     " tokens, the embedding ", config.vocab, " rows");
  }
  PREHOC_ASSIGN_OR_RETURN(auto model,
                          AssembleModel(config, kGgufNames, PartsOf(config.architecture), &gguf.tensors()));
  model->tokenizer = std::move(tokenizer);
  model->owners.push_back(std::move(file));
  return model;
}

}  // namespace prehoc::reference::loader
