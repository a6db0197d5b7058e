#include "integrations/reference/loader/huggingface_rope.h"

#include <cmath>

#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

using Type = RopeScaling::Type;
constexpr int64_t kMaxPositions = int64_t{1} << 31;
constexpr double kMaxFactor = 65536;

Result<Type> TypeNamed(const std::string& name, const JsonFields& rope) {
  constexpr std::pair<std::string_view, Type> kTypes[] = {
      {"default", Type::kNone}, {"linear", Type::kLinear}, {"dynamic", Type::kDynamic},
      {"yarn", Type::kYarn},    {"llama3", Type::kLlama3}, {"longrope", Type::kLongRope}};
  for (const auto& [known, type] : kTypes) {
    if (name == known) return type;
  }
  return FileError(StatusCode::kUnsupported, rope.file(), Quoted(rope.NameOf("rope_type")), " is ", Quoted(name),
                   "; supported: default, linear, dynamic, yarn, llama3, longrope");
}

class ScalingReader {
 public:
  ScalingReader(const JsonFields& top, const JsonFields& rope, ModelConfig* config)
      : top_(top), rope_(rope), config_(*config) {}

  Status Read() {
    PREHOC_ASSIGN_OR_RETURN(const auto type, rope_.String("rope_type"));
    PREHOC_ASSIGN_OR_RETURN(const auto old_type, rope_.String("type"));
    PREHOC_ASSIGN_OR_RETURN(s_.type, TypeNamed(type.value_or(old_type.value_or("default")), rope_));
    switch (s_.type) {
      case Type::kNone: break;
      case Type::kLinear: PREHOC_RETURN_IF_ERROR(RequiredFactor()); break;
      case Type::kDynamic: PREHOC_RETURN_IF_ERROR(ReadDynamic()); break;
      case Type::kYarn: PREHOC_RETURN_IF_ERROR(ReadYarn()); break;
      case Type::kLlama3: PREHOC_RETURN_IF_ERROR(ReadLlama3()); break;
      case Type::kLongRope: PREHOC_RETURN_IF_ERROR(ReadLongRope()); break;
    }
    config_.rope_scaling = std::move(s_);
    config_.rope_freq_factors.clear();
    return {};
  }

 private:
  Status Missing(const char* key) const {
    return FileError(StatusCode::kInvalid, rope_.file(), Quoted(rope_.NameOf(key)), " is missing");
  }
  Status OptionalFactor() {
    PREHOC_ASSIGN_OR_RETURN(const auto factor, rope_.Float("factor"));
    const double ratio = static_cast<double>(config_.max_positions) / static_cast<double>(s_.original_max_positions);
    s_.factor = factor.value_or(s_.original_max_positions > 0 ? ratio : 1);
    if (s_.factor > 0 && s_.factor <= kMaxFactor) return {};
    return FileError(StatusCode::kInvalid, rope_.file(), Quoted(rope_.NameOf("factor")), " is ", s_.factor,
                     ", expected above 0 and at most ", kMaxFactor);
  }
  Status RequiredFactor() { return rope_.Has("factor") ? OptionalFactor() : Missing("factor"); }

  // Beside the scaling it outranks the one within, as transformers has it for Phi-like files.
  Status ReadOriginalPositions() {
    PREHOC_ASSIGN_OR_RETURN(const auto beside, top_.Integer("original_max_position_embeddings", 1, kMaxPositions));
    PREHOC_ASSIGN_OR_RETURN(const auto within, rope_.Integer("original_max_position_embeddings", 1, kMaxPositions));
    s_.original_max_positions = beside.value_or(within.value_or(config_.max_positions));
    return {};
  }

  // transformers takes max_position_embeddings for what the model was trained on and stretches beyond it.
  Status ReadDynamic() {
    PREHOC_RETURN_IF_ERROR(RequiredFactor());
    s_.original_max_positions = config_.max_positions;
    const double stretched = static_cast<double>(config_.max_positions) * std::max(1.0, s_.factor);
    config_.max_positions = static_cast<int64_t>(std::min(stretched, static_cast<double>(kMaxPositions)));
    return {};
  }

  Status ReadYarn() {
    PREHOC_RETURN_IF_ERROR(ReadOriginalPositions());
    PREHOC_RETURN_IF_ERROR(OptionalFactor());
    PREHOC_ASSIGN_OR_RETURN(s_.attention_factor, rope_.Float("attention_factor"));
    PREHOC_ASSIGN_OR_RETURN(const auto fast, rope_.Float("beta_fast"));
    PREHOC_ASSIGN_OR_RETURN(const auto slow, rope_.Float("beta_slow"));
    PREHOC_ASSIGN_OR_RETURN(const auto mscale, rope_.Float("mscale"));
    PREHOC_ASSIGN_OR_RETURN(const auto mscale_all_dim, rope_.Float("mscale_all_dim"));
    PREHOC_ASSIGN_OR_RETURN(const auto truncate, rope_.Bool("truncate"));
    s_.beta_fast = fast.value_or(0) != 0 ? *fast : 32;  // zero means the default, too
    s_.beta_slow = slow.value_or(0) != 0 ? *slow : 1;
    s_.mscale = mscale.value_or(0);
    s_.mscale_all_dim = mscale_all_dim.value_or(0);
    s_.truncate = truncate.value_or(true);
    return {};
  }

  Status ReadLlama3() {
    PREHOC_RETURN_IF_ERROR(ReadOriginalPositions());
    PREHOC_RETURN_IF_ERROR(RequiredFactor());
    PREHOC_ASSIGN_OR_RETURN(const auto low, rope_.Float("low_freq_factor"));
    PREHOC_ASSIGN_OR_RETURN(const auto high, rope_.Float("high_freq_factor"));
    if (!low) return Missing("low_freq_factor");
    if (!high) return Missing("high_freq_factor");
    s_.low_freq_factor = *low;
    s_.high_freq_factor = *high;
    return {};
  }

  Status ReadLongRope() {
    PREHOC_RETURN_IF_ERROR(ReadOriginalPositions());
    PREHOC_RETURN_IF_ERROR(OptionalFactor());
    PREHOC_ASSIGN_OR_RETURN(s_.attention_factor, rope_.Float("attention_factor"));
    PREHOC_ASSIGN_OR_RETURN(auto short_factor, rope_.Floats("short_factor"));
    PREHOC_ASSIGN_OR_RETURN(auto long_factor, rope_.Floats("long_factor"));
    if (!short_factor) return Missing("short_factor");
    if (!long_factor) return Missing("long_factor");
    s_.short_factor = *std::move(short_factor);
    s_.long_factor = *std::move(long_factor);
    return {};
  }

  const JsonFields& top_;
  const JsonFields& rope_;
  ModelConfig& config_;
  RopeScaling s_;
};

Status CheckWholeHead(const JsonFields& fields) {
  PREHOC_ASSIGN_OR_RETURN(const auto part, fields.Float("partial_rotary_factor"));
  if (part.value_or(1) == 1) return {};
  return FileError(StatusCode::kUnsupported, fields.file(), Quoted(fields.NameOf("partial_rotary_factor")), " is ", *part,
                   "; supported: 1, RoPE over whole heads");
}

// One description for all layers: no objects within.
Status CheckFlat(const JsonFields& rope) {
  for (const std::string& key : rope.Keys()) {
    if (!rope.Object(key.c_str()).ok() || !rope.Has(key.c_str())) continue;
    return FileError(StatusCode::kUnsupported, rope.file(), Quoted(rope.NameOf(key)),
                     " describes RoPE for some layers; supported: one description for all");
  }
  return {};
}

}  // namespace

Status ReadRope(const JsonFields& fields, ModelConfig* config) {
  PREHOC_RETURN_IF_ERROR(CheckWholeHead(fields));
  PREHOC_ASSIGN_OR_RETURN(const auto theta, fields.Float("rope_theta"));
  if (theta) config->rope_theta = *theta;
  PREHOC_ASSIGN_OR_RETURN(const auto parameters, fields.Object("rope_parameters"));
  PREHOC_ASSIGN_OR_RETURN(const auto scaling, fields.Object("rope_scaling"));
  const auto& rope = scaling && !scaling->Keys().empty() ? scaling : parameters;
  if (!rope || rope->Keys().empty()) return {};
  PREHOC_RETURN_IF_ERROR(CheckFlat(*rope));
  PREHOC_RETURN_IF_ERROR(CheckWholeHead(*rope));
  PREHOC_ASSIGN_OR_RETURN(const auto inner_theta, rope->Float("rope_theta"));
  if (inner_theta) config->rope_theta = *inner_theta;
  return ScalingReader(fields, *rope, config).Read();
}

}  // namespace prehoc::reference::loader
