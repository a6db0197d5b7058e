#include "integrations/reference/loader/lora_merge.h"

#include <cmath>
#include <cstring>

#include "base/half.h"

namespace prehoc::reference::loader {
namespace {

void AddScaledRow(float weight, const float* row, size_t n, float* sum) {
  for (size_t i = 0; i < n; ++i) sum[i] += weight * row[i];
}

bool AllFinite(const float* values, size_t n) {
  uint32_t bad = 0;
  for (size_t i = 0; i < n; ++i) bad |= static_cast<uint32_t>((std::bit_cast<uint32_t>(values[i]) & 0x7f800000u) == 0x7f800000u);
  return bad == 0;
}

bool StoreHalf(const float* values, size_t n, std::byte* out) {
  constexpr float kMost = 65504;  // larger ones would round to infinity
  float most = 0;
  for (size_t i = 0; i < n; ++i) most = std::max(most, std::fabs(values[i]));
  if (most > kMost) return false;
  for (size_t i = 0; i < n; ++i) {
    const Half half = FloatToHalf(values[i]);
    std::memcpy(out + i * sizeof half, &half, sizeof half);
  }
  return true;
}

}  // namespace

WeightType MergedType(WeightType base) { return base == WeightType::kF32 ? WeightType::kF32 : WeightType::kF16; }

bool MergeRows(const WeightMatrix& base, const LoraFactors& factors, int64_t first, int64_t count, std::byte* out) {
  const auto cols = static_cast<size_t>(base.cols), rank = static_cast<size_t>(factors.rank);
  const bool half = MergedType(base.type) == WeightType::kF16;
  std::vector<float> row(cols), change(cols);
  for (int64_t r = first; r < first + count; ++r) {
    DequantizeRow(base.type, base.row(r), base.cols, row.data());
    std::fill(change.begin(), change.end(), 0.0f);
    const float* b = factors.b.data() + static_cast<size_t>(r) * rank;
    for (size_t k = 0; k < rank; ++k) AddScaledRow(b[k], factors.a.data() + k * cols, cols, change.data());
    AddScaledRow(factors.scale, change.data(), cols, row.data());
    if (!AllFinite(row.data(), cols)) return false;
    if (half && !StoreHalf(row.data(), cols, out)) return false;
    if (!half) std::memcpy(out, row.data(), cols * sizeof(float));
    out += cols * (half ? sizeof(Half) : sizeof(float));
  }
  return true;
}

}  // namespace prehoc::reference::loader
