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

inline constexpr int kSelectThreads = 384;
inline constexpr int kSelectWarps = kSelectThreads / kWarp;
inline constexpr int kBins = 2048;
inline constexpr float kBinsPerNat = 64;    // the bins reach 32 nats below the best weight: 1e-14 of it
inline constexpr int kRefineBits = 11;
inline constexpr int kListRoom = 1024;      // members of a bin that are compared with each other
inline constexpr int kMaxTeam = 64;         // blocks: two to a lane
static_assert(kListRoom * 2 <= kBins, "the list takes the place of the histogram in shared memory");

// What the blocks of a team share; zero before the first launch, and left so that the next one can start.
struct Team {
  uint32_t arrived, generation;
  uint32_t finished;
  uint32_t list_size;
  uint32_t histogram[3][kBins];  // of a round, the one before (being cleared), the next one
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
  bool z_in_shared, keys_in_shared;
  Team* teams;           // [teams]
  Mass* parts;           // [teams, group, kMaxTeam]
  Mass* outside;         // [teams, group, kMaxTeam]
  uint32_t* bitmaps;     // [teams, max_n / 32 rounded up], zero between calls; only with dilate
  float* z;              // [teams, team_blocks, group, z_stride], unless in shared memory or found
  uint32_t* keys;        // [teams, team_blocks, chunk], unless in shared memory
};

// --- waiting for each other ------------------------------------------------------------------------------------------------------

__device__ inline uint32_t LoadAcquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
// Every block of the team has arrived, and what they wrote before is seen.
__device__ inline void WaitForTeam(Team* team, int blocks, bool cluster) {
  if (cluster && blocks > 1) {
    ClusterArrive();
    ClusterWait();
    return;
  }
  __syncthreads();
  if (blocks > 1 && threadIdx.x == 0) {
    __threadfence();
    const uint32_t generation = LoadAcquire(&team->generation);
    if (atomicAdd(&team->arrived, 1u) + 1 == static_cast<uint32_t>(blocks)) {
      team->arrived = 0;
      __threadfence();
      atomicAdd(&team->generation, 1u);
    } else {
      while (LoadAcquire(&team->generation) == generation) {
      }
    }
    __threadfence();
  }
  __syncthreads();
}

// --- sums over the block ---------------------------------------------------------------------------------------------------------

// Exclusive prefix of `value` over the threads; *total is that of the block. `scratch` [kSelectWarps + 1].
__device__ inline uint32_t BlockPrefix(uint32_t value, uint32_t* scratch, uint32_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += below;
  }
  __syncthreads();
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();
  uint32_t before = 0, all = 0;
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  *total = all;
  return before + sum - value;
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
// The bin of a key, in the same order; `best` is an upper bound of the finite scores that matter.
__device__ inline int BinOf(uint32_t key, float best) {
  const float below = (best - ScoreOf(key)) * kBinsPerNat;
  return below >= kBins - 1 ? 0 : below <= 0 ? kBins - 1 : kBins - 1 - static_cast<int>(below);
}

// Which keys are certainly among the first k, and which form the class that is decided one by one.
struct Cut {
  int bin;         // keys of higher bins are in; -1: all keys are
  int shift;       // the class: keys of this bin whose upper bits, from `shift` on, are `prefix`; 32: all keys of the bin
  uint32_t prefix;
  uint32_t need;   // how many of the class are in
  uint32_t equal;  // how many it has
  uint32_t kept;   // in all

  // 1: in, 0: of the class, -1: out.
  __device__ int Of(uint32_t key, float best) const {
    if (key == 0) return -1;
    if (bin < 0) return 1;
    const int b = BinOf(key, best);
    if (b != bin) return b > bin ? 1 : -1;
    if (shift == 32) return 0;
    const uint32_t upper = key >> shift;
    return upper == prefix ? 0 : upper > prefix ? 1 : -1;
  }
  __device__ bool ByList() const { return equal <= kListRoom; }  // else all keys of the class are the same
};

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
  // Two per head, in whole pieces of 16 bytes: the logits behind them are stored by the piece.
  static __host__ __device__ int MassFloats(int group) { return (2 * group + 3) / 4 * 4; }
  // Shared memory: q steps, histogram or list, words of the chosen and of the class, masses, keys, logits.
  static size_t SharedBytes(const SelectArgs& args) {
    size_t bytes = kQueryBytes + kBins * 4 + static_cast<size_t>(args.chunk / 32) * 8 + static_cast<size_t>(MassFloats(args.group)) * 4;
    if (args.keys_in_shared) bytes += static_cast<size_t>(args.chunk) * 4;
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
    MakeKeys();
    round_ = 0;
    const int32_t middle = hi_ - lo_;
    const int32_t k = min(max(rule_->k, 0), middle);
    uint32_t offset = 0, count = 0;
    if (args_.dilate) {
      const int32_t m = min(max(rule_->dilate_m, 0), k);
      Keep(FindCut(static_cast<uint32_t>(m)), &offset);
      Spread();
      Keep(FindCut(static_cast<uint32_t>(k)), &offset);
      TakeSpread(&offset, &count);
    } else {
      const Cut cut = FindCut(static_cast<uint32_t>(k));
      Keep(cut, &offset);
      count = cut.kept;
    }
    Write(offset, count);
    if (rule_->lse_out != nullptr) MassOutside();
  }

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
  __device__ uint32_t* keys() const {                                                         // [own]
    if (args_.keys_in_shared) return reinterpret_cast<uint32_t*>(lse() + MassFloats(args_.group));
    return args_.keys + (int64_t{team_index_} * args_.team_blocks + block_) * args_.chunk;
  }
  __device__ float* kept_z() const {                                                          // [group, z_stride] of this launch
    if (args_.z_in_shared) return reinterpret_cast<float*>(keys() + args_.chunk);
    return args_.z + (int64_t{team_index_} * args_.team_blocks + block_) * args_.group * args_.z_stride;
  }

  __device__ void Wait() const { WaitForTeam(team_, args_.team_blocks, args_.cluster); }
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
        const int g = lane() / 4, j = lane() % 4;
        const bool exists = first + g < args_.group;
        float* const mine = kept_z() + (first + g) * args_.z_stride;
        Mass mass = NoMass();
        for (int32_t at = begin_ + warp() * tokens; at < coded_end; at += kSelectWarps * tokens) {
          const std::byte* block = source_->blocks + int64_t{at / tokens} * static_cast<int64_t>(args_.layout.bytes);
          const bool whole = at >= lo_ || at + tokens <= sinks_;
          const auto emit = [&](int page, const float4& z) {
            if (!exists) return;
            const int32_t i = at + kCodePageTokens * page + 4 * j;
            *reinterpret_cast<float4*>(mine + (i - begin_)) = z;
            if (whole) {
              AddLogits(&mass, z);
            } else {
              if (InSight(i)) AddLogit(&mass, z.x);
              if (InSight(i + 1)) AddLogit(&mass, z.y);
              if (InSight(i + 2)) AddLogit(&mass, z.z);
              if (InSight(i + 3)) AddLogit(&mass, z.w);
            }
          };
          BlockScan<D, BITS, false>::Run(block, args_.layout, tokens / kCodePageTokens, steps(), scale, false, lane(), emit,
                                         [](int, const float4&) {});
        }
#pragma unroll
        for (int offset = 1; offset <= 2; offset *= 2) {
          mass = Join(mass, {__shfl_xor_sync(kAllLanes, mass.most, offset), __shfl_xor_sync(kAllLanes, mass.sum, offset)});
        }
        if (j == 0) of_warps[warp()][g] = mass;
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
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) own_bins()[i] = 0;
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
    plain_ = odd == 0;
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
  __device__ float Score(int32_t i) const {
    const float* const z = z_ + (i - begin_);
    float most = -Infinity();
    if (plain_ && args_.rule != GroupRule::kMaxLogit) {  // finite sums: no logit is NaN or +inf
      for (int h = 0; h < args_.group; ++h) most = fmaxf(most, z[h * z_stride_] - lse()[h]);
    } else {
      for (int h = 0; h < args_.group; ++h) most = fmaxf(most, HeadScore(h, z[h * z_stride_]));
    }
    if (args_.rule != GroupRule::kMeanWeight || isinf(most)) return most;
    float sum = 0;
    for (int h = 0; h < args_.group; ++h) sum += __expf(HeadScore(h, z[h * z_stride_]) - most);
    return most + __logf(sum / static_cast<float>(args_.group));
  }
  __device__ bool IsCandidate(int32_t i, float score) const {
    if (rule_->resident == nullptr) return true;
    return ((rule_->resident[i / 64] >> (i % 64)) & 1) != 0 || score > rule_->log_theta;
  }
  // Keys of the own part, and how many lie in which bin.
  __device__ void MakeKeys() {
    for (int32_t i = begin_ + static_cast<int32_t>(threadIdx.x); i < end_; i += kSelectThreads) {
      uint32_t key = 0;
      if (i >= lo_ && i < hi_) {
        const float score = Score(i);
        if (rule_->pooled != nullptr) {
          rule_->pooled[i] = rule_->pool_reset != 0 ? score : fmaxf(rule_->pooled[i], score);
        }
        if (IsCandidate(i, score)) {
          key = KeyOf(score);
          atomicAdd(own_bins() + BinOf(key, best_), 1u);
        }
      }
      keys()[i - begin_] = key;
    }
    __syncthreads();
  }

  // --- 3
  // How many own keys lie in which bin; bin_of < 0 does not count.
  template <class BinOfKey>
  __device__ void CountKeys(BinOfKey&& bin_of) {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) own_bins()[i] = 0;
    __syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < end_ - begin_; i += kSelectThreads) {
      const int b = bin_of(keys()[i]);
      if (b >= 0) atomicAdd(own_bins() + b, 1u);
    }
    __syncthreads();
  }
  // Adds up what the blocks counted, and finds the bin of rank `target` (from 1, from the top), and how many are above and inside. False if there
  // are fewer; `candidates_` are all.
  __device__ bool FindBin(uint32_t target, int* bin, uint32_t* above, uint32_t* inside) {
    __shared__ uint32_t scratch[kSelectWarps + 1];
    __shared__ uint32_t found[3];
    uint32_t* const histogram = team_->histogram[round_ % 3];
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) {
      if (own_bins()[i] != 0) atomicAdd(histogram + i, own_bins()[i]);
    }
    Wait();
    // Thread t sums bins from the top.
    constexpr int kEach = (kBins + kSelectThreads - 1) / kSelectThreads;
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
    uint32_t count[kEach], mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) count[i] = top - i >= 0 ? __ldcg(histogram + top - i) : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) mine += count[i];
    uint32_t total;
    uint32_t before = BlockPrefix(mine, scratch, &total);
    if (before < target && target <= before + mine) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
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
    Cut cut{-1, 32, 0, 0, 0, 0};
    uint32_t above = 0, inside = 0;
    const float best = best_;
    if (round_ > 0) CountKeys([&](uint32_t key) { return key == 0 ? -1 : BinOf(key, best); });  // else they were, with the keys
    const bool enough = FindBin(max(k, 1u), &cut.bin, &above, &inside);
    if (k == 0) {
      cut.bin = kBins;  // nothing is in
      return cut;
    }
    if (!enough || k == candidates_) {
      cut.bin = -1;
      cut.kept = candidates_;
      return cut;
    }
    cut.kept = k, cut.need = k - above, cut.equal = inside;
    while (!cut.ByList() && cut.shift > 0) {
      const int shift = max(cut.shift - kRefineBits, 0), bits = cut.shift - shift;
      const Cut now = cut;
      int part = 0;
      CountKeys([&](uint32_t key) { return now.Of(key, best) == 0 ? static_cast<int>((key >> shift) & ((1u << bits) - 1)) : -1; });
      FindBin(now.need, &part, &above, &inside);
      cut.prefix = (now.shift == 32 ? 0 : now.prefix << bits) | static_cast<uint32_t>(part);
      cut.shift = shift;
      cut.need = now.need - above, cut.equal = inside;
    }
    return cut;
  }

  // --- 4
  // Adds what `cut` keeps of the own part to kept_words(); *offset: how many the blocks before keep.
  __device__ void Keep(const Cut& cut, uint32_t* offset) {
    __shared__ uint32_t scratch[kSelectWarps + 1];
    __shared__ uint32_t before, own_in, own_class, in_before, class_before;
    const int32_t own = end_ - begin_, words = (own + 31) / 32;
    if (threadIdx.x == 0) before = own_in = own_class = 0;
    __syncthreads();
    uint32_t in = 0, of_class = 0;
    for (int w = warp(); w < words; w += kSelectWarps) {
      const int32_t i = w * 32 + lane();
      const uint32_t key = i < own ? keys()[i] : 0;
      const int side = cut.Of(key, best_);
      const uint32_t in_word = __ballot_sync(kAllLanes, side == 1), class_word = __ballot_sync(kAllLanes, side == 0);
      if (lane() == 0) {
        kept_words()[w] |= in_word;
        class_words()[w] = class_word;
        in += __popc(in_word), of_class += __popc(class_word);
      }
      if (side == 0 && cut.ByList()) {
        const uint32_t at = atomicAdd(&team_->list_size, 1u);
        team_->list_key[at] = key, team_->list_position[at] = begin_ + i;
      }
    }
    if (lane() == 0) {
      if (in != 0) atomicAdd(&own_in, in);
      if (of_class != 0) atomicAdd(&own_class, of_class);
    }
    __syncthreads();
    if (threadIdx.x == 0) team_->above[block_] = own_in, team_->equal[block_] = own_class;
    Wait();
    if (Leads()) ClearHistogram(round_ - 1);  // all are past reading it
    if (warp() == 0) {
      uint32_t above_here = 0, equal_here = 0;
      for (int b = lane(); b < block_; b += kWarp) above_here += __ldcg(team_->above + b), equal_here += __ldcg(team_->equal + b);
      above_here = __reduce_add_sync(kAllLanes, above_here), equal_here = __reduce_add_sync(kAllLanes, equal_here);
      if (lane() == 0) in_before = above_here, class_before = equal_here;
    }
    __syncthreads();
    uint32_t above_before = in_before;
    const uint32_t equal_before = class_before;
    if (cut.bin >= 0 && cut.equal > 0) {
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
    __shared__ uint32_t scratch[kSelectWarps + 1];
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
    __shared__ uint32_t scratch[kSelectWarps + 1];
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
  // Four heads in one pass, in units of a weight that no other is far above. What is so small that it vanishes there, or no number, is
  // added up as logarithms.
  __device__ void MassOutside() {
    __shared__ float of_warps[kSelectWarps][4];
    constexpr float kBelow = 40;  // nats: exp(40) is far from overflow, exp(-40 - 87) is the least that counts
    for (int first = 0; first < args_.group; first += 4) {
      float sum[4] = {}, unit[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) unit[e] = first + e < args_.group ? lse()[first + e] - kBelow : 0;
      for (int32_t at = static_cast<int32_t>(threadIdx.x); at < end_ - begin_; at += kSelectThreads) {
        if (!Outside(at)) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (first + e < args_.group) sum[e] += __expf(z_[(first + e) * z_stride_ + at] - unit[e]);
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
          *PartOf(args_.outside, first + e, block_) = {unit[e], all};
        }
      }
    }
    if (!LastOfTeam()) return;
    for (int h = warp(); h < args_.group; h += kSelectWarps) {
      const Mass mass = TeamMass(args_.outside, h);
      if (lane() == 0) rule_->lse_out[h] = LogOf(mass);
    }
  }
  // True in one block, once all have written.
  __device__ bool LastOfTeam() {
    if (args_.cluster || args_.team_blocks == 1) {
      Wait();
      return Leads();
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
  bool plain_ = false;  // all lse are finite
  int round_ = 0;
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

template <int D, int BITS>
__global__ void __launch_bounds__(kScanThreads, 1) ScanKernel(const __grid_constant__ ScanArgs args) {
  __shared__ uint4 steps[CodeShape<D, BITS>::kSteps * kWarp];
  __shared__ QueryScale scale;
  const ScanTask task = args.tasks[blockIdx.y];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, j = lane % 4;
  const int first = static_cast<int>(blockIdx.z) * kScanHeads;
  const int32_t n = *task.source.n, tokens = args.format.group_tokens;
  if (n < 0 || n > args.max_n) {
    if (blockIdx.x == 0 && threadIdx.x < kScanHeads && first + threadIdx.x < args.group) {
      task.z[(first + threadIdx.x) * task.z_stride] = NotANumber();
      if (task.err != nullptr) task.err[(first + threadIdx.x) * task.z_stride] = Infinity();
    }
    return;
  }
  if (warp == 0) PrepareQuery<D, BITS>(task.source.q, first, args.group, lane, steps, &scale);
  __syncthreads();
  const int32_t coded = n / tokens * tokens, warps = static_cast<int32_t>(gridDim.x) * (kScanThreads / kWarp);
  const int32_t me = static_cast<int32_t>(blockIdx.x) * (kScanThreads / kWarp) + warp;
  const bool mine = first + g < args.group;
  const int64_t row = int64_t{first + g} * task.z_stride;
  for (int64_t at = int64_t{me} * tokens; at < coded; at += int64_t{warps} * tokens) {
    const std::byte* block = task.source.blocks + at / tokens * static_cast<int64_t>(args.layout.bytes);
    const auto emit = [&](int page, const float4& z) {
      if (mine) *reinterpret_cast<float4*>(task.z + row + at + kCodePageTokens * page + 4 * j) = z;
    };
    const auto emit_error = [&](int page, const float4& err) {
      if (mine) *reinterpret_cast<float4*>(task.err + row + at + kCodePageTokens * page + 4 * j) = err;
    };
    const int pages = tokens / kCodePageTokens;
    if (task.err != nullptr) {
      BlockScan<D, BITS, true>::Run(block, args.layout, pages, steps, scale, args.format.error_norms, lane, emit, emit_error);
    } else {
      BlockScan<D, BITS, false>::Run(block, args.layout, pages, steps, scale, false, lane, emit, emit_error);
    }
  }
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
