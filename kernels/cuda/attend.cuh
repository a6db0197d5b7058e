// Attention of one step over scattered rows.
//
// A block takes a part of the keys of one task (KV head), for a tile of 4 or 8 query heads; its warps take tiles of 16 keys in turn. A warp has
// a ring of tiles in shared memory, which it fills by asynchronous copies a few tiles ahead of what it works on, from wherever rows lie: what
// limits a device of some TB/s is how many bytes are on their way. Sixteen rows of the device come by a bulk copy each (sm_90); the last tile,
// and any with a row of pinned memory, in pieces of 16 bytes; rows of 8 bits through registers. Warps do not wait for each other before all keys are done.
// Keys (then channels of V) are the 16 rows of the tensor cores' product and heads its columns, two each: one for q (then the softmax weights)
// rounded to the row type, one for what rounding took. So both products are nearly exact, at no cost.
// Parts are merged by log-sum-exp: the warps of a block in shared memory; the blocks of a task in each other's shared memory where they form a
// cluster, else by the one that ends last.
#pragma once
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/stored_rows.cuh"

namespace prehoc::cuda {

inline constexpr int kKeyTile = 16;

// --- barriers in shared memory that count one arrival a round and the bytes of bulk copies (which sm_90 has) ------------------------------
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kBulkCopies = true;
#else
inline constexpr bool kBulkCopies = false;
#endif
__device__ inline void InitBarrier(uint32_t at) { asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at) : "memory"); }
// Barriers made by this thread are seen by bulk copies.
__device__ inline void FenceBarriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ inline void Arrive(uint32_t at) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at) : "memory");
}
__device__ inline void ArriveExpecting([[maybe_unused]] uint32_t at, [[maybe_unused]] uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}
// The round does not end before the copies that this thread has asked for (other than bulk ones) have arrived.
__device__ inline void ArriveAfterCopies(uint32_t at) { asm volatile("cp.async.mbarrier.arrive.shared.b64 [%0];" ::"r"(at) : "memory"); }
// Waits for the end of the round: even ones have parity 0.
__device__ inline void WaitBarrier(uint32_t at, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PREHOC_TEST_BARRIER "mbarrier.try_wait.parity.shared.b64"
#else
#define PREHOC_TEST_BARRIER "mbarrier.test_wait.parity.shared.b64"
#endif
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; " PREHOC_TEST_BARRIER " p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(at), "r"(parity) : "memory");
  } while (done == 0);
#undef PREHOC_TEST_BARRIER
}
// `bytes`, a multiple of 16, by one thread; they are counted where they arrive, and the barrier's round ends after them.
__device__ inline void CopyBulk([[maybe_unused]] uint32_t to, [[maybe_unused]] const void* from, [[maybe_unused]] uint32_t bytes,
                                [[maybe_unused]] uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}
// Bulk copies write after what others have written.
__device__ inline void FenceBulkCopies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

struct AttendArgs {
  const AttendTask* tasks;
  float* parts;        // [tasks, head tiles, splits, kPart]
  uint32_t* arrived;   // [tasks, head tiles], zero between calls
  int32_t group;
  bool cluster;        // the blocks of a task are one; a power of two of them
  float scale;         // log2(e) / sqrt(head_dim)
  RowShape host;       // rows in host memory
};

// H heads a tile: 4 or 8.
template <int D, int H>
struct AttendShape {
  static constexpr int kMostWarps = 8;
  static constexpr int kColumns = H / 4;                       // of products: 8 wide, two for a head
  static constexpr int kSteps = D / 16;                        // of a product over channels; 16 channels of the output
  static constexpr int kRowBytes = 4 * D;
  static constexpr int kRowPieces = kRowBytes / 16;
  // In shared memory: 8 rows of a matrix then meet no bank twice. Bulk copies alone reach 4.25 TB/s on an H200 this way, and 4.5 to places at
  // multiples of 128 bytes: most of what is left between this kernel and a plain read.
  static constexpr int kRowStride = kRowBytes + 16;
  static constexpr int kTileBytes = kKeyTile * kRowStride;
  static constexpr int kStages = D == 64 ? 6 : D == 96 ? 4 : D == 128 ? 3 : 2;
  static constexpr int kRingBytes = kStages * kTileBytes;      // of a warp
  static constexpr int kHeadPart = D + 8;                      // floats: out, then most, then sum
  static constexpr int kPart = H * kHeadPart;
  static constexpr int kInboxEntries = H * D / 4;
  static constexpr size_t SharedBytes(int warps) { return size_t(warps) * kRingBytes + kInboxEntries * 2 * sizeof(float4); }
  static_assert(kRowStride / 16 % 2 == 1);
  static_assert(kPart * sizeof(float) <= kRingBytes, "a warp leaves its part in its ring");
};

// Where the rows of one task lie. Requires 0 <= i < total(). Chosen rows come first: their refs can be loaded before their
// number is known.
struct AttendRows {
  const std::byte* rows;
  const std::byte* host_rows;
  int64_t row_limit, host_limit;
  int32_t sinks, local, chosen;  // how many of each
  int32_t local_begin, sink_row, ring_row, ring_rows;
  bool broken;                   // the number of refs is none: one row that does not exist
  const int16_t* keep;           // of refs that name rows of the host: the slots that these are kept in; or null
  std::byte* slots;
  int32_t slot_limit;

  __device__ int32_t total() const { return broken ? 1 : sinks + local + chosen; }
  // >= 0: row of `rows`; < 0: ~row of `host_rows`. `listed` is what the refs have at i, if they go so far.
  __device__ int32_t Ref(int32_t i, int32_t listed) const {
    if (i < chosen) return listed;
    i -= chosen;
    if (i >= local) return sink_row + i - local;
    const int32_t p = local_begin + i;
    return ring_row + (p < ring_rows ? p : p % ring_rows);
  }
  __device__ bool Exists(int32_t ref) const { return !broken && (ref >= 0 ? ref < row_limit : ~ref < host_limit); }
};

__device__ inline AttendRows RowsOf(const AttendTask& task, int32_t visible, int32_t num_refs) {
  AttendRows r;
  const int32_t n = max(0, visible);
  r.rows = static_cast<const std::byte*>(task.rows);
  r.host_rows = static_cast<const std::byte*>(task.host_rows);
  r.row_limit = task.row_limit;
  r.host_limit = task.host_rows != nullptr ? task.host_limit : 0;
  r.broken = num_refs < 0 || num_refs > task.refs_room;
  r.sinks = min(max(task.sinks, 0), n);
  r.local = min(max(task.local, 0), n - r.sinks);
  r.local_begin = n - r.local;
  r.chosen = r.broken ? 0 : num_refs;
  r.sink_row = task.sink_row;
  r.ring_row = task.ring_row;
  r.ring_rows = max(task.ring_rows, 1);
  r.keep = task.keep;
  r.slots = static_cast<std::byte*>(task.slots);
  r.slot_limit = task.slot_limit;
  return r;
}

// q of a tile as right operand of K q^T, of a whole warp: in lane (g, j) column g is head g / 2 of four, and what its rounding took if g is odd.
template <RowType R, int D, int H>
struct Query {
  using S = AttendShape<D, H>;
  float2 x[S::kColumns][S::kSteps][2];
  uint32_t b[S::kColumns][S::kSteps][2];
  float factor[S::kColumns];  // what products of head 4 t + j are to be multiplied with

  __device__ void Load(const float* q, int first_head, int group, int g, int j) {
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) {
      const int head = first_head + 4 * t + g / 2;
      const float* const from = q + int64_t{head} * D + 2 * j;
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) x[t][s][i] = head < group ? *reinterpret_cast<const float2*>(from + 16 * s + 8 * i) : float2{};
      }
    }
  }
  __device__ void Prepare(float scale, int g, int j) {
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) {
      float most = 0;
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) most = fmaxf(most, fmaxf(fabsf(x[t][s][i].x), fabsf(x[t][s][i].y)));
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float down = PowerBelow(most);  // so that halves neither overflow nor lose small heads
      factor[t] = __shfl_sync(kAllLanes, scale / down, 8 * j);
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t whole, rest;
          SplitPair<R>(x[t][s][i].x * down, x[t][s][i].y * down, &whole, &rest);
          b[t][s][i] = g % 2 == 0 ? whole : rest;
        }
      }
    }
  }
};

// The ring of one warp: tile after tile, `stride` keys apart, each to the place of the one before it by kStages. kNarrow: rows of the host are of 8 bits.
template <int D, int H, bool kNarrow>
class TileRing {
  using S = AttendShape<D, H>;

 public:
  // `arrived` [kStages] of this warp. No memory is read before Start().
  __device__ TileRing(std::byte* ring, uint64_t* arrived, int64_t first, int64_t stride, int lane)
      : ring_(SharedAddress(ring)), arrived_(SharedAddress(arrived)), next_(first), stride_(stride), lane_(lane) {
    if (lane < S::kStages) InitBarrier(arrived_ + 8 * lane);
    FenceBarriers();
    __syncwarp();
    // What Keys() and Values() name: of each, four matrices of 8 rows, a lane a row.
    keys_ = ring_ + lane % 16 * S::kRowStride + lane / 16 * 16;
    values_ = ring_ + (lane % 8 + lane / 16 * 8) * S::kRowStride + lane / 8 % 2 * 16 + 2 * D;
  }
  // Asks for the refs of the first tiles and of the one after them. The number of refs need not be known yet.
  __device__ void LoadRefs(const int32_t* refs, int32_t room) {
    refs_ = refs;
#pragma unroll
    for (int s = 0; s <= S::kStages; ++s) {
      const int64_t i = next_ + s * stride_ + lane_;
      listed_[s] = refs != nullptr && lane_ < kKeyTile && i < room ? refs[i] : 0;
    }
  }
  // Asks for the first tiles.
  __device__ void Start(const AttendRows& rows, const RowShape& host) {
#pragma unroll
    for (int s = 0; s < S::kStages; ++s) Ask(rows, host, s, listed_[s]);
    listed_[0] = listed_[S::kStages];
  }
  // The next tile is there.
  __device__ void Wait() { WaitBarrier(arrived_ + 8 * stage_, parity_); }
  // It has been used.
  __device__ void Next(const AttendRows& rows, const RowShape& host) {
    __syncwarp();
    if ((keeps_ >> stage_ & 1) != 0) Keep(rows);
    Ask(rows, host, stage_, listed_[0]);
    const int64_t i = next_ + lane_;
    listed_[0] = lane_ < kKeyTile && i < rows.chosen ? refs_[i] : 0;  // long before it is needed
    if (++stage_ == S::kStages) stage_ = 0, parity_ ^= 1;
  }
  // A row that was asked for does not exist.
  __device__ bool Missing() const { return __any_sync(kAllLanes, missing_); }
  // Channels 16 s .. + 15 of K as left operand, and of V transposed.
  __device__ void Keys(int s, uint32_t (&a)[4]) const { LoadMatrices(keys_ + stage_ * S::kTileBytes + 32 * s, a); }
  __device__ void Values(int s, uint32_t (&a)[4]) const { LoadTransposed(values_ + stage_ * S::kTileBytes + 32 * s, a); }

 private:
  // Lane k < 16 names the row of key k. A row that does not exist is zeros; so are those after the last, for no number may meet the weight 0
  // that makes it NaN.
  __device__ void Ask(const AttendRows& rows, [[maybe_unused]] const RowShape& host, int stage, int32_t listed) {
    const int64_t i = next_ + lane_;
    next_ += stride_;
    if (i - lane_ >= rows.total()) return;
    const bool exists = lane_ < kKeyTile && i < rows.total();
    const int32_t ref = exists ? rows.Ref(static_cast<int32_t>(i), listed) : 0;
    const bool loads = exists && rows.Exists(ref);
    missing_ |= exists && !loads;
    const int64_t host_bytes = kNarrow ? host.bytes : S::kRowBytes;
    const std::byte* const row = ref >= 0 ? rows.rows + int64_t{ref} * S::kRowBytes : rows.host_rows + int64_t{~ref} * host_bytes;
    const uint32_t to = ring_ + stage * S::kTileBytes, arrived = arrived_ + 8 * stage;
    const uint32_t valid = __ballot_sync(kAllLanes, loads), near = __ballot_sync(kAllLanes, loads && ref >= 0);
    if (kBulkCopies && near == (1u << kKeyTile) - 1) {
      if (mixed_) FenceBulkCopies();
      if (lane_ == 0) ArriveExpecting(arrived, kKeyTile * S::kRowBytes);
      __syncwarp();
      if (lane_ < kKeyTile) CopyBulk(to + lane_ * S::kRowStride, row, S::kRowBytes, arrived);
      return;
    }
    mixed_ = true;
    const bool keeps = rows.keep != nullptr && (valid & ~near) != 0;
    const uint32_t narrow = kNarrow ? valid & ~near : 0;
#pragma unroll 8  // all of them would cost too many registers
    for (int p = 0; p < kKeyTile * S::kRowPieces / kWarp; ++p) {
      const int piece = p * kWarp + lane_, key = piece / S::kRowPieces, c = piece % S::kRowPieces;
      const uint64_t from = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row), key) + 16 * c;
      if (kNarrow && (narrow >> key & 1) != 0) continue;
      CopyAsync16(to + key * S::kRowStride + 16 * c, reinterpret_cast<const void*>(from), (valid >> key & 1) != 0);
    }
    if constexpr (kNarrow) Widen(row, host, to, narrow);
    if (keeps) {
      keeps_ |= 1u << stage;
      if (lane_ < kKeyTile) AskForSlot(loads && ref < 0 && i < rows.chosen ? rows.keep + i : nullptr, to + lane_ * S::kRowStride + S::kRowBytes);
    }
    ArriveAfterCopies(arrived);
    __syncwarp();
    if (lane_ == 0) Arrive(arrived);
  }

  // Where a row is to be kept comes beside it: the word that has it, and which half it is. Not in registers: numbers that are picked by the stage would
  // take the whole ring to local memory, and a tenth of the bandwidth with it.
  __device__ static void AskForSlot(const int16_t* keep, uint32_t beside) {
    const auto at = reinterpret_cast<uintptr_t>(keep);
    if (keep != nullptr) CopyAsyncFew<4>(beside, reinterpret_cast<const void*>(at & ~uintptr_t{3}));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(beside + 4), "r"(keep == nullptr ? 2u : static_cast<uint32_t>(at) >> 1 & 1u) : "memory");
  }
  __device__ static int32_t SlotBeside(uint32_t beside) {
    uint32_t word, half;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word), "=r"(half) : "r"(beside) : "memory");
    return half == 2 ? -1 : static_cast<int16_t>(half == 1 ? word >> 16 : word & 0xffffu);
  }

  // Rows of the tile that has been used, to where they are kept.
  __device__ void Keep(const AttendRows& rows) {
    keeps_ &= ~(1u << stage_);
    const int32_t slot = lane_ < kKeyTile ? SlotBeside(ring_ + stage_ * S::kTileBytes + lane_ * S::kRowStride + S::kRowBytes) : -1;
    for (uint32_t left = __ballot_sync(kAllLanes, slot >= 0 && slot < rows.slot_limit); left != 0; left &= left - 1) {
      const int key = __ffs(static_cast<int>(left)) - 1;
      const int64_t to = int64_t{__shfl_sync(kAllLanes, slot, key)} * S::kRowBytes;
      for (int piece = lane_; piece < S::kRowPieces; piece += kWarp) {
        *reinterpret_cast<uint4*>(rows.slots + to + 16 * piece) = LoadShared16(ring_ + stage_ * S::kTileBytes + key * S::kRowStride + 16 * piece);
      }
    }
    __syncwarp();  // before others come to its place
  }

  // The keys of `narrow`, a few pieces of each lane on their way at a time. What is written here is seen by whoever waits for the barrier: lane 0
  // arrives there behind __syncwarp().
  __device__ void Widen(const std::byte* row, const RowShape& host, uint32_t to, uint32_t narrow) {
    constexpr int kPieces = kKeyTile * S::kRowPieces / kWarp, kAtOnce = 4;
    static_assert(kPieces % kAtOnce == 0);
    if (narrow == 0) return;
#pragma unroll 1
    for (int first = 0; first < kPieces; first += kAtOnce) {
      NarrowPiece loaded[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = (first + i) * kWarp + lane_, key = piece / S::kRowPieces;
        const uint64_t from = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(row), key);
        if ((narrow >> key & 1) != 0) loaded[i] = LoadNarrow(reinterpret_cast<const std::byte*>(from), host, piece % S::kRowPieces);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = (first + i) * kWarp + lane_, key = piece / S::kRowPieces;
        if ((narrow >> key & 1) != 0) StoreShared16(to + key * S::kRowStride + 16 * (piece % S::kRowPieces), Widened(loaded[i], host));
      }
    }
  }

  const uint32_t ring_, arrived_;
  int64_t next_;  // the tile to be asked for
  const int64_t stride_;
  const int lane_;
  uint32_t keys_, values_;
  const int32_t* refs_ = nullptr;
  int32_t listed_[S::kStages + 1];  // refs of tiles to be asked for; after Start() only the first is used
  int stage_ = 0;                   // of the tile in use
  uint32_t parity_ = 0;
  bool missing_ = false;            // a row of this lane
  bool mixed_ = false;              // a tile came by other copies than bulk ones
  uint32_t keeps_ = 0;              // stages whose tile has rows that are kept
};

// Online softmax of the heads of a tile: lane (g, j) holds `most` of head 4 t + j (the same in all g), its own part of the sum, and of the output
// channels 16 s + g = out[t][s][0] + out[t][s][1], and 16 s + 8 + g = [2] + [3].
template <RowType R, int D, int H>
struct Softmax {
  using S = AttendShape<D, H>;
  float most[S::kColumns];
  float sum[S::kColumns] = {};
  float out[S::kColumns][S::kSteps][4] = {};

  __device__ Softmax() {
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) most[t] = -Infinity();
  }
  // Of the tile in use, of which `keys` exist.
  template <bool kNarrow>
  __device__ void Add(const Query<R, D, H>& q, const TileRing<D, H, kNarrow>& ring, int keys, int g) {
    float z[S::kColumns][2][4] = {};  // two sums, so that one does not wait for the other
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      uint32_t a[4];
      ring.Keys(s, a);
#pragma unroll
      for (int t = 0; t < S::kColumns; ++t) Number<R>::Mma(z[t][s % 2], a[0], a[1], a[2], a[3], q.b[t][s][0], q.b[t][s][1]);
    }
    float w[S::kColumns][2];  // keys g and g + 8
    bool grows = false;
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = (z[t][0][2 * i] + z[t][1][2 * i]) + (z[t][0][2 * i + 1] + z[t][1][2 * i + 1]);
        w[t][i] = g + 8 * i < keys ? fmaf(x, q.factor[t], x - x) : -Infinity();  // x - x: NaN of what is infinite
        grows |= w[t][i] > most[t];
      }
    }
    if (__any_sync(kAllLanes, grows)) Rescale(w);
    uint32_t p[S::kColumns][2];
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) {
      const float from = most[t] == -Infinity() ? 0.0f : most[t];
#pragma unroll
      for (int i = 0; i < 2; ++i) w[t][i] = Exp2(w[t][i] - from), sum[t] += w[t][i];
      uint32_t whole, rest;
      SplitPair<R>(w[t][0], w[t][1], &whole, &rest);
      p[t][0] = Transposed(LowHalves(whole, rest)), p[t][1] = Transposed(HighHalves(whole, rest));
    }
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      uint32_t a[4];
      ring.Values(s, a);
#pragma unroll
      for (int t = 0; t < S::kColumns; ++t) Number<R>::Mma(out[t][s], a[0], a[1], a[2], a[3], p[t][0], p[t][1]);
    }
  }
  // No number is an answer.
  __device__ void Spoil() {
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) sum[t] = NotANumber();
  }
  // To `part` [H][out, most, sum].
  __device__ void Store(float* part, int g, int j) {
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) {
      float* const head = part + (4 * t + j) * S::kHeadPart;
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
        head[16 * s + g] = out[t][s][0] + out[t][s][1];
        head[16 * s + 8 + g] = out[t][s][2] + out[t][s][3];
      }
#pragma unroll
      for (int offset = 4; offset <= 16; offset *= 2) sum[t] += __shfl_xor_sync(kAllLanes, sum[t], offset);
      if (g == 0) head[D] = most[t], head[D + 1] = sum[t];
    }
  }

 private:
  __device__ void Rescale(const float (&w)[S::kColumns][2]) {
#pragma unroll
    for (int t = 0; t < S::kColumns; ++t) {
      float now = fmaxf(most[t], fmaxf(w[t][0], w[t][1]));
#pragma unroll
      for (int offset = 4; offset <= 16; offset *= 2) now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, offset));
      const float shrink = now == -Infinity() ? 1.0f : Exp2(most[t] - now);  // 0 from nothing
      sum[t] *= shrink;
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[t][s][c] *= shrink;
      }
      most[t] = now;
    }
  }
};

// Joins `count` parts of one head, `stride` floats apart, for channels [c, c + 4): the weighted sum, and (in *most, *sum) its weight. Two
// neighbouring lanes share the work and both have the result; each loads some parts before it uses the first.
template <int D, bool kFromOtherBlocks>
__device__ inline float4 JoinParts(const float* parts, int64_t stride, int count, int c, float* most, float* sum) {
  const auto load = [](const float* p) { return kFromOtherBlocks ? __ldcg(p) : *p; };
  const auto load4 = [](const float* p) {
    return kFromOtherBlocks ? __ldcg(reinterpret_cast<const float4*>(p)) : *reinterpret_cast<const float4*>(p);
  };
  constexpr int kAtOnce = kFromOtherBlocks ? 8 : 4;
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
      x[i] = load4(part + c);
      m[i] = exists ? load(part + D) : -Infinity();
      l[i] = exists ? load(part + D + 1) : 0.0f;
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

template <RowType R, int D, int H, bool kNarrow>
__global__ void __launch_bounds__(AttendShape<D, H>::kMostWarps * kWarp, 1) AttendKernel(const __grid_constant__ AttendArgs args) {
  using S = AttendShape<D, H>;
  extern __shared__ float4 shared_[];
  __shared__ bool last;
  __shared__ uint64_t arrived[S::kMostWarps][S::kStages];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp, g = lane / 4, j = lane % 4;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x), first_head = static_cast<int>(blockIdx.z) * H;
  const AttendTask task = args.tasks[blockIdx.y];
  float* const rings = reinterpret_cast<float*>(shared_);
  float* const ring_part = rings + warp * (S::kRingBytes / 4);
  const int64_t first = (int64_t{split} * warps + warp) * kKeyTile, stride = int64_t{splits} * warps * kKeyTile;
  TileRing<D, H, kNarrow> ring(reinterpret_cast<std::byte*>(ring_part), arrived[warp], first, stride, lane);
  if (args.cluster) ClusterArrive();
  WaitForEarlierWork();
  LetLaterWorkLaunch();

  // --- the keys of this warp. First loads that do not wait for each other: lengths, the first refs, q.
  const int32_t visible = *task.n, num_refs = task.refs != nullptr ? *task.num_refs : 0;
  ring.LoadRefs(task.refs, task.refs_room);
  Query<R, D, H> q;
  q.Load(task.q, first_head, args.group, g, j);
  AttendRows rows = RowsOf(task, visible, num_refs);
  if (blockIdx.z != 0) rows.keep = nullptr;  // once is enough
  ring.Start(rows, args.host);
  q.Prepare(args.scale, g, j);
  Softmax<R, D, H> softmax;
#pragma unroll 1
  for (int64_t at = first; at < rows.total(); at += stride) {
    ring.Wait();
    softmax.Add(q, ring, static_cast<int>(min(rows.total() - at, int64_t{kKeyTile})), g);
    ring.Next(rows, args.host);
  }
  if (ring.Missing()) softmax.Spoil();
  __syncwarp();
  softmax.Store(ring_part, g, j);
  __syncthreads();

  // --- the warps of this block
  const int heads = min(H, args.group - first_head), items = heads * (D / 4);  // four channels of a head
  const int64_t tile = int64_t{blockIdx.y} * gridDim.z + blockIdx.z;
  float* const parts = args.parts + tile * splits * S::kPart;
  float4* const inbox = reinterpret_cast<float4*>(rings + warps * (S::kRingBytes / 4));
  const auto write = [&](int h, int c, float4 out, float most, float sum) {
    const float over = sum == 0 ? 0.0f : 1 / sum;
    const int64_t head = first_head + h;
    *reinterpret_cast<float4*>(task.out + head * D + c) = {out.x * over, out.y * over, out.z * over, out.w * over};
    if (c == 0 && task.lse != nullptr) task.lse[head] = sum == 0 ? -Infinity() : (most + __log2f(sum)) * kLn2;
  };
  if (args.cluster) ClusterWait();  // all its blocks have begun
  for (int at = 0; at < items; at += threads / 2) {
    const int i = at + thread / 2, h = min(i, items - 1) / (D / 4), c = min(i, items - 1) % (D / 4) * 4;
    float most, sum;
    const float4 out = JoinParts<D, false>(rings + h * S::kHeadPart, S::kRingBytes / 4, warps, c, &most, &sum);
    if (i >= items || thread % 2 != 0) continue;
    if (splits == 1) {
      write(h, c, out, most, sum);
    } else if (args.cluster) {
      // Item i is written by block i % splits, which has a place for it of each block.
      const uint32_t to = ClusterAddress(inbox + 2 * (i / splits * splits + split), i % splits);
      StoreCluster(to, out);
      StoreCluster(to + 16, {most, sum, 0, 0});
    } else {
      float* const part = parts + split * S::kPart + h * S::kHeadPart;
      *reinterpret_cast<float4*>(part + c) = out;
      if (c == 0) part[D] = most, part[D + 1] = sum;
    }
  }
  if (splits == 1) return;

  if (args.cluster) {
    ClusterArrive();
    ClusterWait();
    // Each of `splits` lanes has the part of one block.
    const int from = thread % splits;
    for (int at = 0; at * splits + split < items; at += threads / splits) {
      const int own = at + thread / splits, i = own * splits + split;
      const int h = min(i, items - 1) / (D / 4), c = min(i, items - 1) % (D / 4) * 4;
      const float4* const entry = inbox + 2 * min(own * splits + from, S::kInboxEntries - 1);
      const float4 x = entry[0];
      const float own_most = entry[1].x, own_sum = entry[1].y;
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
    return;
  }

  // --- the blocks of this task
  __syncthreads();
  if (thread == 0) {
    last = AddAcquireRelease(args.arrived + tile, 1) + 1 == static_cast<uint32_t>(splits);
    if (last) args.arrived[tile] = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int at = 0; at < items; at += threads / 2) {
    const int i = at + thread / 2, h = min(i, items - 1) / (D / 4), c = min(i, items - 1) % (D / 4) * 4;
    float most, sum;
    const float4 out = JoinParts<D, true>(parts + h * S::kHeadPart, S::kPart, splits, c, &most, &sum);
    if (i < items && thread % 2 == 0) write(h, c, out, most, sum);
  }
}

}  // namespace prehoc::cuda
