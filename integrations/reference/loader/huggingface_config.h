// config.json of transformers models, old and new spellings: model types llama, mistral, qwen2 and qwen3.
#pragma once
#include <optional>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "integrations/reference/loader/assemble.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

struct HuggingFaceConfig {
  ModelConfig model;
  ModelParts parts;
  std::optional<int64_t> bos_id;
  std::vector<int64_t> eos_ids;
};

// What is absent has the default of its model type in transformers; shapes have none and must be there. `file` begins
// messages. Returns kCorrupt (no JSON object), kInvalid (a field's value) or kUnsupported (model type, RoPE type,
// a part that we lack), naming the field and what is supported.
Result<HuggingFaceConfig> ReadHuggingFaceConfig(std::string_view json, std::string_view file);

// The fields of an adapter's config_overrides.json over `config`: rope_theta, max_position_embeddings,
// original_max_position_embeddings, and rope_scaling or rope_parameters, which replace all scaling that was there.
// Returns as above, and kUnsupported for any other field.
Status ApplyConfigOverrides(std::string_view json, std::string_view file, ModelConfig* config);

}  // namespace prehoc::reference::loader
