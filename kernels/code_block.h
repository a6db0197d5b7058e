// How a code block lies in memory: low-bit codes of K, per channel over a group of tokens. The same for
// every CPU backend, so that blocks written by one can be read by another.
//
//   lo   [head_dim] fp16    k[t, c] ~ lo[c] + code[t, c] * step[c]
//   step [head_dim] fp16    >= 0; both rounded so that every k of the group is within step / 2 of its decoded value
//   norm [group_tokens] fp16, only with error_norms: |k[t] - decoded[t]|, rounded up
//   pages [group_tokens / 16], each [head_dim * 16 * bits / 8] bytes
//
// With levels = 2^bits - 1 and per channel: lo = the minimum; step = (maximum - minimum) / levels in fp64, to fp32, to
// fp16, then the next fp16 number for as long as maximum - minimum > (levels + 0.5) * step;
// code = the nearest integer to (k - lo) / step in fp64, ties to even, at most levels; 0 where step is 0.
// A channel with a key that is not finite: lo 0, step +inf, codes 0, and then every norm is +inf. -0 is stored as 0.
//
// Dithered (subtractive dither: Schuchman 1964; Lipshitz, Wannamaker, Vanderkooy, "Quantization and dither: a theoretical
// survey", 1992): step goes on to the next fp16 number for as long as maximum - minimum > levels * step, so that no shifted
// key falls off either end; code = the nearest integer to (k - lo) / step + shift, both operations rounded to fp64, ties to
// even; decoded: lo + (code - shift) * step. Shifts are not stored: they follow from the seed of the block.
//
// A page is made of planes of 64 bytes: byte 4 * t + j belongs to token t (0..15) of the page and to channel 4 * quad + j
// (j = 0..3) of several quads, one bit field each, lowest first. So a 32-bit lane holds four neighbouring channels of one
// token: multiply-add instructions that sum four bytes need no shuffle, and sixteen tokens fill a vector.
//
//   bits 8: a plane holds 1 quad;   bits 4: 2 quads (low nibble first);   bits 2: 4 quads (low pair first)
//   bits 3, 5: the low two (four) bits of all channels as for bits 2 (4), then the high bit of all channels in planes of
//           8 quads (head_dim is rounded up to 32 there; unused bits are zero)
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/function_table.h"

namespace prehoc {

inline constexpr int32_t kCodePageTokens = 16;

// Of a code, in the planes of low bits; the rest is one high bit, if there is any.
constexpr int32_t LowCodeBits(int32_t bits) { return bits == 3 || bits == 5 ? bits - 1 : bits; }

constexpr bool IsCodeFormat(const CodeFormat& format, int32_t head_dim) {
  const bool bits = format.bits == 2 || format.bits == 3 || format.bits == 4 || format.bits == 5 || format.bits == 8;
  const bool group = format.group_tokens == 16 || format.group_tokens == 64;
  return bits && group && head_dim >= 16 && head_dim <= 256 && head_dim % 16 == 0;
}

// Seed of block `index` of a head whose blocks have `seed`. SplitMix64.
constexpr uint64_t CodeBlockSeed(uint64_t seed, int64_t index) {
  uint64_t x = seed + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(index) + 1);
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// How far a dithered block shifts a channel [steps]: an odd multiple of 2^-24 in (-1/2, 1/2), exact in fp32. A counter goes
// through a mixing function (Wellons' lowbias32), in 32-bit operations that vector units have.
inline constexpr uint32_t kShiftStride = 0x9e3779b9u, kShiftMix1 = 0x7feb352du, kShiftMix2 = 0x846ca68bu;
constexpr float CodeShift(uint64_t block_seed, int32_t channel) {
  uint32_t x = static_cast<uint32_t>(block_seed) + static_cast<uint32_t>(channel) * kShiftStride;
  x = (x ^ x >> 16) * kShiftMix1;
  x ^= static_cast<uint32_t>(block_seed >> 32);
  x = (x ^ x >> 15) * kShiftMix2;
  x ^= x >> 16;
  return (static_cast<float>(x >> 9) + 0.5f) * 0x1p-23f - 0.5f;
}

// Offsets within a block [bytes]. Requires IsCodeFormat().
struct CodeBlockLayout {
  size_t step = 0, norm = 0, pages = 0;  // lo is at 0; norm == pages without error_norms
  size_t page_bytes = 0;
  size_t bytes = 0;  // of the block
};
constexpr CodeBlockLayout LayoutOf(const CodeFormat& format, int32_t head_dim) {
  const auto d = static_cast<size_t>(head_dim);
  CodeBlockLayout layout;
  layout.step = 2 * d;
  layout.norm = 4 * d;
  layout.pages = layout.norm + (format.error_norms ? size_t{2} * static_cast<size_t>(format.group_tokens) : 0);
  const int32_t low_bits = LowCodeBits(format.bits);
  layout.page_bytes = d * 2 * static_cast<size_t>(low_bits);  // 16 tokens, 8 bits to a byte
  if (low_bits != format.bits) layout.page_bytes += (d + 31) / 32 * 64;
  layout.bytes = layout.pages + layout.page_bytes * static_cast<size_t>(format.group_tokens / kCodePageTokens);
  return layout;
}

}  // namespace prehoc
