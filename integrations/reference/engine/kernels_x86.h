// The vector code of one level. Included by kernels_avx2.cc and kernels_avx512.cc alone, whose flags decide what the
// branches below mean. Everything has internal linkage and nothing of the standard library is instantiated here: a
// function compiled for AVX-512 must never be the copy that the linker keeps for all processors.
//
// Rows of 4-bit and 8-bit blocks are multiplied in integers: codes of the weight times 16-bit codes of the activation,
// pairwise into 32-bit lanes. A lane holds at most four products of a block, below 2^24: its conversion to fp32 is exact.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "integrations/reference/engine/kernel_table.h"

namespace prehoc::reference {
namespace {

inline float SumLanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t SumLanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
inline __m256i LoadCodes(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m128i Load16(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i Load32(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <class T>
inline T LoadAs(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Weights stream from memory, and the hardware's own prefetch stops at each page of 4 KiB: asking half a page ahead
// gained 35 to 45 % on rows that do not fit a cache. The address need not exist.
inline void FetchAhead(const std::byte* p) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + 2048), _MM_HINT_T0);
}

// Pairwise products of 32 weight codes and 32 activation codes.
inline __m256i Multiply32(__m256i w0, __m256i w1, const int16_t* x) {
  const __m256i first = _mm256_madd_epi16(w0, LoadCodes(x));
#if defined(__AVX512VNNI__)
  return _mm256_dpwssd_epi32(first, w1, LoadCodes(x + 16));
#else
  return _mm256_add_epi32(first, _mm256_madd_epi16(w1, LoadCodes(x + 16)));
#endif
}
inline __m256 Accumulate(__m256i products, const float* scale, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_broadcast_ss(scale), sum);
}

constexpr int64_t kStretch = 64;  // blocks whose scales are unpacked at once; a multiple of 8

// --- rows of blocks with one fp16 scale (and minimum) -----------------------------------------------------------
// Each format gives: kBytes; Head, the scale bits of a block as a number; Scales(), eight blocks' scales (and
// minima) as fp32; Products(), the integer products of a block.
struct Q4_1 {
  static constexpr int64_t kBytes = 20;
  static constexpr bool kHasMin = true;
  static uint32_t Head(const std::byte* block) { return LoadAs<uint32_t>(block); }
  static __m256 Scales(__m256i heads, __m256* min) {
    const __m256i low = _mm256_and_si256(heads, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(heads, 16);
    *min = _mm256_cvtph_ps(
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
  }
  static __m256i Products(const std::byte* block, const int16_t* x) { return Nibbles(block + 4, x); }
  static __m256i Nibbles(const std::byte* codes, const int16_t* x) {
    const __m256i bytes = _mm256_cvtepu8_epi16(Load16(codes));
    return Multiply32(_mm256_and_si256(bytes, _mm256_set1_epi16(15)), _mm256_srli_epi16(bytes, 4), x);
  }
};
struct Q4_0 {
  static constexpr int64_t kBytes = 18;
  static constexpr bool kHasMin = true;  // d * (q - 8) = d * q - 8 d
  static uint32_t Head(const std::byte* block) { return LoadAs<uint16_t>(block); }
  static __m256 Scales(__m256i heads, __m256* min) {
    const __m256 scale =
        _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(heads), _mm256_extracti128_si256(heads, 1)));
    *min = _mm256_mul_ps(scale, _mm256_set1_ps(-8));
    return scale;
  }
  static __m256i Products(const std::byte* block, const int16_t* x) { return Q4_1::Nibbles(block + 2, x); }
};
struct Q8_0 {
  static constexpr int64_t kBytes = 34;
  static constexpr bool kHasMin = false;
  static uint32_t Head(const std::byte* block) { return LoadAs<uint16_t>(block); }
  static __m256 Scales(__m256i heads, __m256*) {
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(heads), _mm256_extracti128_si256(heads, 1)));
  }
  static __m256i Products(const std::byte* block, const int16_t* x) {
    return Multiply32(_mm256_cvtepi8_epi16(Load16(block + 2)), _mm256_cvtepi8_epi16(Load16(block + 18)), x);
  }
};

// Scales of weight times activation for `blocks` blocks from `row` on; returns the minima's part of the dot product.
template <class Format>
inline __m256 UnpackScales(const std::byte* row, int64_t blocks, const float* x_scale, const float* x_sum,
                           float* scale, __m256 min_part) {
  alignas(32) uint32_t heads[kStretch];
  for (int64_t b = 0; b < blocks; ++b) {
    heads[b] = Format::Head(row + b * Format::kBytes);
    FetchAhead(row + b * Format::kBytes);
  }
  for (int64_t b = blocks; b % 8 != 0; ++b) heads[b] = 0;  // the activation's padding is zero: 0 * 0
  for (int64_t b = 0; b < blocks; b += 8) {
    __m256 min;
    const __m256 d = Format::Scales(_mm256_load_si256(reinterpret_cast<const __m256i*>(heads + b)), &min);
    _mm256_store_ps(scale + b, _mm256_mul_ps(d, _mm256_loadu_ps(x_scale + b)));
    if constexpr (Format::kHasMin) min_part = _mm256_fmadd_ps(min, _mm256_loadu_ps(x_sum + b), min_part);
  }
  return min_part;
}

template <class Format>
void DotBlocks(const std::byte* rows, size_t row_bytes, int64_t count, int64_t cols, const Activation& x, float* y) {
  const int64_t blocks = cols / 32;
  for (int64_t r = 0; r < count; ++r, rows += row_bytes) {
    __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, min_part = sum0;
    for (int64_t first = 0; first < blocks; first += kStretch) {
      const int64_t n = blocks - first < kStretch ? blocks - first : kStretch;
      const std::byte* row = rows + first * Format::kBytes;
      const int16_t* codes = x.codes + 32 * first;
      alignas(32) float scale[kStretch];
      min_part = UnpackScales<Format>(row, n, x.scale + first, x.sum + first, scale, min_part);
      int64_t b = 0;
      for (; b + 2 <= n; b += 2) {
        sum0 = Accumulate(Format::Products(row + b * Format::kBytes, codes + 32 * b), scale + b, sum0);
        sum1 = Accumulate(Format::Products(row + (b + 1) * Format::kBytes, codes + 32 * b + 32), scale + b + 1, sum1);
      }
      if (b < n) sum0 = Accumulate(Format::Products(row + b * Format::kBytes, codes + 32 * b), scale + b, sum0);
    }
    y[r] = SumLanes(_mm256_add_ps(_mm256_add_ps(sum0, sum1), min_part));
  }
}

// --- Q4_K: blocks of 256 as eight of 32, each with a 6-bit scale and minimum -------------------------------------
inline __m256 Widen(uint32_t low, uint32_t high) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(uint64_t{high} << 32 | low));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
inline float HalfAt(const std::byte* p) { return _cvtsh_ss(LoadAs<uint16_t>(p)); }

void DotQ4K(const std::byte* rows, size_t row_bytes, int64_t count, int64_t cols, const Activation& x, float* y) {
  for (int64_t r = 0; r < count; ++r, rows += row_bytes) {
    __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, min_part = sum0;
    const std::byte* block = rows;
    for (int64_t c = 0; c < cols; c += 256, block += 144) {
      for (int64_t line = 0; line < 144; line += 64) FetchAhead(block + line);
      // Packed 6 bits: see DequantizeRow. Four scales or minima are unpacked in one 32-bit word.
      const auto s0 = LoadAs<uint32_t>(block + 4), s1 = LoadAs<uint32_t>(block + 8), s2 = LoadAs<uint32_t>(block + 12);
      const __m256 scales = Widen(s0 & 0x3f3f3f3fu, (s2 & 0x0f0f0f0fu) | ((s0 >> 2) & 0x30303030u));
      const __m256 mins = Widen(s1 & 0x3f3f3f3fu, ((s2 >> 4) & 0x0f0f0f0fu) | ((s1 >> 2) & 0x30303030u));
      alignas(32) float scale[8];
      const __m256 d = _mm256_mul_ps(_mm256_set1_ps(HalfAt(block)), _mm256_loadu_ps(x.scale + c / 32));
      _mm256_store_ps(scale, _mm256_mul_ps(d, scales));
      const __m256 m = _mm256_mul_ps(_mm256_set1_ps(HalfAt(block + 2)), _mm256_loadu_ps(x.sum + c / 32));
      min_part = _mm256_fnmadd_ps(m, mins, min_part);
      for (int64_t g = 0; g < 4; ++g) {
        const __m256i q0 = _mm256_cvtepu8_epi16(Load16(block + 16 + 32 * g));
        const __m256i q1 = _mm256_cvtepu8_epi16(Load16(block + 32 + 32 * g));
        const __m256i mask = _mm256_set1_epi16(15);
        const int16_t* codes = x.codes + c + 64 * g;
        sum0 = Accumulate(Multiply32(_mm256_and_si256(q0, mask), _mm256_and_si256(q1, mask), codes), scale + 2 * g, sum0);
        sum1 = Accumulate(Multiply32(_mm256_srli_epi16(q0, 4), _mm256_srli_epi16(q1, 4), codes + 32), scale + 2 * g + 1,
                          sum1);
      }
    }
    y[r] = SumLanes(_mm256_add_ps(_mm256_add_ps(sum0, sum1), min_part));
  }
}

// --- Q6_K: blocks of 256 as sixteen of 16, each with an 8-bit scale ----------------------------------------------
// 32 codes of quarter `quarter` of a half: nibbles from `low`, two high bits from `high`.
inline __m256i Codes6(const std::byte* low, const std::byte* high, int quarter) {
  __m256i nibbles = Load32(low + 32 * (quarter & 1));
  if (quarter >= 2) nibbles = _mm256_srli_epi16(nibbles, 4);
  nibbles = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_and_si256(_mm256_srli_epi16(Load32(high), 2 * quarter), _mm256_set1_epi8(3));
  return _mm256_sub_epi8(_mm256_or_si256(nibbles, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(32));
}

void DotQ6K(const std::byte* rows, size_t row_bytes, int64_t count, int64_t cols, const Activation& x, float* y) {
  for (int64_t r = 0; r < count; ++r, rows += row_bytes) {
    __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0;
    const std::byte* block = rows;
    for (int64_t c = 0; c < cols; c += 256, block += 210) {
      for (int64_t line = 0; line < 210; line += 64) FetchAhead(block + line);
      const __m256 d = _mm256_set1_ps(HalfAt(block + 208));
      // Each of the activation's eight scales serves two groups of 16.
      const __m256 xs = _mm256_mul_ps(d, _mm256_loadu_ps(x.scale + c / 32));
      const __m256 low = _mm256_unpacklo_ps(xs, xs), high = _mm256_unpackhi_ps(xs, xs);
      const __m128i scales = Load16(block + 192);
      alignas(32) float scale[16];
      _mm256_store_ps(scale, _mm256_mul_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                           _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales))));
      _mm256_store_ps(scale + 8, _mm256_mul_ps(_mm256_permute2f128_ps(low, high, 0x31),
                                               _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(scales, 8)))));
      for (int64_t half = 0; half < 2; ++half) {
        for (int quarter = 0; quarter < 4; ++quarter) {
          const __m256i q = Codes6(block + 64 * half, block + 128 + 32 * half, quarter);
          const int16_t* codes = x.codes + c + 128 * half + 32 * quarter;
          const float* s = scale + 8 * half + 2 * quarter;
          const __m256i q0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(q));
          const __m256i q1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(q, 1));
          sum0 = Accumulate(_mm256_madd_epi16(q0, LoadCodes(codes)), s, sum0);
          sum1 = Accumulate(_mm256_madd_epi16(q1, LoadCodes(codes + 16)), s + 1, sum1);
        }
      }
    }
    y[r] = SumLanes(_mm256_add_ps(sum0, sum1));
  }
}

// --- rows of floats ---------------------------------------------------------------------------------------------
struct F32 {
  static constexpr int64_t kBytes = 4;
  static __m256 Load(const std::byte* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
struct F16 {
  static constexpr int64_t kBytes = 2;
  static __m256 Load(const std::byte* p) { return _mm256_cvtph_ps(Load16(p)); }
};
struct BF16 {
  static constexpr int64_t kBytes = 2;
  static __m256 Load(const std::byte* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(Load16(p)), 16));
  }
};

template <class Format>
inline float DotFloats(const std::byte* row, const float* x, int64_t n) {
  __m256 sum[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + 8 * j;
      sum[j] = _mm256_fmadd_ps(Format::Load(row + at * Format::kBytes), _mm256_loadu_ps(x + at), sum[j]);
    }
  }
  for (; i + 8 <= n; i += 8) {
    sum[0] = _mm256_fmadd_ps(Format::Load(row + i * Format::kBytes), _mm256_loadu_ps(x + i), sum[0]);
  }
  if (i < n) {
    std::byte rest[8 * Format::kBytes] = {};
    float x_rest[8] = {};
    std::memcpy(rest, row + i * Format::kBytes, static_cast<size_t>((n - i) * Format::kBytes));
    std::memcpy(x_rest, x + i, static_cast<size_t>(n - i) * sizeof(float));
    sum[1] = _mm256_fmadd_ps(Format::Load(rest), _mm256_loadu_ps(x_rest), sum[1]);
  }
  return SumLanes(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}
template <class Format>
void DotFloatRows(const std::byte* rows, size_t row_bytes, int64_t count, int64_t cols, const Activation& x, float* y) {
  for (int64_t r = 0; r < count; ++r, rows += row_bytes) y[r] = DotFloats<Format>(rows, x.values, cols);
}
float Dot(const float* a, const float* b, int64_t n) {
  return DotFloats<F32>(reinterpret_cast<const std::byte*>(a), b, n);
}

void AddScaled(float a, const float* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
  }
  for (; i < n; ++i) y[i] += a * x[i];
}

// --- activations ------------------------------------------------------------------------------------------------
void Quantize(const float* x, int64_t cols, int16_t* codes, float* scale, float* sum) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t b = 0; b < cols / 32; ++b, x += 32, codes += 32) {
    __m256 v[4], largest = _mm256_setzero_ps(), unordered = largest;
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm256_loadu_ps(x + 8 * j);
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v[j], v[j], _CMP_UNORD_Q));
      largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, v[j]));
    }
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    const float max = _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
    // A reciprocal that overflows would make codes of infinity: such tiny blocks count as zero.
    const float inverse = max > 1e-33f ? 32767.0f / max : 0.0f;
    // Codes cannot say NaN and a maximum may lose it: the scale carries it on, as infinity carries itself.
    scale[b] = _mm256_movemask_ps(unordered) != 0 ? __builtin_nanf("") : max / 32767.0f;
    __m256i total = _mm256_setzero_si256();
    for (int j = 0; j < 4; j += 2) {
      const __m256i q0 = _mm256_cvtps_epi32(_mm256_mul_ps(v[j], _mm256_set1_ps(inverse)));
      const __m256i q1 = _mm256_cvtps_epi32(_mm256_mul_ps(v[j + 1], _mm256_set1_ps(inverse)));
      total = _mm256_add_epi32(total, _mm256_add_epi32(q0, q1));
      // The pack works in halves of 128 bits; the permutation puts them in order.
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(q0, q1), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 8 * j), packed);
    }
    sum[b] = scale[b] * static_cast<float>(SumLanes(total));
  }
}

#if defined(__AVX512F__)
// The zero-masked forms with every lane on are the plain instructions; g++ 12 warns inside the unmasked ones.
using Vec = __m512;
constexpr int32_t kLanes = 16, kTileRows = 14;
inline Vec LoadVec(const float* p) { return _mm512_loadu_ps(p); }
inline void StoreVec(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec Fill(float f) { return _mm512_set1_ps(f); }
inline Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec NegMulAdd(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec Min(Vec a, Vec b) { return _mm512_maskz_min_ps(0xffff, a, b); }
inline Vec Max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
inline Vec RoundVec(Vec a) { return _mm512_maskz_roundscale_ps(0xffff, a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec TimesPowerOf2(Vec a, Vec n) { return _mm512_maskz_scalef_ps(0xffff, a, n); }
#else
using Vec = __m256;
constexpr int32_t kLanes = 8, kTileRows = 6;
inline Vec LoadVec(const float* p) { return _mm256_loadu_ps(p); }
inline void StoreVec(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec Fill(float f) { return _mm256_set1_ps(f); }
inline Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec NegMulAdd(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec Div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec Min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec RoundVec(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec TimesPowerOf2(Vec a, Vec n) {  // |n| < 127
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
#endif

// e^x to 2 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor series of e^r to r^7 / 7!. NaN stays NaN: the
// second operand of Min and Max is what comes out then.
inline Vec Exp(Vec x) {
  x = Max(Fill(-86.0f), Min(Fill(86.0f), x));
  const Vec n = RoundVec(Mul(x, Fill(1.44269504f)));
  Vec r = NegMulAdd(n, Fill(0.693359375f), x);       // the leading bits of ln 2: exact
  r = NegMulAdd(n, Fill(-2.12194440e-4f), r);        // the rest
  Vec p = Fill(1.0f / 5040);
  p = MulAdd(p, r, Fill(1.0f / 720));
  p = MulAdd(p, r, Fill(1.0f / 120));
  p = MulAdd(p, r, Fill(1.0f / 24));
  p = MulAdd(p, r, Fill(1.0f / 6));
  p = MulAdd(p, r, Fill(0.5f));
  p = MulAdd(p, r, Fill(1.0f));
  p = MulAdd(p, r, Fill(1.0f));
  return TimesPowerOf2(p, n);
}
inline Vec SiluTimes(Vec gate, Vec up) {
  return Mul(Div(gate, Add(Fill(1.0f), Exp(Mul(gate, Fill(-1.0f))))), up);
}
void SiluMultiply(const float* gate, const float* up, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreVec(out + i, SiluTimes(LoadVec(gate + i), LoadVec(up + i)));
  if (i == n) return;
  float g[kLanes] = {}, u[kLanes] = {}, o[kLanes];
  std::memcpy(g, gate + i, static_cast<size_t>(n - i) * sizeof(float));
  std::memcpy(u, up + i, static_cast<size_t>(n - i) * sizeof(float));
  StoreVec(o, SiluTimes(LoadVec(g), LoadVec(u)));
  std::memcpy(out + i, o, static_cast<size_t>(n - i) * sizeof(float));
}

// --- the tile of the matrix product -----------------------------------------------------------------------------
// kTileRows x 2 vectors of sums stay in registers; each step loads two vectors of w and spreads one x per row.
template <int32_t R>
void TileOf(int64_t depth, const float* x, const float* w, float* c, int64_t ldc, bool accumulate) {
  Vec sum[R][2];
  for (int32_t r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Fill(0);
  for (int64_t k = 0; k < depth; ++k, x += kTileRows, w += 2 * kLanes) {
    const Vec w0 = LoadVec(w), w1 = LoadVec(w + kLanes);
#pragma GCC unroll 16
    for (int32_t r = 0; r < R; ++r) {
      const Vec spread = Fill(x[r]);
      sum[r][0] = MulAdd(spread, w0, sum[r][0]);
      sum[r][1] = MulAdd(spread, w1, sum[r][1]);
    }
  }
  for (int32_t r = 0; r < R; ++r, c += ldc) {
    StoreVec(c, accumulate ? Add(LoadVec(c), sum[r][0]) : sum[r][0]);
    StoreVec(c + kLanes, accumulate ? Add(LoadVec(c + kLanes), sum[r][1]) : sum[r][1]);
  }
}
template <int32_t R = 1>
void Tile(int64_t depth, int32_t rows, const float* x, const float* w, float* c, int64_t ldc, bool accumulate) {
  if constexpr (R < kTileRows) {
    if (rows > R) return Tile<R + 1>(depth, rows, x, w, c, ldc, accumulate);
  }
  TileOf<R>(depth, x, w, c, ldc, accumulate);
}

// Eight by eight: pairs of rows are interleaved, then pairs of pairs, then the halves of 128 bits are put in order.
inline void Transpose8(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows + i * stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
void Transpose(const float* rows, int64_t stride, int64_t depth, float* out) {
  constexpr int64_t kCols = 2 * kLanes;
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    for (int64_t j = 0; j < kCols; j += 8) Transpose8(rows + j * stride + k, stride, out + k * kCols + j, kCols);
  }
  for (; k < depth; ++k) {
    for (int64_t j = 0; j < kCols; ++j) out[k * kCols + j] = rows[j * stride + k];
  }
}

constexpr EngineKernels MakeTable(SimdLevel level) {
  return {.level = level,
          .dot_rows = {DotFloatRows<F32>, DotFloatRows<F16>, DotFloatRows<BF16>, DotBlocks<Q8_0>, DotBlocks<Q4_0>,
                       DotBlocks<Q4_1>, DotQ4K, DotQ6K},
          .quantize = Quantize,
          .tile_rows = kTileRows,
          .tile_cols = 2 * kLanes,
          .tile = Tile<1>,
          .transpose = Transpose,
          .silu_multiply = SiluMultiply,
          .dot = Dot,
          .add_scaled = AddScaled};
}

}  // namespace
}  // namespace prehoc::reference
