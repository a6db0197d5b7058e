// The engine's inner loops behind one table: plain C++, AVX2 and AVX-512 fill the same entries. Internal to engine/.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "integrations/reference/engine/simd_level.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

// One vector, as rows of weights are multiplied with it. A block is 32 elements; the arrays of blocks are padded with
// zeros to a multiple of 8 blocks. Only `values` is read for F32, F16 and BF16, and at all by plain C++.
struct Activation {
  const float* values = nullptr;   // [cols]
  const int16_t* codes = nullptr;  // [cols]: values ~ codes * scale[block]
  const float* scale = nullptr;    // [blocks]: largest magnitude / 32767
  const float* sum = nullptr;      // [blocks]: scale * sum of the codes; multiplies the minimum of a weight block
};

struct EngineKernels {
  SimdLevel level = SimdLevel::kPlain;

  // y[i] = row i . x for `count` rows; by WeightType. The result of a row does not depend on its neighbours.
  using DotRows = void (*)(const std::byte* rows, size_t row_bytes, int64_t count, int64_t cols, const Activation& x,
                           float* y);
  std::array<DotRows, 8> dot_rows{};
  // Fills codes, scale and sum of an Activation; cols is a multiple of 32. Null: dot_rows reads `values` only.
  void (*quantize)(const float* x, int64_t cols, int16_t* codes, float* scale, float* sum) = nullptr;

  // The matrix product's inner tile, for r < rows <= tile_rows and j < tile_cols:
  //   c[r * ldc + j] = (accumulate ? c : 0) + SUM_k x[k * tile_rows + r] * w[k * tile_cols + j]
  // summed in the order of k, whatever `rows` is. x and w are aligned to 64 bytes.
  int32_t tile_rows = 0, tile_cols = 0;
  void (*tile)(int64_t depth, int32_t rows, const float* x, const float* w, float* c, int64_t ldc,
               bool accumulate) = nullptr;

  // out[k * tile_cols + j] = rows[j * stride + k] for k < depth and j < tile_cols: expanded weights become w of a tile.
  void (*transpose)(const float* rows, int64_t stride, int64_t depth, float* out) = nullptr;

  void (*silu_multiply)(const float* gate, const float* up, int64_t n, float* out) = nullptr;  // silu(gate) * up
  float (*dot)(const float* a, const float* b, int64_t n) = nullptr;
  void (*add_scaled)(float a, const float* x, int64_t n, float* y) = nullptr;  // y += a x
};

constexpr int32_t kMaxTileRows = 16, kMaxTileCols = 64;
constexpr bool IsBlockType(WeightType type) { return type >= WeightType::kQ8_0; }

// Requires SimdLevelAvailable(level).
const EngineKernels& KernelsFor(SimdLevel level);

// Filled in files of their own, compiled with the flags of their level; null in builds for other processors.
const EngineKernels* PlainEngineKernels();
const EngineKernels* Avx2EngineKernels();
const EngineKernels* Avx512EngineKernels();

}  // namespace prehoc::reference
