// How exact a prompt's products are on a GPU.
#pragma once
#include <cstdint>
#include <optional>
#include <string_view>

namespace prehoc {

// What becomes of fp32 activations, queries and attention's weights on their way into the tensor cores; sums are fp32 either way.
enum class PromptPrecision : uint8_t {
  kSplit,  // sums of two 16-bit numbers: errors of some 2^-21 (fp16) or 2^-16 (bf16)
  kHalf,   // rounded to 16 bits once, as serving engines do, at half the work: 2^-12 or 2^-9
};

constexpr std::string_view PromptPrecisionName(PromptPrecision precision) { return precision == PromptPrecision::kHalf ? "half" : "fp32"; }
constexpr std::optional<PromptPrecision> FindPromptPrecision(std::string_view name) {
  for (const PromptPrecision p : {PromptPrecision::kSplit, PromptPrecision::kHalf}) {
    if (name == PromptPrecisionName(p)) return p;
  }
  return std::nullopt;
}

}  // namespace prehoc
