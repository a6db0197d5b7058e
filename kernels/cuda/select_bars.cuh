// Choice without keeping logits: only what reaches a bar can be among the first k.
//
// A team of blocks takes a task, each block a contiguous part of the positions, each warp a run of it:
//   1. the first code blocks of every run are a sample of the task: a histogram of each head's logits
//      -- wait --
//   2. from it for each head a bar that somewhat more than k eligible positions reach. The rest is scanned: where a head reaches its bar, the
//      position is listed with all heads' logits; of everything else only the mass is added up
//      -- wait --
//   3. lse_all. Each block scores the list of the whole team and finds rank k in it; its own part of the choice is what it writes
// What is not listed scores less than (bar - lse) of some head. If that is below the score of rank k, the choice is that of all positions, to the
// last tie; if it is not (a sample that misled), or if the list is too long, the team starts anew and keeps all logits (select.cuh).
#pragma once
#include "kernels/cuda/select_team.cuh"

namespace prehoc::cuda {

template <int D, int BITS>
struct QuerySize {
  static constexpr size_t kBytes = CodeShape<D, BITS>::kQueryBytes;
};
template <int D>
struct QuerySize<D, 0> {
  static constexpr size_t kBytes = 0;
};

template <int D, int BITS>
class BarSelector : public TeamMember {
 public:
  static constexpr int32_t kTokens = 64;      // of a code block; others are not taken this way
  static constexpr int kMostSamples = 4;
  static constexpr int kHeadBins = kBins / kScanHeads;
  static constexpr float kSampleBinsPerNat = 4;  // the bins reach 64 nats to both sides of 0

  // Behind the common part: heads of code blocks, q, and what a way to choose needs.
  static __host__ __device__ size_t ScanBytes(const SelectArgs& args) { return CommonBytes(args) + kSelectWarps * kHeaderBytes + kQueryBytes; }
  static __host__ __device__ int SampleStride(const SelectArgs& args) { return (args.most_samples * kSelectWarps + 1) * kTokens + 8; }
  static size_t ListBytes(const SelectArgs& args) {
    const size_t sample = size_t{kScanHeads} * static_cast<size_t>(SampleStride(args)) * 4, list = size_t{2 * kMostListed + kListRoom} * 4;
    return args.bars ? (sample > list ? sample : list) : 0;
  }

 protected:
  using TeamMember::TeamMember;
  static constexpr size_t kQueryBytes = QuerySize<D, BITS>::kBytes;
  static constexpr size_t kHeaderBytes = size_t{4} * D;  // of the code block of a warp

  __device__ std::byte* header() const { return Memory() + CommonBytes(args_) + warp() * kHeaderBytes; }
  __device__ uint4* steps() const { return reinterpret_cast<uint4*>(Memory() + CommonBytes(args_) + kSelectWarps * kHeaderBytes); }
  __device__ std::byte* room() const { return Memory() + ScanBytes(args_); }

  // False: nothing is chosen, and all blocks of the team say so. The next task that writes to `parts` at once has to Wait() before.
  __device__ bool ChooseByBars() {
    const int32_t k = rule_->k, middle = hi_ - lo_;
    if (!args_.bars || k <= 0 || chunk_ < 2 * kSelectWarps * kTokens || middle / 8 < k) return false;
    if (rule_->pooled != nullptr && rule_->pool_level == nullptr) return false;  // by lse_all, which comes too late
    parity_ ^= 1;
    settled_ = false;
    const bool barred = ScanByBars(k);
    Wait();
    if (Leads()) {  // all have read it
      for (int i = static_cast<int>(threadIdx.x); i < kBins + 4; i += kSelectThreads) team_->sample[parity_][i] = 0;
    }
    if (!barred) return false;
    JoinMass();
    return ChooseListed(static_cast<uint32_t>(k));
  }

  // The largest of the heads' logits above `level`, of four positions; lane j of a quad, which has head j's, gets that of position j.
  __device__ float PooledScore(const float4& z) const {
    const int j = lane() % 4;
    const float by = j < args_.group ? level()[j] : Infinity();
    const auto most = [&](float x) {
      float score = x - by;  // NaN is no candidate for a maximum
      score = fmaxf(score, __shfl_xor_sync(kAllLanes, score, 1));
      return fmaxf(score, __shfl_xor_sync(kAllLanes, score, 2));
    };
    const float a = most(z.x), b = most(z.y), c = most(z.z), d = most(z.w), mine = j == 0 ? a : j == 1 ? b : j == 2 ? c : d;
    return isnan(mine) ? -Infinity() : mine;
  }

  const ScanSource* source_ = nullptr;
  bool settled_ = true;  // no block may still read what this one writes next

 private:
  struct Shared {
    uint32_t sampled;  // positions of the middle
    uint32_t listed;   // by this block
    int misled;
    float bar[kScanHeads], bar_missing[kScanHeads];  // of what is resident, and of what is not
    uint32_t starts[kMaxTeam + 1];  // of the blocks' lists in that of the team
    bool too_long;
    uint32_t members, before;
    uint32_t found[3], edge[2];
  };
  static __device__ Shared& shared() {
    __shared__ Shared s;
    return s;
  }
  __device__ float* sample_z(int h) const { return reinterpret_cast<float*>(room()) + h * SampleStride(args_); }
  __device__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(room()); }                  // [kMostListed]
  __device__ int32_t* positions() const { return reinterpret_cast<int32_t*>(keys() + kMostListed); }  // [kMostListed]
  __device__ uint32_t* entries() const { return keys() + 2 * kMostListed; }                          // [kListRoom] of members
  __device__ int64_t ListOf(int block) const { return (int64_t{team_index_} * args_.team_blocks + block) * args_.list_room; }

  // --- 1, 2
  // What a lane knows while it scans: of head lane % 4.
  struct Lane {
    float bar, bar_missing;
    Mass listed, other;
  };
  // Four positions from `i` on, a lane's own: which are of the middle.
  __device__ uint32_t OfMiddle(int32_t i) const {
    const auto before = static_cast<uint32_t>(min(max(lo_ - i, 0), 4)), within = static_cast<uint32_t>(min(max(hi_ - i, 0), 4));
    return (15u << before) & ((1u << within) - 1);
  }
  __device__ static float Of(const float4& z, int t) { return t == 0 ? z.x : t == 1 ? z.y : t == 2 ? z.z : z.w; }

  __device__ void Sample(int32_t i, const float4& z, uint32_t resident, float* to) {
    const int j = lane() % 4;
    if (j >= args_.group) return;
    *reinterpret_cast<float4*>(to) = z;
    const uint32_t counts = resident & OfMiddle(i);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int bin = min(max(__float2int_rd(Of(z, t) * kSampleBinsPerNat) + kHeadBins / 2, 0), kHeadBins - 1);
      if ((counts >> t) & 1) atomicAdd(own_bins() + j * kHeadBins + bin, 1u);
    }
  }
  // Lists what reaches a bar; the masses of this, and of all else in sight.
  __device__ void Take(int32_t i, const float4& z, uint32_t resident, bool whole, Lane* of) {
    const int j = lane() % 4;
    uint32_t passes = 0, missing = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      passes |= (Of(z, t) >= of->bar ? 1u : 0u) << t;
      missing |= (Of(z, t) >= of->bar_missing ? 1u : 0u) << t;
    }
    passes = (passes & resident) | missing;
    passes |= __shfl_xor_sync(kAllLanes, passes, 1);
    passes |= __shfl_xor_sync(kAllLanes, passes, 2);
    uint32_t others = 15u;
    if (!whole) {
      const uint32_t middle = OfMiddle(i);
      passes &= middle;
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (((middle >> t) & 1) != 0) continue;
        if (InSight(i + t)) AddLogit(&of->listed, Of(z, t));  // attended to in any case
        others &= ~(1u << t);
      }
    }
    others &= ~passes;
    const float none = -Infinity();
    AddLogits(&of->other, float4{(others & 1) != 0 ? z.x : none, (others & 2) != 0 ? z.y : none, (others & 4) != 0 ? z.z : none, (others & 8) != 0 ? z.w : none});
    if (!__any_sync(kAllLanes, passes != 0)) return;
    uint32_t of_token[4], total = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      of_token[t] = __ballot_sync(kAllLanes, j == 0 && ((passes >> t) & 1) != 0);
      total += __popc(of_token[t]);
    }
    uint32_t entry = 0;
    if (lane() == 0) entry = atomicAdd(&shared().listed, total);
    entry = __shfl_sync(kAllLanes, entry, 0);
    const uint32_t lower = (1u << (lane() - j)) - 1;  // lanes of the quads before
    const int64_t list = ListOf(block_);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const uint32_t at = entry + __popc(of_token[t] & lower);
      entry += __popc(of_token[t]);
      if (((passes >> t) & 1) == 0) continue;
      if (j < args_.group) AddLogit(&of->listed, Of(z, t));
      if (at >= static_cast<uint32_t>(args_.list_room)) continue;
      reinterpret_cast<float*>(args_.list_z + list + at)[j] = j < args_.group ? Of(z, t) : none;
      if (j == 0) args_.list_at[list + at] = static_cast<uint32_t>(i + t) | ((resident >> t) & 1) << 31;
    }
  }

  // The sample, the bars, the rest: lists, and masses to `parts` (all) and `outside` (what is not listed). False without bars.
  __device__ bool ScanByBars(int32_t k) {
    __shared__ QueryScale scale;
    const int g = lane() / 4, j = lane() % 4;
    const int32_t coded = n_ / kTokens * kTokens, coded_end = min(end_, coded), run = (chunk_ / kTokens + kSelectWarps - 1) / kSelectWarps;
    const int32_t samples = min((run + 7) / 8, args_.most_samples), tail_at = args_.most_samples * kSelectWarps * kTokens;
    reinterpret_cast<uint4*>(own_bins())[threadIdx.x] = uint4{};
    if (threadIdx.x == 0) shared().sampled = shared().listed = 0;
    if (warp() == 0) PrepareQuery<D, BITS>(source_->q, 0, args_.group, lane(), steps(), &scale);
    const bool has_tail = end_ > max(begin_, coded);  // one block: its part ends with less than a code block
    for (int t = warp(); has_tail && t < kTokens; t += kSelectWarps) {
      const int32_t i = coded + t;
      const std::byte* row = static_cast<const std::byte*>(source_->rows) + int64_t{i % source_->ring_rows} * (4 * D);
      for (int h = 0; h < args_.group; ++h) {
        const float z = i < end_ ? RowLogit<D>(args_.type, source_->q + h * D, row, lane()).x : -Infinity();
        if (lane() == 0) sample_z(h)[tail_at + t] = z;
      }
    }
    __syncthreads();

    const uint64_t* const resident = rule_->resident;
    float* const pooled = rule_->pooled;
    const bool anew = rule_->pool_reset != 0;
    const int block_bytes = static_cast<int>(args_.layout.bytes);
    const int32_t first = begin_ + warp() * run * kTokens, stop = min(first + run * kTokens, coded_end);
    const auto words_of = [&](int32_t at) { return resident != nullptr ? resident[at / kTokens] : ~uint64_t{0}; };
    const auto bits_of = [&](uint64_t word, int token) { return static_cast<uint32_t>(word >> token) & 15u; };
    const auto in_middle = [&](int32_t i) { return i >= lo_ && i < hi_; };
    // Lane (g, j) keeps the pooled score of position i + j, where i is the first of its quad's four.
    const auto old_score = [&](int32_t i) { return pooled != nullptr && !anew && in_middle(i + j) ? pooled[i + j] : -Infinity(); };
    const auto pool = [&](int32_t i, const float4& z, float old) {
      const float score = fmaxf(PooledScore(z), old);
      if (in_middle(i + j)) pooled[i + j] = score;
    };
    float* const my_sample = sample_z(min(j, kScanHeads - 1)) + warp() * samples * kTokens;

    Lane of{0, 0, NoMass(), NoMass()};
    BlockScan<D, BITS, kTokens / kCodePageTokens, false> scan(static_cast<int>(args_.layout.pages), steps(), scale, false, header(), lane());
    const std::byte* block = source_->blocks + int64_t{first / kTokens} * block_bytes;
    if (first < stop) scan.Start(block);
    int32_t at = first;
#pragma unroll 1
    for (int32_t i = 0;; ++i, at += kTokens) {
      if (i == samples) {
        if (!SetBars(k)) return false;
        of.bar = j < args_.group ? shared().bar[j] : NotANumber(), of.bar_missing = j < args_.group ? shared().bar_missing[j] : NotANumber();  // never reached
#pragma unroll 1
        for (int32_t s = 0; s <= samples; ++s) {  // a lane finds what it stored itself; last, the tail
          const bool tail = s == samples;
          const int32_t from = tail ? coded : first + s * kTokens;
          if (tail ? !has_tail || warp() != 0 : from >= stop) continue;
          const uint64_t word = words_of(from);
#pragma unroll 1
          for (int token = 4 * g; token < kTokens; token += 32) {
            const float4 z = *reinterpret_cast<const float4*>(tail ? sample_z(j) + tail_at + token : my_sample + s * kTokens + token);
            if (tail && pooled != nullptr) pool(from + token, z, old_score(from + token));
            Take(from + token, z, bits_of(word, token), false, &of);
          }
        }
      }
      if (at >= stop) {
        if (i >= samples) break;
        continue;
      }
      const std::byte* const next = at + kTokens < stop ? block + block_bytes : nullptr;
      const uint64_t word = words_of(at);
      const float old[2] = {old_score(at + 4 * g), old_score(at + 32 + 4 * g)};
      const bool whole = at >= lo_ && at + kTokens <= hi_;
      if (i < samples && lane() == 0) {
        atomicAdd(&shared().sampled, static_cast<uint32_t>(max(min(at + kTokens, hi_) - max(at, lo_), 0)));
      }
      const auto emit = [&](int token, const auto& z) {
        if (pooled != nullptr) pool(at + token, z, token < 32 ? old[0] : old[1]);
        if (i < samples) {
          Sample(at + token, z, bits_of(word, token), my_sample + i * kTokens + token);
        } else {
          Take(at + token, z, bits_of(word, token), whole, &of);
        }
      };
      scan.Run(block, next, emit, [](int, const auto&) {});
      block = next;
    }
    StoreMasses(of);
    return true;
  }

  __device__ void StoreMasses(const Lane& of) {
    __shared__ Mass of_warps[2][kSelectWarps][kScanHeads];
    Mass listed = of.listed, other = of.other;
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) {
      listed = Join(listed, {__shfl_xor_sync(kAllLanes, listed.most, offset), __shfl_xor_sync(kAllLanes, listed.sum, offset)});
      other = Join(other, {__shfl_xor_sync(kAllLanes, other.most, offset), __shfl_xor_sync(kAllLanes, other.sum, offset)});
    }
    if (lane() < kScanHeads) of_warps[0][warp()][lane()] = listed, of_warps[1][warp()][lane()] = other;
    __syncthreads();
    if (threadIdx.x == 0) team_->above[block_] = shared().listed;
    const int h = warp();
    if (h >= args_.group) return;
    const bool is_warp = lane() < kSelectWarps;
    listed = WarpJoin(is_warp ? of_warps[0][lane()][h] : NoMass()), other = WarpJoin(is_warp ? of_warps[1][lane()][h] : NoMass());
    if (lane() == 0) *PartOf(args_.parts, h, block_) = Join(listed, other), *PartOf(args_.outside, h, block_) = other;
  }

  // False, in all blocks of the team, if the sample has too few eligible positions.
  __device__ bool SetBars(int32_t k) {
    uint32_t* const bins = team_->sample[parity_];
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kSelectThreads) {
      if (own_bins()[i] != 0) atomicAdd(bins + i, own_bins()[i]);
    }
    if (threadIdx.x == 0) {
      atomicAdd(bins + kBins, shared().sampled);
      shared().misled = 0;
    }
    Wait();
    if (warp() < args_.group) FindBar(bins, warp(), k);
    __syncthreads();
    return shared().misled == 0;
  }
  __device__ void FindBar(const uint32_t* bins, int h, int32_t k) {
    constexpr int kMine = kHeadBins / kWarp;  // lane 0 has the highest ones
    const int lowest = kHeadBins - kMine * (lane() + 1);
    uint32_t count[kMine], mine = 0;
#pragma unroll
    for (int i = 0; i < kMine; i += 4) {
      const uint4 x = __ldcg(reinterpret_cast<const uint4*>(bins + h * kHeadBins + lowest + i));
      count[i] = x.x, count[i + 1] = x.y, count[i + 2] = x.z, count[i + 3] = x.w;
    }
    const float sampled = static_cast<float>(__ldcg(bins + kBins));
    const auto edge = [&](int i) { return static_cast<float>(lowest + i - kHeadBins / 2) / kSampleBinsPerNat; };
    float mass = 0;  // of the sample: not more than that of all
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      mine += count[i];
      if (lowest + i > 0) mass += static_cast<float>(count[i]) * __expf(edge(i));
    }
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) mass += __shfl_xor_sync(kAllLanes, mass, offset);
    uint32_t up_to = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint32_t above = __shfl_up_sync(kAllLanes, up_to, offset);
      if (lane() >= offset) up_to += above;
    }
    // The share of k that the sample has, and four times what chance (of runs of neighbours that are alike) may add to it.
    const float share = static_cast<float>(k) * sampled / static_cast<float>(hi_ - lo_);
    const auto rank = static_cast<uint32_t>(share + 8 * sqrtf(share) + 8);
    if (lane() == kWarp - 1 && up_to < rank) shared().misled = 1;
    uint32_t above = up_to - mine;
    if (above >= rank || rank > up_to) return;
#pragma unroll
    for (int i = kMine - 1; i >= 0; --i) {
      if (above < rank && rank <= above + count[i]) {
        if (lowest + i == 0) shared().misled = 1;
        const float inside = lowest + i == kHeadBins - 1 ? 1 : static_cast<float>(rank - above) / static_cast<float>(count[i]);
        const float bar = edge(i) + (1 - inside) / kSampleBinsPerNat;
        shared().bar[h] = bar;
        // What is not resident must also weigh more than theta: no more than it seems to by a part of the mass.
        shared().bar_missing[h] = rule_->resident != nullptr ? fmaxf(bar, __logf(mass) + rule_->log_theta - 0.01f) : Infinity();
      }
      above += count[i];
    }
  }

  // --- 3
  __device__ bool TooLong() {
    Shared& s = shared();
    if (warp() == 0) {
      uint32_t all = 0;
      bool full = false;
      for (int first = 0; first < args_.team_blocks; first += kWarp) {
        const int b = first + lane();
        const uint32_t count = b < args_.team_blocks ? __ldcg(team_->above + b) : 0;
        full = full || count > static_cast<uint32_t>(args_.list_room);
        uint32_t up_to = count;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
          const uint32_t before = __shfl_up_sync(kAllLanes, up_to, offset);
          if (lane() >= offset) up_to += before;
        }
        if (b < args_.team_blocks) s.starts[b] = all + up_to - count;
        all += __shfl_sync(kAllLanes, up_to, kWarp - 1);
      }
      full = __any_sync(kAllLanes, full);
      if (lane() == 0) s.starts[args_.team_blocks] = all, s.too_long = full || all > kMostListed, s.members = s.before = 0;
    }
    __syncthreads();
    return s.too_long;
  }
  // Where entry e of the team's list lies.
  __device__ int64_t PlaceOf(uint32_t e) const {
    const uint32_t* const starts = shared().starts;
    int b = 0;
#pragma unroll
    for (int step = kMaxTeam / 2; step > 0; step /= 2) {
      if (b + step < args_.team_blocks && starts[b + step] <= e) b += step;
    }
    return ListOf(b) + (e - starts[b]);
  }
  // fn(e, z, at) for all entries of the team.
  template <class Fn>
  __device__ void ForListed(Fn&& fn) const {
    constexpr int kAtOnce = 4;
    const uint32_t total = shared().starts[args_.team_blocks];
    for (uint32_t first = threadIdx.x; first < total; first += kAtOnce * kSelectThreads) {
      float4 z[kAtOnce];
      uint32_t at[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t place = PlaceOf(min(first + static_cast<uint32_t>(u * kSelectThreads), total - 1));
        z[u] = __ldcg(args_.list_z + place), at[u] = __ldcg(args_.list_at + place);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const uint32_t e = first + static_cast<uint32_t>(u * kSelectThreads);
        if (e < total) fn(e, z[u], at[u]);
      }
    }
  }

  __device__ bool ChooseListed(uint32_t k) {
    __shared__ uint32_t scratch[kSelectWarps];
    Shared& s = shared();
    reinterpret_cast<uint4*>(own_bins())[threadIdx.x] = uint4{};
    if (TooLong() || !simple_) return false;
    float offset[kScanHeads];
#pragma unroll
    for (int h = 0; h < kScanHeads; ++h) offset[h] = h < args_.group && args_.rule != GroupRule::kMaxLogit ? lse()[h] : 0;
    const bool filters = rule_->resident != nullptr;
    const float log_theta = rule_->log_theta, best = best_;
    ForListed([&](uint32_t e, const float4& z, uint32_t at) {
      const float score = fmaxf(fmaxf(z.x - offset[0], z.y - offset[1]), fmaxf(z.z - offset[2], z.w - offset[3]));
      const bool eligible = !filters || at >> 31 != 0 || score > log_theta;
      keys()[e] = eligible ? KeyOf(score) : 0;
      positions()[e] = static_cast<int32_t>(at & 0x7fffffffu);
      if (eligible) atomicAdd(own_bins() + BinOf(score, best), 1u);
    });
    __syncthreads();
    constexpr int kThreadBins = kBins / kSelectThreads;
    const int top_bin = kBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins;
    uint32_t mine = 0, total;
    for (int i = 0; i < kThreadBins; ++i) mine += own_bins()[top_bin - i];
    uint32_t above = BlockPrefix(mine, scratch, &total);
    if (above < k && k <= above + mine) {
      int i = 0;
      for (; above + own_bins()[top_bin - i] < k; ++i) above += own_bins()[top_bin - i];
      s.found[0] = static_cast<uint32_t>(top_bin - i), s.found[1] = above, s.found[2] = own_bins()[top_bin - i];
    }
    __syncthreads();
    if (total < k || s.found[2] > kListRoom) return false;
    if (warp() < 2) {
      const uint32_t key = FirstKeyOf(static_cast<int>(s.found[0]) + warp(), best, lane());
      if (lane() == 0) s.edge[warp()] = key;
    }
    __syncthreads();
    const uint32_t from = s.edge[0], to = s.edge[1], need = k - s.found[1];
    for (int h = 0; h < args_.group; ++h) {
      if (!(s.bar[h] - offset[h] < ScoreOf(from))) return false;
    }
    const uint32_t listed = s.starts[args_.team_blocks];
    uint32_t* const member_key = own_bins();
    int32_t* const member_position = reinterpret_cast<int32_t*>(own_bins() + kListRoom);
    for (uint32_t e = threadIdx.x; e < listed; e += kSelectThreads) {
      const uint32_t key = keys()[e];
      if (key < from || key >= to) continue;
      const uint32_t i = atomicAdd(&s.members, 1u);
      member_key[i] = key, member_position[i] = positions()[e], entries()[i] = e;
    }
    __syncthreads();
    ForFirst(need, member_key, member_position, static_cast<int>(s.members), [&](int i) { keys()[entries()[i]] = 0xffffffffu; });
    __syncthreads();
    uint32_t before = 0;
    for (uint32_t e = threadIdx.x; e < listed; e += kSelectThreads) {
      if (keys()[e] < to) continue;
      const int32_t at = positions()[e] - begin_;
      before += at < 0 ? 1 : 0;
      if (at >= 0 && positions()[e] < end_) atomicOr(kept_words() + at / 32, 1u << (at % 32));
    }
    before = __reduce_add_sync(kAllLanes, before);
    if (lane() == 0 && before != 0) atomicAdd(&s.before, before);
    __syncthreads();
    Write(s.before, k);
    if (rule_->lse_out != nullptr) MassOutside(to, offset);
    return true;
  }

  // Of what is not listed, and of what is and was not chosen. The heads are shared out among the blocks.
  __device__ void MassOutside(uint32_t to, const float (&offset)[kScanHeads]) {
    __shared__ float of_warps[kSelectWarps];
    // No weight that is left out is far above that of rank k, or else theta.
    float most = fminf(ScoreOf(to), best_);
    if (rule_->resident != nullptr) most = fmaxf(most, rule_->log_theta);
    for (int h = block_; h < args_.group; h += args_.team_blocks) {
      const float unit = most + offset[h];
      float sum = 0;
      ForListed([&](uint32_t e, const float4& z, uint32_t) {
        if (keys()[e] < to) sum += Exp2((Of(z, h) - unit) * kLog2E);
      });
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      __syncthreads();
      if (lane() == 0) of_warps[warp()] = sum;
      __syncthreads();
      if (warp() != 0) continue;
      sum = 0;
      for (int w = 0; w < kSelectWarps; ++w) sum += of_warps[w];
      const Mass other = TeamMass(args_.outside, h);
      if (lane() == 0) rule_->lse_out[h] = LogOf(sum > 0 ? Join(other, {unit, sum}) : other);
    }
  }

  int parity_ = 0;
};

}  // namespace prehoc::cuda
