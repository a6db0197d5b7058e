// Logits of coded keys on the tensor cores.
//
// With code n of channel c at k ~ lo + n step the logit is SUM q lo + SUM (q step) n: the products q step are the left operand (8
// heads, and in the other 8 rows what rounding to fp16 took from them), the codes are the right one. A code needs no conversion: the
// bits n in the low half of an fp16 number are the subnormal n 2^-24, which the tensor cores multiply exactly; a code in a higher
// field of its byte is 2^field times that, which the left operand divides out again.
// A lane holds the words of two tokens of a page and of every fourth plane: which channels are which k of the product is free.
#pragma once
#include "kernels/code_block.h"
#include "kernels/cuda/common.cuh"

namespace prehoc::cuda {

inline constexpr int kScanHeads = 8;

template <int D, int BITS>
struct CodeShape {
  static_assert(BITS == 2 || BITS == 4 || BITS == 8);
  static constexpr int kWordChannels = 32 / BITS;
  static constexpr int kFields = 8 / BITS;                          // quads in a word; a step of the product takes one
  static constexpr int kPlanes = (D + kWordChannels - 1) / kWordChannels;
  static constexpr int kLanePlanes = (kPlanes + 3) / 4;
  static constexpr int kSteps = kLanePlanes * kFields;
  static constexpr int kPassSteps = kSteps < 8 ? kSteps : 8;        // of the left operand that registers hold at once
  static constexpr int kPasses = kSteps / kPassSteps;
  static constexpr int kPassPlanes = kPassSteps / kFields;
  static_assert(kSteps % kPassSteps == 0 && kPassSteps % kFields == 0);
  static constexpr size_t kQueryBytes = size_t{kSteps} * kWarp * sizeof(uint4);
};

// What is the same for every block: of the 8 heads of a tile.
struct QueryScale {
  float unit[kScanHeads];       // logit of a sum of products
  float norm[kScanHeads];       // |q| / sqrt(d), rounded up
  float absolute[kScanHeads];   // |q|_1 / sqrt(d), rounded up
};

// q of heads [first, first + 8) as steps of the left operand, in shared memory: [step][lane] = {most of channels 0 and 2 of the quad, rest of
// them, most of 1 and 3, rest}. Of one warp; the others wait for it.
template <int D, int BITS>
__device__ inline void PrepareQuery(const float* q, int first, int group, int lane, uint4* steps, QueryScale* scale) {
  using S = CodeShape<D, BITS>;
  const int g = lane / 4, j = lane % 4;
  const bool exists = first + g < group;
  const float* const mine = q + int64_t{first + g} * D;
  float most = 0, squares = 0, absolute = 0;
  for (int c = j; c < D; c += 4) {
    const float x = exists ? mine[c] : 0;
    most = fmaxf(most, fabsf(x));
    squares += x * x;
    absolute += fabsf(x);
  }
#pragma unroll
  for (int offset = 1; offset <= 2; offset *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
    squares += __shfl_xor_sync(kAllLanes, squares, offset);
    absolute += __shfl_xor_sync(kAllLanes, absolute, offset);
  }
  // Below 1, so that a product with the largest step (43669, of 2 bits) is finite.
  const float down = 0.5f * PowerBelow(most), root = __frsqrt_rn(static_cast<float>(D));
  if (j == 0) {
    scale->unit[g] = root / down;
    scale->norm[g] = sqrtf(squares) * root * 1.0001f;
    scale->absolute[g] = absolute * root * 1.0001f;
  }
  for (int s = 0; s < S::kSteps; ++s) {
    const int plane = j + 4 * (s / S::kFields), c = plane * S::kWordChannels + 4 * (s % S::kFields);
    float x[4] = {};
    if (exists && plane < S::kPlanes) {
      for (int e = 0; e < 4; ++e) x[e] = mine[c + e] * down;
    }
    uint4 step;
    SplitPair<RowType::kF16>(x[0], x[2], &step.x, &step.y);
    SplitPair<RowType::kF16>(x[1], x[3], &step.z, &step.w);
    steps[s * kWarp + lane] = step;
  }
}

__device__ inline __half2 AsHalf2(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ inline uint32_t AsBits(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// q times step, over 2^down: rows of the left operand for channels 0 and 2, or 1 and 3, of a quad.
__device__ inline void Slope(uint32_t q_most, uint32_t q_rest, uint32_t step, int down, uint32_t* most, uint32_t* rest) {
  const __half2 s = AsHalf2(step);
  __half2 product = __hmul2(AsHalf2(q_most), s);
  __half2 left = __hfma2(AsHalf2(q_rest), s, __hfma2(AsHalf2(q_most), s, __hneg2(product)));
  if (down > 0) {
    const __half2 factor = AsHalf2(static_cast<uint32_t>((15 - down) << 10) * 0x10001u);
    product = __hmul2(product, factor);
    left = __hmul2(left, factor);
  }
  *most = AsBits(product), *rest = AsBits(left);
}

// The logits of one code block for the 8 heads that `steps` was made of; all lanes of a warp. For each page of 16 tokens
//   emit(page, z): lane (g, j) has z of head g at tokens 16 page + 4 j ..
//   emit_error(page, err): the same for bounds, if WITH_ERROR.
template <int D, int BITS, bool WITH_ERROR>
struct BlockScan {
  using S = CodeShape<D, BITS>;
  static constexpr float kUp = 16777216.0f;  // 2^24
  static constexpr int kLevels = (1 << BITS) - 1;
  static constexpr int kAhead = BITS == 8 ? 1 : D == 256 ? 2 : 4;  // pages whose words are loaded ahead: what registers allow

  template <class Emit, class EmitError>
  static __device__ inline void Run(const std::byte* block, const CodeBlockLayout& layout, int pages, const uint4* steps,
                                    const QueryScale& scale, bool norms, int lane, Emit&& emit, EmitError&& emit_error) {
    const int g = lane / 4, j = lane % 4;
    float base[4] = {};
    float sum[4][2][4] = {};
    float magnitude[4] = {}, spread[4] = {};  // of |lo|, of steps
    bool unbounded = false;
#pragma unroll 1
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int plane0 = j + 4 * S::kPassPlanes * pass;
      uint2 word[kAhead][S::kPassPlanes];
      const auto load = [&](int page) {
#pragma unroll
        for (int m = 0; m < S::kPassPlanes; ++m) {
          const int plane = plane0 + 4 * m;
          const std::byte* at = block + layout.pages + layout.page_bytes * page + 64 * plane + 8 * g;
          word[page % kAhead][m] = page < pages && plane < S::kPlanes ? __ldg(reinterpret_cast<const uint2*>(at)) : uint2{};
        }
      };
#pragma unroll
      for (int page = 0; page < kAhead; ++page) load(page);
      uint32_t a[S::kPassSteps][4];
#pragma unroll
      for (int m = 0; m < S::kPassPlanes; ++m) {
        const int plane = plane0 + 4 * m;
#pragma unroll
        for (int f = 0; f < S::kFields; ++f) {
          const int s = m * S::kFields + f, c = plane * S::kWordChannels + 4 * f;
          const bool exists = plane < S::kPlanes;
          const uint2 lo = exists ? __ldg(reinterpret_cast<const uint2*>(block + 2 * c)) : uint2{};
          uint2 step = exists ? __ldg(reinterpret_cast<const uint2*>(block + layout.step + 2 * c)) : uint2{};
          const uint4 q = steps[(pass * S::kPassSteps + s) * kWarp + lane];
          uint32_t step02 = LowHalves(step.x, step.y), step13 = HighHalves(step.x, step.y);
          const uint32_t lo02 = LowHalves(lo.x, lo.y), lo13 = HighHalves(lo.x, lo.y);
          Number<RowType::kF16>::Mma(base, q.x, q.y, q.z, q.w, lo02, lo13);
          // A step of +inf stands for a channel without a bound, which has no part in the logit.
          const uint32_t infinite = InfiniteHalves(step02) | InfiniteHalves(step13);
          if (infinite != 0) {
            unbounded = true;
            step02 &= ~InfiniteHalves(step02), step13 &= ~InfiniteHalves(step13);
          }
          if constexpr (WITH_ERROR) {
            // 2^-11 more than |q|: a share of 2^-14 of the sums then covers what is lost of a q below 2^-14, too.
            const __half2 floor = __float2half2_rn(0x1p-11f);
            const uint32_t a0 = AsBits(__hadd2(AsHalf2(q.x & 0x7fff7fffu), floor)), a1 = q.y & 0x7fff7fffu;
            const uint32_t a2 = AsBits(__hadd2(AsHalf2(q.z & 0x7fff7fffu), floor)), a3 = q.w & 0x7fff7fffu;
            Number<RowType::kF16>::Mma(magnitude, a0, a1, a2, a3, lo02 & 0x7fff7fffu, lo13 & 0x7fff7fffu);
            Number<RowType::kF16>::Mma(spread, a0, a1, a2, a3, step02, step13);
          }
          Slope(q.x, q.y, step02, f * BITS, &a[s][0], &a[s][1]);
          Slope(q.z, q.w, step13, f * BITS, &a[s][2], &a[s][3]);
        }
      }
#pragma unroll
      for (int page = 0; page < 4; ++page) {
        if (page >= pages) break;
#pragma unroll
        for (int m = 0; m < S::kPassPlanes; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t even = i == 0 ? word[page % kAhead][m].x : word[page % kAhead][m].y, odd = even >> 8;
#pragma unroll
            for (int f = 0; f < S::kFields; ++f) {
              constexpr uint32_t kField = (uint32_t{kLevels} << 16) | kLevels;
              const uint32_t mask = kField << (f * BITS);
              const uint32_t(&x)[4] = a[m * S::kFields + f];
              Number<RowType::kF16>::Mma(sum[page][i], x[0], x[1], x[2], x[3], even & mask, odd & mask);
            }
          }
        }
        if (page + kAhead < 4) load(page + kAhead);
      }
    }
    const float unit = scale.unit[g], start = (base[0] + base[2]) * unit, up = unit * kUp;
    if constexpr (WITH_ERROR) unbounded = __any_sync(kAllLanes, unbounded);
#pragma unroll
    for (int page = 0; page < 4; ++page) {
      if (page >= pages) break;
      const float(&s)[2][4] = sum[page];
      const float4 z = {fmaf(s[0][0] + s[0][2], up, start), fmaf(s[1][0] + s[1][2], up, start),
                        fmaf(s[0][1] + s[0][3], up, start), fmaf(s[1][1] + s[1][3], up, start)};
      emit(page, z);
      if constexpr (WITH_ERROR) {
        const float step_sum = (spread[0] + spread[2]) * unit, lo_sum = (magnitude[0] + magnitude[2]) * unit;
        float4 err;
        float* const e = &err.x;
        const float* const of = &z.x;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          float quantisation = 0.5f * step_sum;
          if (norms) {
            const __half norm = reinterpret_cast<const __half*>(block + layout.norm)[page * kCodePageTokens + 4 * j + t];
            const float by_norm = scale.norm[g] * __half2float(norm);
            if (by_norm < quantisation) quantisation = by_norm;
          }
          // fp32 sums of d / 16 + 1 products of the tensor cores, of numbers of 21 bits. A subnormal enters them unnormalised, ten bits
          // of the sum above it: of each of 16 products and the sum before, 2^-13 of the largest slope is lost; here 2^-7 of all
          // slopes. Then the grain of subnormal slopes, 2^-25 before the field is divided out, and what bf16 keys lost below 2^-14.
          const float arithmetic = 0x1p-14f * (lo_sum + kLevels * step_sum) + 0x1p-7f * step_sum;
          const float grain = unit * static_cast<float>(D) * kLevels * 0x1p-22f * static_cast<float>(1 << (8 - BITS));
          const float bound = quantisation * 1.0002f + arithmetic + grain + scale.absolute[g] * 0x1p-25f;
          e[t] = unbounded || !isfinite(of[t]) || !(bound < Infinity()) ? Infinity() : bound;
        }
        emit_error(page, err);
      }
    }
  }

 private:
  // 0xffff in each half that is +inf or NaN.
  static __device__ inline uint32_t InfiniteHalves(uint32_t x) { return __vcmpgeu2(x & 0x7fff7fffu, 0x7c007c00u); }
};

// The exact logit of a row that has no code yet, in every lane of a warp; and SUM |q k| / sqrt(d).
template <int D>
__device__ inline float2 RowLogit(RowType type, const float* q, const void* row, int lane) {
  float dot = 0, magnitude = 0;
#pragma unroll
  for (int c = lane; c < D; c += kWarp) {
    const uint16_t bits = static_cast<const uint16_t*>(row)[c];
    const float product = q[c] * (type == RowType::kF16 ? Number<RowType::kF16>::Value(bits) : Number<RowType::kBF16>::Value(bits));
    dot += product, magnitude += fabsf(product);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    dot += __shfl_xor_sync(kAllLanes, dot, offset);
    magnitude += __shfl_xor_sync(kAllLanes, magnitude, offset);
  }
  const float root = __frsqrt_rn(static_cast<float>(D));
  return {dot * root, magnitude * root};
}

}  // namespace prehoc::cuda
