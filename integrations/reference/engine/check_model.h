// Is this model one that the engine can run?
#pragma once
#include "base/status.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

// Returns kInvalid (a configuration or weights whose shapes disagree, naming the weight and both shapes) or
// kUnsupported (dynamic RoPE on heads of 2).
Status CheckModel(const Model& model);

}  // namespace prehoc::reference
