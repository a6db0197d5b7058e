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
#include "kernels/cuda/select_bars.cuh"

namespace prehoc::cuda {

template <int D, int BITS>  // BITS 0: the logits are there
class Selector : public BarSelector<D, BITS> {
  using Base = BarSelector<D, BITS>;
  using Base::args_, Base::rule_, Base::team_, Base::block_, Base::team_index_, Base::n_, Base::begin_, Base::end_, Base::sinks_, Base::lo_, Base::hi_;
  using Base::best_, Base::simple_, Base::source_, Base::lane, Base::warp, Base::own_bins, Base::kept_words, Base::class_words, Base::lse, Base::top;
  using Base::level, Base::header, Base::steps, Base::Wait, Base::Leads, Base::InSight, Base::PartOf, Base::TeamMass, Base::JoinMass, Base::ForFirst, Base::Write;

 public:
  static constexpr bool kScans = BITS != 0;
  // Keys and logits of the own part, if they fit.
  static size_t SharedBytes(const SelectArgs& args) {
    size_t bytes = 0;
    if (args.keep_keys) bytes += static_cast<size_t>(args.chunk) * 4;
    if (args.z_in_shared) bytes += static_cast<size_t>(args.group) * static_cast<size_t>(args.z_stride) * 4;
    return Base::CommonBytes(args) + std::max(bytes, Base::ListBytes(args));
  }

  using Base::Base;

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
    if (!this->Divide()) return;
    if constexpr (kScans) {
      if (this->TakesBars()) {
        if (ChooseListed(static_cast<uint32_t>(rule_->k))) return;
        if (Leads() && threadIdx.x == 0 && args_.restarts != nullptr) atomicAdd(args_.restarts, 1);
      }
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

 private:
  __device__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(this->room()); }  // [own], with keep_keys
  __device__ float* kept_z_shared() const { return reinterpret_cast<float*>(keys() + (args_.keep_keys ? args_.chunk : 0)); }
  __device__ float* kept_z() const {  // [group, z_stride] of this launch
    if (args_.z_in_shared) return kept_z_shared();
    return args_.z + (int64_t{team_index_} * args_.team_blocks + block_) * args_.group * args_.z_stride;
  }

  // --- without logits (select_bars.cuh)
  // False: nothing is chosen, and all blocks of the team say so; what they share is as it was before.
  __device__ bool ChooseListed(uint32_t k) {
    const bool barred = this->ScanListed();
    Wait();
    if (Leads()) this->ClearSample();  // all have read it
    round_ = 0;
    bool good = false;
    if (barred) JoinMass();
    if (barred && simple_) {
      listed_ = this->listed();
      const Cut cut = FindCut(k);
      good = candidates_ > k && !this->Misses(ScoreOf(cut.from));
      if (good) {
        uint32_t offset = 0;
        Keep(cut, &offset);
        Write(offset, cut.kept);
        if (rule_->lse_out != nullptr) MassOutsideListed(fminf(ScoreOf(cut.to), best_));
      }
      listed_ = -1;
    }
    if (good) return true;
    Wait();  // all have read the masses and the histogram
    if (Leads() && round_ > 0) ClearHistogram(round_ - 1);
    Wait();
    return false;
  }
  // As CountKeys, of what is listed.
  __device__ void CountListed(const Cut& cut, bool refines, int shift) {
    reinterpret_cast<uint4*>(own_bins())[threadIdx.x] = uint4{};
    __syncthreads();
    const bool first = round_ == 0, filters = rule_->resident != nullptr;
    const float log_theta = rule_->log_theta, best = best_;
#pragma unroll 2
    for (int32_t e = static_cast<int32_t>(threadIdx.x); e < listed_; e += kSelectThreads) {
      uint32_t key = 0;
      if (first) {
        float score = -Infinity();
#pragma unroll
        for (int h = 0; h < kScanHeads; ++h) {
          if (h < args_.group) score = fmaxf(score, this->listed_z(h)[e] - (args_.rule != GroupRule::kMaxLogit ? lse()[h] : 0));
        }
        key = !filters || this->listed_at()[e] >> 31 != 0 || score > log_theta ? KeyOf(score) : 0;
        keys()[e] = key;
      } else {
        key = keys()[e];
      }
      const bool counts = refines ? key >= cut.from && key < cut.to : key != 0;
      if (counts) atomicAdd(own_bins() + (refines ? static_cast<int>((key - cut.from) >> shift) : BinOf(ScoreOf(key), best)), 1u);
    }
    __syncthreads();
  }
  // Adds what was listed and not chosen to the mass of what was not listed. `most`: about the score of rank k, not below it.
  __device__ void MassOutsideListed(float most) {
    __shared__ float of_warps[kSelectWarps];
    // No weight that is left out is far above that of rank k, or else theta: in units of the larger one.
    if (rule_->resident != nullptr) most = fmaxf(most, rule_->log_theta);
    const int h = warp() % kScanHeads;  // a warp takes a head of a part of it
    const float unit = most + (h < args_.group && args_.rule != GroupRule::kMaxLogit ? lse()[h] : 0);
    float sum = 0;
    for (int32_t e = warp() / kScanHeads * kWarp + lane(); h < args_.group && e < listed_; e += kSelectThreads / kScanHeads) {
      const int32_t at = static_cast<int32_t>(this->listed_at()[e] & 0x7fffffffu) - begin_;
      if (((kept_words()[at / 32] >> (at % 32)) & 1) == 0) sum += Exp2((this->listed_z(h)[e] - unit) * kLog2E);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane() == 0) of_warps[warp()] = sum;
    __syncthreads();
    if (warp() < args_.group && lane() == 0) {
      float all = 0;
      for (int w = warp(); w < kSelectWarps; w += kScanHeads) all += of_warps[w];
      Mass* const part = PartOf(args_.outside, h, block_);
      if (all > 0) *part = Join(*part, {unit, all});
    }
    JoinOutside();
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
      scan.Arrive();
      scan.Run(block, next, emit, [](int, const auto&) {});
      block = next;
    }
    return mass;
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
  // --- 2
  static __device__ float HeadScore(GroupRule rule, float lse, float z) {
    if (isnan(z) || z == -Infinity()) return -Infinity();
    if (z == Infinity() || rule == GroupRule::kMaxLogit) return z;
    return isnan(lse) ? -Infinity() : z - lse;
  }
  // Any rule, any numbers. Out of the way: code that is run once costs the time to fetch it. Not a member: whose address a call needs lies in memory.
  static __device__ __noinline__ float Score(GroupRule rule, int group, const float* lse, const float* z, int64_t stride) {
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
    for (int t = 0; t < 4; ++t) most = {most.y, most.z, most.w, Score(args_.rule, args_.group, lse(), z_ + min(at + t, end_ - begin_ - 1), z_stride_)};
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
      if (kScans && listed_ >= 0) {
        CountListed(cut, refines, shift);
      } else {
        CountKeys(k, cut, refines, shift);
      }
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
    if (kScans && listed_ >= 0) {
      for (int32_t w = static_cast<int32_t>(threadIdx.x); w < words; w += kSelectThreads) class_words()[w] = 0;
      __syncthreads();
#pragma unroll 2
      for (int32_t e = static_cast<int32_t>(threadIdx.x); e < listed_; e += kSelectThreads) {
        const uint32_t key = keys()[e];
        if (key < cut.from) continue;
        const auto position = static_cast<int32_t>(this->listed_at()[e] & 0x7fffffffu);
        const int32_t at = position - begin_;
        const bool is_in = key >= cut.to;
        atomicOr((is_in ? kept_words() : class_words()) + at / 32, 1u << (at % 32));
        in += is_in ? 1 : 0, of_class += is_in ? 0 : 1;
        if (is_in || !lists) continue;
        const uint32_t entry = atomicAdd(&team_->list_size, 1u);
        team_->list_key[entry] = key, team_->list_position[entry] = position;
      }
    }
    for (int32_t from = warp() * 4 * kWarp; listed_ < 0 && from < own; from += kSelectWarps * 4 * kWarp) {
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
    ForFirst(cut.need, key, position, size, [&](int i) {
      const int32_t at = position[i] - begin_;
      if (at < 0) atomicAdd(before, 1u);
      if (at >= 0 && position[i] < end_) atomicOr(kept_words() + at / 32, 1u << (at % 32));
    });
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
    JoinOutside();
  }
  __device__ void JoinOutside() {
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

  const float* z_ = nullptr;  // logit of head h at own position i: z_[h * z_stride_ + i]
  int64_t z_stride_ = 0;
  int round_ = 0;
  uint32_t candidates_ = 0;
  int32_t listed_ = -1;  // candidates are what is listed, so many; -1: all own positions
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

}  // namespace prehoc::cuda
