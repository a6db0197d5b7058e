// W + scale * B A for one weight matrix, in fp32, the same on every machine.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

struct LoraFactors {
  int64_t rank = 0;
  float scale = 0;
  std::vector<float> a;  // [rank, cols]
  std::vector<float> b;  // [rows, rank], rows in the order of the matrix
};

// What a merged matrix is stored as: F32 stays F32, everything else becomes F16, which has finer steps than BF16 at
// the same size and is far finer than any quantised base.
WeightType MergedType(WeightType base);

// Writes rows [first, first + count) of the merged matrix to `out`, as rows of MergedType(). Sums run over the rank
// in order, without fused multiply-adds. Returns false if a value is not finite there; `out` is unspecified then.
bool MergeRows(const WeightMatrix& base, const LoraFactors& factors, int64_t first, int64_t count, std::byte* out);

// The row of a Hugging Face matrix that row `row` of a GGUF file of the llama architecture holds: there, each head's
// two halves are interleaved, so that RoPE pairs neighbours.
constexpr int64_t HuggingFaceRowOfInterleaved(int64_t row, int64_t head_dim) {
  const int64_t within = row % head_dim;
  return row - within + within % 2 * (head_dim / 2) + within / 2;
}

}  // namespace prehoc::reference::loader
