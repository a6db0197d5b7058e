// Plain C++: for any processor, and the truth that the vector code is compared with.
#include <algorithm>
#include <cmath>

#include "integrations/reference/engine/kernel_table.h"

namespace prehoc::reference {
namespace {

// Eight running sums: the compiler may keep them in registers side by side without reordering anything.
float Dot(const float* a, const float* b, int64_t n) {
  float sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int64_t j = 0; j < 8; ++j) sum[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Expands a stretch of the row, then multiplies: slow and beyond doubt.
template <WeightType type>
void DotRows(const std::byte* rows, size_t row_bytes, int64_t count, int64_t cols, const Activation& x, float* y) {
  constexpr int64_t kStretch = 256;  // whole blocks of every type
  float expanded[kStretch];
  for (int64_t r = 0; r < count; ++r) {
    const std::byte* row = rows + static_cast<size_t>(r) * row_bytes;
    float sum = 0;
    for (int64_t c = 0; c < cols; c += kStretch) {
      const int64_t n = std::min(kStretch, cols - c);
      DequantizeRow(type, row, n, expanded);
      sum += Dot(expanded, x.values + c, n);
      if (n == kStretch) row += row_bytes * kStretch / static_cast<size_t>(cols);
    }
    y[r] = sum;
  }
}

constexpr int32_t kRows = 4, kCols = 8;
void Tile(int64_t depth, int32_t rows, const float* x, const float* w, float* c, int64_t ldc, bool accumulate) {
  float sum[kRows][kCols] = {};
  for (int64_t k = 0; k < depth; ++k, x += kRows, w += kCols) {
    for (int32_t r = 0; r < kRows; ++r) {
      for (int32_t j = 0; j < kCols; ++j) sum[r][j] += x[r] * w[j];
    }
  }
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t j = 0; j < kCols; ++j) c[r * ldc + j] = accumulate ? c[r * ldc + j] + sum[r][j] : sum[r][j];
  }
}

void Transpose(const float* rows, int64_t stride, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int32_t j = 0; j < kCols; ++j) out[k * kCols + j] = rows[j * stride + k];
  }
}

void SiluMultiply(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

void AddScaled(float a, const float* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

constexpr EngineKernels kTable = {
    .level = SimdLevel::kPlain,
    .dot_rows = {DotRows<WeightType::kF32>, DotRows<WeightType::kF16>, DotRows<WeightType::kBF16>,
                 DotRows<WeightType::kQ8_0>, DotRows<WeightType::kQ4_0>, DotRows<WeightType::kQ4_1>,
                 DotRows<WeightType::kQ4_K>, DotRows<WeightType::kQ6_K>},
    .quantize = nullptr,
    .tile_rows = kRows,
    .tile_cols = kCols,
    .tile = Tile,
    .transpose = Transpose,
    .silu_multiply = SiluMultiply,
    .dot = Dot,
    .add_scaled = AddScaled,
};

}  // namespace

const EngineKernels* PlainEngineKernels() { return &kTable; }

}  // namespace prehoc::reference
