// A scan that keeps no logits: only what reaches a bar can be among the first k.
//
// A team of blocks takes a task, each block a contiguous part of the positions, each warp a run of it:
//   1. the first code blocks of every run are a sample of the task: a histogram of each head's logits
//      -- wait --
//   2. from it for each head a bar that somewhat more than k eligible positions reach. The rest is scanned: where a head reaches its bar, the
//      position is listed with all heads' logits; of everything else only the mass is added up
// The choice is then made among what is listed (select_team.cuh). What is not scores less than (bar - lse) of every head: if that is below the score
// of rank k, the choice is that of all positions, to the last tie. If it is not (a sample that misled), or if a list is full, the task is left to
// the launch that follows, which keeps all logits (select.cuh).
#pragma once
#include "kernels/cuda/select_team.cuh"

namespace prehoc::cuda {

// What a scan has, and of each warp what it needs beside the codes, of each thread a mass.
template <int D, int BITS>
struct BarMemory : ScanMemory<D, BITS> {
  static constexpr int32_t kTokens = 64;  // of a code block; others are not taken this way
  static constexpr size_t kWords = ScanMemory<D, BITS>::kBytes;
  static constexpr size_t kScores = kWords + size_t{16} * kSelectWarps;
  static constexpr size_t kMasses = kScores + size_t{8} * kTokens * kSelectWarps;
  static constexpr size_t kBytes = kMasses + size_t{8} * kSelectThreads;
};

template <int D, int BITS>
class BarSelector : public TeamMember<BarSelector<D, BITS>, BarMemory<D, BITS>::kBytes> {
  using M = BarMemory<D, BITS>;
  using Base = TeamMember<BarSelector, M::kBytes>;
  friend Base;
  using Base::args_, Base::rule_, Base::team_, Base::block_, Base::n_, Base::chunk_, Base::begin_, Base::end_, Base::sinks_;
  using Base::lo_, Base::hi_, Base::best_, Base::simple_, Base::round_, Base::candidates_, Base::lane, Base::warp, Base::own_bins, Base::fixed;
  using Base::kept_words, Base::class_words, Base::lse, Base::level, Base::room, Base::Wait, Base::Leads, Base::PartOf, Base::JoinMass, Base::Write;
  using Base::FindCut, Base::Keep, Base::AddMember, Base::JoinOutside;

 public:
  static constexpr int32_t kTokens = M::kTokens;
  static constexpr int kMostSamples = 4;
  static constexpr bool kLists = true;
  static constexpr int kHeadBins = kBins / kScanHeads;
  static constexpr float kSampleBinsPerNat = 4;  // the bins reach 64 nats to both sides of the head's centre

  static __host__ __device__ int SampleStride(const SelectArgs& args) { return (args.most_samples * kSelectWarps + 1) * kTokens + 8; }
  static size_t RoomBytes(const SelectArgs& args) {  // for the sample, then for the list
    const size_t sample = size_t{kScanHeads} * static_cast<size_t>(SampleStride(args)) * 4, list = static_cast<size_t>(args.list_room) * 8;
    return sample > list ? sample : list;
  }
  static size_t SharedBytes(const SelectArgs& args) { return Base::CommonBytes(args) + RoomBytes(args); }

  using Base::Base;

  __device__ void Run(int task_index) {
    const SelectTask& task = args_.select[task_index];
    source_ = &task.source, rule_ = &task.rule;
    n_ = *task.source.n;
    bool chosen = true;
    if (this->Divide()) {
      const bool tries = TakesBars();
      chosen = tries && Choose(static_cast<uint32_t>(rule_->k));
      if (Leads() && threadIdx.x == 0 && tries && !chosen && args_.restarts != nullptr) atomicAdd(args_.restarts, 1);
    }
    if (Leads() && threadIdx.x == 0) args_.again[task_index] = chosen ? 0 : 1;
  }

 private:
  __device__ std::byte* header() const { return fixed() + warp() * M::kHeaderBytes; }
  __device__ uint4* steps() const { return reinterpret_cast<uint4*>(fixed() + M::kSteps); }

  // Whether the task may be scanned this way: the same in all blocks of the team.
  __device__ bool TakesBars() const {
    const bool lists_are_short = (hi_ - lo_) / 24 >= rule_->k;
    const bool pools_now = rule_->pooled == nullptr || rule_->pool_level != nullptr;  // lse_all comes too late for it
    return args_.bars && rule_->k > 0 && chunk_ >= 2 * kSelectWarps * kTokens && lists_are_short && pools_now;
  }
  // False: nothing is chosen, all blocks of the team say so, and what they share is as it was.
  __device__ bool Choose(uint32_t k) {
    parity_ ^= 1;
    const bool barred = ScanByBars(static_cast<int32_t>(k));
    Wait();
    if (Leads()) {  // all have read it
      for (int i = static_cast<int>(threadIdx.x); i < kBins + 4; i += kSelectThreads) team_->sample[parity_][i] = 0;
    }
    round_ = 0;
    if (barred) {
      JoinMass();
      if (simple_) {
        listed_ = static_cast<int32_t>(shared().listed);
        const Cut cut = FindCut(k);
        if (candidates_ > k && !Misses(ScoreOf(cut.from))) {
          uint32_t offset = 0;
          Keep(cut, &offset);
          this->WriteLse();
          Write(offset, cut.kept);
          if (rule_->lse_out != nullptr) MassOutside(fminf(ScoreOf(cut.to), best_));
          return true;
        }
      }
    }
    Wait();  // all have read the masses and the histogram
    if (Leads() && round_ > 0) this->ClearHistogram(round_ - 1);
    Wait();
    return false;
  }
  // Whether a score above `least` may not have been listed.
  __device__ bool Misses(float least) const {
    bool misses = false;
    for (int h = 0; h < args_.group; ++h) misses = misses || !(shared().bars[h].x - this->ScoreUnit(h) < least);
    return misses;
  }

  // The largest of the heads' logits above `level`, of four positions; lane j of a quad, which has head j's, gets that of position j.
  __device__ float PooledScore(const float4& z) const {
    const int j = lane() % 4;
    const float by = HasHead() ? level()[j] : Infinity();
    const auto most = [&](float x) {
      float score = x - by;  // NaN is no candidate for a maximum
      score = fmaxf(score, __shfl_xor_sync(kAllLanes, score, 1));
      return fmaxf(score, __shfl_xor_sync(kAllLanes, score, 2));
    };
    const float a = most(z.x), b = most(z.y), c = most(z.z), d = most(z.w), mine = j == 0 ? a : j == 1 ? b : j == 2 ? c : d;
    return isnan(mine) ? -Infinity() : mine;
  }

  struct Shared {
    const uint64_t* resident;
    float* pooled;
    int32_t lo, hi, sinks;
    bool anew;
    uint32_t sampled;  // positions of the middle
    uint32_t listed;   // by this block
    int misled;
    float* list_z[kScanHeads];
    uint32_t* list_at;
    float centre[kScanHeads];
    float2 bars[kScanHeads];  // of what is resident, and of what is not
  };
  static __device__ Shared& shared() {
    __shared__ Shared s;
    return s;
  }
  __device__ float* sample_z(int h) const { return reinterpret_cast<float*>(room()) + h * SampleStride(args_); }
  __device__ float* tail_z(int h) const { return sample_z(h) + args_.most_samples * kSelectWarps * kTokens; }
  __device__ uint32_t* list_at() const { return args_.list_at + int64_t{blockIdx.x} * args_.list_room; }
  __device__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(room()); }                // [list_room]
  __device__ int32_t* places() const { return reinterpret_cast<int32_t*>(keys() + args_.list_room); }  // [list_room] own positions
  __device__ float* list_z(int h) const { return args_.list_z + (int64_t{blockIdx.x} * kScanHeads + h) * args_.list_room; }

  // --- 1, 2
  // The scan needs all registers for products: what it uses beside is in shared memory, and loaded anew each time.
  template <class T>
  static __device__ T Fresh(const T& x) {
    return *const_cast<const volatile T*>(&x);
  }
  static __device__ float2 Fresh2(const float2& x) { return {Fresh(x.x), Fresh(x.y)}; }
  static __device__ float HigherBar(float2 bars) { return fmaxf(bars.x, isinf(bars.y) ? bars.x : bars.y); }
  __device__ bool HasHead() const { return lane() % 4 < args_.group; }
  // Of a warp: the words of residents and the pooled scores of the code block that is scanned, and of the next.
  __device__ uint64_t* side_word(int32_t at) const { return reinterpret_cast<uint64_t*>(fixed() + M::kWords) + 2 * warp() + Odd(at); }
  __device__ float* side_scores(int32_t at) const { return reinterpret_cast<float*>(fixed() + M::kScores) + (2 * warp() + Odd(at)) * kTokens; }
  static __device__ int Odd(int32_t at) { return static_cast<int>((static_cast<uint32_t>(at) / kTokens) & 1u); }
  __device__ float2* edge_mass() const { return reinterpret_cast<float2*>(fixed() + M::kMasses) + threadIdx.x; }  // of a thread: sinks and local
  __device__ void FetchSide(int32_t at) const {
    const uint64_t* const resident = Fresh(shared().resident);
    if (resident != nullptr && lane() == 0) CopyAsyncFew<8>(SharedAddress(side_word(at)), resident + at / kTokens);
    const float* const pooled = Fresh(shared().pooled);
    for (int i = lane(); pooled != nullptr && i < kTokens; i += kWarp) CopyAsyncFew<4>(SharedAddress(side_scores(at) + i), pooled + at + i);
  }

  // Four positions from `i` on, a lane's own: which are of the middle.
  static __device__ uint32_t OfMiddle(int32_t i) {
    const auto before = static_cast<uint32_t>(min(max(Fresh(shared().lo) - i, 0), 4)), within = static_cast<uint32_t>(min(max(Fresh(shared().hi) - i, 0), 4));
    return (15u << before) & ((1u << within) - 1);
  }
  __device__ static float Of(const float4& z, int t) { return t == 0 ? z.x : t == 1 ? z.y : t == 2 ? z.z : z.w; }

  // Lane (g, j) pools the score of position i + j, where i is the first of its quad's four.
  __device__ void Pool(int32_t i, const float4& z, float old) const {
    const float score = PooledScore(z);
    float* const pooled = Fresh(shared().pooled) + i + lane() % 4;
    if ((OfMiddle(i) >> (lane() % 4)) & 1) *pooled = Fresh(shared().anew) ? score : fmaxf(score, old);
  }
  __device__ void Sample(int32_t i, const float4& z, uint32_t resident, float* to) const {
    if (!HasHead()) return;
    *reinterpret_cast<float4*>(to) = z;
    const uint32_t counts = resident & OfMiddle(i);
    const float centre = Fresh(shared().centre[lane() % 4]);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int bin = min(max(__float2int_rd((Of(z, t) - centre) * kSampleBinsPerNat) + kHeadBins / 2, 0), kHeadBins - 1);
      if ((counts >> t) & 1) atomicAdd(own_bins() + lane() % 4 * kHeadBins + bin, 1u);
    }
  }
  // Of a code block of the middle, mostly: nothing reaches a bar, and all of it goes to `sum`. False if something might.
  template <int N>
  __device__ bool NoneListed(const float4 (&z)[N], float* sum) const {
    const float2 bars = Fresh2(shared().bars[lane() % 4]);
    float most = Most(z[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmaxf(most, Most(z[i]));
    if (__any_sync(kAllLanes, most >= fminf(bars.x, bars.y))) return false;
    const float unit = -HigherBar(bars) * kLog2E;
    const auto weight = [&](float x) { return Exp2(fmaf(x, kLog2E, unit)); };
    float more = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) more += (weight(z[i].x) + weight(z[i].y)) + (weight(z[i].z) + weight(z[i].w));
    *sum += more;
    return true;
  }
  // Lists what reaches a bar; the mass of all else in the middle goes to `sum`, in units of the higher bar. Of N pieces, 32 positions apart, the
  // first at `i`; `resident` has four bits of each. Not `whole`: some of the positions may not be of the middle.
  template <int N>
  __device__ void Take(int32_t i, const float4 (&z)[N], uint32_t resident, bool whole, float* sum) const {
    constexpr uint32_t kAll = (1u << (4 * N)) - 1;
    const int j = lane() % 4;
    const float2 bars = Fresh2(shared().bars[j]);
    uint32_t over_x = 0, over_y = 0;
#pragma unroll
    for (int t = 0; t < 4 * N; ++t) {
      const float x = Of(z[t / 4], t % 4);
      over_x |= x >= bars.x ? 1u << t : 0;
      over_y |= x >= bars.y ? 1u << t : 0;
    }
    uint32_t passes = (over_x & resident) | (over_y & ~resident);
    passes |= __shfl_xor_sync(kAllLanes, passes, 1);
    passes |= __shfl_xor_sync(kAllLanes, passes, 2);
    uint32_t others = ~passes & kAll;
    if (!whole) {
      uint32_t middle = 0;
#pragma unroll
      for (int p = 0; p < N; ++p) middle |= OfMiddle(i + 32 * p) << (4 * p);
      passes &= middle, others &= middle;
      if (middle != kAll && HasHead()) {
        float2* const mass = edge_mass();
        Mass edges{mass->x, mass->y};
#pragma unroll
        for (int p = 0; p < N; ++p) {
          float4 left = z[p];
#pragma unroll 1
          for (int t = 0; t < 4; ++t, left = {left.y, left.z, left.w, 0}) {
            const int32_t at = i + 32 * p + t;
            if (((middle >> (4 * p + t)) & 1) == 0 && (at < Fresh(shared().sinks) || at >= Fresh(shared().lo))) AddLogit(&edges, left.x);
          }
        }
        *mass = {edges.most, edges.sum};
      }
    }
    const float unit = -HigherBar(bars) * kLog2E;
    float more = 0;
#pragma unroll
    for (int t = 0; t < 4 * N; ++t) {
      const float weight = Exp2(fmaf(Of(z[t / 4], t % 4), kLog2E, unit));
      if ((others >> t & 1) != 0) more += weight;
    }
    *sum += more;
    // Lane j of a quad speaks for token j of each piece.
    uint32_t listed[N], count = 0;
#pragma unroll
    for (int p = 0; p < N; ++p) {
      listed[p] = __ballot_sync(kAllLanes, ((passes >> (4 * p + j)) & 1) != 0);
      count += __popc(listed[p]);
    }
    if (count == 0) return;
    uint32_t entry = 0;
    if (lane() == 0) entry = atomicAdd(&shared().listed, count);
    entry = __shfl_sync(kAllLanes, entry, 0);
    if (entry + count > static_cast<uint32_t>(args_.list_room)) return;  // too many: they are counted
    float* const list = Fresh(shared().list_z[j]);
    uint32_t* const places = Fresh(shared().list_at);
#pragma unroll
    for (int p = 0; p < N; ++p) {
      uint32_t at = entry + __popc(listed[p] & ((1u << (lane() - j)) - 1));  // behind those of the quads before
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const bool passed = (passes >> (4 * p + t) & 1) != 0;
        if (passed) {
          list[at] = Of(z[p], t);
          if (t == j) places[at] = static_cast<uint32_t>(i + 32 * p + t) | (resident >> (4 * p + t) & 1) << 31;
          ++at;
        }
      }
      entry += __popc(listed[p]);
    }
  }

  // The sample, the bars, the rest: lists, and masses to `parts` (all) and `outside` (what is not listed). False without bars.
  __device__ bool ScanByBars(int32_t k) {
    __shared__ QueryScale scale;
    const int32_t coded = n_ / kTokens * kTokens, coded_end = min(end_, coded), run = (chunk_ / kTokens + kSelectWarps - 1) / kSelectWarps;
    const int32_t samples = min((run + 7) / 8, args_.most_samples);
    if (warp() > 0 && warp() <= args_.group) FindCentre(warp() - 1, min(lo_, coded - 1) / kTokens);
    const bool has_tail = end_ > max(begin_, coded);  // one block: its part ends with less than a code block
    reinterpret_cast<uint4*>(own_bins())[threadIdx.x] = uint4{};
    *edge_mass() = {-Infinity(), 0};
    if (threadIdx.x < kScanHeads) shared().bars[threadIdx.x] = {NotANumber(), NotANumber()};  // never reached
    if (threadIdx.x == 0) {
      Shared& s = shared();
      s.sampled = s.listed = 0;
      s.resident = rule_->resident, s.pooled = rule_->pooled, s.anew = rule_->pool_reset != 0;
      s.lo = lo_, s.hi = hi_, s.sinks = sinks_;
      s.list_at = list_at();
      for (int h = 0; h < kScanHeads; ++h) s.list_z[h] = list_z(h);
    }
    if (lane() == 0) *side_word(0) = *side_word(kTokens) = ~uint64_t{0};  // without residents all are
    if (warp() == 0) PrepareQuery<D, BITS>(source_->q, 0, args_.group, lane(), steps(), &scale);
    for (int t = warp(); has_tail && t < kTokens; t += kSelectWarps) {
      const int32_t i = coded + t;
      const std::byte* row = static_cast<const std::byte*>(source_->rows) + int64_t{i % source_->ring_rows} * (4 * D);
      for (int h = 0; h < args_.group; ++h) {
        const float z = i < end_ ? RowLogit<D>(args_.type, source_->q + h * D, row, lane()).x : -Infinity();
        if (lane() == 0) tail_z(h)[t] = z;
      }
    }
    __syncthreads();

    const int block_bytes = static_cast<int>(args_.layout.bytes);
    int32_t at = begin_ + warp() * run * kTokens;
    const int32_t stop = min(at + run * kTokens, coded_end);
    int32_t unsampled = at + samples * kTokens;  // below it is the sample, until the bars stand
    float* to = sample_z(lane() % 4) + warp() * samples * kTokens - at;
    float other = 0;
    using Scan = BlockScan<D, BITS, kTokens / kCodePageTokens, false>;
    Scan scan(static_cast<int>(args_.layout.pages), steps(), scale, false, header(), lane());
    const std::byte* block = source_->blocks + int64_t{at / kTokens} * block_bytes;
    if (at < stop) {
      scan.Start(block, Odd(at) != 0);
      FetchSide(at);
    }
#pragma unroll 1
    for (;; at += kTokens) {
      if (at == unsampled) {
        PrefetchBlocks(block + block_bytes, stop - at - kTokens);
        if (!SetBars(k)) {
          WaitForCopies();  // of a code block that is not taken: the next task's must not meet them
          return false;
        }
        TakeSample(at - samples * kTokens, min(at, stop), to, coded, has_tail, &other);
      }
      if (at >= stop) {
        if (at >= unsampled) break;
        continue;
      }
      scan.Arrive();
      const std::byte* next = nullptr;
      if (at + kTokens < stop) {
        next = block + block_bytes;
        FetchSide(at + kTokens);
      }
      if (at < unsampled && lane() == 0) {
        atomicAdd(&shared().sampled, static_cast<uint32_t>(max(min(at + kTokens, Fresh(shared().hi)) - max(at, Fresh(shared().lo)), 0)));
      }
      const bool whole = at >= Fresh(shared().lo) && at + kTokens <= Fresh(shared().hi);
      const auto emit = [&](const float4 (&z)[Scan::kPairs]) {
        if (Fresh(shared().pooled) != nullptr) {
#pragma unroll
          for (int piece = 0; piece < Scan::kPairs; ++piece) Pool(at + Scan::TokenOf(piece, lane()), z[piece], Fresh(side_scores(at)[piece * 32 + lane()]));
        }
        if (at >= unsampled && whole && NoneListed(z, &other)) return;
        static_assert(Scan::kPairs == 2 && kTokens == 64, "pieces are 32 positions apart");
        const int token = Scan::TokenOf(0, lane());
        const uint64_t word = Fresh(*side_word(at)) >> token;
        const uint32_t resident = (static_cast<uint32_t>(word) & 15u) | (static_cast<uint32_t>(word >> 28) & 0xf0u);
        if (at < unsampled) {
#pragma unroll
          for (int piece = 0; piece < 2; ++piece) Sample(at + token + 32 * piece, z[piece], resident >> (4 * piece) & 15u, to + at + token + 32 * piece);
        } else {
          Take(at + token, z, resident, whole, &other);
        }
      };
      scan.Run(block, next, Odd(at) != 0, emit, [](const auto&) {});
      block = next;
    }
    StoreMasses(other);
    return true;
  }
  // While the team waits, memory need not: what comes after the code block that is on its way goes to L2.
  __device__ void PrefetchBlocks(const std::byte* from, int32_t tokens) const {
    const int bytes = static_cast<int>(args_.layout.bytes) * min(max(tokens, 0) / kTokens, 2);
    for (int at = lane() * 128; at < bytes; at += 128 * kWarp) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
  }
  // What was sampled, of which a lane finds what it stored itself, and the tail.
  __device__ void TakeSample(int32_t from, int32_t stop, const float* z_at, int32_t coded, bool has_tail, float* other) const {
    const int first = lane() / 4 * 4;
#pragma unroll 1
    for (int32_t at = from;; at += kTokens) {
      const bool tail = at >= stop;
      if (tail && (!has_tail || warp() != 0)) return;
      const int32_t of = tail ? coded : at;
      const uint64_t word = rule_->resident != nullptr ? rule_->resident[of / kTokens] : ~uint64_t{0};
#pragma unroll 1
      for (int token = first; token < kTokens; token += 32) {
        const float4 z[1] = {*reinterpret_cast<const float4*>(tail ? tail_z(lane() % 4) + token : z_at + at + token)};
        const int32_t i = of + token + lane() % 4;
        if (tail && rule_->pooled != nullptr) Pool(of + token, z[0], i < n_ ? rule_->pooled[i] : 0);
        Take(of + token, z, static_cast<uint32_t>(word >> token) & 15u, false, other);
      }
      if (tail) return;
    }
  }

  __device__ void StoreMasses(float sum) {
    static_assert(kSelectWarps % kScanHeads == 0);
    __shared__ Mass others[kSelectWarps][kScanHeads], edges[kSelectWarps][kScanHeads], rest[kSelectWarps];
    const float2 edge = *edge_mass();
    const auto over_quads = [&](Mass mass) {
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        mass = Join(mass, {__shfl_xor_sync(kAllLanes, mass.most, offset), __shfl_xor_sync(kAllLanes, mass.sum, offset)});
      }
      return mass;
    };
    Mass other = over_quads(sum == 0 ? NoMass() : Mass{HigherBar(shared().bars[lane() % 4]), sum});
    const Mass at_edges = over_quads({edge.x, edge.y});
    __syncthreads();  // the list is complete
    const int h = warp() % kScanHeads;  // a warp takes a head of a part of it
    const uint32_t count = min(shared().listed, static_cast<uint32_t>(args_.list_room));
    Mass mass = NoMass();
    for (uint32_t e = static_cast<uint32_t>(warp() / kScanHeads * kWarp + lane()); e < count; e += kSelectThreads / kScanHeads) AddLogit(&mass, list_z(h)[e]);
    mass = WarpJoin(mass);
    if (lane() == 0) rest[warp()] = mass;
    if (lane() < kScanHeads) others[warp()][lane()] = other, edges[warp()][lane()] = at_edges;
    __syncthreads();
    if (warp() >= args_.group) return;
    const bool is_warp = lane() < kSelectWarps;
    other = WarpJoin(is_warp ? others[lane()][h] : NoMass());
    mass = is_warp ? edges[lane()][h] : NoMass();
    if (is_warp && lane() % kScanHeads == h) mass = Join(mass, rest[lane()]);
    mass = Join(WarpJoin(mass), other);
    // A list that is full leaves out what it should have: the team then takes none.
    if (shared().listed > static_cast<uint32_t>(args_.list_room)) mass = {0, NotANumber()};
    if (lane() == 0) *PartOf(args_.parts, h, block_) = mass, *PartOf(args_.outside, h, block_) = other;
  }

  // Where the logits of a head lie, roughly and for all blocks the same: that of the middle of a code block.
  __device__ void FindCentre(int h, int32_t code_block) const {
    const __half* const lo = reinterpret_cast<const __half*>(source_->blocks + int64_t{code_block} * static_cast<int64_t>(args_.layout.bytes));
    const float* const q = source_->q + h * D;
    float sum = 0;
    for (int c = lane(); c < D; c += kWarp) sum += q[c] * (__half2float(lo[c]) + __half2float(lo[D + c]) * (0.5f * ((1 << BITS) - 1)));
    sum = WarpSum(sum) * __frsqrt_rn(static_cast<float>(D));
    if (lane() == 0) shared().centre[h] = isfinite(sum) ? sum : 0;
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
    const float centre = shared().centre[h];
    const auto edge = [&](int i) { return static_cast<float>(lowest + i - kHeadBins / 2) / kSampleBinsPerNat; };  // above the centre
    float mass = 0;  // of the sample: not more than that of all
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      mine += count[i];
      if (lowest + i > 0) mass += static_cast<float>(count[i]) * __expf(edge(i));
    }
    mass = WarpSum(mass);
    const uint32_t up_to = WarpUpTo(mine);
    // The share of k that the sample has, and three times what chance (of runs of neighbours that are alike) may add to it.
    const float share = static_cast<float>(k) * sampled / static_cast<float>(hi_ - lo_);
    const auto rank = static_cast<uint32_t>(share + 6 * sqrtf(share) + 8);
    if (lane() == kWarp - 1 && up_to < rank) shared().misled = 1;
    uint32_t above = up_to - mine;
    if (above >= rank || rank > up_to) return;
#pragma unroll
    for (int i = kMine - 1; i >= 0; --i) {
      if (above < rank && rank <= above + count[i]) {
        if (lowest + i == 0) shared().misled = 1;
        const float inside = lowest + i == kHeadBins - 1 ? 1 : static_cast<float>(rank - above) / static_cast<float>(count[i]);
        const float bar = centre + edge(i) + (1 - inside) / kSampleBinsPerNat;
        // What is not resident must also score more than theta: no more than it seems to by a part of the mass.
        const float least_lse = args_.rule != GroupRule::kMaxLogit ? centre + __logf(mass) : 0;
        shared().bars[h] = {bar, rule_->resident != nullptr ? fmaxf(bar, least_lse + rule_->log_theta - 0.01f) : Infinity()};
      }
      above += count[i];
    }
  }

  // --- the choice
  __device__ void CountKeys(uint32_t, const Cut& cut, bool refines, int shift) {
    reinterpret_cast<uint4*>(own_bins())[threadIdx.x] = uint4{};
    __syncthreads();
    const bool first = round_ == 0, filters = rule_->resident != nullptr;
    const float log_theta = rule_->log_theta, best = best_;
#pragma unroll 4
    for (int32_t e = static_cast<int32_t>(threadIdx.x); e < listed_; e += kSelectThreads) {
      uint32_t key = 0;
      if (first) {
        float score = -Infinity();
#pragma unroll
        for (int h = 0; h < kScanHeads; ++h) {
          if (h < args_.group) score = fmaxf(score, list_z(h)[e] - this->ScoreUnit(h));
        }
        const uint32_t at = list_at()[e];
        key = !filters || at >> 31 != 0 || score > log_theta ? KeyOf(score) : 0;
        keys()[e] = key, places()[e] = static_cast<int32_t>(at & 0x7fffffffu) - begin_;
      } else {
        key = keys()[e];
      }
      const bool counts = refines ? key >= cut.from && key < cut.to : key != 0;
      if (counts) atomicAdd(own_bins() + (refines ? static_cast<int>((key - cut.from) >> shift) : BinOf(ScoreOf(key), best)), 1u);
    }
    __syncthreads();
  }
  // Adds what was listed and not chosen to the mass of what was not listed. `most`: about the score of rank k, not below it.
  __device__ void MassOutside(float most) {
    __shared__ float of_warps[kSelectWarps];
    // No weight that is left out is far above that of rank k, or else theta: in units of the larger one.
    if (rule_->resident != nullptr) most = fmaxf(most, rule_->log_theta);
    const int h = warp() % kScanHeads;  // a warp takes a head of a part of it
    const float unit = most + (h < args_.group ? this->ScoreUnit(h) : 0);
    float sum = 0;
    const int32_t listed = h < args_.group ? listed_ : 0;
#pragma unroll 8
    for (int32_t e = warp() / kScanHeads * kWarp + lane(); e < listed; e += kSelectThreads / kScanHeads) {
      const int32_t at = places()[e];
      if (((kept_words()[at / 32] >> (at % 32)) & 1) == 0) sum += Exp2((list_z(h)[e] - unit) * kLog2E);
    }
    sum = WarpSum(sum);
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

  __device__ void PlaceKeys(const Cut& cut, uint32_t* in, uint32_t* of_class) {
    for (int32_t w = static_cast<int32_t>(threadIdx.x); w < (end_ - begin_ + 31) / 32; w += kSelectThreads) class_words()[w] = 0;
    __syncthreads();
#pragma unroll 4
    for (int32_t e = static_cast<int32_t>(threadIdx.x); e < listed_; e += kSelectThreads) {
      const uint32_t key = keys()[e];
      if (key < cut.from) continue;
      const int32_t at = places()[e];
      const bool is_in = key >= cut.to;
      atomicOr((is_in ? kept_words() : class_words()) + at / 32, 1u << (at % 32));
      *in += is_in ? 1 : 0, *of_class += is_in ? 0 : 1;
      if (!is_in && Base::ByList(cut)) AddMember(key, begin_ + at);
    }
  }

  const ScanSource* source_ = nullptr;
  int32_t listed_ = 0;  // by this block
  int parity_ = 0;
};

}  // namespace prehoc::cuda
