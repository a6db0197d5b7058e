// fp16 as stored: conversions that round to nearest even, without needing the CPU's F16C.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

namespace prehoc {

using Half = uint16_t;  // IEEE binary16 bits

constexpr float HalfToFloat(Half h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    // Subnormal: mantissa * 2^-24, exact in fp32.
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Overflow becomes infinity, NaN stays NaN.
constexpr Half FloatToHalf(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t abs = bits & 0x7fffffffu;
  if (abs >= 0x7f800000u) return static_cast<Half>(sign | 0x7c00u | (abs > 0x7f800000u ? 0x200u : 0u));
  if (abs >= 0x477ff000u) return static_cast<Half>(sign | 0x7c00u);
  if (abs < 0x38800000u) {
    // Adding 0.5 puts the mantissa of the subnormal at the end of the fp32 mantissa, rounded to even.
    const float shifted = std::bit_cast<float>(abs) + 0.5f;
    return static_cast<Half>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = abs + 0xfffu + ((abs >> 13) & 1u);
  return static_cast<Half>(sign | ((rounded - 0x38000000u) >> 13));
}

// The smallest fp16 that is not below f (f >= 0): for stored norms that must stay upper bounds.
constexpr Half FloatToHalfUp(float f) {
  const Half h = FloatToHalf(f);
  return (HalfToFloat(h) < f) ? static_cast<Half>(h + 1) : h;
}

constexpr float BFloat16ToFloat(uint16_t b) { return std::bit_cast<float>(uint32_t{b} << 16); }
constexpr uint16_t FloatToBFloat16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace prehoc
