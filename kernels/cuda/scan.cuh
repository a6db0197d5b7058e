// Logits of coded keys on the tensor cores.
//
// With code n of channel c at k ~ lo + n step the logit is SUM q lo + SUM (q step) n: the codes are the left operand (16 tokens), the
// products q step the right one: of each of 4 heads a column, and beside it one of what rounding to fp16 took. A code needs no
// conversion: the bits n in the low half of an fp16 number are the subnormal n 2^-24, which the tensor cores multiply exactly; a code in
// a higher field of its byte is 2^field times that, which the right operand divides out again.
// A lane (g, j) holds the words of 4 neighbouring tokens (or 2) and of every fourth plane: which channels are which k of the product, and
// which tokens which rows, is free. Of the result it has these tokens' logits of head j.
#pragma once
#include "kernels/code_block.h"
#include "kernels/cuda/common.cuh"

namespace prehoc::cuda {

inline constexpr int kScanHeads = 4;  // of a tile

template <int D, int BITS>
struct CodeShape {
  static_assert(BITS == 2 || BITS == 4 || BITS == 8);
  static constexpr int kWordChannels = 32 / BITS;
  static constexpr int kFields = 8 / BITS;                          // quads in a word; a step of the product takes one
  static constexpr int kPlanes = (D + kWordChannels - 1) / kWordChannels;
  static constexpr int kLanePlanes = (kPlanes + 3) / 4;
  static constexpr int kSteps = kLanePlanes * kFields;
  static constexpr int kMostPassPlanes = BITS == 2 ? 2 : 4;         // whose words registers hold at once
  static constexpr int kPassPlanes = kLanePlanes <= kMostPassPlanes ? kLanePlanes : kLanePlanes % kMostPassPlanes == 0 ? kMostPassPlanes : 3;
  static constexpr int kPassSteps = kPassPlanes * kFields;
  static constexpr int kPasses = kLanePlanes / kPassPlanes;
  static constexpr int kPageBytes = 64 * kPlanes;
  static constexpr int kHeaderPieces = (4 * D / 16 + kWarp - 1) / kWarp;  // of 16 bytes, of each lane
  static_assert(kLanePlanes % kPassPlanes == 0);
  static constexpr size_t kHeaderBytes = size_t{4} * D;             // lo and step of a block
  static constexpr int kPassBases = (kPassSteps + 1) / 2;           // a product with lo takes two quads
  static constexpr size_t kSlopeBytes = size_t{kSteps} * kWarp / 2 * sizeof(uint4);
  static constexpr size_t kQueryBytes = kSlopeBytes + size_t{kPasses} * kPassBases * kWarp * sizeof(uint4);  // of a tile
};

// What is the same for every block: of the heads of a tile.
struct QueryScale {
  float unit[kScanHeads];       // logit of a sum of products
  float norm[kScanHeads];       // |q| / sqrt(d), rounded up
  float absolute[kScanHeads];   // |q|_1 / sqrt(d), rounded up
};

// q of heads [first, first + 4), in shared memory, twice. For slopes [step][head][j] = {most of channels 0 and 1 of the quad, most of 2 and 3,
// rest of 0 and 1, rest of 2 and 3}, over 2^(field * BITS), which the place of the field in its byte makes up for. Behind them, as the right
// operand beside lo, [pair of quads][lane (g, j)] = {channels 0 and 1 of both, 2 and 3 of both}: most of head g / 2 where g is even, else its rest.
// Of one warp; the others wait for it.
template <int D, int BITS>
__device__ inline void PrepareQuery(const float* q, int first, int group, int lane, uint4* steps, QueryScale* scale) {
  using S = CodeShape<D, BITS>;
  const int head = lane / 8, part = lane % 8, j = part % 4;  // the lanes of a head take every other step
  const bool exists = first + head < group;
  const float* const mine = q + int64_t{first + head} * D;
  float most = 0, squares = 0, absolute = 0;
  for (int c = 4 * part; c < D; c += 32) {
    const float4 x = exists ? *reinterpret_cast<const float4*>(mine + c) : float4{};
    most = fmaxf(most, fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
    squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
    absolute += fabsf(x.x) + fabsf(x.y) + fabsf(x.z) + fabsf(x.w);
  }
#pragma unroll
  for (int offset = 1; offset <= 4; offset *= 2) {
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
    squares += __shfl_xor_sync(kAllLanes, squares, offset);
    absolute += __shfl_xor_sync(kAllLanes, absolute, offset);
  }
  // Below 1, so that a product with the largest step (43669, of 2 bits) is finite.
  const float down = 0.5f * PowerBelow(most), root = __frsqrt_rn(static_cast<float>(D));
  if (part == 0) {
    scale->unit[head] = root / down;
    scale->norm[head] = sqrtf(squares) * root * 1.0001f;
    scale->absolute[head] = absolute * root * 1.0001f;
  }
  for (int s = part / 4; s < S::kSteps; s += 2) {
    const int plane = j + 4 * (s / S::kFields), c = plane * S::kWordChannels + 4 * (s % S::kFields);
    const float by = down / static_cast<float>(1 << (s % S::kFields * BITS));
    float4 x{};
    if (exists && plane < S::kPlanes) x = *reinterpret_cast<const float4*>(mine + c);
    uint4 step;
    SplitPair<RowType::kF16>(x.x * by, x.y * by, &step.x, &step.z);
    SplitPair<RowType::kF16>(x.z * by, x.w * by, &step.y, &step.w);
    steps[s * (kWarp / 2) + head * 4 + j] = step;
    SplitPair<RowType::kF16>(x.x * down, x.y * down, &step.x, &step.z);
    SplitPair<RowType::kF16>(x.z * down, x.w * down, &step.y, &step.w);
    const int of_pass = s % S::kPassSteps, base = s / S::kPassSteps * S::kPassBases + of_pass / 2;
    uint32_t* const most_of = reinterpret_cast<uint32_t*>(steps) + S::kSlopeBytes / 4 + (base * kWarp + 8 * head + j) * 4 + of_pass % 2;
    uint32_t* const rest_of = most_of + 16;
    most_of[0] = step.x, most_of[2] = step.y;
    rest_of[0] = step.z, rest_of[2] = step.w;
    if (S::kPassSteps % 2 != 0 && of_pass + 1 == S::kPassSteps) most_of[1] = most_of[3] = rest_of[1] = rest_of[3] = 0;
  }
}

__device__ inline __half2 AsHalf2(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ inline uint32_t AsBits(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// q times step, of two channels: the product, or (rest) what rounding it and q took.
__device__ inline uint32_t Slope(uint32_t q_most, uint32_t q_rest, uint32_t step, bool rest) {
  const __half2 q = AsHalf2(q_most), s = AsHalf2(step), product = __hmul2(q, s);
  const __half2 lost = __hfma2(AsHalf2(q_rest), s, __hfma2(q, s, __hneg2(product)));
  return rest ? AsBits(lost) : AsBits(product);
}

// 0xffff in each half of a pair of numbers >= 0 that is +inf or NaN.
__device__ inline uint32_t InfiniteHalves(uint32_t x) {
  return ((x & 0xffffu) >= 0x7c00u ? 0xffffu : 0) | ((x >> 16) >= 0x7c00u ? 0xffff0000u : 0);
}

// The words of a lane in one piece.
template <int TOKENS>
struct LaneWords;
template <>
struct LaneWords<4> {
  using Piece = uint4;
  using Logits = float4;
};
template <>
struct LaneWords<2> {
  using Piece = uint2;
  using Logits = float2;
};
__device__ inline uint32_t WordOf(const uint4& piece, int t) { return t == 0 ? piece.x : t == 1 ? piece.y : t == 2 ? piece.z : piece.w; }
__device__ inline uint32_t WordOf(const uint2& piece, int t) { return t == 0 ? piece.x : piece.y; }
__device__ inline void SetLogit(float4* z, int t, float x) { (t == 0 ? z->x : t == 1 ? z->y : t == 2 ? z->z : z->w) = x; }
__device__ inline void SetLogit(float2* z, int t, float x) { (t == 0 ? z->x : z->y) = x; }

// Logits of code blocks of PAGES pages for the 4 heads that `steps` was made of; of a whole warp, which takes block after block: what a block
// needs is asked for while the one before is multiplied.
template <int D, int BITS, int PAGES, bool WITH_ERROR>
class BlockScan {
  using S = CodeShape<D, BITS>;
  static constexpr int kLaneTokens = PAGES == 1 ? 2 : 4;
  static constexpr float kUp = 16777216.0f;  // 2^24
  static constexpr int kLevels = (1 << BITS) - 1;
  using Piece = typename LaneWords<kLaneTokens>::Piece;

 public:
  static constexpr int kPairs = PAGES == 1 ? 1 : PAGES / 2;  // pieces of 8 * kLaneTokens tokens
  using Logits = typename LaneWords<kLaneTokens>::Logits;

  // `header` [2, 4 D bytes] of shared memory of this warp.
  __device__ BlockScan(int pages_at, const uint4* steps, const QueryScale& scale, bool norms, std::byte* header, int lane)
      : steps_(steps), scale_(scale), header_(header), lane_at_(FirstWord(pages_at, lane)), lane_(lane), norms_(norms) {}

  // Asks for the first block. `odd`: of a block's place among those of this warp; the one after it has the other half of `header`.
  __device__ void Start(const std::byte* block, bool odd) {
    LoadHeader(block, odd);
#pragma unroll
    for (int m = 0; m < S::kPassPlanes; ++m) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) LoadPiece(block, 0, pair, m);
    }
  }
  // The head of the block that was asked for is there; so is all else that this warp asked for by asynchronous copies.
  __device__ void Arrive() {
    WaitForCopies();
    __syncwarp();
  }
  // The tokens of a lane in piece `piece` of a block: from this one on, one to a number of Logits.
  static __device__ int TokenOf(int piece, int lane) { return 8 * kLaneTokens * piece + kLaneTokens * (lane / 4); }

  // After Arrive(): the logits of `block`, which was asked for; asks for `next`, if it is not null. emit(z), and with errors emit_error(err), take
  // all pieces: lane (g, j) has those of head j at the tokens TokenOf().
  template <class Emit, class EmitError>
  __device__ void Run(const std::byte* block, const std::byte* next, bool odd, Emit&& emit, EmitError&& emit_error) {
    const int g = lane_ / 4, j = lane_ % 4;
    const bool rest = g % 2 != 0;
    const std::byte* const head = header_ + (odd ? S::kHeaderBytes : 0);
    if (next != nullptr) LoadHeader(next, !odd);
    float base[2][4] = {};
    float sum[kPairs][kLaneTokens / 2][4] = {};
    float magnitude[2][4] = {}, spread[2][4] = {};  // of |lo|, of steps
    bool unbounded = false;
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int plane0 = j + 4 * S::kPassPlanes * pass;
      const auto quads_of = [&](int m) { return head + 2 * S::kWordChannels * (plane0 + 4 * m); };
      uint32_t step[S::kPassPlanes][S::kFields][2] = {}, lo[S::kPassPlanes][S::kFields][2] = {};
#pragma unroll
      for (int m = 0; m < S::kPassPlanes; ++m) {
        if (Exists(plane0, m)) LoadQuads(quads_of(m) + 2 * D, step[m]);
      }
      unbounded = LeaveOutUnbounded(step) || unbounded;
      // No branch from here on: loads, slopes and products of one plane go on beside those of another, and of four sums in turn.
#pragma unroll
      for (int m = 0; m < S::kPassPlanes; ++m) {
        if (Exists(plane0, m)) LoadQuads(quads_of(m), lo[m]);
#pragma unroll
        for (int f = 0; f < S::kFields; ++f) {
          const int s = m * S::kFields + f;
          if (s % 2 != 0 || s + 1 == S::kPassSteps) AddBase<WITH_ERROR>(pass, s / 2, lo, step, base, magnitude, spread);
          const uint4 q = steps_[(pass * S::kPassSteps + s) * (kWarp / 2) + g / 2 * 4 + j];
          const uint32_t s0 = Slope(q.x, q.z, step[m][f][0], rest), s1 = Slope(q.y, q.w, step[m][f][1], rest);
          const uint32_t b0 = LowHalves(s0, s1), b1 = HighHalves(s0, s1);  // channels 0 and 2, 1 and 3: as bytes of words lie
          constexpr uint32_t kField = (uint32_t{kLevels} << 16) | kLevels;
          const uint32_t mask = kField << (f * BITS);
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
            for (int t = 0; t < kLaneTokens; t += 2) {
              const uint32_t even0 = WordOf(word_[pair][m], t), odd0 = even0 >> 8, even1 = WordOf(word_[pair][m], t + 1), odd1 = even1 >> 8;
              Number<RowType::kF16>::Mma(sum[pair][t / 2], even0 & mask, even1 & mask, odd0 & mask, odd1 & mask, b0, b1);
            }
          }
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          if (pass + 1 < S::kPasses) {
            LoadPiece(block, pass + 1, pair, m);
          } else if (next != nullptr) {
            LoadPiece(next, 0, pair, m);
          }
        }
      }
    }
    const float unit = scale_.unit[j], start = Whole(base) * unit, up = unit * kUp;
    Logits z[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int t = 0; t < kLaneTokens; t += 2) {
        const float(&s)[4] = sum[pair][t / 2];
        SetLogit(&z[pair], t, fmaf(s[0] + s[1], up, start)), SetLogit(&z[pair], t + 1, fmaf(s[2] + s[3], up, start));
      }
    }
    emit(z);
    if constexpr (WITH_ERROR) {
      unbounded = __any_sync(kAllLanes, unbounded);
      const float step_sum = Whole(spread) * unit, lo_sum = Whole(magnitude) * unit;
      Logits err[kPairs];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const float* const of = &z[pair].x;
#pragma unroll
        for (int t = 0; t < kLaneTokens; ++t) {
          float quantisation = 0.5f * step_sum;
          if (norms_) {
            const __half norm = reinterpret_cast<const __half*>(block + 4 * D)[TokenOf(pair, lane_) + t];
            const float by_norm = scale_.norm[j] * __half2float(norm);
            if (by_norm < quantisation) quantisation = by_norm;
          }
          // fp32 sums of d / 16 + 1 products of the tensor cores, of numbers of 21 bits. A subnormal enters them unnormalised, ten bits
          // of the sum above it: of each of 16 products and the sum before, 2^-13 of the largest slope is lost; here 2^-7 of all
          // slopes. Then the grain of subnormal slopes, 2^-25 before the field is divided out, and what bf16 keys lost below 2^-14.
          const float arithmetic = 0x1p-14f * (lo_sum + kLevels * step_sum) + 0x1p-7f * step_sum;
          const float grain = unit * static_cast<float>(D) * kLevels * 0x1p-22f * static_cast<float>(1 << (8 - BITS));
          const float bound = quantisation * 1.0002f + arithmetic + grain + scale_.absolute[j] * 0x1p-25f;
          SetLogit(&err[pair], t, unbounded || !isfinite(of[t]) || !(bound < Infinity()) ? Infinity() : bound);
        }
      }
      emit_error(err);
    }
  }

 private:
  static __device__ bool Exists(int plane0, int m) {
    if constexpr (S::kPlanes % 4 == 0) return true;
    return plane0 + 4 * m < S::kPlanes;
  }
  // Adds q lo of two quads. What a lane (g, j) has of lo depends on j alone, and serves as rows g and g + 8: of the first product counts what rows
  // g say, which is of channels 0 and 1 of the quads, of the second what rows g + 8 say. With errors |q| |lo| and |q| step likewise.
  template <bool ERRORS>
  __device__ void AddBase(int pass, int i, const uint32_t (&lo)[S::kPassPlanes][S::kFields][2], const uint32_t (&step)[S::kPassPlanes][S::kFields][2],
                          float (&base)[2][4], float (&magnitude)[2][4], float (&spread)[2][4]) const {
    const uint4 q = steps_[S::kSlopeBytes / sizeof(uint4) + (pass * S::kPassBases + i) * kWarp + lane_];
    constexpr uint32_t kNone[2] = {0, 0};
    const int a = 2 * i, b = 2 * i + 1;
    const bool both = b < S::kPassSteps;
    const auto add = [&](const uint32_t (&x)[S::kPassPlanes][S::kFields][2], const uint4& y, uint32_t keep, float (&to)[2][4]) {
      const uint32_t(&x0)[2] = x[a / S::kFields][a % S::kFields];
      const uint32_t(&x1)[2] = both ? x[b / S::kFields % S::kPassPlanes][b % S::kFields] : kNone;
      const uint32_t w[4] = {x0[0] & keep, x0[1] & keep, x1[0] & keep, x1[1] & keep};
      Number<RowType::kF16>::Mma(to[0], w[0], w[1], w[2], w[3], y.x, y.y);
      Number<RowType::kF16>::Mma(to[1], w[0], w[1], w[2], w[3], y.z, y.w);
    };
    add(lo, q, ~0u, base);
    if constexpr (ERRORS) {
      // 2^-11 more than what |q| is over its field: a share of 2^-14 of the sums then covers what is lost of a q below 2^-14, too.
      const bool rest = lane_ / 4 % 2 != 0;
      const auto more = [&](uint32_t x, int s) {
        return AsBits(__hadd2(AsHalf2(x & 0x7fff7fffu), __float2half2_rn(rest ? 0.0f : 0x1p-11f * static_cast<float>(1 << (s % S::kFields * BITS)))));
      };
      const uint4 up = {more(q.x, a), more(q.y, b), more(q.z, a), more(q.w, b)};
      add(lo, up, 0x7fff7fffu, magnitude);
      add(step, up, ~0u, spread);
    }
  }
  // A step of +inf stands for a channel without a bound, which has no part in the logit: it becomes 0. Whether there was one.
  static __device__ bool LeaveOutUnbounded(uint32_t (&step)[S::kPassPlanes][S::kFields][2]) {
    __half2 most = AsHalf2(step[0][0][0]);
#pragma unroll
    for (int m = 0; m < S::kPassPlanes; ++m) {
#pragma unroll
      for (int i = 0; i < 2 * S::kFields; ++i) most = __hmax2(most, AsHalf2(step[m][i / 2][i % 2]));
    }
    if ((AsBits(most) & 0xffffu) < 0x7c00u && AsBits(most) < 0x7c000000u) return false;
#pragma unroll
    for (int m = 0; m < S::kPassPlanes; ++m) {
#pragma unroll
      for (int i = 0; i < 2 * S::kFields; ++i) step[m][i / 2][i % 2] &= ~InfiniteHalves(step[m][i / 2][i % 2]);
    }
    return true;
  }
  __device__ bool HasHeader(int i) const {
    if constexpr ((4 * D / 16) % kWarp == 0) return true;
    return lane_ + i * kWarp < 4 * D / 16;
  }
  __device__ void LoadHeader(const std::byte* block, bool odd) {
    const std::byte* const to = header_ + (odd ? S::kHeaderBytes : 0);
#pragma unroll
    for (int i = 0; i < S::kHeaderPieces; ++i) {
      if (HasHeader(i)) CopyAsync16(SharedAddress(to + 16 * (lane_ + i * kWarp)), block + 16 * (lane_ + i * kWarp), true);
    }
  }
  // What differs from piece to piece is known when this is compiled.
  __device__ void LoadPiece(const std::byte* block, int pass, int pair, int m) {
    constexpr int kPiecePages = 8 * kLaneTokens / kCodePageTokens;
    word_[pair][m] = Piece{};
    if (!Exists(lane_ % 4 + 4 * S::kPassPlanes * pass, m)) return;
    word_[pair][m] = LoadOnce(reinterpret_cast<const Piece*>(block + lane_at_ + (kPiecePages * pair * S::kPageBytes + 256 * (S::kPassPlanes * pass + m))));
  }
  static __device__ int FirstWord(int pages_at, int lane) {
    const int token = TokenOf(0, lane);
    return pages_at + token / kCodePageTokens * S::kPageBytes + token % kCodePageTokens * 4 + 64 * (lane % 4);
  }
  // What is read once leaves the first-level cache to others.
  static __device__ uint4 LoadOnce(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
  }
  static __device__ uint2 LoadOnce(const uint2* p) {
    uint2 x;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
  }
  // Both columns of the head, of AddBase()'s sums.
  static __device__ float Whole(const float (&sum)[2][4]) { return (sum[0][0] + sum[0][1]) + (sum[1][2] + sum[1][3]); }
  // fp16 numbers of the channels of one word: [quad][channels 0 and 1, 2 and 3].
  static __device__ void LoadQuads(const std::byte* at, uint32_t (&x)[S::kFields][2]) {
    if constexpr (S::kFields == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(at);
      x[0][0] = v.x, x[0][1] = v.y;
    } else {
#pragma unroll
      for (int f = 0; f < S::kFields; f += 2) {
        const uint4 v = reinterpret_cast<const uint4*>(at)[f / 2];
        x[f][0] = v.x, x[f][1] = v.y, x[f + 1][0] = v.z, x[f + 1][1] = v.w;
      }
    }
  }

  const uint4* const steps_;
  const QueryScale& scale_;
  std::byte* const header_;
  const int lane_at_;  // of a lane's first word in a block
  const int lane_;
  const bool norms_;
  Piece word_[kPairs][S::kPassPlanes] = {};
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

// --- scan alone ----------------------------------------------------------------------------------------------------------------------

struct ScanArgs {
  const ScanTask* tasks;
  int32_t max_n;
  CodeFormat format;
  CodeBlockLayout layout;
  RowType type;
  int32_t group;
};
inline constexpr int kScanThreads = 256;

template <int D, int BITS, int PAGES, bool WITH_ERROR>
__device__ inline void ScanBlocks(const ScanArgs& args, const ScanTask& task, int first, int32_t coded, const uint4* steps, const QueryScale& scale,
                                  std::byte* header) {
  constexpr int32_t kTokens = PAGES * kCodePageTokens;
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const int32_t warps = static_cast<int32_t>(gridDim.x) * (kScanThreads / kWarp), me = static_cast<int32_t>(blockIdx.x) * (kScanThreads / kWarp) + warp;
  const int block_bytes = static_cast<int>(args.layout.bytes);
  const bool mine = first + lane % 4 < args.group;
  const int64_t row = (first + lane % 4) * task.z_stride;
  int64_t at = int64_t{me} * kTokens;
  if (at >= coded) return;
  const std::byte* block = task.source.blocks + at / kTokens * block_bytes;
  using Scan = BlockScan<D, BITS, PAGES, WITH_ERROR>;
  using Logits = typename Scan::Logits;
  Scan scan(static_cast<int>(args.layout.pages), steps, scale, args.format.error_norms, header, lane);
  scan.Start(block, false);
  bool odd = false;
#pragma unroll 1
  for (; at < coded; at += int64_t{warps} * kTokens, odd = !odd) {
    const std::byte* const next = at + int64_t{warps} * kTokens < coded ? block + int64_t{warps} * block_bytes : nullptr;
    const auto store = [&](float* to, const Logits (&x)[Scan::kPairs]) {
#pragma unroll
      for (int pair = 0; pair < Scan::kPairs; ++pair) {
        if (mine) *reinterpret_cast<Logits*>(to + row + at + Scan::TokenOf(pair, lane)) = x[pair];
      }
    };
    const auto emit = [&](const auto& z) { store(task.z, z); };
    const auto emit_error = [&](const auto& err) { store(task.err, err); };
    scan.Arrive();
    scan.Run(block, next, odd, emit, emit_error);
    block = next;
  }
}

template <int D, int BITS>
__global__ void __launch_bounds__(kScanThreads, 1) ScanKernel(const __grid_constant__ ScanArgs args) {
  __shared__ __align__(16) std::byte step_bytes[CodeShape<D, BITS>::kQueryBytes];
  __shared__ __align__(16) std::byte headers[kScanThreads / kWarp][2 * CodeShape<D, BITS>::kHeaderBytes];
  __shared__ QueryScale scale;
  const ScanTask task = args.tasks[blockIdx.y];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const int first = static_cast<int>(blockIdx.z) * kScanHeads;
  const int32_t n = *task.source.n, tokens = args.format.group_tokens;
  if (n < 0 || n > args.max_n) {
    const int h = first + static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && threadIdx.x < kScanHeads && h < args.group) {
      task.z[h * task.z_stride] = NotANumber();
      if (task.err != nullptr) task.err[h * task.z_stride] = Infinity();
    }
    return;
  }
  uint4* const steps = reinterpret_cast<uint4*>(step_bytes);
  if (warp == 0) PrepareQuery<D, BITS>(task.source.q, first, args.group, lane, steps, &scale);
  __syncthreads();
  const int32_t coded = n / tokens * tokens;
  if (task.err != nullptr) {
    if (tokens == 16) ScanBlocks<D, BITS, 1, true>(args, task, first, coded, steps, scale, headers[warp]);
    if (tokens == 64) ScanBlocks<D, BITS, 4, true>(args, task, first, coded, steps, scale, headers[warp]);
  } else {
    if (tokens == 16) ScanBlocks<D, BITS, 1, false>(args, task, first, coded, steps, scale, headers[warp]);
    if (tokens == 64) ScanBlocks<D, BITS, 4, false>(args, task, first, coded, steps, scale, headers[warp]);
  }
  const int32_t warps = static_cast<int32_t>(gridDim.x) * (kScanThreads / kWarp), me = static_cast<int32_t>(blockIdx.x) * (kScanThreads / kWarp) + warp;
  for (int32_t i = coded + me; i < n; i += warps) {
    const std::byte* key = static_cast<const std::byte*>(task.source.rows) + int64_t{i % task.source.ring_rows} * (4 * D);
    for (int h = first; h < min(first + kScanHeads, args.group); ++h) {
      const float2 logit = RowLogit<D>(args.type, task.source.q + int64_t{h} * D, key, lane);
      if (lane != 0) continue;
      task.z[h * task.z_stride + i] = logit.x;
      if (task.err != nullptr) {
        const float bound = logit.y * 0x1p-14f + 1e-37f;
        task.err[h * task.z_stride + i] = isfinite(logit.x) && bound < Infinity() ? bound : Infinity();
      }
    }
  }
}

}  // namespace prehoc::cuda
