// Scan and choice in one launch.
//
// A team of blocks takes a task (KV head); each block a contiguous part of the positions. Steps, with a wait of the team between them:
//   1. logits of the own part (from codes and rows, or found in memory), kept in shared memory if they fit; their log-sum-exp
//   2. lse_all; score of every position of the middle as a 32-bit key of the same order; a histogram of the keys of the team
//   3. the bin in which rank k falls; while it holds too many, histograms of the next bits inside it; its members to a list
//   4. rank of each member among them; the own chosen positions in order, at an offset that follows from what all blocks counted
// Ties are broken by position without sorting: keys are compared with positions where few are equal, and counted where many are.
// Dilation adds a second cut (rank m), a bitmap of neighbours, and one more wait.
// After select_bars.cuh it takes what that has left.
#pragma once
#include "kernels/cuda/select_team.cuh"

namespace prehoc::cuda {

template <int D, int BITS, int THREADS = kSelectThreads>  // BITS 0: the logits are there
class Selector : public TeamMember<Selector<D, BITS, THREADS>, ScanMemory<D, BITS, THREADS>::kBytes, THREADS> {
  using M = ScanMemory<D, BITS, THREADS>;
  using Base = TeamMember<Selector, M::kBytes, THREADS>;
  friend Base;
  using Base::args_, Base::rule_, Base::team_, Base::block_, Base::team_index_, Base::n_, Base::begin_, Base::end_, Base::sinks_, Base::lo_, Base::hi_;
  using Base::best_, Base::simple_, Base::round_, Base::lane, Base::warp, Base::own_bins, Base::fixed, Base::kept_words, Base::class_words, Base::lse;
  using Base::top, Base::level, Base::room, Base::Wait, Base::Leads, Base::InSight, Base::PartOf, Base::TeamMass, Base::JoinMass, Base::Write;
  using Base::kThreads, Base::kWarps, Base::kAlone, Base::kThreadBins, Base::TopOfThread, Base::FindCut, Base::Keep, Base::AddMember, Base::JoinOutside;

 public:
  static constexpr bool kScans = BITS != 0;
  static constexpr int kSample = 4 * kThreads;  // own positions from which a block guesses what rank k will leave far below
  static constexpr bool kLists = false;
  // Keys and logits of the own part, if they fit.
  static size_t SharedBytes(const SelectArgs& args) {
    size_t bytes = 0;
    if (args.keep_keys) bytes += static_cast<size_t>(args.chunk) * 4;
    if (args.z_in_shared) bytes += static_cast<size_t>(args.group) * static_cast<size_t>(args.z_stride) * 4;
    return Base::CommonBytes(args) + bytes;
  }

  using Base::Base;

  __device__ void Run(int task_index) {
    if (args_.again != nullptr && args_.again[task_index] == 0) return;
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
    if (!this->Divide()) return;
    round_ = 0;
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
    Base::WriteLse();
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

 private:
  __device__ std::byte* header() const { return fixed() + warp() * M::kHeaderBytes; }
  __device__ uint4* steps() const { return reinterpret_cast<uint4*>(fixed() + M::kSteps); }
  __device__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(room()); }  // [own], with keep_keys
  __device__ float* kept_z_shared() const { return reinterpret_cast<float*>(keys() + (args_.keep_keys ? args_.chunk : 0)); }
  __device__ float* kept_z() const {  // [group, z_stride] of this launch
    if (args_.z_in_shared) return kept_z_shared();
    return args_.z + int64_t{blockIdx.x} * args_.group * args_.z_stride;
  }

  // --- 1
  // Logits of the own part to kept_z, their masses to `parts`.
  __device__ void ScanOwn() {
    if constexpr (kScans) {
      __shared__ QueryScale scale;
      __shared__ Mass of_warps[kWarps][kScanHeads];
      const int32_t tokens = args_.format.group_tokens, coded = n_ / tokens * tokens;
      const int32_t coded_end = min(end_, coded);
      for (int32_t i = max(begin_, coded) + warp(); i < end_; i += kWarps) {
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
        Mass mass = !kAlone && tokens == 16 ? ScanTile<kAlone ? 4 : 1>(first, coded_end, scale) : ScanTile<4>(first, coded_end, scale);
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2) {
          mass = Join(mass, {__shfl_xor_sync(kAllLanes, mass.most, offset), __shfl_xor_sync(kAllLanes, mass.sum, offset)});
        }
        if (lane() < kScanHeads) of_warps[warp()][lane()] = mass;
        __syncthreads();
        const int h = first + warp();
        if (warp() >= kScanHeads || h >= args_.group) continue;
        mass = lane() < kWarps ? of_warps[lane()][warp()] : NoMass();
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
    constexpr int32_t kTokens = PAGES * kCodePageTokens, kStride = kWarps * kTokens;
    const int block_bytes = static_cast<int>(args_.layout.bytes);
    const bool exists = first + lane() % 4 < args_.group;
    float* const mine = kept_z() + (first + lane() % 4) * args_.z_stride - begin_;
    int32_t at = begin_ + warp() * kTokens;
    const std::byte* block = source_->blocks + int64_t{at / kTokens} * block_bytes;
    Mass mass = NoMass();
    if (at >= coded_end) return mass;
    using Scan = BlockScan<D, BITS, PAGES, false>;
    using Logits = typename Scan::Logits;
    Scan scan(static_cast<int>(args_.layout.pages), steps(), scale, false, header(), lane());
    const auto odd = [](int32_t i) { return (i / kStride & 1) != 0; };
    scan.Start(block, odd(at));
#pragma unroll 1
    for (; at < coded_end; at += kStride) {
      const std::byte* const next = at + kStride < coded_end ? block + int64_t{kWarps} * block_bytes : nullptr;
      const auto emit = [&](Logits (&z)[Scan::kPairs]) {
#pragma unroll
        for (int pair = 0; pair < Scan::kPairs; ++pair) {
          if (exists) *reinterpret_cast<Logits*>(mine + at + Scan::TokenOf(pair, lane())) = z[pair];
        }
        if (at < lo_ && at + kTokens > sinks_) {  // what is out of sight has no weight
#pragma unroll
          for (int pair = 0; pair < Scan::kPairs; ++pair) HideUnseen(at + Scan::TokenOf(pair, lane()), &z[pair]);
        }
        AddLogits(&mass, z);
      };
      scan.Arrive();
      scan.Run(block, next, odd(at), emit, [](const auto&) {});
      block = next;
    }
    return mass;
  }

  template <class Logits>
  __device__ void HideUnseen(int32_t i, Logits* z) const {
    const auto seen = [&](int t, float x) { return InSight(i + t) ? x : -Infinity(); };
    z->x = seen(0, z->x), z->y = seen(1, z->y);
    if constexpr (sizeof(Logits) == sizeof(float4)) z->z = seen(2, z->z), z->w = seen(3, z->w);
  }

  // Of the own positions that `counts` takes, for each head, to `parts`.
  template <class Counts>
  __device__ void BlockMass(Mass* parts, Counts&& counts) {
    for (int h = 0; h < args_.group; ++h) HeadMass(parts, h, counts);
  }
  template <class Counts>
  __device__ void HeadMass(Mass* parts, int h, Counts&& counts) {
    __shared__ Mass of_warps[kWarps];
    const float* const z = z_ + h * z_stride_;
    Mass mass = NoMass();
    for (int32_t i = begin_ + static_cast<int32_t>(threadIdx.x); i < end_; i += kThreads) {
      if (counts(i)) AddLogit(&mass, z[i - begin_]);
    }
    mass = WarpJoin(mass);
    __syncthreads();
    if (lane() == 0) of_warps[warp()] = mass;
    __syncthreads();
    if (warp() != 0) return;
    mass = WarpJoin(lane() < kWarps ? of_warps[lane()] : NoMass());
    if (lane() == 0) *PartOf(parts, h, block_) = mass;
  }
  // --- 2
  __device__ static float HeadScore(GroupRule rule, float lse, float z) {
    if (isnan(z) || z == -Infinity()) return -Infinity();
    if (z == Infinity()) return z;
    if (rule == GroupRule::kMaxLogit) return z;
    return isnan(lse) ? -Infinity() : z - lse;
  }
  // Any rule, any numbers. Out of the way: code that is run once costs the time to fetch it. It is told what it needs: if it took `this`, that would
  // have to lie in memory.
  __device__ __noinline__ static float Score(const float* z, int64_t stride, int group, GroupRule rule, const float* lse) {
    float most = -Infinity();
    for (int h = 0; h < group; ++h) most = fmaxf(most, HeadScore(rule, lse[h], z[h * stride]));
    if (rule != GroupRule::kMeanWeight || isinf(most)) return most;
    float sum = 0;
    for (int h = 0; h < group; ++h) sum += __expf(HeadScore(rule, lse[h], z[h * stride]) - most);
    return most + __logf(sum / static_cast<float>(group));
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
    for (int t = 0; t < 4; ++t) {
      most = {most.y, most.z, most.w, Score(z_ + min(at + t, end_ - begin_ - 1), z_stride_, args_.group, args_.rule, lse())};
    }
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
  // The largest of the heads' logits above the level of pooled scores, of four own positions; NaN is no candidate for a maximum.
  __device__ float4 AboveLevel(int32_t at) const {
    float4 most = {-Infinity(), -Infinity(), -Infinity(), -Infinity()};
    for (int h = 0; h < args_.group; ++h) {
      const float4 z = LoadFour(h, at);
      const float by = level()[h];
      most = {fmaxf(most.x, z.x - by), fmaxf(most.y, z.y - by), fmaxf(most.z, z.z - by), fmaxf(most.w, z.w - by)};
    }
    return most;
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
    __shared__ uint32_t scratch[kWarps];
    __shared__ int shared_floor;
#pragma unroll
    for (int i = 0; i < kThreadBins / 4; ++i) reinterpret_cast<uint4*>(own_bins())[threadIdx.x + i * kThreads] = uint4{};
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
          if (pools) Pool(at, rule_->pool_level != nullptr ? AboveLevel(at) : score);
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
      uint32_t before = BlockPrefix<kThreads>(mine, scratch, &total);
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
      atomicMax(this->lowest_bin(), static_cast<uint32_t>(floor));
    }
    __syncthreads();
  }

  // --- 4
  __device__ void PlaceKeys(const Cut& cut, uint32_t* in, uint32_t* of_class) {
    const int32_t own = end_ - begin_, words = (own + 31) / 32;
    const bool lists = Base::ByList(cut);
    const uint64_t* const resident = rule_->resident;
    const float log_theta = rule_->log_theta;
    for (int32_t from = warp() * 4 * kWarp; from < own; from += kWarps * 4 * kWarp) {
      const int32_t at = from + 4 * lane();
      uint4 key{};
      if (at < own) key = KeysAgain(at, resident, log_theta);
      uint32_t in_word = 0, class_word = 0;
      const auto place = [&](uint32_t one, int t) {
        in_word |= static_cast<uint32_t>(one >= cut.to) << t;
        if (one < cut.from || one >= cut.to) return;
        class_word |= 1u << t;
        if (!lists) return;
        AddMember(one, begin_ + at + t);
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
        *in += __popc(in_word), *of_class += __popc(class_word);
      }
    }
  }

  // Dilation: the neighbours of what kept_words() holds (rank <= m) go to the bitmap of the team; kept_words() starts anew.
  __device__ void Spread() {
    uint32_t* const bitmap = Bitmap();
    const int32_t reach = min(max(rule_->dilate_r, 0), hi_ - lo_);
    for (int w = threadIdx.x; w < (end_ - begin_ + 31) / 32; w += kThreads) {
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
    if (Leads() && threadIdx.x == 0) *this->list_size() = 0;  // the waits of the next cut come before its list
    __syncthreads();
  }
  // ... and join what rank k kept. The waits of the second cut lie between; one more for the counts.
  __device__ void TakeSpread(uint32_t* offset, uint32_t* count) {
    __shared__ uint32_t scratch[kWarps];
    uint32_t* const bitmap = Bitmap() + begin_ / 32;
    uint32_t mine = 0, total;
    for (int w = threadIdx.x; w < (end_ - begin_ + 31) / 32; w += kThreads) {
      kept_words()[w] |= __ldcg(bitmap + w);
      bitmap[w] = 0;
      mine += __popc(kept_words()[w]);
    }
    BlockPrefix<kThreads>(mine, scratch, &total);
    if constexpr (kAlone) {
      *offset = 0, *count = total;
      return;
    }
    Wait();  // all have read the counts of the cut
    if (threadIdx.x == 0) team_->above[block_] = total;
    Wait();
    *offset = 0, *count = 0;
    for (int b = 0; b < this->team_blocks_; ++b) {  // (dilation is not the fast path)
      const uint32_t here = __ldcg(team_->above + b);
      if (b < block_) *offset += here;
      *count += here;
    }
  }
  __device__ uint32_t* Bitmap() const { return args_.bitmaps + int64_t{team_index_} * ((args_.max_n + 31) / 32); }

  __device__ bool Outside(int32_t at) const { return begin_ + at >= lo_ && begin_ + at < hi_ && ((kept_words()[at / 32] >> (at % 32)) & 1) == 0; }
  __device__ static float Weight(float z, float unit, uint32_t counts) { return counts != 0 ? Exp2(fmaf(z, kLog2E, unit)) : 0; }
  // Four heads in one pass, in units of a weight that no other is far above. What is so small that it vanishes there, or no number, is
  // added up as logarithms.
  __device__ void MassOutside() {
    __shared__ float of_warps[kWarps][4];
    constexpr float kBelow = 40;  // nats: exp(40) is far from overflow, exp(-40 - 87) is the least that counts
    for (int first = 0; first < args_.group; first += 4) {
      float sum[4] = {}, unit[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) unit[e] = first + e < args_.group ? (kBelow - lse()[first + e]) * kLog2E : 0;
      for (int32_t at = 4 * static_cast<int32_t>(threadIdx.x); at < end_ - begin_; at += 4 * kThreads) {
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
        for (int w = 0; w < kWarps; ++w) all += of_warps[w][e];
        const bool fine = all > 1e-25f && all < 1e30f && isfinite(lse()[first + e]);
        if (!fine) {
          HeadMass(args_.outside, first + e, [&](int32_t i) { return Outside(i - begin_); });
        } else if (threadIdx.x == 0) {
          *PartOf(args_.outside, first + e, block_) = {lse()[first + e] - kBelow, all};
        }
      }
    }
    JoinOutside();
  }

  const ScanSource* source_ = nullptr;
  const float* z_ = nullptr;  // logit of head h at own position i: z_[h * z_stride_ + i]
  int64_t z_stride_ = 0;
};

}  // namespace prehoc::cuda
