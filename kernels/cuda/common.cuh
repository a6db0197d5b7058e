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
// What is no normal number counts as 0: to keep it takes three more instructions a number.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// 2^-e so that |x| * 2^-e lies in [1, 2); 1 for 0, subnormal, infinite and NaN.
__device__ inline float PowerBelow(float x) {
  const int exponent = (__float_as_int(x) >> 23) & 0xff;
  return exponent == 0 || exponent >= 254 ? 1.0f : __int_as_float((254 - exponent) << 23);
}

// --- shared memory: copies that run beside the thread that asked for them, and operands of products --------------------------------------
__device__ inline uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline uint4 LoadShared16(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
  return x;
}
__device__ inline void StoreShared16(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
// 16 bytes from anywhere, pinned memory included; or zeros, and `from` is not read.
__device__ inline void CopyAsync16(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
// 4 or 8 bytes of device memory.
template <int BYTES>
__device__ inline void CopyAsyncFew(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}
// All copies that this thread has asked for have arrived.
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// The copies that this thread has asked for since the last call become a group; all but its last kLeft groups have arrived.
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
// Four matrices of 8 x 8 numbers of the row type, of which lane L names row L % 8 of matrix L / 8: lane (g, j) gets numbers 2j and 2j + 1 of row g
// of each; or of its transposed.
__device__ inline void LoadMatrices(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}
__device__ inline void LoadTransposed(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row) : "memory");
}
// Of a matrix that the warp holds as LoadMatrices() gives it.
__device__ inline uint32_t Transposed(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// --- order of kernels ------------------------------------------------------------------------------------------------------------
// On sm_90 a kernel is launched while the one before it still runs: it may then load what nothing on the stream writes (its tasks),
// and waits before everything else, which it loads by plain loads: read-only ones may be moved before the wait unless their address is
// loaded after it. Every block of every kernel waits, so that the end of one kernel means the end of all before it.
__device__ inline void WaitForEarlierWork() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void LetLaterWorkLaunch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What this block wrote (before a __syncthreads()) is seen by who sees the sum, and the other way round.
__device__ inline uint32_t AddAcquireRelease(uint32_t* p, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(value) : "memory");
  return before;
}
__device__ inline void AddRelease(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ inline uint32_t LoadAcquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// --- clusters: blocks that run at once and reach each other's shared memory (sm_90) --------------------------------------------------
// All threads of all blocks arrive, then wait; what was written before, in shared or global memory, is seen after.
__device__ inline void ClusterArrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void ClusterWait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The address of `p`, in shared memory, of block `rank` of the cluster.
__device__ inline uint32_t ClusterAddress(const void* p, int rank) {
  uint32_t address = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto own = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
#endif
  return address;
}
__device__ inline void StoreCluster(uint32_t address, float4 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
#endif
}

// In every lane.
__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
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
__device__ inline float Most(const float4& x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }
template <int N>
__device__ inline void AddLogits(Mass* mass, const float4 (&x)[N]) {
  float most = Most(x[0]);
#pragma unroll
  for (int i = 1; i < N; ++i) most = fmaxf(most, Most(x[i]));
  if (most > mass->most) {
    mass->sum *= Exp2((mass->most - most) * kLog2E);
    mass->most = most;
  }
  if (isinf(mass->most)) {  // nothing yet, or one that is infinite: few instructions, they lie in the way of the others
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float4 left = x[i];
#pragma unroll 1
      for (int t = 0; t < 4; ++t, left = {left.y, left.z, left.w, 0}) AddLogit(mass, left.x);
    }
    return;
  }
  const float unit = -mass->most * kLog2E;
  const auto weight = [&](float z) { return Exp2(fmaf(z, kLog2E, unit)); };
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = (weight(x[i].x) + weight(x[i].y)) + (weight(x[i].z) + weight(x[i].w));
#pragma unroll
  for (int i = 1; i < N; ++i) sum[0] += sum[i];
  mass->sum += sum[0];
}
template <int N>
__device__ inline void AddLogits(Mass* mass, const float2 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) AddLogit(mass, x[i].x), AddLogit(mass, x[i].y);
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
