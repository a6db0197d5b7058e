// A PEFT adapter directory, merged into a loaded model.
#pragma once
#include <functional>
#include <string>

#include "base/executor.h"
#include "base/status.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

// Reads adapter_config.json, adapter_model.safetensors and, where it is there, config_overrides.json from `directory`.
// Every module that the adapter names is replaced, in every layer, by a buffer that `model` owns; the other weights
// stay where they are. The result does not depend on the executor. `progress` (may be empty) gets fractions.
// Returns kNotFound, kCorrupt (missing tensors, shapes, values that are not finite), kInvalid or kUnsupported, naming
// file and field; `model` is then good for nothing.
Status MergeLora(const std::string& directory, Executor& executor, const std::function<void(double)>& progress,
                 Model* model);

}  // namespace prehoc::reference::loader
