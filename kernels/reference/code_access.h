// One code at a time, straight from the layout of kernels/code_block.h.
#pragma once
#include "kernels/code_block.h"

namespace prehoc::reference {

// Where a field of `width` bits of (token of the page, channel) lies in planes that start at `planes`: see code_block.h.
struct CodeField {
  size_t byte = 0;
  int32_t shift = 0;
};
constexpr CodeField FieldAt(int32_t token, int32_t channel, int32_t width) {
  const int32_t quads_per_plane = 8 / width;
  const int32_t quad = channel / 4, j = channel % 4;
  const int32_t plane = quad / quads_per_plane;
  return {static_cast<size_t>(64 * plane + 4 * token + j), quad % quads_per_plane * width};
}

inline uint32_t ReadField(const std::byte* planes, int32_t token, int32_t channel, int32_t width) {
  const CodeField field = FieldAt(token, channel, width);
  return (std::to_integer<uint32_t>(planes[field.byte]) >> field.shift) & ((1u << width) - 1);
}
// Requires that the field holds zero.
inline void WriteField(std::byte* planes, int32_t token, int32_t channel, int32_t width, uint32_t value) {
  const CodeField field = FieldAt(token, channel, width);
  planes[field.byte] |= static_cast<std::byte>(value << field.shift);
}

// The code of (token of the page, channel) in a page: codes of 3 and 5 bits lie in two parts.
inline uint32_t ReadCode(const std::byte* page, int32_t token, int32_t channel, int32_t bits, int32_t head_dim) {
  const int32_t low_bits = LowCodeBits(bits);
  const uint32_t low = ReadField(page, token, channel, low_bits);
  if (low_bits == bits) return low;
  return low | ReadField(page + 2 * low_bits * head_dim, token, channel, 1) << low_bits;
}
inline void WriteCode(std::byte* page, int32_t token, int32_t channel, int32_t bits, int32_t head_dim, uint32_t code) {
  const int32_t low_bits = LowCodeBits(bits);
  WriteField(page, token, channel, low_bits, code & ((1u << low_bits) - 1));
  if (low_bits != bits) WriteField(page + 2 * low_bits * head_dim, token, channel, 1, code >> low_bits);
}

}  // namespace prehoc::reference
