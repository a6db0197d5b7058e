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
  static constexpr int kPageBytes = 64 * kPlanes;
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
// them, most of 1 and 3, rest}, over 2^(field * BITS), which the place of the field in its byte makes up for. Of one warp; the others
// wait for it.
template <int D, int BITS>
__device__ inline void PrepareQuery(const float* q, int first, int group, int lane, uint4* steps, QueryScale* scale) {
  using S = CodeShape<D, BITS>;
  const int g = lane / 4, j = lane % 4;
  const bool exists = first + g < group;
  const float* const mine = q + int64_t{first + g} * D;
  float most = 0, squares = 0, absolute = 0;
  for (int c = 4 * j; c < D; c += 16) {
    const float4 x = exists ? *reinterpret_cast<const float4*>(mine + c) : float4{};
    most = fmaxf(most, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
    squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    absolute += fabsf(x.x) + fabsf(x.y) + fabsf(x.z) + fabsf(x.w);
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
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s) {
    const int plane = j + 4 * (s / S::kFields), c = plane * S::kWordChannels + 4 * (s % S::kFields);
    const float by = down / static_cast<float>(1 << (s % S::kFields * BITS));
    float4 x{};
    if (exists && plane < S::kPlanes) x = *reinterpret_cast<const float4*>(mine + c);
    uint4 step;
    SplitPair<RowType::kF16>(x.x * by, x.z * by, &step.x, &step.y);
    SplitPair<RowType::kF16>(x.y * by, x.w * by, &step.z, &step.w);
    steps[s * kWarp + lane] = step;
  }
}

__device__ inline __half2 AsHalf2(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ inline uint32_t AsBits(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// q times step: rows of the left operand for channels 0 and 2, or 1 and 3, of a quad; `rest` is what rounding took.
__device__ inline void Slope(uint32_t q_most, uint32_t q_rest, uint32_t step, uint32_t* most, uint32_t* rest) {
  const __half2 q = AsHalf2(q_most), s = AsHalf2(step), product = __hmul2(q, s);
  *most = AsBits(product);
  *rest = AsBits(__hfma2(AsHalf2(q_rest), s, __hfma2(q, s, __hneg2(product))));
}

// 0xffff in each half of a pair of numbers >= 0 that is +inf or NaN.
__device__ inline uint32_t InfiniteHalves(uint32_t x) {
  return ((x & 0xffffu) >= 0x7c00u ? 0xffffu : 0) | ((x >> 16) >= 0x7c00u ? 0xffff0000u : 0);
}

// Asks for the 128-byte lines of a code block, to be in the L2 cache when its turn comes: what is on its way from memory does not
// hold registers.
__device__ inline void FetchBlock(const std::byte* block, int bytes, int lane) {
#pragma unroll 1
  for (int at = 128 * lane; at < bytes; at += 128 * kWarp) asm volatile("prefetch.global.L2 [%0];" ::"l"(block + at));
}
// Copies a code block to shared memory behind the work of the warp, until CopyDone().
__device__ inline void CopyBlock(std::byte* to, const std::byte* from, int bytes, int lane) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(to));
#pragma unroll 4
  for (int at = 16 * lane; at < bytes; at += 16 * kWarp) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target + static_cast<uint32_t>(at)), "l"(from + at) : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ inline void CopyDone() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncwarp();
}

// The logits of one code block of PAGES pages for the 8 heads that `steps` was made of; all lanes of a warp. For each page of 16 tokens
//   emit(page, z): lane (g, j) has z of head g at tokens 16 page + 4 j ..
//   emit_error(page, err): the same for bounds, if WITH_ERROR.
// read() is called once the block has been read. STAGED: `block` is in shared memory.
template <int D, int BITS, int PAGES, bool WITH_ERROR, bool STAGED>
struct BlockScan {
  using S = CodeShape<D, BITS>;
  static constexpr float kUp = 16777216.0f;  // 2^24
  static constexpr int kLevels = (1 << BITS) - 1;
  static constexpr int kAhead = PAGES == 1 || BITS == 8 ? 1 : D == 256 ? 2 : 4;  // pages whose words are loaded ahead: what registers allow

  template <class Read, class Emit, class EmitError>
  static __device__ inline void Run(const std::byte* block, int pages_at, const uint4* steps, const QueryScale& scale, bool norms, int lane,
                                    Read&& read, Emit&& emit, EmitError&& emit_error) {
    const int g = lane / 4, j = lane % 4;
    float base[S::kFields][4] = {};
    float sum[PAGES][2][4] = {};
    float magnitude[S::kFields][4] = {}, spread[S::kFields][4] = {};  // of |lo|, of steps
    bool unbounded = false;
#pragma unroll 1
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int plane0 = j + 4 * S::kPassPlanes * pass;
      const std::byte* const codes = block + pages_at + 64 * plane0 + 8 * g;
      uint2 word[kAhead][S::kPassPlanes];
      const auto load = [&](int page) {
#pragma unroll
        for (int m = 0; m < S::kPassPlanes; ++m) {
          word[page % kAhead][m] = uint2{};
          if (Exists(plane0, m)) word[page % kAhead][m] = Load(reinterpret_cast<const uint2*>(codes + page * S::kPageBytes + 256 * m));
        }
      };
      if constexpr (!STAGED) {  // what comes from far is asked for first
#pragma unroll
        for (int page = 0; page < kAhead; ++page) load(page);
      }
      // Steps and minima of the channels of this lane, as pairs of channels 0 and 2, 1 and 3 of each quad.
      uint32_t lo[S::kPassSteps][2], step[S::kPassSteps][2];
      __half2 most = __float2half2_rn(0);
#pragma unroll
      for (int m = 0; m < S::kPassPlanes; ++m) {
        uint32_t x[S::kFields][2] = {}, y[S::kFields][2] = {};
        if (Exists(plane0, m)) {
          const std::byte* const at = block + 2 * S::kWordChannels * (plane0 + 4 * m);
          LoadQuads(at, x);
          LoadQuads(at + 2 * D, y);
        }
#pragma unroll
        for (int f = 0; f < S::kFields; ++f) {
          const int s = m * S::kFields + f;
          lo[s][0] = LowHalves(x[f][0], x[f][1]), lo[s][1] = HighHalves(x[f][0], x[f][1]);
          step[s][0] = LowHalves(y[f][0], y[f][1]), step[s][1] = HighHalves(y[f][0], y[f][1]);
          most = __hmax2(most, __hmax2(AsHalf2(step[s][0]), AsHalf2(step[s][1])));
        }
      }
      // A step of +inf stands for a channel without a bound, which has no part in the logit.
      if (InfiniteHalves(AsBits(most)) != 0) {
        unbounded = true;
#pragma unroll
        for (int s = 0; s < S::kPassSteps; ++s) {
          step[s][0] &= ~InfiniteHalves(step[s][0]), step[s][1] &= ~InfiniteHalves(step[s][1]);
        }
      }
      uint32_t a[S::kPassSteps][4];
#pragma unroll
      for (int s = 0; s < S::kPassSteps; ++s) {
        const uint4 q = steps[(pass * S::kPassSteps + s) * kWarp + lane];
        Number<RowType::kF16>::Mma(base[s % S::kFields], q.x, q.y, q.z, q.w, lo[s][0], lo[s][1]);
        if constexpr (WITH_ERROR) {
          // 2^-11 more than |q| (before the field is divided out): a share of 2^-14 of the sums then covers what is lost of a q below
          // 2^-14, too.
          const __half2 floor = __float2half2_rn(0x1p-11f);
          const uint32_t a0 = AsBits(__hadd2(AsHalf2(q.x & 0x7fff7fffu), floor)), a1 = q.y & 0x7fff7fffu;
          const uint32_t a2 = AsBits(__hadd2(AsHalf2(q.z & 0x7fff7fffu), floor)), a3 = q.w & 0x7fff7fffu;
          Number<RowType::kF16>::Mma(magnitude[s % S::kFields], a0, a1, a2, a3, lo[s][0] & 0x7fff7fffu, lo[s][1] & 0x7fff7fffu);
          Number<RowType::kF16>::Mma(spread[s % S::kFields], a0, a1, a2, a3, step[s][0], step[s][1]);
        }
        Slope(q.x, q.y, step[s][0], &a[s][0], &a[s][1]);
        Slope(q.z, q.w, step[s][1], &a[s][2], &a[s][3]);
      }
      const bool last_pass = pass == S::kPasses - 1;
      if constexpr (STAGED) {
#pragma unroll
        for (int page = 0; page < kAhead; ++page) load(page);
      }
      if constexpr (kAhead == PAGES) {
        if (last_pass) read();
      }
      const auto multiply = [&](int page, int m, int i) {
        const uint32_t even = i == 0 ? word[page % kAhead][m].x : word[page % kAhead][m].y, odd = even >> 8;
#pragma unroll
        for (int f = 0; f < S::kFields; ++f) {
          constexpr uint32_t kField = (uint32_t{kLevels} << 16) | kLevels;
          const uint32_t mask = kField << (f * BITS);
          const uint32_t(&x)[4] = a[m * S::kFields + f];
          Number<RowType::kF16>::Mma(sum[page][i], x[0], x[1], x[2], x[3], even & mask, odd & mask);
        }
      };
      if constexpr (kAhead == PAGES) {
        // Sums of different pages do not wait for each other.
#pragma unroll
        for (int m = 0; m < S::kPassPlanes; ++m) {
#pragma unroll
          for (int page = 0; page < PAGES; ++page) multiply(page, m, 0), multiply(page, m, 1);
        }
      } else {
#pragma unroll
        for (int page = 0; page < PAGES; ++page) {
#pragma unroll
          for (int m = 0; m < S::kPassPlanes; ++m) multiply(page, m, 0), multiply(page, m, 1);
          if (page + kAhead < PAGES) load(page + kAhead);
          if (page + kAhead == PAGES - 1 && last_pass) read();
        }
      }
    }
    const float unit = scale.unit[g], start = Whole(base) * unit, up = unit * kUp;
    if constexpr (WITH_ERROR) unbounded = __any_sync(kAllLanes, unbounded);
#pragma unroll
    for (int page = 0; page < PAGES; ++page) {
      const float(&s)[2][4] = sum[page];
      const float4 z = {fmaf(s[0][0] + s[0][2], up, start), fmaf(s[1][0] + s[1][2], up, start),
                        fmaf(s[0][1] + s[0][3], up, start), fmaf(s[1][1] + s[1][3], up, start)};
      emit(page, z);
      if constexpr (WITH_ERROR) {
        const float step_sum = Whole(spread) * unit, lo_sum = Whole(magnitude) * unit;
        float4 err;
        float* const e = &err.x;
        const float* const of = &z.x;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          float quantisation = 0.5f * step_sum;
          if (norms) {
            const __half norm = reinterpret_cast<const __half*>(block + 4 * D)[page * kCodePageTokens + 4 * j + t];
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
  static __device__ inline bool Exists(int plane0, int m) {
    if constexpr (S::kPlanes % 4 == 0) return true;
    return plane0 + 4 * m < S::kPlanes;
  }
  // Both halves of the tile, and every field in its own unit.
  static __device__ inline float Whole(const float (&sum)[S::kFields][4]) {
    float whole = 0;
#pragma unroll
    for (int f = 0; f < S::kFields; ++f) whole += (sum[f][0] + sum[f][2]) * static_cast<float>(1 << (f * BITS));
    return whole;
  }
  template <class T>
  static __device__ inline T Load(const T* p) {
    if constexpr (STAGED) return *p;
    return __ldg(p);
  }
  // fp16 numbers of the channels of one word: [quad][channels 0 and 1, 2 and 3].
  static __device__ inline void LoadQuads(const std::byte* at, uint32_t (&x)[S::kFields][2]) {
    if constexpr (S::kFields == 1) {
      const uint2 v = Load(reinterpret_cast<const uint2*>(at));
      x[0][0] = v.x, x[0][1] = v.y;
    } else {
#pragma unroll
      for (int f = 0; f < S::kFields; f += 2) {
        const uint4 v = Load(reinterpret_cast<const uint4*>(at) + f / 2);
        x[f][0] = v.x, x[f][1] = v.y, x[f + 1][0] = v.z, x[f + 1][1] = v.w;
      }
    }
  }
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
