// Models from GGUF files: architectures llama (also Mistral), qwen2 and qwen3.
#pragma once
#include <memory>

#include "base/result.h"
#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

// Weights stay in `file`, which the model keeps alive. No fingerprint yet. Codes as for LoadModel().
Result<std::shared_ptr<Model>> LoadGguf(std::shared_ptr<const MappedFile> file);

}  // namespace prehoc::reference::loader
