// From named tensors and a configuration to a Model: the part that all file formats share.
#pragma once
#include <memory>
#include <string_view>

#include "base/result.h"
#include "integrations/reference/loader/tensor_table.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

// What a format calls the tensors. A layer's are `layer_prefix` N `.` part `.weight` (or `.bias`).
struct TensorNames {
  std::string_view embedding, output, output_norm, layer_prefix;
  std::string_view attention_norm, ffn_norm, q, k, v, o, gate, up, down, q_norm, k_norm;
};
extern const TensorNames kGgufNames;
extern const TensorNames kHuggingFaceNames;

enum class Presence { kAbsent, kOptional, kRequired };
struct ModelParts {
  Presence qkv_bias = Presence::kAbsent;
  Presence o_bias = Presence::kAbsent;
  Presence qk_norm = Presence::kAbsent;
};

// Finds values that no real model has. Returns kInvalid, naming the field, its value and its range.
Status ValidateConfig(const ModelConfig& config, std::string_view file);

// Takes every weight that `config` calls for. The result has no tokenizer and no fingerprint yet; its owners are
// the table's copies, the caller adds the files.
// Returns kCorrupt (missing, wrong shape) or kUnsupported (types, tensors without a place).
Result<std::shared_ptr<Model>> AssembleModel(const ModelConfig& config, const TensorNames& names,
                                             const ModelParts& parts, TensorTable* tensors);

// Sums up what the weights occupy, the embedding once.
size_t WeightBytes(const Model& model);

}  // namespace prehoc::reference::loader
