// Models from directories as transformers saves them: config.json, safetensors, tokenizer.json.
#pragma once
#include <memory>
#include <string>

#include "base/result.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

// Weights stay in the mapped files, which the model keeps alive. No fingerprint yet. Codes as for LoadModel().
// tokenizer_config.json, generation_config.json and chat_template.jinja are read where they are there; without
// tokenizer.json the spec has no tokens.
Result<std::shared_ptr<Model>> LoadHuggingFace(const std::string& directory);

}  // namespace prehoc::reference::loader
