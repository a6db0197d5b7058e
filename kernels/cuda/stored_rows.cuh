// Rows as host memory has them (kernels/row_codec.h), a piece at a time: eight channels of K, then of V, become 16 bytes of fp16; and back, 32
// channels by a warp.
#pragma once
#include <cuda_fp8.h>

#include "base/row_format.h"
#include "kernels/cuda/common.cuh"

namespace prehoc::cuda {

struct RowShape {
  RowFormat format;
  int32_t head_dim;
  int32_t bytes;     // of a row
  int32_t codes_at;  // where its channels begin
  int32_t scales;    // of K, and as many of V behind them; 0 but for int8
};
inline RowShape RowShapeOf(RowFormat format, int32_t head_dim) {
  const bool scaled = format == RowFormat::kInt8;
  return {format, head_dim, static_cast<int32_t>(RowBytes(format, head_dim)), scaled ? static_cast<int32_t>(RowScaleBytes(head_dim)) : 0,
          scaled ? static_cast<int32_t>(RowScales(head_dim)) : 0};
}

// What is loaded of a piece of a row of 8 bits. Loads of several pieces can be on their way before the first is widened.
struct NarrowPiece {
  uint2 codes;
  uint16_t scale;
};
// The scale of channel c of [2, head_dim].
__device__ inline int ScaleOf(const RowShape& shape, int c) {
  return c < shape.head_dim ? c / kScaledChannels : shape.scales + (c - shape.head_dim) / kScaledChannels;
}
// Pieces are channels [8 p, 8 p + 8); each byte is read once: it need not stay in the caches.
__device__ inline NarrowPiece LoadNarrow(const std::byte* row, const RowShape& shape, int p) {
  NarrowPiece piece{__ldcs(reinterpret_cast<const uint2*>(row + shape.codes_at) + p), 0};
  if (shape.scales > 0) piece.scale = __ldcs(reinterpret_cast<const uint16_t*>(row) + ScaleOf(shape, 8 * p));
  return piece;
}
__device__ inline uint32_t WidenInt8(uint32_t word, int at, __half2 scale) {
  const auto code = [&](int i) { return __short2half_rn(static_cast<short>(static_cast<int8_t>(word >> (8 * i)))); };
  const __half2 pair = __hmul2(__halves2half2(code(at), code(at + 1)), scale);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t WidenE4m3(uint32_t word, int at) {
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(word >> (8 * at) & 0xffff), __NV_E4M3);
  return uint32_t{pair.y} << 16 | pair.x;
}
__device__ inline uint4 Widened(const NarrowPiece& piece, const RowShape& shape) {
  if (shape.format == RowFormat::kE4m3) {
    return {WidenE4m3(piece.codes.x, 0), WidenE4m3(piece.codes.x, 2), WidenE4m3(piece.codes.y, 0), WidenE4m3(piece.codes.y, 2)};
  }
  const __half2 scale = __half2half2(__ushort_as_half(piece.scale));
  return {WidenInt8(piece.codes.x, 0, scale), WidenInt8(piece.codes.x, 2, scale), WidenInt8(piece.codes.y, 0, scale),
          WidenInt8(piece.codes.y, 2, scale)};
}
// A piece of a row of any format.
__device__ inline uint4 WidePiece(const std::byte* row, const RowShape& shape, int p) {
  if (shape.format == RowFormat::kF16) return __ldcs(reinterpret_cast<const uint4*>(row) + p);
  return Widened(LoadNarrow(row, shape, p), shape);
}

// A channel in a row of 8 bits.
struct Narrowed {
  uint8_t code;
  __half scale;  // of all 32 lanes
  __half value;  // what the code stands for
};
__device__ inline Narrowed NarrowE4m3(__half x) {
  const float value = __half2float(x), magnitude = fabsf(value);
  const uint32_t bits = __float_as_uint(magnitude), rounded = bits + 0x7ffff + (bits >> 20 & 1);
  uint32_t code = magnitude < 0x1p-6f ? static_cast<uint32_t>(rintf(magnitude * 0x1p9f)) : (rounded >> 20) - (120 << 3);
  if (!(magnitude <= 464)) code = 0x7f;
  code |= __float_as_uint(value) >> 24 & 0x80;
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(code), __NV_E4M3);
  return {static_cast<uint8_t>(code), __ushort_as_half(0), __ushort_as_half(pair.x)};
}
// The channels of a warp share a scale; lanes without one give 0. The quotient is rounded as the reference rounds it.
__device__ inline Narrowed NarrowInt8(__half x) {
  const float value = __half2float(x);
  float most = fabsf(value);
  const bool odd = __any_sync(kAllLanes, !(most <= 65504));
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
  if (odd) return {0, __ushort_as_half(0x7e00), __ushort_as_half(0x7e00)};
  const __half scale = __float2half_ru(__fdiv_rn(most, 127.0f));
  const float step = __half2float(scale);
  if (step == 0) return {0, scale, __ushort_as_half(0)};
  const int largest = __fmul_rn(127.0f, step) < 65520 ? 127 : 126;
  const int code = min(max(__float2int_rn(__fdiv_rn(value, step)), -largest), largest);  // there is no -0
  return {static_cast<uint8_t>(static_cast<int8_t>(code)), scale, __float2half_rn(__fmul_rn(static_cast<float>(code), step))};
}

// Of a warp, channels [first, first + 32) of K (half 0) or V (half 1) as far as the head goes: to a stored row, or to the fp16 row that it stands
// for, or both; null: not there.
__device__ inline void NarrowChannels(__half x, const RowShape& shape, int half, int first, int lane, std::byte* stored, uint16_t* wide) {
  const bool real = first + lane < shape.head_dim;
  const Narrowed n = shape.format == RowFormat::kE4m3 ? NarrowE4m3(x) : NarrowInt8(real ? x : __ushort_as_half(0));
  const int at = half * shape.head_dim + first + lane;
  if (real && wide != nullptr) wide[at] = __half_as_ushort(n.value);
  if (stored == nullptr) return;
  if (real) reinterpret_cast<uint8_t*>(stored)[shape.codes_at + at] = n.code;
  if (shape.scales == 0) return;
  auto* const scales = reinterpret_cast<uint16_t*>(stored);
  if (lane == 0) scales[half * shape.scales + first / kScaledChannels] = __half_as_ushort(n.scale);
  // What fills the scales up to 16 bytes.
  if (half == 0 && first == 0 && 2 * shape.scales + lane < shape.codes_at / 2) scales[2 * shape.scales + lane] = 0;
}

}  // namespace prehoc::cuda
