// A name for what a model computes: stored keys and values are only good for the weights that made them.
#pragma once
#include <array>
#include <cstdint>

#include "base/executor.h"
#include "base/result.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

// SHA-256 over the configuration (its name left out) and the hashes of all weights, each hashed in pieces that
// run on `executor` at once. The result does not depend on the executor. Returns kInvalid if the crypto library
// refuses SHA-256. Reads every weight byte once.
Result<std::array<uint8_t, 32>> FingerprintOf(const Model& model, Executor& executor);

}  // namespace prehoc::reference::loader
