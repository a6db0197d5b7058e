// Scan and choice in one launch.
//
// A team of blocks takes a task (KV head); each block a contiguous part of the positions. Steps, with a wait of the team between them:
//   1. logits of the own part (from codes and rows, or found in memory), kept in shared memory if they fit; their log-sum-exp
//   2. lse_all; score of every position of the middle as a 32-bit key of the same order; a histogram of the keys of the team
//   3. the bin in which rank k falls; while it holds too many, histograms of the next bits inside it; its members to a list
//   4. rank of each member among them; the own chosen positions in order, at an offset that follows from what all blocks counted
// Ties are broken by position without sorting: keys are compared with positions where few are equal, and counted where many are.
// Dilation adds a second cut (rank m), a bitmap of neighbours, and one more wait.
#pragma once
#include "kernels/cuda/scan.cuh"

namespace prehoc::cuda {

inline constexpr int kSelectThreads = 512;
inline constexpr int kSelectWarps = kSelectThreads / kWarp;
inline constexpr int kBins = 2048;
inline constexpr float kBinsPerNat = 64;    // the bins reach 32 nats below the best weight: 1e-14 of it
inline constexpr int kListRoom = 1024;      // members of a bin that are compared with each other
inline constexpr int kSample = 4 * kSelectThreads;  // own positions from which a block guesses what rank k will leave far below
inline constexpr int kMaxTeam = 64;         // blocks: two to a lane
static_assert(kListRoom * 2 <= kBins, "the list takes the place of the histogram in shared memory");

// What the blocks of a team share; zero before the first launch, and left so that the next one can start.
struct Team {
  uint32_t arrived, left;
  uint32_t finished;
  uint32_t list_size;
  uint32_t floor;  // bins below it are not fully counted
  alignas(16) uint32_t histogram[3][kBins];  // of a round, the one before (being cleared), the next one
  uint32_t list_key[kListRoom];
  int32_t list_position[kListRoom];
  uint32_t above[kMaxTeam];
  uint32_t equal[kMaxTeam];
};

struct SelectArgs {
  const SelectTask* select;  // one of the two is null
  const ChooseTask* choose;
  int32_t num_tasks, max_n;
  CodeFormat format;
  CodeBlockLayout layout;
  RowType type;
  int32_t group;
  GroupRule rule;
  bool dilate;
  int32_t team_blocks;   // blocks per team
  bool cluster;          // a team is a cluster; else all blocks of the launch run at once
  int32_t chunk;         // most positions of a block, a multiple of 64
  int64_t z_stride;      // [floats] of a head in the logits that this launch keeps
  bool z_in_shared;
  bool keep_keys;        // in shared memory: they fit
  Team* teams;           // [teams]
  Mass* parts;           // [teams, group, kMaxTeam]
  Mass* outside;         // [teams, group, kMaxTeam]
  uint32_t* bitmaps;     // [teams, max_n / 32 rounded up], zero between calls; only with dilate
  float* z;              // [teams, team_blocks, group, z_stride], unless in shared memory or found
};

// --- waiting for each other ------------------------------------------------------------------------------------------------------

// Every block of the team has arrived `*waits` times, and what they wrote before is seen.
__device__ inline void WaitForTeam(Team* team, int blocks, bool cluster, uint32_t* waits) {
  if (cluster && blocks > 1) {
    ClusterArrive();
    ClusterWait();
    return;
  }
  __syncthreads();
  ++*waits;
  if (blocks == 1) return;
  if (threadIdx.x == 0) {
    AddRelease(&team->arrived, 1);
    const uint32_t all = *waits * static_cast<uint32_t>(blocks);
    while (LoadAcquire(&team->arrived) < all) {
    }
  }
  __syncthreads();
}
// At the end of a block: the last one leaves the count at 0 for the next launch.
__device__ inline void LeaveTeam(Team* team, int blocks, bool cluster) {
  if (cluster || blocks == 1) return;
  __syncthreads();
  if (threadIdx.x != 0 || AddAcquireRelease(&team->left, 1) + 1 != static_cast<uint32_t>(blocks)) return;
  team->arrived = 0;
  team->left = 0;
}

// --- sums over the block ---------------------------------------------------------------------------------------------------------

// Exclusive prefix of `value` over the threads; *total is that of the block. `scratch` [kSelectWarps].
__device__ inline uint32_t BlockPrefix(uint32_t value, uint32_t* scratch, uint32_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto up_to = [&](uint32_t x) {  // the sum of the lanes up to this one
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, x, offset);
      if (lane >= offset) x += below;
    }
    return x;
  };
  const uint32_t sum = up_to(value);
  __syncthreads();
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();
  const uint32_t warps = up_to(lane < kSelectWarps ? scratch[lane] : 0);
  *total = __shfl_sync(kAllLanes, warps, kWarp - 1);
  const uint32_t before = __shfl_sync(kAllLanes, warps, max(warp - 1, 0));
  return (warp > 0 ? before : 0) + sum - value;
}

// --- keys ------------------------------------------------------------------------------------------------------------------------

// Larger score, larger key; -0 as 0. Never 0, which is the key of what is no candidate. Scores are never NaN.
__device__ inline uint32_t KeyOf(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
__device__ inline float ScoreOf(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}
// The bin of a score, in the same order; `best` is an upper bound of the finite scores that matter. Infinities end in the outer bins.
__device__ inline int BinOf(float score, float best) {
  const int below = __float2int_rz(fmaf(score, -kBinsPerNat, best * kBinsPerNat));
  return kBins - 1 - min(max(below, 0), kBins - 1);
}

// Which keys are certainly among the first k, and which form the class that is decided one by one.
struct Cut {
  uint32_t from, to;  // keys of at least `to` are in; those of [from, to) are of the class
  uint32_t need;      // how many of the class are in
  uint32_t equal;     // how many it has
  uint32_t kept;      // in all

  __device__ bool ByList() const { return equal <= kListRoom; }  // else all keys of the class are the same
};
// Everything and nothing; no score has key 0 or the largest one (they would be NaN).
__device__ inline Cut AllOf(uint32_t candidates) { return {1, 1, 0, 0, candidates}; }
__device__ inline Cut NoneOf() { return {0xffffffffu, 0xffffffffu, 0, 0, 0}; }

// The smallest key whose bin is at least `bin`; of a whole warp. Keys and bins have the same order, so that 7 steps of 32 ways find it.
__device__ inline uint32_t FirstKeyOf(int bin, float best, int lane) {
  uint32_t from = 0x007fffffu;  // the key of -inf; below it, and above that of +inf, are NaN
#pragma unroll 1
  for (int width = 30; width >= 0; width -= 5) {
    const uint64_t probe = uint64_t{from} + (static_cast<uint64_t>(lane) << width);
    const bool at_least = probe >= 0xff800001u || BinOf(ScoreOf(static_cast<uint32_t>(probe)), best) >= bin;
    const unsigned reached = __ballot_sync(kAllLanes, at_least);
    const int below = reached == 0 ? kWarp : __ffs(static_cast<int>(reached)) - 1;  // lanes whose key is too small
    if (below > 0) from += static_cast<uint32_t>(below - 1) << width;
    if (below == 0) return from;
    if (width == 0) return from + 1;
  }
  return from;
}

// --- the kernel ------------------------------------------------------------------------------------------------------------------

template <int D, int BITS>
struct QuerySize {
  static constexpr size_t kBytes = CodeShape<D, BITS>::kQueryBytes;
};
template <int D>
struct QuerySize<D, 0> {
  static constexpr size_t kBytes = 0;
};

template <int D, int BITS>  // BITS 0: the logits are there
class Selector {
 public:
  static constexpr bool kScans = BITS != 0;
  static constexpr size_t kQueryBytes = QuerySize<D, BITS>::kBytes;
  static constexpr size_t kHeaderBytes = size_t{4} * D;  // of the code block of a warp
  // Two per head, in whole pieces of 16 bytes: the logits behind them are stored by the piece.
  static __host__ __device__ int MassFloats(int group) { return (2 * group + 3) / 4 * 4; }
  // Shared memory: q steps, histogram or list, words of the chosen and of the class, masses, keys, logits.
  static size_t SharedBytes(const SelectArgs& args) {
    size_t bytes = kQueryBytes + kBins * 4 + static_cast<size_t>(args.chunk / 32) * 8 + static_cast<size_t>(MassFloats(args.group)) * 4;
    bytes += kHeaderBytes * kSelectWarps;
    if (args.keep_keys) bytes += static_cast<size_t>(args.chunk) * 4;
    if (args.z_in_shared) bytes += static_cast<size_t>(args.group) * static_cast<size_t>(args.z_stride) * 4;
    return bytes;
  }

  __device__ explicit Selector(const SelectArgs& args)
      : args_(args), team_index_(static_cast<int>(blockIdx.x) / args.team_blocks), block_(static_cast<int>(blockIdx.x) % args.team_blocks),
        team_(args.teams + team_index_) {}

  __device__ void Run(int task_index) {
    if constexpr (kScans) {
      const SelectTask& task = args_.select[task_index];
      source_ = &task.source, rule_ = &task.rule;
      n_ = *task.source.n;
      z_ = kept_z(), z_stride_ = args_.z_stride;
    } else {
      const ChooseTask& task = args_.choose[task_index];
      rule_ = &task.rule;
      n_ = *task.n;
    }
    if (rule_->hold != nullptr && *rule_->hold != 0) return;
    if (n_ < 0 || n_ > args_.max_n) {
      Refuse();
      return;
    }
    const int32_t chunk = (n_ + 64 * args_.team_blocks - 1) / (64 * args_.team_blocks) * 64;
    begin_ = min(block_ * chunk, n_), end_ = min(begin_ + chunk, n_);
    sinks_ = min(max(rule_->sinks, 0), n_);
    hi_ = max(sinks_, n_ - max(rule_->local, 0));
    lo_ = min(hi_, max(sinks_, n_ - max(rule_->window, 0)));
    if constexpr (kScans) {
      ScanOwn();
    } else {
      const ChooseTask& task = args_.choose[task_index];
      z_ = task.z + begin_, z_stride_ = task.z_stride;
    }
    __syncthreads();
    if constexpr (!kScans) BlockMass(args_.parts, [&](int32_t i) { return InSight(i); });
    Wait();
    JoinMass();
    round_ = 0;
    const int32_t middle = hi_ - lo_;
    const int32_t k = min(max(rule_->k, 0), middle), m = args_.dilate ? min(max(rule_->dilate_m, 0), k) : 0;
    uint32_t offset = 0, count = 0;
#pragma unroll 1
    for (int dilated = args_.dilate ? 0 : 1; dilated < 2; ++dilated) {  // one copy of the code for both cuts: it is fetched, too
      const Cut cut = FindCut(static_cast<uint32_t>(dilated == 0 ? m : k));
      Keep(cut, &offset);
      count = cut.kept;
      if (dilated == 0) Spread();
    }
    if (args_.dilate) TakeSpread(&offset, &count);
    Write(offset, count);
    if (rule_->lse_out != nullptr) MassOutside();
  }

  __device__ void Leave() { LeaveTeam(team_, args_.team_blocks, args_.cluster); }

 private:
  // Where things lie is computed anew at each use: registers are needed for products.
  static __device__ std::byte* Memory() {
    extern __shared__ float4 select_shared[];
    return reinterpret_cast<std::byte*>(select_shared);
  }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ int warp() const { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ uint4* steps() const { return reinterpret_cast<uint4*>(Memory()); }
  __device__ uint32_t* own_bins() const { return reinterpret_cast<uint32_t*>(Memory() + kQueryBytes); }
  __device__ uint32_t* kept_words() const { return own_bins() + kBins; }                          // [own / 32] kept positions
  __device__ uint32_t* class_words() const { return kept_words() + args_.chunk / 32; }             // [own / 32] the class of the last cut
  __device__ float* lse() const { return reinterpret_cast<float*>(class_words() + args_.chunk / 32); }  // [group]
  __device__ float* top() const { return lse() + args_.group; }                               // [group] largest logits
  __device__ std::byte* header() const {  // [kHeaderBytes] of this warp
    return reinterpret_cast<std::byte*>(lse() + MassFloats(args_.group)) + warp() * kHeaderBytes;
  }
  __device__ uint32_t* keys() const {  // [own], with keep_keys
    return reinterpret_cast<uint32_t*>(reinterpret_cast<std::byte*>(lse() + MassFloats(args_.group)) + kSelectWarps * kHeaderBytes);
  }
  __device__ float* kept_z_shared() const { return reinterpret_cast<float*>(keys() + (args_.keep_keys ? args_.chunk : 0)); }
  __device__ float* kept_z() const {  // [group, z_stride] of this launch
    if (args_.z_in_shared) return kept_z_shared();
    return args_.z + (int64_t{team_index_} * args_.team_blocks + block_) * args_.group * args_.z_stride;
  }

  __device__ void Wait() { WaitForTeam(team_, args_.team_blocks, args_.cluster, &waits_); }
  __device__ bool Leads() const { return block_ == 0; }
  __device__ bool InSight(int32_t i) const { return i < sinks_ || i >= lo_; }

  __device__ void Refuse() {
    if (!Leads()) return;
    if (threadIdx.x == 0) *rule_->count = -1;
    for (int h = threadIdx.x; h < args_.group; h += kSelectThreads) {
      rule_->lse_all[h] = NotANumber();
      if (rule_->lse_out != nullptr) rule_->lse_out[h] = NotANumber();
    }
  }

  // --- 1
  // Logits of the own part to kept_z, their masses to `parts`.
  __device__ void ScanOwn() {
    if constexpr (kScans) {
      __shared__ QueryScale scale;
      __shared__ Mass of_warps[kSelectWarps][kScanHeads];
      const int32_t tokens = args_.format.group_tokens, coded = n_ / tokens * tokens;
      const int32_t coded_end = min(end_, coded);
      for (int32_t i = max(begin_, coded) + warp(); i < end_; i += kSelectWarps) {
        const std::byte* row = static_cast<const std::byte*>(source_->rows) + int64_t{i % source_->ring_rows} * (4 * D);
        for (int h = 0; h < args_.group; ++h) {
          const float2 logit = RowLogit<D>(args_.type, source_->q + h * D, row, lane());
          if (lane() == 0) kept_z()[h * args_.z_stride + (i - begin_)] = logit.x;
        }
      }
      for (int first = 0; first < args_.group; first += kScanHeads) {
        __syncthreads();
        if (warp() == 0) PrepareQuery<D, BITS>(source_->q, first, args_.group, lane(), steps(), &scale);
        __syncthreads();
        Mass mass = tokens == 16 ? ScanTile<1>(first, coded_end, scale) : ScanTile<4>(first, coded_end, scale);
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2) {
          mass = Join(mass, {__shfl_xor_sync(kAllLanes, mass.most, offset), __shfl_xor_sync(kAllLanes, mass.sum, offset)});
        }
        if (lane() < kScanHeads) of_warps[warp()][lane()] = mass;
        __syncthreads();
        const int h = first + warp();
        if (warp() >= kScanHeads || h >= args_.group) continue;
        mass = lane() < kSelectWarps ? of_warps[lane()][warp()] : NoMass();
        for (int32_t i = max(begin_, coded) + lane(); i < end_; i += kWarp) {
          if (InSight(i)) AddLogit(&mass, kept_z()[h * args_.z_stride + (i - begin_)]);
        }
        mass = WarpJoin(mass);
        if (lane() == 0) *PartOf(args_.parts, h, block_) = mass;
      }
    }
  }

  // Blocks of PAGES pages for heads [first, first + 4): logits to kept_z; the mass of head first + lane % 4 as far as this lane has it.
  template <int PAGES>
  __device__ Mass ScanTile(int first, int32_t coded_end, const QueryScale& scale) {
    constexpr int32_t kTokens = PAGES * kCodePageTokens, kStride = kSelectWarps * kTokens;
    const int block_bytes = static_cast<int>(args_.layout.bytes);
    const bool exists = first + lane() % 4 < args_.group;
    float* const mine = kept_z() + (first + lane() % 4) * args_.z_stride - begin_;
    int32_t at = begin_ + warp() * kTokens;
    const std::byte* block = source_->blocks + int64_t{at / kTokens} * block_bytes;
    Mass mass = NoMass();
    if (at >= coded_end) return mass;
    BlockScan<D, BITS, PAGES, false> scan(static_cast<int>(args_.layout.pages), steps(), scale, false, header(), lane());
    scan.Start(block);
#pragma unroll 1
    for (; at < coded_end; at += kStride) {
      const std::byte* const next = at + kStride < coded_end ? block + int64_t{kSelectWarps} * block_bytes : nullptr;
      const bool whole = at >= lo_ || at + kTokens <= sinks_;
      const auto emit = [&](int token, const auto& z) {
        if (!exists) return;
        const int32_t i = at + token;
        *reinterpret_cast<std::decay_t<decltype(z)>*>(mine + i) = z;
        if (whole) {
          AddLogits(&mass, z);
        } else {
#pragma unroll
          for (int t = 0; t < static_cast<int>(sizeof(z) / 4); ++t) {
            if (InSight(i + t)) AddLogit(&mass, (&z.x)[t]);
          }
        }
      };
      scan.Run(block, next, emit, [](int, const auto&) {});
      block = next;
    }
    return mass;
  }

  __device__ Mass* PartOf(Mass* parts, int h, int block) const {
    return parts + (int64_t{team_index_} * args_.group + h) * kMaxTeam + block;
  }
  // Of the own positions that `counts` takes, for each head, to `parts`.
  template <class Counts>
  __device__ void BlockMass(Mass* parts, Counts&& counts) {
    for (int h = 0; h < args_.group; ++h) HeadMass(parts, h, counts);
  }
  template <class Counts>
  __device__ void HeadMass(Mass* parts, int h, Counts&& counts) {
    __shared__ Mass of_warps[kSelectWarps];
    const float* const z = z_ + h * z_stride_;
    Mass mass = NoMass();
    for (int32_t i = begin_ + static_cast<int32_t>(threadIdx.x); i < end_; i += kSelectThreads) {
      if (counts(i)) AddLogit(&mass, z[i - begin_]);
    }
    mass = WarpJoin(mass);
    __syncthreads();
    if (lane() == 0) of_warps[warp()] = mass;
    __syncthreads();
    if (warp() != 0) return;
    mass = WarpJoin(lane() < kSelectWarps ? of_warps[lane()] : NoMass());
    if (lane() == 0) *PartOf(parts, h, block_) = mass;
  }
  // Of the team, in every lane.
  __device__ Mass TeamMass(Mass* parts, int h) const {
    Mass mass = NoMass();
    for (int b = lane(); b < args_.team_blocks; b += kWarp) {
      const float2 part = __ldcg(reinterpret_cast<const float2*>(PartOf(parts, h, b)));
      mass = Join(mass, {part.x, part.y});
    }
    return WarpJoin(mass);
  }

  // --- 2
  __device__ void JoinMass() {
    __shared__ int odd;
    if (threadIdx.x == 0) {
      odd = 0;
      if (Leads()) team_->list_size = 0;
    }
    for (int i = static_cast<int>(threadIdx.x); i < args_.chunk / 32; i += kSelectThreads) kept_words()[i] = 0;
    __syncthreads();
    for (int h = warp(); h < args_.group; h += kSelectWarps) {
      const Mass mass = TeamMass(args_.parts, h);
      if (lane() != 0) continue;
      const float all = LogOf(mass);
      lse()[h] = all;
      top()[h] = mass.most;
      if (!isfinite(all)) odd = 1;
      if (Leads()) rule_->lse_all[h] = all;
    }
    __syncthreads();
    simple_ = odd == 0 && args_.rule != GroupRule::kMeanWeight;
    best_ = 0;  // no weight is above 1
    if (args_.rule == GroupRule::kMaxLogit) {
      float most = -Infinity();
      for (int h = 0; h < args_.group; ++h) most = fmaxf(most, top()[h]);
      best_ = isinf(most) ? 0 : most;
    }
  }

  __device__ float HeadScore(int h, float z) const {
    if (isnan(z) || z == -Infinity()) return -Infinity();
    if (z == Infinity()) return z;
    if (args_.rule == GroupRule::kMaxLogit) return z;
    return isnan(lse()[h]) ? -Infinity() : z - lse()[h];
  }
  // Any rule, any numbers. Out of the way: code that is run once costs the time to fetch it.
  __device__ __noinline__ float Score(int32_t at) const {
    const float* const z = z_ + at;
    float most = -Infinity();
    for (int h = 0; h < args_.group; ++h) most = fmaxf(most, HeadScore(h, z[h * z_stride_]));
    if (args_.rule != GroupRule::kMeanWeight || isinf(most)) return most;
    float sum = 0;
    for (int h = 0; h < args_.group; ++h) sum += __expf(HeadScore(h, z[h * z_stride_]) - most);
    return most + __logf(sum / static_cast<float>(args_.group));
  }
  // Of four own positions by a rule that takes the maximum, where every logit is a number or -inf.
  __device__ static float4 MostOf(const float* z, int stride, int group, const float* offset) {
    float4 most = {-Infinity(), -Infinity(), -Infinity(), -Infinity()};
#pragma unroll 4
    for (int h = 0; h < group; ++h, z += stride) {
      const float4 x = *reinterpret_cast<const float4*>(z);
      const float o = offset != nullptr ? offset[h] : 0;
      most = {fmaxf(most.x, x.x - o), fmaxf(most.y, x.y - o), fmaxf(most.z, x.z - o), fmaxf(most.w, x.w - o)};
    }
    return most;
  }
  // Logits of four own positions, the last of them at most 3 behind the own part.
  __device__ float4 LoadFour(int h, int32_t at) const {
    const float* const z = z_ + h * z_stride_ + at;
    if constexpr (kScans) return *reinterpret_cast<const float4*>(z);  // kept in rows of whole pieces
    const int32_t own = end_ - begin_;
    return {z[0], at + 1 < own ? z[1] : 0, at + 2 < own ? z[2] : 0, at + 3 < own ? z[3] : 0};
  }
  // Of four own positions from `at` on; what lies behind the own part is anything.
  __device__ float4 ScoreFour(int32_t at) const {
    const float* const offset = args_.rule != GroupRule::kMaxLogit ? lse() : nullptr;
    if (kScans && simple_ && args_.z_in_shared) {  // where loads are known to be of shared memory
      return MostOf(kept_z_shared() + at, static_cast<int>(args_.z_stride), args_.group, offset);
    }
    float4 most = {-Infinity(), -Infinity(), -Infinity(), -Infinity()};
    if (simple_) {
#pragma unroll 4
      for (int h = 0; h < args_.group; ++h) {
        const float4 z = LoadFour(h, at);
        const float o = offset != nullptr ? offset[h] : 0;
        most = {fmaxf(most.x, z.x - o), fmaxf(most.y, z.y - o), fmaxf(most.z, z.z - o), fmaxf(most.w, z.w - o)};
      }
      return most;
    }
#pragma unroll 1
    for (int t = 0; t < 4; ++t) most = {most.y, most.z, most.w, Score(min(at + t, end_ - begin_ - 1))};
    return most;
  }
  // Keys of four own positions; 0 where a position is no candidate. `at` is a multiple of 4.
  __device__ uint4 KeysAt(int32_t at, const float4& score, const uint64_t* resident, float log_theta) const {
    const int32_t i = begin_ + at;
    uint32_t in = resident != nullptr ? static_cast<uint32_t>(resident[i / 64] >> (i % 64)) : 15u;
    if (resident != nullptr) {
      in |= (score.x > log_theta ? 1u : 0) | (score.y > log_theta ? 2u : 0) | (score.z > log_theta ? 4u : 0) | (score.w > log_theta ? 8u : 0);
    }
    const uint32_t before = static_cast<uint32_t>(min(max(lo_ - i, 0), 4)), within = static_cast<uint32_t>(min(max(hi_ - i, 0), 4));
    in &= (15u << before) & ((1u << within) - 1);
    return {(in & 1) != 0 ? KeyOf(score.x) : 0, (in & 2) != 0 ? KeyOf(score.y) : 0, (in & 4) != 0 ? KeyOf(score.z) : 0,
            (in & 8) != 0 ? KeyOf(score.w) : 0};
  }
  // As the first round of CountKeys found them.
  __device__ uint4 KeysAgain(int32_t at, const uint64_t* resident, float log_theta) const {
    if (args_.keep_keys) return *reinterpret_cast<const uint4*>(keys() + at);
    return KeysAt(at, ScoreFour(at), resident, log_theta);
  }
  __device__ void Pool(int32_t at, const float4& score) const {
    const int32_t i = begin_ + at;
    float* const pooled = rule_->pooled + i;
    const bool anew = rule_->pool_reset != 0;
    if (i >= lo_ && i + 3 < hi_ && reinterpret_cast<uintptr_t>(pooled) % sizeof(float4) == 0) {
      float4 x = score;
      if (!anew) {
        const float4 old = *reinterpret_cast<float4*>(pooled);
        x = {fmaxf(old.x, x.x), fmaxf(old.y, x.y), fmaxf(old.z, x.z), fmaxf(old.w, x.w)};
      }
      *reinterpret_cast<float4*>(pooled) = x;
      return;
    }
    float4 left = score;
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
      if (i + t >= lo_ && i + t < hi_) pooled[t] = anew ? left.x : fmaxf(pooled[t], left.x);
      left = {left.y, left.z, left.w, 0};
    }
  }

  // --- 3
  // How many own keys lie in which bin: all of them, or (refining) those of the class of `cut` in bins of 2^shift keys. Four positions to a
  // thread, so that loads do not wait for each other. The first round also pools. It counts most of what lies far below rank k only as
  // one number, in bin 0: adding to bins is what a round costs.
  __device__ void CountKeys(uint32_t k, const Cut& cut, bool refines, int shift) {
    __shared__ uint32_t scratch[kSelectWarps];
    __shared__ int shared_floor;
    reinterpret_cast<uint4*>(own_bins())[threadIdx.x] = uint4{};
    if (threadIdx.x == 0) shared_floor = 0;
    __syncthreads();
    const int32_t own = end_ - begin_, middle = hi_ - lo_;
    const uint64_t* const resident = rule_->resident;
    const float log_theta = rule_->log_theta, best = best_;
    const bool first = round_ == 0, pools = first && rule_->pooled != nullptr;
    int floor = 0;
    uint32_t skipped = 0;
    for (int32_t from = 0; from < own; from += kSample) {
      const int32_t at = from + 4 * static_cast<int32_t>(threadIdx.x);
      if (at < own) {
        uint4 key;
        float4 score;
        if (first) {
          score = ScoreFour(at);
          if (pools) Pool(at, score);
          key = KeysAt(at, score, resident, log_theta);
          if (args_.keep_keys) *reinterpret_cast<uint4*>(keys() + at) = key;
        } else {
          key = KeysAgain(at, resident, log_theta);
          score = {ScoreOf(key.x), ScoreOf(key.y), ScoreOf(key.z), ScoreOf(key.w)};
        }
        const auto count = [&](uint32_t one, float of) {
          int bin = BinOf(of, best);
          bool counts = one != 0 && bin >= floor;
          skipped += one != 0 && bin < floor ? 1 : 0;
          if (refines) {
            bin = static_cast<int>((one - cut.from) >> shift);
            counts = one >= cut.from && one < cut.to;
          }
          if (counts) atomicAdd(own_bins() + bin, 1u);
        };
        count(key.x, score.x), count(key.y, score.y), count(key.z, score.z), count(key.w, score.w);
      }
      if (from != 0 || !first || own < 4 * kSample) continue;
      // From the first positions: the bin above which four times the share of k lies, and some.
      __syncthreads();
      const uint32_t enough = static_cast<uint32_t>(4.0f * static_cast<float>(k) * kSample / static_cast<float>(max(middle, 1))) + 64;
      const int top = TopOfThread();
      uint32_t mine = 0, total;
      for (int i = 0; i < kThreadBins; ++i) mine += own_bins()[top - i];
      uint32_t before = BlockPrefix(mine, scratch, &total);
      if (before < enough && enough <= before + mine) {
        int i = 0;
        for (; before + own_bins()[top - i] < enough; ++i) before += own_bins()[top - i];
        shared_floor = top - i;
      }
      __syncthreads();
      floor = shared_floor;
    }
    skipped = __reduce_add_sync(kAllLanes, skipped);
    if (lane() == 0 && skipped != 0) {
      atomicAdd(own_bins(), skipped);
      atomicMax(&team_->floor, static_cast<uint32_t>(floor));
    }
    __syncthreads();
  }
  static constexpr int kThreadBins = kBins / kSelectThreads;
  static_assert(kThreadBins == 4 && kBins % kSelectThreads == 0, "a thread's bins are one piece");
  // Each thread takes kThreadBins bins, from this one down.
  __device__ static int TopOfThread() { return kBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins; }

  // Adds up what the blocks counted, and finds the bin of rank `target` (from 1, from the top), and how many are above and inside. False if there
  // are fewer; `candidates_` are all.
  __device__ bool FindBin(uint32_t target, int* bin, uint32_t* above, uint32_t* inside) {
    __shared__ uint32_t scratch[kSelectWarps];
    __shared__ uint32_t found[3];
    uint32_t* const histogram = team_->histogram[round_ % 3];
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) {
      if (own_bins()[i] != 0) atomicAdd(histogram + i, own_bins()[i]);
    }
    Wait();
    // Thread t sums bins from the top.
    const int top = TopOfThread();
    const uint4 piece = __ldcg(reinterpret_cast<const uint4*>(histogram + top + 1 - kThreadBins));
    const uint32_t count[kThreadBins] = {piece.w, piece.z, piece.y, piece.x};
    const uint32_t mine = (piece.x + piece.y) + (piece.z + piece.w);
    uint32_t total;
    uint32_t before = BlockPrefix(mine, scratch, &total);
    if (before < target && target <= before + mine) {
#pragma unroll
      for (int i = 0; i < kThreadBins; ++i) {
        if (before < target && target <= before + count[i]) {
          found[0] = static_cast<uint32_t>(top - i), found[1] = before, found[2] = count[i];
        }
        before += count[i];
      }
    }
    // All have read the histogram of the round before: they are past the wait.
    if (Leads() && round_ > 0) ClearHistogram(round_ - 1);
    __syncthreads();
    ++round_;
    *bin = static_cast<int>(found[0]), *above = found[1], *inside = found[2];
    candidates_ = total;
    return target <= total;
  }
  __device__ void ClearHistogram(int round) {
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) team_->histogram[round % 3][i] = 0;
  }

  __device__ Cut FindCut(uint32_t k) {
    __shared__ uint32_t edge[2];
    Cut cut{};
    uint32_t need = max(k, 1u);
    bool refines = false;
#pragma unroll 1
    for (;;) {
      int shift = 0;
      while (refines && ((cut.to - cut.from - 1) >> shift) >= kBins) ++shift;
      CountKeys(k, cut, refines, shift);
      int bin = 0;
      uint32_t above = 0, inside = 0;
      const bool was_first = round_ == 0, enough = FindBin(need, &bin, &above, &inside);
      if (!refines) {
        if (k == 0) return NoneOf();
        if (!enough || k == candidates_) return AllOf(candidates_);
        // A guess that was wrong (the same in every block): bins below it are counted now.
        if (was_first && static_cast<uint32_t>(bin) < __ldcg(&team_->floor)) continue;
        if (warp() < 2) {
          const uint32_t key = FirstKeyOf(bin + warp(), best_, lane());
          if (lane() == 0) edge[warp()] = key;
        }
        __syncthreads();
        cut.from = edge[0], cut.to = edge[1];
        cut.kept = k;
      } else {
        const uint32_t from = cut.from + (static_cast<uint32_t>(bin) << shift);
        cut.to = min(cut.to - 1, from + ((1u << shift) - 1)) + 1;
        cut.from = from;
      }
      cut.need = need -= above;
      cut.equal = inside;
      refines = true;
      if (cut.ByList() || cut.to - cut.from == 1) return cut;
    }
  }

  // --- 4
  // Adds what `cut` keeps of the own part to kept_words(); *offset: how many the blocks before keep.
  __device__ void Keep(const Cut& cut, uint32_t* offset) {
    __shared__ uint32_t scratch[kSelectWarps];
    __shared__ uint32_t before, own_in, own_class, in_before, class_before;
    const int32_t own = end_ - begin_, words = (own + 31) / 32;
    if (threadIdx.x == 0) before = own_in = own_class = 0;
    __syncthreads();
    uint32_t in = 0, of_class = 0;  // in the first lane of eight
    const bool lists = cut.ByList();
    const uint64_t* const resident = rule_->resident;
    const float log_theta = rule_->log_theta;
    for (int32_t from = warp() * 4 * kWarp; from < own; from += kSelectWarps * 4 * kWarp) {
      const int32_t at = from + 4 * lane();
      uint4 key{};
      if (at < own) key = KeysAgain(at, resident, log_theta);
      uint32_t in_word = 0, class_word = 0;
      const auto place = [&](uint32_t one, int t) {
        in_word |= static_cast<uint32_t>(one >= cut.to) << t;
        if (one < cut.from || one >= cut.to) return;
        class_word |= 1u << t;
        if (!lists) return;
        const uint32_t entry = atomicAdd(&team_->list_size, 1u);
        team_->list_key[entry] = one, team_->list_position[entry] = begin_ + at + t;
      };
      place(key.x, 0), place(key.y, 1), place(key.z, 2), place(key.w, 3);
      in_word <<= 4 * (lane() % 8), class_word <<= 4 * (lane() % 8);
#pragma unroll
      for (int offset = 1; offset < 8; offset *= 2) {
        in_word |= __shfl_xor_sync(kAllLanes, in_word, offset);
        class_word |= __shfl_xor_sync(kAllLanes, class_word, offset);
      }
      const int32_t w = from / 32 + lane() / 8;
      if (lane() % 8 == 0 && w < words) {
        kept_words()[w] |= in_word;
        class_words()[w] = class_word;
        in += __popc(in_word), of_class += __popc(class_word);
      }
    }
    in = __reduce_add_sync(kAllLanes, in), of_class = __reduce_add_sync(kAllLanes, of_class);
    if (lane() == 0) {
      if (in != 0) atomicAdd(&own_in, in);
      if (of_class != 0) atomicAdd(&own_class, of_class);
    }
    __syncthreads();
    if (threadIdx.x == 0) team_->above[block_] = own_in, team_->equal[block_] = own_class;
    Wait();
    if (Leads()) {  // all are past reading them
      ClearHistogram(round_ - 1);
      if (threadIdx.x == 0) team_->floor = 0;
    }
    if (warp() == 0) {
      uint32_t above_here = 0, equal_here = 0;
      for (int b = lane(); b < block_; b += kWarp) above_here += __ldcg(team_->above + b), equal_here += __ldcg(team_->equal + b);
      above_here = __reduce_add_sync(kAllLanes, above_here), equal_here = __reduce_add_sync(kAllLanes, equal_here);
      if (lane() == 0) in_before = above_here, class_before = equal_here;
    }
    __syncthreads();
    uint32_t above_before = in_before;
    const uint32_t equal_before = class_before;
    if (cut.equal > 0) {
      if (cut.ByList()) {
        RankList(cut, &before);
        __syncthreads();
        above_before += before;
      } else {
        TakeInOrder(cut, equal_before, scratch);
        above_before += min(equal_before, cut.need);
      }
    }
    *offset = above_before;
    __syncthreads();
  }

  // The members of the class of which fewer than `need` come before (by key, then position) are kept: own ones in kept_words(), those of
  // the blocks before are counted.
  __device__ void RankList(const Cut& cut, uint32_t* before) {
    uint32_t* const key = own_bins();
    int32_t* const position = reinterpret_cast<int32_t*>(own_bins() + kListRoom);
    const int size = static_cast<int>(cut.equal);
    for (int i = threadIdx.x; i < size; i += kSelectThreads) {
      key[i] = __ldcg(team_->list_key + i), position[i] = __ldcg(team_->list_position + i);
    }
    __syncthreads();
    // As many lanes for a member as there are to spare; a warp's loop is the same for all of its lanes.
    int lanes = 1;
    while (lanes < kWarp && size * lanes * 2 <= kSelectThreads) lanes *= 2;
    const int each = kSelectThreads / lanes, part = static_cast<int>(threadIdx.x) % lanes;
    for (int from = 0; from < size; from += each) {
      const int i = from + static_cast<int>(threadIdx.x) / lanes;
      uint32_t rank = 0;
      if (i < size) {
        const uint32_t my_key = key[i];
        const int32_t my_position = position[i];
        for (int other = part; other < size; other += lanes) {
          rank += key[other] > my_key || (key[other] == my_key && position[other] < my_position) ? 1 : 0;
        }
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) rank += __shfl_xor_sync(kAllLanes, rank, offset);
      if (i >= size || part != 0 || rank >= cut.need) continue;
      const int32_t at = position[i] - begin_;
      if (at < 0) atomicAdd(before, 1u);
      if (at >= 0 && position[i] < end_) atomicOr(kept_words() + at / 32, 1u << (at % 32));
    }
  }

  // All keys of the class are equal: the lowest positions are kept.
  __device__ void TakeInOrder(const Cut& cut, uint32_t equal_before, uint32_t* scratch) {
    const int words = (end_ - begin_ + 31) / 32, each = (words + kSelectThreads - 1) / kSelectThreads;
    const int first = static_cast<int>(threadIdx.x) * each;
    uint32_t mine = 0, total;
    for (int w = first; w < min(first + each, words); ++w) mine += __popc(class_words()[w]);
    uint32_t rank = equal_before + BlockPrefix(mine, scratch, &total);
    for (int w = first; w < min(first + each, words); ++w) {
      uint32_t left = class_words()[w], kept = 0;
      while (left != 0 && rank < cut.need) {
        const uint32_t bit = left & (~left + 1);
        kept |= bit, left ^= bit;
        ++rank;
      }
      kept_words()[w] |= kept;
    }
    __syncthreads();
  }

  // Dilation: the neighbours of what kept_words() holds (rank <= m) go to the bitmap of the team; kept_words() starts anew.
  __device__ void Spread() {
    uint32_t* const bitmap = Bitmap();
    const int32_t reach = min(max(rule_->dilate_r, 0), hi_ - lo_);
    for (int w = threadIdx.x; w < (end_ - begin_ + 31) / 32; w += kSelectThreads) {
      uint32_t left = kept_words()[w];
      kept_words()[w] = 0;
      for (; left != 0; left &= left - 1) {
        const int32_t p = begin_ + w * 32 + __ffs(static_cast<int>(left)) - 1;
        const int32_t from = max(lo_, p - reach), to = min(hi_ - 1, p + reach);
        for (int32_t word = from / 32; word <= to / 32; ++word) {
          uint32_t bits = kAllLanes;
          if (word == from / 32) bits &= kAllLanes << (from % 32);
          if (word == to / 32) bits &= kAllLanes >> (31 - to % 32);
          atomicOr(bitmap + word, bits);
        }
      }
    }
    if (Leads() && threadIdx.x == 0) team_->list_size = 0;  // the waits of the next cut come before its list
    __syncthreads();
  }
  // ... and join what rank k kept. The waits of the second cut lie between; one more for the counts.
  __device__ void TakeSpread(uint32_t* offset, uint32_t* count) {
    __shared__ uint32_t scratch[kSelectWarps];
    uint32_t* const bitmap = Bitmap() + begin_ / 32;
    uint32_t mine = 0, total;
    for (int w = threadIdx.x; w < (end_ - begin_ + 31) / 32; w += kSelectThreads) {
      kept_words()[w] |= __ldcg(bitmap + w);
      bitmap[w] = 0;
      mine += __popc(kept_words()[w]);
    }
    BlockPrefix(mine, scratch, &total);
    Wait();  // all have read the counts of the cut
    if (threadIdx.x == 0) team_->above[block_] = total;
    Wait();
    *offset = 0, *count = 0;
    for (int b = 0; b < args_.team_blocks; ++b) {  // (dilation is not the fast path)
      const uint32_t here = __ldcg(team_->above + b);
      if (b < block_) *offset += here;
      *count += here;
    }
  }
  __device__ uint32_t* Bitmap() const { return args_.bitmaps + int64_t{team_index_} * ((args_.max_n + 31) / 32); }

  __device__ void Write(uint32_t offset, uint32_t count) {
    __shared__ uint32_t scratch[kSelectWarps];
    const bool fits = static_cast<int64_t>(count) <= rule_->room;
    if (Leads() && threadIdx.x == 0) *rule_->count = fits ? static_cast<int32_t>(count) : -1;
    if (!fits) return;
    const int words = (end_ - begin_ + 31) / 32, each = (words + kSelectThreads - 1) / kSelectThreads;
    const int first = static_cast<int>(threadIdx.x) * each;
    uint32_t mine = 0, total;
    for (int w = first; w < min(first + each, words); ++w) mine += __popc(kept_words()[w]);
    uint32_t at = offset + BlockPrefix(mine, scratch, &total);
    for (int w = first; w < min(first + each, words); ++w) {
      for (uint32_t left = kept_words()[w]; left != 0; left &= left - 1) {
        rule_->chosen[at++] = begin_ + w * 32 + __ffs(static_cast<int>(left)) - 1;
      }
    }
  }

  __device__ bool Outside(int32_t at) const { return begin_ + at >= lo_ && begin_ + at < hi_ && ((kept_words()[at / 32] >> (at % 32)) & 1) == 0; }
  __device__ static float Weight(float z, float unit, uint32_t counts) { return counts != 0 ? Exp2(fmaf(z, kLog2E, unit)) : 0; }
  // Four heads in one pass, in units of a weight that no other is far above. What is so small that it vanishes there, or no number, is
  // added up as logarithms.
  __device__ void MassOutside() {
    __shared__ float of_warps[kSelectWarps][4];
    constexpr float kBelow = 40;  // nats: exp(40) is far from overflow, exp(-40 - 87) is the least that counts
    for (int first = 0; first < args_.group; first += 4) {
      float sum[4] = {}, unit[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) unit[e] = first + e < args_.group ? (kBelow - lse()[first + e]) * kLog2E : 0;
      for (int32_t at = 4 * static_cast<int32_t>(threadIdx.x); at < end_ - begin_; at += 4 * kSelectThreads) {
        uint32_t out = ~(kept_words()[at / 32] >> (at % 32)) & 15u;
        const int32_t i = begin_ + at;
        if (i < lo_ || i + 3 >= hi_) {
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            if (i + t < lo_ || i + t >= hi_) out &= ~(1u << t);
          }
        }
        if (out == 0) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (first + e >= args_.group) continue;
          const float4 z = LoadFour(first + e, at);
          sum[e] += (Weight(z.x, unit[e], out & 1) + Weight(z.y, unit[e], out & 2)) + (Weight(z.z, unit[e], out & 4) + Weight(z.w, unit[e], out & 8));
        }
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], offset);
      }
      __syncthreads();
      if (lane() < 4) of_warps[warp()][lane()] = lane() == 0 ? sum[0] : lane() == 1 ? sum[1] : lane() == 2 ? sum[2] : sum[3];
      __syncthreads();
      for (int e = 0; e < 4 && first + e < args_.group; ++e) {
        float all = 0;
        for (int w = 0; w < kSelectWarps; ++w) all += of_warps[w][e];
        const bool fine = all > 1e-25f && all < 1e30f && isfinite(lse()[first + e]);
        if (!fine) {
          HeadMass(args_.outside, first + e, [&](int32_t i) { return Outside(i - begin_); });
        } else if (threadIdx.x == 0) {
          *PartOf(args_.outside, first + e, block_) = {lse()[first + e] - kBelow, all};
        }
      }
    }
    if (!LastOfTeam()) return;
    for (int h = warp(); h < args_.group; h += kSelectWarps) {
      const Mass mass = TeamMass(args_.outside, h);
      if (lane() == 0) rule_->lse_out[h] = LogOf(mass);
    }
  }
  // True in the last block that is here: all have written then.
  __device__ bool LastOfTeam() {
    if (args_.team_blocks == 1) {
      __syncthreads();
      return true;
    }
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(&team_->finished, 1u) + 1 == static_cast<uint32_t>(args_.team_blocks);
      if (last) team_->finished = 0;
      __threadfence();
    }
    __syncthreads();
    return last;
  }

  const SelectArgs& args_;
  const ScanSource* source_ = nullptr;
  const ChooseRule* rule_ = nullptr;
  int team_index_, block_;
  Team* team_;
  const float* z_ = nullptr;  // logit of head h at own position i: z_[h * z_stride_ + i]
  int64_t z_stride_ = 0;
  int32_t n_ = 0, begin_ = 0, end_ = 0, sinks_ = 0, lo_ = 0, hi_ = 0;
  float best_ = 0;      // an upper bound of the scores that matter
  bool simple_ = false;  // all lse are finite, and the score is a maximum
  int round_ = 0;
  uint32_t waits_ = 0;
  uint32_t candidates_ = 0;
};

template <int D, int BITS>
__global__ void __launch_bounds__(kSelectThreads, 1) SelectKernel(const __grid_constant__ SelectArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  Selector<D, BITS> selector(args);
  const int teams = gridDim.x / args.team_blocks;
  for (int task = blockIdx.x / args.team_blocks; task < args.num_tasks; task += teams) {
    selector.Run(task);
    __syncthreads();
  }
  selector.Leave();
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
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int32_t warps = static_cast<int32_t>(gridDim.x) * (kScanThreads / kWarp), me = static_cast<int32_t>(blockIdx.x) * (kScanThreads / kWarp) + warp;
  const int block_bytes = static_cast<int>(args.layout.bytes);
  const bool mine = first + lane % 4 < args.group;
  const int64_t row = (first + lane % 4) * task.z_stride;
  int64_t at = int64_t{me} * kTokens;
  if (at >= coded) return;
  const std::byte* block = task.source.blocks + at / kTokens * block_bytes;
  BlockScan<D, BITS, PAGES, WITH_ERROR> scan(static_cast<int>(args.layout.pages), steps, scale, args.format.error_norms, header, lane);
  scan.Start(block);
#pragma unroll 1
  for (; at < coded; at += int64_t{warps} * kTokens) {
    const std::byte* const next = at + int64_t{warps} * kTokens < coded ? block + int64_t{warps} * block_bytes : nullptr;
    const auto emit = [&](int token, const auto& z) {
      if (mine) *reinterpret_cast<std::decay_t<decltype(z)>*>(task.z + row + at + token) = z;
    };
    const auto emit_error = [&](int token, const auto& err) {
      if (mine) *reinterpret_cast<std::decay_t<decltype(err)>*>(task.err + row + at + token) = err;
    };
    scan.Run(block, next, emit, emit_error);
    block = next;
  }
}

template <int D, int BITS>
__global__ void __launch_bounds__(kScanThreads, 1) ScanKernel(const __grid_constant__ ScanArgs args) {
  __shared__ __align__(16) std::byte step_bytes[CodeShape<D, BITS>::kQueryBytes];
  __shared__ __align__(16) std::byte headers[kScanThreads / kWarp][CodeShape<D, BITS>::kHeaderBytes];
  __shared__ QueryScale scale;
  const ScanTask task = args.tasks[blockIdx.y];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
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
