// What the ways to choose share: how the blocks of a team wait for each other, keys and cuts, sums over the team, and the result.
#pragma once
#include "kernels/cuda/gate.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/residency.cuh"
#include "kernels/cuda/scan.cuh"

namespace prehoc::cuda {

inline constexpr int kSelectThreads = 512;
inline constexpr int kAloneThreads = 128;   // of a block that has a task for itself, beside three others on its multiprocessor
inline constexpr int kAloneBlocks = 4;
inline constexpr int kSelectWarps = kSelectThreads / kWarp;
inline constexpr int kBins = 2048;
inline constexpr float kBinsPerNat = 64;    // the bins reach 32 nats below the best weight: 1e-14 of it
inline constexpr int kListRoom = 384;       // members of a bin that are compared with each other: of more, another round finds fewer sooner
inline constexpr int kMaxTeam = 64;         // blocks: two to a lane
inline constexpr int kMostListed = 12288;   // candidates of a block (select_bars.cuh)
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
  alignas(16) uint32_t sample[2][kBins + 4];  // of this task and the one before (being cleared): kBins / 4 bins of a head; then, of positions
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
  int32_t team_blocks;   // blocks per team, at least
  bool cluster;          // a team is a cluster; else all blocks of the launch run at once
  bool alone;            // every task has a small block of its own, which knows of no other
  GateArgs gate;         // alone, with tasks: done first
  bool regroup;          // not a cluster: the blocks of tasks that need nothing join the teams of the others
  int32_t chunk;         // most positions of a block, a multiple of 64
  int64_t z_stride;      // [floats] of a head in the logits that this launch keeps
  bool z_in_shared;
  bool keep_keys;        // in shared memory: they fit
  Team* teams;           // [teams]
  Mass* parts;           // [teams, group, kMaxTeam]
  Mass* outside;         // [teams, group, kMaxTeam]
  uint32_t* bitmaps;     // [teams, max_n / 32 rounded up], zero between calls; only with dilate
  float* z;              // [blocks, group, z_stride], unless in shared memory or found
  bool bars;             // select_bars.cuh first
  int32_t* restarts;     // or null
  const ResolveTask* resolves;  // or null
  int32_t query_floats;
  uint8_t* again;        // [num_tasks] 1: select_bars.cuh has not chosen; or null: all tasks are to be chosen
  int32_t most_samples;  // code blocks of a warp
  int32_t list_room;     // of a block
  float* list_z;         // [blocks, kScanHeads, list_room]
  uint32_t* list_at;     // [blocks, list_room]: position, and a bit for residents
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

// The sum of the lanes up to this one.
__device__ inline uint32_t WarpUpTo(uint32_t x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}
// Exclusive prefix of `value` over the threads; *total is that of the block. `scratch` [THREADS / kWarp].
template <int THREADS = kSelectThreads>
__device__ inline uint32_t BlockPrefix(uint32_t value, uint32_t* scratch, uint32_t* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t sum = WarpUpTo(value);
  __syncthreads();
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();
  const uint32_t warps = WarpUpTo(lane < THREADS / kWarp ? scratch[lane] : 0);
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

// Shared memory of a scan: the heads of two code blocks of each warp, and q.
template <int D, int BITS, int THREADS = kSelectThreads>
struct ScanMemory {
  static constexpr size_t kHeaderBytes = size_t{8} * D;
  static constexpr size_t kSteps = THREADS / kWarp * kHeaderBytes;
  static constexpr size_t kBytes = kSteps + CodeShape<D, BITS>::kQueryBytes;
};
template <int D, int THREADS>
struct ScanMemory<D, 0, THREADS> {
  static constexpr size_t kHeaderBytes = 0, kSteps = 0, kBytes = 0;
};

// What each way to choose has: histogram or list, of each head three numbers, words of the chosen and of the class.
__host__ __device__ inline size_t CommonBytes(const SelectArgs& args) {
  return size_t{kBins} * 4 + static_cast<size_t>((3 * args.group + 3) / 4 * 4) * 4 + static_cast<size_t>(args.chunk / 32) * 8;
}

// --- resolve: functions of their own, so that what they need is not kept beside a scan ------------------------------------------------
static __device__ __noinline__ void ResolveStanding(const ResolveTask* task, int32_t query_floats) { ResolveWhole(*task, query_floats); }
// The chosen positions [from, to) that this block has written, and all else if it leads.
static __device__ __noinline__ void ResolveOwn(const ResolveTask* task, int32_t n, int32_t from, int32_t to, int32_t count, int32_t query_floats,
                                               bool leads) {
  __syncthreads();
  if (task->refs != nullptr) ResolveRows(*task, n, from, to);
  if (leads) EndResolve(*task, n, count, query_floats);
}

// --- a block at a task -------------------------------------------------------------------------------------------------------------

// A way to choose, WAY, brings
//   CountKeys(k, cut, refines, shift)   own_bins(): how many own candidates lie in which bin; or of the class of `cut`, in bins of 2^shift keys
//   PlaceKeys(cut, &in, &of_class)      kept_words() and class_words() of the own candidates, their numbers, and AddMember() for the class if it is
//                                       decided by list
// FIXED: bytes of shared memory that it has at an address that is known when it is compiled. Blocks of fewer threads are alone: all that a team has
// in common is in their shared memory, and nobody is waited for.
template <class WAY, size_t FIXED, int THREADS = kSelectThreads>
class TeamMember {
 public:
  static constexpr int kThreads = THREADS, kWarps = THREADS / kWarp;
  static constexpr bool kAlone = THREADS != kSelectThreads;
  static constexpr uint32_t kMostRanked = kAlone ? kListRoom / 4 : kListRoom;

  __device__ TeamMember(const SelectArgs& args, int team_blocks)
      : args_(args), team_blocks_(team_blocks), team_index_(static_cast<int>(blockIdx.x) / team_blocks), block_(static_cast<int>(blockIdx.x) % team_blocks),
        team_(args.teams + team_index_) {}
  __device__ void Leave() { LeaveTeam(team_, team_blocks_, args_.cluster); }

  static __host__ __device__ size_t CommonBytes(const SelectArgs& args) { return FIXED + cuda::CommonBytes(args); }

 protected:
  // Where things lie is computed anew at each use: registers are needed for products.
  static __device__ std::byte* Memory() {
    extern __shared__ float4 select_shared[];
    return reinterpret_cast<std::byte*>(select_shared);
  }
  static __device__ int lane() { return static_cast<int>(threadIdx.x % kWarp); }
  static __device__ int warp() { return static_cast<int>(threadIdx.x / kWarp); }
  static __device__ uint32_t* own_bins() { return reinterpret_cast<uint32_t*>(Memory()); }
  static __device__ std::byte* fixed() { return Memory() + size_t{kBins} * 4; }
  static __device__ float* lse() { return reinterpret_cast<float*>(fixed() + FIXED); }                   // [group]
  __device__ float* top() const { return lse() + args_.group; }                                          // [group] largest logits
  __device__ float* level() const { return top() + args_.group; }                                        // [group] of pooled scores
  __device__ uint32_t* kept_words() const { return reinterpret_cast<uint32_t*>(lse() + (3 * args_.group + 3) / 4 * 4); }  // [own / 32] kept positions
  __device__ uint32_t* class_words() const { return kept_words() + args_.chunk / 32; }                   // [own / 32] the class of the last cut
  __device__ std::byte* room() const { return reinterpret_cast<std::byte*>(class_words() + args_.chunk / 32); }

  // How long the list of the class is; the bin below which not all are counted.
  __device__ uint32_t* list_size() const {
    __shared__ uint32_t of_block;
    return kAlone ? &of_block : &team_->list_size;
  }
  __device__ uint32_t* lowest_bin() const {
    __shared__ uint32_t of_block;
    return kAlone ? &of_block : &team_->floor;
  }
  __device__ uint32_t LowestBin() const {
    return kAlone ? *lowest_bin() : __ldcg(&team_->floor);
  }

  __device__ void Wait() { WaitForTeam(team_, team_blocks_, args_.cluster, &waits_); }
  __device__ bool Leads() const { return block_ == 0; }
  __device__ bool InSight(int32_t i) const { return i < sinks_ || i >= lo_; }

  // The task to be resolved that goes with the one of `rule_`.
  __device__ const ResolveTask* ResolveOf() const {
    if (args_.resolves == nullptr) return nullptr;
    const std::byte* const task = reinterpret_cast<const std::byte*>(rule_) - offsetof(SelectTask, rule);
    return args_.resolves + (reinterpret_cast<const SelectTask*>(task) - args_.select);
  }
  // The own part of the task of `rule_` and n_. False if there is none to choose from: then all is done.
  __device__ bool Divide() {
    const bool holds = rule_->hold != nullptr && *rule_->hold != 0;
    if (holds || n_ < 0 || n_ > args_.max_n) {
      if (!holds) Refuse();
      if (Leads() && args_.resolves != nullptr) {
        __syncthreads();
        ResolveStanding(ResolveOf(), args_.query_floats);
      }
      return false;
    }
    chunk_ = (n_ + 64 * team_blocks_ - 1) / (64 * team_blocks_) * 64;
    begin_ = min(block_ * chunk_, n_), end_ = min(begin_ + chunk_, n_);
    sinks_ = min(max(rule_->sinks, 0), n_);
    hi_ = max(sinks_, n_ - max(rule_->local, 0));
    lo_ = min(hi_, max(sinks_, n_ - max(rule_->window, 0)));
    if (rule_->pooled != nullptr && rule_->pool_level != nullptr) {  // before anything is written: it may be lse_all
      for (int h = static_cast<int>(threadIdx.x); h < args_.group; h += kThreads) {
        const float x = rule_->pool_level[h];
        level()[h] = isfinite(x) ? x : 0;
      }
    }
    return true;
  }
  __device__ void Refuse() {
    if (!Leads()) return;
    if (threadIdx.x == 0) *rule_->count = -1;
    for (int h = threadIdx.x; h < args_.group; h += kThreads) {
      rule_->lse_all[h] = NotANumber();
      if (rule_->lse_out != nullptr) rule_->lse_out[h] = NotANumber();
    }
  }

  __device__ Mass* PartOf(Mass* parts, int h, int block) const {
    return parts + (int64_t{team_index_} * args_.group + h) * (kAlone ? 1 : kMaxTeam) + block;
  }
  // Of the team, in every lane.
  __device__ Mass TeamMass(Mass* parts, int h) const {
    Mass mass = NoMass();
    for (int b = lane(); b < team_blocks_; b += kWarp) {
      const float2 part = __ldcg(reinterpret_cast<const float2*>(PartOf(parts, h, b)));
      mass = Join(mass, {part.x, part.y});
    }
    return WarpJoin(mass);
  }
  // lse() of all heads from `parts`; nothing is kept yet.
  __device__ void JoinMass() {
    __shared__ int odd;
    if (threadIdx.x == 0) {
      odd = 0;
      if (Leads()) *list_size() = 0;
      if (kAlone) *lowest_bin() = 0;
    }
    for (int i = static_cast<int>(threadIdx.x); i < args_.chunk / 32; i += kThreads) kept_words()[i] = 0;
    __syncthreads();
    for (int h = warp(); h < args_.group; h += kWarps) {
      const Mass mass = TeamMass(args_.parts, h);
      if (lane() != 0) continue;
      const float all = LogOf(mass);
      lse()[h] = all;
      top()[h] = mass.most;
      if (!isfinite(all)) odd = 1;
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

  static constexpr int kThreadBins = kBins / kThreads;
  static_assert(kThreadBins % 4 == 0 && kBins % kThreads == 0, "a thread's bins are whole pieces");
  // Each thread takes kThreadBins bins, from this one down.
  __device__ static int TopOfThread() { return kBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins; }

  // Adds up what the blocks counted, and finds the bin of rank `target` (from 1, from the top), and how many are above and inside. False if there
  // are fewer; `candidates_` are all.
  __device__ bool FindBin(uint32_t target, int* bin, uint32_t* above, uint32_t* inside) {
    __shared__ uint32_t scratch[kWarps];
    __shared__ uint32_t found[3];
    if constexpr (!kAlone) {
      uint32_t* const histogram = team_->histogram[round_ % 3];
      for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) {
        if (own_bins()[i] != 0) atomicAdd(histogram + i, own_bins()[i]);
      }
      Wait();
    }
    // Thread t sums bins from the top.
    const int top = TopOfThread();
    uint32_t count[kThreadBins], mine = 0;
#pragma unroll
    for (int i = 0; i < kThreadBins; i += 4) {
      uint4 piece;
      if constexpr (kAlone) {
        piece = *reinterpret_cast<const uint4*>(own_bins() + top - 3 - i);
      } else {
        piece = __ldcg(reinterpret_cast<const uint4*>(team_->histogram[round_ % 3] + top - 3 - i));
      }
      count[i] = piece.w, count[i + 1] = piece.z, count[i + 2] = piece.y, count[i + 3] = piece.x;
      mine += (piece.x + piece.y) + (piece.z + piece.w);
    }
    uint32_t total;
    uint32_t before = BlockPrefix<kThreads>(mine, scratch, &total);
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
    for (int i = threadIdx.x; !kAlone && i < kBins; i += kThreads) team_->histogram[round % 3][i] = 0;
  }

  // The class of `cut` is ranked one by one; else all of its keys are the same.
  __device__ static bool ByList(const Cut& cut) { return cut.equal <= kMostRanked; }

  __device__ Cut FindCut(uint32_t k) {
    __shared__ uint32_t edge[2];
    Cut cut{};
    uint32_t need = max(k, 1u);
    bool refines = false;
#pragma unroll 1
    for (;;) {
      int shift = 0;
      while (refines && ((cut.to - cut.from - 1) >> shift) >= kBins) ++shift;
      way().CountKeys(k, cut, refines, shift);
      int bin = 0;
      uint32_t above = 0, inside = 0;
      const bool was_first = round_ == 0, enough = FindBin(need, &bin, &above, &inside);
      if (!refines) {
        if (k == 0) return NoneOf();
        if (!enough || k == candidates_) return AllOf(candidates_);
        // A guess that was wrong (the same in every block): bins below it are counted now.
        if (was_first && static_cast<uint32_t>(bin) < LowestBin()) continue;
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
      if (ByList(cut) || cut.to - cut.from == 1) return cut;
    }
  }

  // Adds what `cut` keeps of the own part to kept_words(); *offset: how many the blocks before keep.
  __device__ void Keep(const Cut& cut, uint32_t* offset) {
    __shared__ uint32_t scratch[kWarps];
    __shared__ uint32_t before, own_in, own_class, in_before, class_before;
    if (threadIdx.x == 0) before = own_in = own_class = 0;
    __syncthreads();
    uint32_t in = 0, of_class = 0;  // of this thread
    way().PlaceKeys(cut, &in, &of_class);
    in = __reduce_add_sync(kAllLanes, in), of_class = __reduce_add_sync(kAllLanes, of_class);
    if (lane() == 0) {
      if (in != 0) atomicAdd(&own_in, in);
      if (of_class != 0) atomicAdd(&own_class, of_class);
    }
    __syncthreads();
    if constexpr (kAlone) {
      if (threadIdx.x == 0) in_before = class_before = *lowest_bin() = 0;
    } else {
      if (threadIdx.x == 0) team_->above[block_] = own_in, team_->equal[block_] = own_class;
      Wait();
      if (Leads()) {  // all are past reading them
        ClearHistogram(round_ - 1);
        if (threadIdx.x == 0) team_->floor = 0;
      }
    }
    if (!kAlone && warp() == 0) {
      uint32_t above_here = 0, equal_here = 0;
      for (int b = lane(); b < block_; b += kWarp) above_here += __ldcg(team_->above + b), equal_here += __ldcg(team_->equal + b);
      above_here = __reduce_add_sync(kAllLanes, above_here), equal_here = __reduce_add_sync(kAllLanes, equal_here);
      if (lane() == 0) in_before = above_here, class_before = equal_here;
    }
    __syncthreads();
    uint32_t above_before = in_before;
    const uint32_t equal_before = class_before;
    if (cut.equal > 0) {
      if (ByList(cut)) {
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
    if constexpr (!kAlone) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        key[i] = __ldcg(team_->list_key + i), position[i] = __ldcg(team_->list_position + i);
      }
    }
    __syncthreads();
    ForFirst(cut.need, key, position, size, [&](int i) {
      const int32_t at = position[i] - begin_;
      if (at < 0) atomicAdd(before, 1u);
      if (at >= 0 && position[i] < end_) atomicOr(kept_words() + at / 32, 1u << (at % 32));
    });
  }

  // All keys of the class are equal: the lowest positions are kept.
  __device__ void TakeInOrder(const Cut& cut, uint32_t equal_before, uint32_t* scratch) {
    const int words = (end_ - begin_ + 31) / 32, each = (words + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * each;
    uint32_t mine = 0, total;
    for (int w = first; w < min(first + each, words); ++w) mine += __popc(class_words()[w]);
    uint32_t rank = equal_before + BlockPrefix<kThreads>(mine, scratch, &total);
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

  __device__ void AddMember(uint32_t key, int32_t position) const {
    const uint32_t entry = atomicAdd(list_size(), 1u);
    if constexpr (kAlone) {  // where the histogram was
      own_bins()[entry] = key, own_bins()[kListRoom + entry] = static_cast<uint32_t>(position);
    } else {
      team_->list_key[entry] = key, team_->list_position[entry] = position;
    }
  }

  // What a head's logits are scored above, by a rule that takes a maximum.
  __device__ float ScoreUnit(int h) const { return args_.rule != GroupRule::kMaxLogit ? lse()[h] : 0; }
  __device__ void WriteLse() const {
    if (!Leads()) return;
    for (int h = static_cast<int>(threadIdx.x); h < args_.group; h += kThreads) rule_->lse_all[h] = lse()[h];
  }

  // Calls kept(i) for the members of which fewer than `need` come before (larger key, then lower position). Of the whole block.
  template <class Kept>
  __device__ void ForFirst(uint32_t need, const uint32_t* key, const int32_t* position, int size, Kept&& kept) const {
    // As many lanes for a member as there are to spare; a warp's loop is the same for all of its lanes.
    int lanes = 1;
    while (lanes < kWarp && size * lanes * 2 <= kThreads) lanes *= 2;
    const int each = kThreads / lanes, part = static_cast<int>(threadIdx.x) % lanes;
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
      if (i < size && part == 0 && rank < need) kept(i);
    }
  }

  // The positions of kept_words(), which come after `offset` others. Nobody of the team reads bits of residents any more.
  __device__ void Write(uint32_t offset, uint32_t count) {
    const bool fits = static_cast<int64_t>(count) <= rule_->room;
    if (Leads() && threadIdx.x == 0) *rule_->count = fits ? static_cast<int32_t>(count) : -1;
    const uint32_t own = fits ? WriteOwn(offset) : 0;
    if (args_.resolves == nullptr) return;
    ResolveOwn(ResolveOf(), n_, static_cast<int32_t>(offset), static_cast<int32_t>(offset + own), fits ? static_cast<int32_t>(count) : -1,
               args_.query_floats, Leads());
  }
  // How many.
  __device__ uint32_t WriteOwn(uint32_t offset) {
    __shared__ uint32_t scratch[kWarps];
    const int words = (end_ - begin_ + 31) / 32, each = (words + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * each;
    uint32_t mine = 0, total;
    for (int w = first; w < min(first + each, words); ++w) mine += __popc(kept_words()[w]);
    uint32_t at = offset + BlockPrefix<kThreads>(mine, scratch, &total);
    for (int w = first; w < min(first + each, words); ++w) {
      for (uint32_t left = kept_words()[w]; left != 0; left &= left - 1) {
        rule_->chosen[at++] = begin_ + w * 32 + __ffs(static_cast<int>(left)) - 1;
      }
    }
    return total;
  }

  // lse_out, when the last block has written its part of `outside`.
  __device__ void JoinOutside() {
    if (!LastOfTeam()) return;
    for (int h = warp(); h < args_.group; h += kWarps) {
      const Mass mass = TeamMass(args_.outside, h);
      if (lane() == 0) rule_->lse_out[h] = LogOf(mass);
    }
  }
  // True in the last block that is here: all have written then.
  __device__ bool LastOfTeam() {
    if (team_blocks_ == 1) {
      __syncthreads();
      return true;
    }
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = AddAcquireRelease(&team_->finished, 1) + 1 == static_cast<uint32_t>(team_blocks_);
      if (last) team_->finished = 0;
    }
    __syncthreads();
    return last;
  }

  const SelectArgs& args_;
  const ChooseRule* rule_ = nullptr;
  int team_blocks_, team_index_, block_;
  Team* team_;
  int32_t n_ = 0, chunk_ = 0, begin_ = 0, end_ = 0, sinks_ = 0, lo_ = 0, hi_ = 0;
  float best_ = 0;      // an upper bound of the scores that matter
  bool simple_ = false;  // all lse are finite, and the score is a maximum
  uint32_t waits_ = 0;
  int round_ = 0;
  uint32_t candidates_ = 0;

 private:
  __device__ WAY& way() { return *static_cast<WAY*>(this); }
};

// The tasks of a launch, by teams of blocks. WAY::kLists: it leaves tasks to the launch that follows, by `again`.
template <class WAY>
__device__ inline void RunTasks(const SelectArgs& args) {
  __shared__ uint16_t order[kSelectThreads];  // tasks that need something, then (from the end) those that do not
  __shared__ uint32_t scratch[kSelectWarps];
  int tasks = args.num_tasks, team_blocks = args.team_blocks;
  if (args.regroup) {
    const auto t = static_cast<int>(threadIdx.x);
    bool needs = t < tasks;
    if (needs && args.select != nullptr) {
      const uint8_t* const hold = args.select[t].rule.hold;
      needs = hold == nullptr || *hold == 0;
      if constexpr (WAY::kLists) {
        if (!needs && blockIdx.x == 0) args.again[t] = 0;
      } else if (args.again != nullptr) {
        needs = needs && args.again[t] != 0;
      }
    }
    uint32_t total = 0;
    const auto before = static_cast<int>(BlockPrefix(needs ? 1 : 0, scratch, &total));
    if (t < tasks) order[needs ? before : tasks - 1 - (t - before)] = static_cast<uint16_t>(t);
    __syncthreads();
    tasks = static_cast<int>(total);
    if (tasks > 0) team_blocks = max(team_blocks, min(static_cast<int>(gridDim.x) / tasks, kMaxTeam));
  }
  const int teams = static_cast<int>(gridDim.x) / team_blocks;
  const int first = static_cast<int>(blockIdx.x) / team_blocks;
  if (first < min(teams, tasks)) {
    WAY way(args, team_blocks);
    for (int i = first; i < tasks; i += teams) {
      way.Run(args.regroup ? order[i] : i);
      __syncthreads();
    }
    way.Leave();
  }
  // Tasks that hold are resolved by blocks that have nothing to do, as far as there are any: teams are at the front.
  if (!args.regroup || args.resolves == nullptr || (!WAY::kLists && args.again != nullptr)) return;
  for (int i = static_cast<int>(gridDim.x - 1 - blockIdx.x); i < args.num_tasks - tasks; i += static_cast<int>(gridDim.x)) {
    ResolveStanding(args.resolves + order[args.num_tasks - 1 - i], args.query_floats);
  }
}

template <class WAY>
__global__ void __launch_bounds__(kSelectThreads, 1) SelectKernel(const __grid_constant__ SelectArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  RunTasks<WAY>(args);
}
template <class WAY>
Status LaunchWay(const char* name, const SelectArgs& args, int blocks, cudaStream_t stream) {
  const Shape shape{.grid = dim3(static_cast<unsigned>(blocks)), .threads = kSelectThreads, .shared_bytes = WAY::SharedBytes(args),
                    .cluster = args.cluster ? args.team_blocks : 1, .cooperative = !args.cluster && (args.team_blocks > 1 || args.regroup)};
  return LaunchKernel(SelectKernel<WAY>, name, args, shape, stream);
}

}  // namespace prehoc::cuda
