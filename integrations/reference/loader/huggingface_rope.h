// RoPE as transformers configurations describe it: rope_theta and rope_scaling, or rope_parameters with both.
#pragma once
#include "base/result.h"
#include "integrations/reference/loader/json.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

// Sets rope_theta, rope_scaling and, for dynamic scaling, max_positions from the fields that are there; requires
// max_positions. Where a scaling is given, it replaces the earlier one and rope_freq_factors.
// Returns kInvalid or kUnsupported, naming the field.
Status ReadRope(const JsonFields& fields, ModelConfig* config);

}  // namespace prehoc::reference::loader
