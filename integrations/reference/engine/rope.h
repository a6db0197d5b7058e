// Rotary position embedding: inverse frequencies of all scaling kinds, tables of a piece, rotation of heads.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "integrations/reference/engine/aligned_floats.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

// Frequencies and the factor on cos and sin, for sequences that reach `length` tokens. Formulas and fp32 rounding as
// in transformers' modeling_rope_utils, so that angles agree far into long contexts too. GGUF's frequency factors
// divide the result. `length` matters to kDynamic and kLongRope alone.
struct RopeFrequencies {
  std::vector<float> inverse;  // [head_dim / 2]
  float magnitude = 1;         // multiplies cos and sin: attention_factor of yarn and longrope
};
RopeFrequencies MakeRopeFrequencies(const ModelConfig& config, int64_t length);

// What `length` means to the frequencies: equal values, equal frequencies. 0 unless they depend on it.
int64_t RopeVariantOf(const ModelConfig& config, int64_t length);

// cos and sin of the positions of one piece.
class RopeTables {
 public:
  RopeTables(const ModelConfig& config, int64_t max_tokens);

  // Positions [first, first + count) of a sequence that reaches `length` tokens.
  void Prepare(int64_t first, int64_t count, int64_t length);
  // Rotates one head [head_dim] of the piece's token `index` in place.
  void Rotate(int64_t index, float* head) const;
  // [count, head_dim / 2] of the piece.
  const float* cos() const { return cos_.data(); }
  const float* sin() const { return sin_.data(); }
  size_t bytes() const { return cos_.bytes() + sin_.bytes(); }

 private:
  const ModelConfig& config_;  // the model's
  const int64_t half_;
  int64_t variant_ = 0;
  RopeFrequencies frequencies_;
  AlignedFloats cos_, sin_;  // [max_tokens, head_dim / 2]
};

}  // namespace prehoc::reference
