// Small device functions that several kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/device_kernels.h"

namespace prehoc::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
__device__ constexpr float kLog2E = 1.4426950408889634f;
__device__ constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float Infinity() { return __int_as_float(0x7f800000); }
__device__ inline float NotANumber() { return __int_as_float(0x7fc00000); }
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The two halves of a register as numbers of the row type, and the product of the tensor cores over them:
// c[16 x 8] += a[16 x 16] b[16 x 8]. Lane L holds, with g = L / 4 and j = L % 4: a = (g, 2j..), (g + 8, 2j..), (g, 2j + 8..),
// (g + 8, 2j + 8..); b = (2j.., g), (2j + 8.., g); c = (g, 2j), (g, 2j + 1), (g + 8, 2j), (g + 8, 2j + 1).
template <RowType R>
struct Number;
template <>
struct Number<RowType::kF16> {
  static __device__ inline uint32_t Pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ inline float2 Unpack(uint32_t bits) { return __half22float2(*reinterpret_cast<const __half2*>(&bits)); }
  static __device__ inline uint16_t Bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ inline float Value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ inline void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};
template <>
struct Number<RowType::kBF16> {
  static __device__ inline uint32_t Pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ inline float2 Unpack(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  }
  static __device__ inline uint16_t Bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static __device__ inline float Value(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
  static __device__ inline void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

// A pair as the sum of two pairs of the row type: what the first rounds off, the second holds.
template <RowType R>
__device__ inline void SplitPair(float x, float y, uint32_t* most, uint32_t* rest) {
  *most = Number<R>::Pack(x, y);
  const float2 rounded = Number<R>::Unpack(*most);
  *rest = Number<R>::Pack(x - rounded.x, y - rounded.y);
}

// {low half of x, low half of y} and {high half of x, high half of y}.
__device__ inline uint32_t LowHalves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
__device__ inline uint32_t HighHalves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

// Loads past the first-level cache: what other blocks of this launch wrote.
template <class T>
__device__ inline T LoadShared(const T* p) {
  return __ldcg(p);
}

// 2^-e so that |x| * 2^-e lies in [1, 2); 1 for 0, subnormal, infinite and NaN.
__device__ inline float PowerBelow(float x) {
  const int exponent = (__float_as_int(x) >> 23) & 0xff;
  return exponent == 0 || exponent >= 254 ? 1.0f : __int_as_float((254 - exponent) << 23);
}

// Log-sum-exp in parts: sum of exp(x - most). NaN, once in `sum`, stays; +inf is its own maximum.
struct Mass {
  float most;
  float sum;
};
__device__ inline Mass NoMass() { return {-Infinity(), 0.0f}; }
__device__ inline void AddLogit(Mass* mass, float x) {
  if (x == -Infinity()) return;
  if (x > mass->most) {
    mass->sum = mass->most == -Infinity() ? mass->sum : mass->sum * __expf(mass->most - x);
    mass->most = x;
  }
  mass->sum += x == mass->most ? 1.0f : __expf(x - mass->most);
}
__device__ inline Mass Join(Mass a, Mass b) {
  const float most = fmaxf(a.most, b.most);
  const float sum = (a.most == most ? a.sum : a.sum * __expf(a.most - most)) +
                    (b.most == most ? b.sum : b.sum * __expf(b.most - most));
  return {most, sum};
}
__device__ inline float LogOf(Mass mass) {
  if (isnan(mass.sum)) return mass.sum;
  return isinf(mass.most) ? mass.most : mass.most + __logf(mass.sum);
}
__device__ inline Mass WarpJoin(Mass mass) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Mass other{__shfl_xor_sync(kAllLanes, mass.most, offset), __shfl_xor_sync(kAllLanes, mass.sum, offset)};
    mass = Join(mass, other);
  }
  return mass;
}

}  // namespace prehoc::cuda
