#include "kernels/row_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace prehoc {
namespace {
constexpr Half kNanHalf = 0x7e00;
constexpr uint8_t kNanE4m3 = 0x7f;

// `num` channels that share a scale.
void Quantise(const Half* x, int32_t num, Half* scale, int8_t* codes) {
  float most = 0;
  for (int32_t i = 0; i < num; ++i) {
    const float magnitude = std::abs(HalfToFloat(x[i]));
    if (!std::isfinite(magnitude)) {
      *scale = kNanHalf;
      std::fill_n(codes, num, int8_t{0});
      return;
    }
    most = std::max(most, magnitude);
  }
  *scale = FloatToHalfUp(most / 127);
  const float s = HalfToFloat(*scale);
  // A scale that was rounded up may make 127 of it more than fp16 has.
  const float largest = 127 * s < 65520 ? 127 : 126;
  for (int32_t i = 0; i < num; ++i) {
    const float code = s > 0 ? std::nearbyint(HalfToFloat(x[i]) / s) : 0;
    codes[i] = static_cast<int8_t>(std::clamp(code, -largest, largest));
  }
}
}  // namespace

Half E4m3ToHalf(uint8_t code) {
  const auto sign = static_cast<Half>((code & 0x80) << 8);
  const int magnitude = code & 0x7f, exponent = magnitude >> 3, mantissa = magnitude & 7;
  if (magnitude == kNanE4m3) return sign | kNanHalf;
  const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return sign | FloatToHalf(value);
}

uint8_t HalfToE4m3(Half value) {
  const auto sign = static_cast<uint8_t>(value >> 8 & 0x80);
  const float magnitude = std::abs(HalfToFloat(value));
  if (!(magnitude <= 464)) return sign | kNanE4m3;  // 464, half way to a 480 that does not exist, is a tie to the even 448
  if (magnitude < 0x1p-6f) return static_cast<uint8_t>(sign | static_cast<int>(std::nearbyint(magnitude * 0x1p9f)));  // 8 is the least normal one
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
  const int eighths = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 4 - exponent)));  // 8 .. 16
  return static_cast<uint8_t>(sign | ((exponent + 6) * 8 + eighths - 8));                     // 16 carries into the exponent
}

void NarrowRow(const Half* row, RowFormat format, int32_t head_dim, void* stored) {
  const int32_t channels = 2 * head_dim;
  if (format == RowFormat::kF16) {
    std::memcpy(stored, row, RowBytes(format, head_dim));
  } else if (format == RowFormat::kE4m3) {
    std::transform(row, row + channels, static_cast<uint8_t*>(stored), HalfToE4m3);
  } else {
    std::memset(stored, 0, RowScaleBytes(head_dim));
    auto* scale = static_cast<Half*>(stored);
    auto* codes = reinterpret_cast<int8_t*>(static_cast<std::byte*>(stored) + RowScaleBytes(head_dim));
    for (int32_t half = 0; half < channels; half += head_dim) {
      for (int32_t c = 0; c < head_dim; c += kScaledChannels) {
        Quantise(row + half + c, std::min(kScaledChannels, head_dim - c), scale++, codes + half + c);
      }
    }
  }
}

void WidenRow(const void* stored, RowFormat format, int32_t head_dim, Half* row) {
  const int32_t channels = 2 * head_dim;
  if (format == RowFormat::kF16) {
    std::memcpy(row, stored, RowBytes(format, head_dim));
  } else if (format == RowFormat::kE4m3) {
    const auto* codes = static_cast<const uint8_t*>(stored);
    std::transform(codes, codes + channels, row, E4m3ToHalf);
  } else {
    const auto* scales = static_cast<const Half*>(stored);
    const auto* codes = reinterpret_cast<const int8_t*>(static_cast<const std::byte*>(stored) + RowScaleBytes(head_dim));
    const auto of_key = static_cast<int32_t>(RowScales(head_dim));
    for (int32_t c = 0; c < channels; ++c) {
      const int32_t scale = c < head_dim ? c / kScaledChannels : of_key + (c - head_dim) / kScaledChannels;
      row[c] = FloatToHalf(static_cast<float>(codes[c]) * HalfToFloat(scales[scale]));
    }
  }
}

}  // namespace prehoc
