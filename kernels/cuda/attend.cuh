// Attention of one step over scattered rows.
//
// A block takes a part of the keys of one task (KV head), for eight query heads; its warps take tiles of 16 keys in turn. Keys and
// values go from memory straight into the registers of the tensor cores' operands: which channel of K is which k of the
// product is free as long as q agrees, and which channel of V is which column of the output is free as well, so a lane loads
// whole 16-byte pieces of a row.
// The product has 16 rows and a tile has 8 heads: the other 8 rows carry what rounding to the row type took from q, and later
// from the softmax weights. So both products are nearly exact, at no cost.
// Parts are merged by log-sum-exp: the warps of a block in shared memory; the blocks of a task through each other's shared memory
// where they form a cluster, else by the one that ends last.
#pragma once
#include "kernels/cuda/common.cuh"

namespace prehoc::cuda {

inline constexpr int kHeadTile = 8;
inline constexpr int kKeyTile = 16;

struct AttendArgs {
  const AttendTask* tasks;
  float* parts;        // [tasks, head tiles, splits, kHeadTile * (D + 2)]
  uint32_t* arrived;   // [tasks, head tiles], zero between calls
  int32_t group;
  bool cluster;        // the blocks of a task are one; a power of two of them
  float scale;         // log2(e) / sqrt(head_dim)
};

template <int D>
struct AttendShape {
  static constexpr int kWarps = D == 256 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kKVectors = D / 32;                    // 16-byte pieces of K per lane and key
  static constexpr int kVChannels = D % 64 == 0 ? 8 : 4;      // channels in one piece of V
  static constexpr int kVVectors = D / (8 * kVChannels);
  // Registers hold the output, and beside it: up to 128 channels, q and whole tiles, the next keys loaded ahead; above, q lies in
  // shared memory and values come in halves.
  static constexpr bool kRoomy = D <= 128;
  static constexpr int kValuePasses = kRoomy ? 1 : 2;
  static constexpr int kPassVectors = kVVectors / kValuePasses;
  static constexpr int kPart = kHeadTile * (D + 2);           // floats: out, then most, then sum
  static constexpr size_t kQueryBytes = size_t{D / 16} * kWarp * sizeof(uint4);
  static constexpr size_t kSharedBytes = kQueryBytes + sizeof(float) * (kWarps + 1) * kPart;  // of warps, and of the block
  static_assert(D % 32 == 0, "a lane quad loads 64 bytes of K at a time");
};

// Where the rows of one task lie. Requires 0 <= i < total(). Chosen rows come first: their refs can be loaded before their
// number is known.
struct AttendRows {
  const std::byte* rows;
  const std::byte* host_rows;
  const int32_t* refs;
  int64_t row_limit, host_limit;
  int32_t sinks, local, chosen;  // how many of each
  int32_t local_begin, sink_row, ring_row, ring_rows;

  __device__ int32_t total() const { return sinks + local + chosen; }
  // >= 0: row of `rows`; < 0: ~row of `host_rows`.
  __device__ int32_t Ref(int32_t i) const {
    if (i < chosen) return refs[i];
    i -= chosen;
    if (i >= local) return sink_row + i - local;
    const int32_t p = local_begin + i;
    return ring_row + (p < ring_rows ? p : p % ring_rows);
  }
};

__device__ inline AttendRows RowsOf(const AttendTask& task, int32_t visible, int32_t num_refs) {
  AttendRows r;
  const int32_t n = max(0, visible);
  r.rows = static_cast<const std::byte*>(task.rows);
  r.host_rows = static_cast<const std::byte*>(task.host_rows);
  r.refs = task.refs;
  r.row_limit = task.row_limit;
  r.host_limit = task.host_rows != nullptr ? task.host_limit : 0;
  r.sinks = min(max(task.sinks, 0), n);
  r.local = min(max(task.local, 0), n - r.sinks);
  r.local_begin = n - r.local;
  r.chosen = num_refs;
  r.sink_row = task.sink_row;
  r.ring_row = task.ring_row;
  r.ring_rows = max(task.ring_rows, 1);
  return r;
}

// q of 8 heads as the left operand of K^T, in shared memory: [k step][lane] = {most b0, rest b0, most b1, rest b1}, where lane (g, j) of k steps 2i
// and 2i + 1 holds channels 32 i + 8 j .. + 7 of head g. A warp takes a head, a lane four channels: one piece of the result.
template <RowType R, int D>
struct QueryLoader {
  using S = AttendShape<D>;
  static constexpr int kHeads = kHeadTile / S::kWarps, kPieces = (D / 4 + kWarp - 1) / kWarp;
  float4 x[kHeads][kPieces];

  __device__ inline void Load(const float* q, int first_head, int group, int warp, int lane) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = first_head + warp + i * S::kWarps;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int piece = lane + p * kWarp;
        x[i][p] = head < group && piece < D / 4 ? reinterpret_cast<const float4*>(q + int64_t{head} * D)[piece] : float4{};
      }
    }
  }
  // `factor` [kHeadTile]: what the logits are to be multiplied with.
  __device__ inline void Store(float scale, int warp, int lane, uint4* steps, float* factor) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      float most = 0;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const float4& v = x[i][p];
        most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
      const float down = PowerBelow(most);  // so that halves neither overflow nor lose small heads
      const int g = warp + i * S::kWarps;
      if (lane == 0) factor[g] = scale / down;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int piece = lane + p * kWarp;
        const float4& v = x[i][p];
        uint4 step;
        SplitPair<R>(v.x * down, v.y * down, &step.x, &step.y);
        SplitPair<R>(v.z * down, v.w * down, &step.z, &step.w);
        if (piece < D / 4) steps[(piece / 8 * 2 + piece % 2) * kWarp + g * 4 + piece % 8 / 2] = step;
      }
    }
  }
};

// One tile of K: lane (g, j) holds pieces of keys g and g + 8.
template <int D>
struct KeyTile {
  uint4 piece[2][AttendShape<D>::kKVectors];
};
// One tile of V: lane (g, j) holds pieces of keys 2j, 2j + 1, 2j + 8, 2j + 9.
template <int D>
struct ValueTile {
  uint32_t word[4][AttendShape<D>::kPassVectors][AttendShape<D>::kVChannels / 2];
};

// q where the products take it from.
template <int D, bool kInRegisters>
struct Query {
  uint32_t a[D / 16][4];
  __device__ uint4 operator()(int step) const { return {a[step][0], a[step][1], a[step][2], a[step][3]}; }
};
template <int D>
struct Query<D, false> {
  const uint4* a;  // of this lane, kWarp apart
  __device__ uint4 operator()(int step) const { return a[step * kWarp]; }
};

template <int D>
__device__ inline const std::byte* RowAt(const AttendRows& r, int32_t ref) {
  constexpr int64_t kRowBytes = int64_t{4} * D;
  return ref >= 0 ? r.rows + int64_t{ref} * kRowBytes : r.host_rows + int64_t{~ref} * kRowBytes;
}

// `ref` of lane L < 16 is that of key L; `valid` has a bit for each key that is loaded, the others are zero.
template <int D>
__device__ inline void LoadKeys(const AttendRows& r, int32_t ref, uint32_t valid, int g, int j, KeyTile<D>* k) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const int key = g + 8 * t;
    const std::byte* row = RowAt<D>(r, __shfl_sync(kAllLanes, ref, key)) + 16 * j;
    const bool load = (valid >> key) & 1;
#pragma unroll
    for (int i = 0; i < AttendShape<D>::kKVectors; ++i) {
      k->piece[t][i] = load ? __ldg(reinterpret_cast<const uint4*>(row + 64 * i)) : uint4{};
    }
  }
}
template <int D>
__device__ inline void LoadValues(const AttendRows& r, int32_t ref, uint32_t valid, int g, int j, int pass, ValueTile<D>* v) {
  constexpr int kVectors = AttendShape<D>::kPassVectors;
  constexpr int kChannels = AttendShape<D>::kVChannels;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int key = 2 * j + s % 2 + 8 * (s / 2);
    const std::byte* row = RowAt<D>(r, __shfl_sync(kAllLanes, ref, key)) + 2 * D + 2 * kChannels * (g + 8 * kVectors * pass);
    const bool load = (valid >> key) & 1;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::byte* at = row + 16 * kChannels * i;
      if constexpr (kChannels == 8) {
        const uint4 x = load ? __ldg(reinterpret_cast<const uint4*>(at)) : uint4{};
        v->word[s][i][0] = x.x, v->word[s][i][1] = x.y, v->word[s][i][2] = x.z, v->word[s][i][3] = x.w;
      } else {
        const uint2 x = load ? __ldg(reinterpret_cast<const uint2*>(at)) : uint2{};
        v->word[s][i][0] = x.x, v->word[s][i][1] = x.y;
      }
    }
  }
}

// Online softmax of 8 heads: lane (g, j) holds `most` of head g (the same in its quad), its own part of the sum, and of the output
// channels 8 C v + 2 C j + c (x) and .. + C (y) with C = kVChannels: out[v * C + c] = {x most, y most, x rest, y rest}.
template <RowType R, int D>
struct Softmax {
  using S = AttendShape<D>;
  float most = -Infinity();
  float sum = 0;
  float out[D / 8][4] = {};

  template <class Q>
  __device__ void Add(const Q& q, const KeyTile<D>& k, float factor, uint32_t valid, uint32_t missing, int j,
                      uint32_t (&p)[4]) {
    float z[2][4] = {};
#pragma unroll
    for (int i = 0; i < S::kKVectors; ++i) {
      const uint4 even = q(2 * i), odd = q(2 * i + 1);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const uint4& x = k.piece[t][i];
        Number<R>::Mma(z[t], even.x, even.y, even.z, even.w, x.x, x.y);
        Number<R>::Mma(z[t], odd.x, odd.y, odd.z, odd.w, x.z, x.w);
      }
    }
    float w[4];
    float tile_most = -Infinity();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int key = 2 * j + s % 2 + 8 * (s / 2);
      w[s] = (z[s / 2][s % 2] + z[s / 2][s % 2 + 2]) * factor;
      if (!((valid >> key) & 1)) w[s] = (missing >> key) & 1 ? NotANumber() : -Infinity();
      tile_most = fmaxf(tile_most, w[s]);
    }
    tile_most = fmaxf(tile_most, __shfl_xor_sync(kAllLanes, tile_most, 1));
    tile_most = fmaxf(tile_most, __shfl_xor_sync(kAllLanes, tile_most, 2));
    const float now = fmaxf(most, tile_most);
    const float from = now == -Infinity() ? 0.0f : now;
    if (__any_sync(kAllLanes, now != most)) {
      const float shrink = Exp2(most - from);  // 0 from nothing
      sum *= shrink;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[i][c] *= shrink;
      }
      most = now;
    }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      w[s] = Exp2(w[s] - from);
      sum += w[s];
    }
    SplitPair<R>(w[0], w[1], &p[0], &p[1]);
    SplitPair<R>(w[2], w[3], &p[2], &p[3]);
  }

  template <int kPass>
  __device__ void AddValues(const uint32_t (&p)[4], const ValueTile<D>& v) {
#pragma unroll
    for (int i = 0; i < S::kPassVectors; ++i) {
#pragma unroll
      for (int c = 0; c < S::kVChannels; ++c) {
        const int at = c / 2;
        const uint32_t b0 = c % 2 == 0 ? LowHalves(v.word[0][i][at], v.word[1][i][at]) : HighHalves(v.word[0][i][at], v.word[1][i][at]);
        const uint32_t b1 = c % 2 == 0 ? LowHalves(v.word[2][i][at], v.word[3][i][at]) : HighHalves(v.word[2][i][at], v.word[3][i][at]);
        Number<R>::Mma(out[(kPass * S::kPassVectors + i) * S::kVChannels + c], p[0], p[1], p[2], p[3], b0, b1);
      }
    }
  }

  // To part [kHeadTile][D], most [kHeadTile], sum [kHeadTile].
  __device__ void Store(float* part, int g, int j) {
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    constexpr int C = S::kVChannels;
#pragma unroll
    for (int i = 0; i < S::kVVectors; ++i) {
      float* to = part + g * D + 8 * C * i + 2 * C * j;
#pragma unroll
      for (int c = 0; c < C; c += 4) {
        float x[4], y[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float(&o)[4] = out[i * C + c + e];
          x[e] = o[0] + o[2], y[e] = o[1] + o[3];
        }
        *reinterpret_cast<float4*>(to + c) = {x[0], x[1], x[2], x[3]};
        *reinterpret_cast<float4*>(to + C + c) = {y[0], y[1], y[2], y[3]};
      }
    }
    if (j == 0) {
      part[kHeadTile * D + g] = most;
      part[kHeadTile * D + kHeadTile + g] = sum;
    }
  }
};

// Joins `count` parts, `stride` floats apart, for channels [c, c + 4) of head g: the weighted sum, and (in *most, *sum) its weight. Two
// neighbouring lanes share the work and both have the result; each loads four parts before it uses the first.
template <int D, bool kFromOtherBlocks>
__device__ inline float4 JoinParts(const float* parts, int64_t stride, int count, int g, int c, float* most, float* sum) {
  const auto load = [](const float* p) { return kFromOtherBlocks ? __ldcg(p) : *p; };
  const auto load4 = [](const float* p) {
    return kFromOtherBlocks ? __ldcg(reinterpret_cast<const float4*>(p)) : *reinterpret_cast<const float4*>(p);
  };
  constexpr int kAtOnce = 4;
  float4 out{};
  float top = -Infinity(), total = 0;
  const auto join = [&](float4 x, float m, float l) {
    const float now = fmaxf(top, m), from = now == -Infinity() ? 0.0f : now;
    const float old = Exp2(top - from), fresh = Exp2(m - from);
    out = {out.x * old + x.x * fresh, out.y * old + x.y * fresh, out.z * old + x.z * fresh, out.w * old + x.w * fresh};
    total = total * old + l * fresh;
    top = now;
  };
  for (int first = static_cast<int>(threadIdx.x) % 2; first < count; first += 2 * kAtOnce) {
    float4 x[kAtOnce];
    float m[kAtOnce], l[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* const part = parts + min(first + 2 * i, count - 1) * stride;
      const bool exists = first + 2 * i < count;
      x[i] = load4(part + g * D + c);
      m[i] = exists ? load(part + kHeadTile * D + g) : -Infinity();
      l[i] = exists ? load(part + kHeadTile * D + kHeadTile + g) : 0.0f;
    }
    float now = top;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) now = fmaxf(now, m[i]);
    const float from = now == -Infinity() ? 0.0f : now, old = Exp2(top - from);
    out = {out.x * old, out.y * old, out.z * old, out.w * old};
    total *= old;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (m[i] == -Infinity() && l[i] == 0) continue;  // nothing, or no part
      const float weight = Exp2(m[i] - from);
      out.x += weight * x[i].x, out.y += weight * x[i].y, out.z += weight * x[i].z, out.w += weight * x[i].w;
      total += weight * l[i];
    }
    top = now;
  }
  const float4 x = {__shfl_xor_sync(kAllLanes, out.x, 1), __shfl_xor_sync(kAllLanes, out.y, 1), __shfl_xor_sync(kAllLanes, out.z, 1),
                    __shfl_xor_sync(kAllLanes, out.w, 1)};
  const float m = __shfl_xor_sync(kAllLanes, top, 1), l = __shfl_xor_sync(kAllLanes, total, 1);
  join(x, m, l);
  *most = top;
  *sum = total;
  return out;
}

template <RowType R, int D>
__global__ void __launch_bounds__(AttendShape<D>::kThreads, 1) AttendKernel(const __grid_constant__ AttendArgs args) {
  using S = AttendShape<D>;
  extern __shared__ float4 shared_[];
  float* const shared = reinterpret_cast<float*>(shared_) + S::kQueryBytes / sizeof(float);
  __shared__ bool last;
  __shared__ float factors[kHeadTile];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, j = lane % 4;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x), head_tile = static_cast<int>(blockIdx.z);
  const AttendTask task = args.tasks[blockIdx.y];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int64_t stride = int64_t{splits} * S::kWarps * kKeyTile;
  int64_t base = (int64_t{split} * S::kWarps + warp) * kKeyTile;
  // Loads that do not wait for each other: lengths, the first refs, q.
  const bool has_refs = task.refs != nullptr;
  const int32_t visible = *task.n, num_refs = has_refs ? *task.num_refs : 0;
  const int32_t first_ref = has_refs && lane < kKeyTile && base + lane < task.refs_room ? task.refs[base + lane] : 0;
  QueryLoader<R, D> loader;
  loader.Load(task.q, head_tile * kHeadTile, args.group, warp, lane);
  const bool broken = num_refs < 0 || num_refs > task.refs_room;
  const AttendRows rows = RowsOf(task, visible, broken ? 0 : num_refs);
  const int32_t total = broken ? 1 : rows.total();

  // --- the keys of this warp
  int32_t ref = 0;
  uint32_t valid = 0, missing = 0;
  const auto check = [&](int64_t at, int32_t found) {  // valid and missing of the tile at `at`
    const bool exists = lane < kKeyTile && at + lane < total;
    ref = found;
    const bool loads = exists && !broken && (ref >= 0 ? ref < rows.row_limit : ~ref < rows.host_limit);
    valid = __ballot_sync(kAllLanes, loads);
    missing = __ballot_sync(kAllLanes, exists && !loads);
  };
  const auto find = [&](int64_t at) {
    const bool exists = lane < kKeyTile && at + lane < total && !broken;
    check(at, exists ? rows.Ref(static_cast<int32_t>(at + lane)) : 0);
  };
  loader.Store(args.scale, warp, lane, reinterpret_cast<uint4*>(shared_), factors);
  KeyTile<D> k;
  ValueTile<D> v;
  const bool any = base < total;
  if (any) {
    if (base + kKeyTile <= rows.chosen) {
      check(base, first_ref);
    } else {
      find(base);
    }
    LoadKeys<D>(rows, ref, valid, g, j, &k);  // on their way while the warps wait for each other's heads
  }
  __syncthreads();
  Query<D, S::kRoomy> q;
  const float factor = factors[g];
  {
    const uint4* const steps = reinterpret_cast<const uint4*>(shared_) + lane;
    if constexpr (S::kRoomy) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        const uint4 step = steps[i * kWarp];
        q.a[i][0] = step.x, q.a[i][1] = step.y, q.a[i][2] = step.z, q.a[i][3] = step.w;
      }
    } else {
      q.a = steps;
    }
  }
  Softmax<R, D> softmax;
  if (any) {
#pragma unroll 1
    for (;;) {
      if constexpr (S::kRoomy) LoadValues<D>(rows, ref, valid, g, j, 0, &v);
      const int32_t ref_now = ref;
      const uint32_t valid_now = valid, missing_now = missing;
      base += stride;
      const bool more = base < total;
      if (more) find(base);
      uint32_t p[4];
      softmax.Add(q, k, factor, valid_now, missing_now, j, p);
      if constexpr (S::kRoomy) {
        if (more) LoadKeys<D>(rows, ref, valid, g, j, &k);  // on their way while the values are used
        softmax.template AddValues<0>(p, v);
        if (!more) break;
      } else {
        LoadValues<D>(rows, ref_now, valid_now, g, j, 0, &v);
        softmax.template AddValues<0>(p, v);
        LoadValues<D>(rows, ref_now, valid_now, g, j, 1, &v);
        softmax.template AddValues<1>(p, v);
        if (!more) break;
        LoadKeys<D>(rows, ref, valid, g, j, &k);
      }
    }
  }
  softmax.Store(shared + warp * S::kPart, g, j);
  __syncthreads();

  // --- the warps of this block
  const int heads = min(kHeadTile, args.group - head_tile * kHeadTile);
  const int64_t tile = int64_t{blockIdx.y} * gridDim.z + head_tile;
  float* const parts = args.parts + tile * splits * S::kPart;
  float* const block_part = shared + S::kWarps * S::kPart;
  const auto write = [&](int h, int c, float4 out, float most, float sum) {
    const float over = sum == 0 ? 0.0f : 1 / sum;
    const int64_t head = head_tile * kHeadTile + h;
    *reinterpret_cast<float4*>(task.out + head * D + c) = {out.x * over, out.y * over, out.z * over, out.w * over};
    if (c == 0 && task.lse != nullptr) task.lse[head] = sum == 0 ? -Infinity() : (most + __log2f(sum)) * kLn2;
  };
  const int items = heads * (D / 4);  // four channels of a head
  for (int at = 0; at < items; at += S::kThreads / 2) {
    const int i = at + static_cast<int>(threadIdx.x) / 2, h = min(i, items - 1) / (D / 4), c = min(i, items - 1) % (D / 4) * 4;
    float most, sum;
    const float4 out = JoinParts<D, false>(shared, S::kPart, S::kWarps, h, c, &most, &sum);
    if (i >= items || threadIdx.x % 2 != 0) continue;
    if (splits == 1) {
      write(h, c, out, most, sum);
    } else {
      float* const part = args.cluster ? block_part : parts + split * S::kPart;
      *reinterpret_cast<float4*>(part + h * D + c) = out;
      if (c == 0) part[kHeadTile * D + h] = most, part[kHeadTile * D + kHeadTile + h] = sum;
    }
  }
  if (splits == 1) return;

  if (args.cluster) {
    // Each block writes every splits-th item; each of `splits` lanes brings the part of one block.
    ClusterArrive();
    ClusterWait();
    const int from = static_cast<int>(threadIdx.x) % splits;
    const uint32_t part = ClusterAddress(block_part, from);
    for (int at = 0; at * splits + split < items; at += S::kThreads / splits) {
      const int i = (at + static_cast<int>(threadIdx.x) / splits) * splits + split;
      const int h = min(i, items - 1) / (D / 4), c = min(i, items - 1) % (D / 4) * 4;
      const float4 x = LoadCluster4(part + static_cast<uint32_t>(4 * (h * D + c)));
      const float own_most = LoadCluster(part + static_cast<uint32_t>(4 * (kHeadTile * D + h)));
      const float own_sum = LoadCluster(part + static_cast<uint32_t>(4 * (kHeadTile * D + kHeadTile + h)));
      float most = own_most;
      for (int offset = splits / 2; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
      const float weight = Exp2(own_most - (most == -Infinity() ? 0.0f : most));
      float sum = own_sum * weight;
      float4 out = {x.x * weight, x.y * weight, x.z * weight, x.w * weight};
      for (int offset = splits / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
        out.x += __shfl_xor_sync(kAllLanes, out.x, offset);
        out.y += __shfl_xor_sync(kAllLanes, out.y, offset);
        out.z += __shfl_xor_sync(kAllLanes, out.z, offset);
        out.w += __shfl_xor_sync(kAllLanes, out.w, offset);
      }
      if (from == 0 && i < items) write(h, c, out, most, sum);
    }
    ClusterArrive();  // no block ends while another reads its part
    ClusterWait();
    return;
  }

  // --- the blocks of this task
  __syncthreads();
  if (threadIdx.x == 0) {
    last = AddAcquireRelease(args.arrived + tile, 1) + 1 == static_cast<uint32_t>(splits);
    if (last) args.arrived[tile] = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int at = 0; at < items; at += S::kThreads / 2) {
    const int i = at + static_cast<int>(threadIdx.x) / 2, h = min(i, items - 1) / (D / 4), c = min(i, items - 1) % (D / 4) * 4;
    float most, sum;
    const float4 out = JoinParts<D, true>(parts, S::kPart, splits, h, c, &most, &sum);
    if (i < items && threadIdx.x % 2 == 0) write(h, c, out, most, sum);
  }
}

}  // namespace prehoc::cuda
