// Weight types: names, row sizes, expansion to fp32. Block layouts: the GGUF format's quantisation types.
#include <cstring>

#include "base/check.h"
#include "base/half.h"
#include "integrations/reference/loader/text.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {
namespace {

struct Layout {
  std::string_view name;
  int64_t block;  // [elements]
  size_t bytes;   // of a block
};

constexpr Layout LayoutOf(WeightType type) {
  switch (type) {
    case WeightType::kF32: return {"F32", 1, 4};
    case WeightType::kF16: return {"F16", 1, 2};
    case WeightType::kBF16: return {"BF16", 1, 2};
    case WeightType::kQ8_0: return {"Q8_0", 32, 34};
    case WeightType::kQ4_0: return {"Q4_0", 32, 18};
    case WeightType::kQ4_1: return {"Q4_1", 32, 20};
    case WeightType::kQ4_K: return {"Q4_K", 256, 144};
    case WeightType::kQ6_K: return {"Q6_K", 256, 210};
  }
  return {"?", 1, 1};
}

// Rows may lie at any address: every read of more than a byte goes through a copy.
uint16_t ReadU16(const std::byte* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
float ReadHalf(const std::byte* p) { return HalfToFloat(ReadU16(p)); }
int Byte(const std::byte* p, int i) { return std::to_integer<int>(p[i]); }
int SignedByte(const std::byte* p, int i) { return static_cast<int8_t>(std::to_integer<uint8_t>(p[i])); }

// d, then 32 signed bytes: d * q.
void BlockQ8_0(const std::byte* b, float* y) {
  const float d = ReadHalf(b);
  for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(SignedByte(b + 2, i));
}

// d, then 16 bytes: low nibbles are elements 0..15, high ones 16..31; d * (q - 8).
void BlockQ4_0(const std::byte* b, float* y) {
  const float d = ReadHalf(b);
  for (int i = 0; i < 16; ++i) {
    const int q = Byte(b + 2, i);
    y[i] = d * static_cast<float>((q & 15) - 8);
    y[i + 16] = d * static_cast<float>((q >> 4) - 8);
  }
}

// d, m, then nibbles as in Q4_0: d * q + m.
void BlockQ4_1(const std::byte* b, float* y) {
  const float d = ReadHalf(b), m = ReadHalf(b + 2);
  for (int i = 0; i < 16; ++i) {
    const int q = Byte(b + 4, i);
    y[i] = d * static_cast<float>(q & 15) + m;
    y[i + 16] = d * static_cast<float>(q >> 4) + m;
  }
}

struct ScaleMin {
  int scale, min;
};
// Eight pairs of 6 bits in 12 bytes: the first four pairs lie in the low bits of bytes 0..3 and 4..7, the
// others have 4 bits in bytes 8..11 and their top 2 bits in what the first four left free.
ScaleMin UnpackScaleMin(const std::byte* s, int j) {
  if (j < 4) return {Byte(s, j) & 63, Byte(s, j + 4) & 63};
  return {(Byte(s, j + 4) & 15) | ((Byte(s, j - 4) >> 6) << 4), (Byte(s, j + 4) >> 4) | ((Byte(s, j) >> 6) << 4)};
}

// d, dmin, 12 bytes of scales, then 128 bytes: groups of 64 elements share 32 bytes, low nibbles first.
void BlockQ4_K(const std::byte* b, float* y) {
  const float d = ReadHalf(b), dmin = ReadHalf(b + 2);
  const std::byte* scales = b + 4;
  for (int group = 0; group < 4; ++group) {
    const std::byte* q = b + 16 + 32 * group;
    for (int high = 0; high < 2; ++high) {
      const ScaleMin sm = UnpackScaleMin(scales, 2 * group + high);
      const float scale = d * static_cast<float>(sm.scale), min = dmin * static_cast<float>(sm.min);
      float* out = y + 64 * group + 32 * high;
      for (int i = 0; i < 32; ++i) {
        const int nibble = high ? Byte(q, i) >> 4 : Byte(q, i) & 15;
        out[i] = scale * static_cast<float>(nibble) - min;
      }
    }
  }
}

// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, d: d * scale * (q - 32).
void BlockQ6_K(const std::byte* b, float* y) {
  const float d = ReadHalf(b + 208);
  for (int half = 0; half < 2; ++half) {
    const std::byte* low = b + 64 * half;
    const std::byte* high = b + 128 + 32 * half;
    const std::byte* scales = b + 192 + 8 * half;
    for (int quarter = 0; quarter < 4; ++quarter) {
      float* out = y + 128 * half + 32 * quarter;
      for (int i = 0; i < 32; ++i) {
        const int lows = Byte(low, i + 32 * (quarter & 1));
        const int nibble = quarter < 2 ? lows & 15 : lows >> 4;
        const int q = (nibble | (((Byte(high, i) >> (2 * quarter)) & 3) << 4)) - 32;
        out[i] = d * static_cast<float>(SignedByte(scales, i / 16 + 2 * quarter)) * static_cast<float>(q);
      }
    }
  }
}

template <class Fn>
void ForEachBlock(WeightType type, const std::byte* row, int64_t cols, float* out, Fn&& block) {
  const Layout layout = LayoutOf(type);
  for (int64_t c = 0; c < cols; c += layout.block, row += layout.bytes) block(row, out + c);
}

}  // namespace

std::string_view WeightTypeName(WeightType type) { return LayoutOf(type).name; }

Result<size_t> WeightRowBytes(WeightType type, int64_t cols) {
  const Layout layout = LayoutOf(type);
  if (cols <= 0 || cols % layout.block != 0) {
    return {StatusCode::kInvalid, loader::Cat("a row of ", cols, " elements is not a whole number of ", layout.name,
                                              " blocks (", layout.block, " elements)")};
  }
  size_t bytes = 0;
  if (__builtin_mul_overflow(static_cast<size_t>(cols / layout.block), layout.bytes, &bytes)) {
    return {StatusCode::kInvalid, loader::Cat("a row of ", cols, " elements is too large")};
  }
  return bytes;
}

void DequantizeRow(WeightType type, const std::byte* row, int64_t cols, float* out) {
  PREHOC_DCHECK(cols % LayoutOf(type).block == 0);
  switch (type) {
    case WeightType::kF32: std::memcpy(out, row, static_cast<size_t>(cols) * sizeof(float)); return;
    case WeightType::kF16:
      return ForEachBlock(type, row, cols, out, [](const std::byte* b, float* y) { *y = ReadHalf(b); });
    case WeightType::kBF16:
      return ForEachBlock(type, row, cols, out,
                          [](const std::byte* b, float* y) { *y = BFloat16ToFloat(ReadU16(b)); });
    case WeightType::kQ8_0: return ForEachBlock(type, row, cols, out, BlockQ8_0);
    case WeightType::kQ4_0: return ForEachBlock(type, row, cols, out, BlockQ4_0);
    case WeightType::kQ4_1: return ForEachBlock(type, row, cols, out, BlockQ4_1);
    case WeightType::kQ4_K: return ForEachBlock(type, row, cols, out, BlockQ4_K);
    case WeightType::kQ6_K: return ForEachBlock(type, row, cols, out, BlockQ6_K);
  }
}

}  // namespace prehoc::reference
