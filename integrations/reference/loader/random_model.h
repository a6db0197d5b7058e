// Models of a known geometry with random weights: for measurements and tests of what does not depend on what the weights say.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/result.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

// llama-3.1-8b, llama-2-7b, mistral-7b, qwen3-8b (their published configurations), and tiny: two layers, for tests.
std::span<const std::string_view> RandomModelShapes();

struct RandomModelOptions {
  std::string shape;  // one of RandomModelShapes()
  uint64_t seed = 1;
  std::function<void(double fraction)> progress;  // may be empty
};

// Weights are fp16, normal with a deviation of 1 / sqrt(cols) (quantiles of 16 bits: none beyond 4.2 deviations), norms near one; each
// depends on shape, seed and its place alone. The tokenizer stands in: a token a byte, then an end token; what is left of the
// vocabulary has names that no text means. The fingerprint names shape and seed. A shape of 8 billion weights takes 16 GB and about a second of 16 CPUs.
// Returns kInvalid (naming the known shapes), kOutOfSpace.
Result<std::shared_ptr<const Model>> MakeRandomModel(const RandomModelOptions& options);

}  // namespace prehoc::reference
