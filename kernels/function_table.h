// The kernels of one backend behind one table: plain C++ (the truth), vector code, and CUDA fill the same entries,
// so the whole pipeline runs on any of them and can be compared. Kernels know rows, codes and scores; they
// know no policy. A call covers any number of (sequence, KV head) tasks of one layer.
//
// q [group, head_dim] fp32 after RoPE, logits z = q.k / sqrt(head_dim), n visible positions.
// A row is K[head_dim] then V[head_dim], fp16; where a task names a RowFormat, rows of that format, which are exact names of fp16 rows
// (row_codec.h): an entry gives what it would give for those. Pointers are of the backend's device. Everywhere: head_dim is a multiple of
// 16 in [16, 256], group in [1, 256], counts may be 0 (pointers to nothing may then be null), outputs of one call do not
// overlap each other or its inputs, and the calling thread may hold no loop of the same executor.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

#include "base/executor.h"
#include "base/half.h"
#include "base/row_format.h"
#include "base/status.h"

namespace prehoc {

// Who runs the work and what orders it: the CPU backends use `executor` and return when done; the CUDA backend
// enqueues on `stream` and returns at once.
struct Launch {
  Executor* executor = nullptr;  // null = the calling thread alone
  void* stream = nullptr;        // cuda::DeviceKernels::launch_stream() of the CUDA backend
};

// Consecutive rows in one piece of memory.
struct RowRun {
  const void* rows = nullptr;  // [count] rows
  int32_t count = 0;
  RowFormat format = RowFormat::kF16;
};

// Low-bit codes of K, per channel over a group of tokens: k ~ lo[c] + code * step[c]; dithered: k ~ lo[c] + (code -
// shift[c]) * step[c], with a shift from a seed (CodeShift() in code_block.h) that encode adds and scan takes away.
struct CodeFormat {
  int32_t bits = 4;          // 2, 3, 4, 5 or 8
  int32_t group_tokens = 64; // 16 or 64
  bool error_norms = false;  // also stores |k_i - code_i| per token (fp16, rounded up): tightens the bound
  // Over the seeds, the errors of a token are uniform on +-step / 2, unbiased and independent between channels; tokens of
  // a block share their shifts, so that a scan pays for them once per block. Same bytes per token, same proven bound.
  bool dither = false;
  friend bool operator==(const CodeFormat&, const CodeFormat&) = default;
};

// --- append: fp32 K and V of new tokens become rows -------------------------------------------------------------
// Rounded to nearest even; beyond 65504 fp16 has only infinity, and NaN stays NaN. Other formats are made from the fp16 row.
struct AppendTask {
  const float* k = nullptr;  // [count] vectors, `stride` floats apart
  const float* v = nullptr;
  int64_t stride = 0;        // [floats] between tokens, in k and in v
  void* rows = nullptr;      // [count] rows
  int32_t count = 0;
  bool widened = false;      // `rows` [count, 2, head_dim] fp16 are what rows of the format stand for
};
struct AppendParams {
  std::span<const AppendTask> tasks;
  int32_t head_dim = 0;
  RowFormat format = RowFormat::kF16;
  // Only for tables with `settle`: k and v lie in the device's memory, and whatever writes them is finished. Rows in host memory then
  // arrive behind the call: until settle() says that they are there, encode and prefill see them all the same (by the device's copy), and
  // nobody else reads them.
  bool on_device = false;
};

// --- encode: one group of rows becomes a code block ---------------------------------------------------------------
// The layout is that of code_block.h, and so are the bytes: every CPU backend writes the same block.
// A channel with an infinite or NaN key anywhere in the group is stored as lo 0, step +inf, codes 0: scan then claims no
// bound for any token of the group. Page bounds take NaN as both -inf and +inf. -0 is stored as 0.
struct EncodeTask {
  const void* rows = nullptr;     // [group_tokens] rows; only K is read
  std::byte* block = nullptr;     // [code_block_bytes]
  Half* page_lo = nullptr;        // [group_tokens / 16, head_dim] minimum of each K channel per page of 16, or null
  Half* page_hi = nullptr;        // maximum
  uint64_t seed = 0;              // of this block: CodeBlockSeed() in code_block.h; read only by dithered formats
};
struct EncodeParams {
  std::span<const EncodeTask> tasks;
  CodeFormat format;
  int32_t head_dim = 0;
  RowFormat rows = RowFormat::kF16;
};

// --- gate: has the query turned since the choice was made? (CIS) ------------------------------------------------
// cosine = min over the group of cos(anchor[h], q[h]), clamped to [-1, 1]; -2 if a norm is zero or not finite.
// With `spread`, also spread[h] = sqrt(SUM_c variance[c] (q[h, c] - anchor[h, c])^2 / head_dim): how far logits moved, as their
// standard deviation over keys whose channels have these variances and are independent; +inf where that is no finite number.
struct GateTask {
  const float* q = nullptr;         // [group, head_dim]
  const float* anchor = nullptr;    // [group, head_dim]
  float* cosine = nullptr;          // [1], or null with `spread`
  const float* variance = nullptr;  // [head_dim], not negative; with `spread`
  float* spread = nullptr;          // [group], or null
};
struct GateParams {
  std::span<const GateTask> tasks;
  int32_t group = 0, head_dim = 0;
};

// --- scan: logits of every coded position, from the codes --------------------------------------------------------
// z[h, i] for i < groups * group_tokens. With `err` also a proven bound: |z_exact - z| <= err[h, i], where z_exact
// is the real-arithmetic logit of the stored fp16 key: the smaller of SUM_c |q_c| step_c / 2 and |q| |e_i|
// (if norms are stored and finite), over sqrt(head_dim), plus whatever this backend's arithmetic adds.
// err is +inf where nothing is proven: z is not finite, or the group has a channel with step +inf (such channels are left
// out of z). err is never NaN.
// With `variance` (dithered formats, beside err) the spread of the same error, one figure for all tokens of a block: for a
// query that does not depend on the seed and any l >= 1, P(z_exact - z > l sqrt(variance[h, g])) <= exp(-l^2 / 2), and as
// much for z - z_exact. It is SUM_c q_c^2 step_c^2 / 12 / head_dim, plus whatever this backend's arithmetic adds (a sum of
// independent uniform variables is sub-Gaussian with its own variance: Arbel, Marchal, Nguyen, "On strict
// sub-Gaussianity, optimal proxy variance and symmetry for bounded random variables", 2020); never NaN, +inf if not known.
// With `bias` the part of the error that is not random and does not average out over blocks: |z_exact - z - e| <= bias[h, g]
// for an e of that variance and mean 0, independent between blocks. Never NaN, +inf if not known.
struct ScanTask {
  const float* q = nullptr;           // [group, head_dim]
  const std::byte* blocks = nullptr;  // [groups] blocks of code_block_bytes, contiguous
  int32_t groups = 0;                 // may be 0
  float* z = nullptr;                 // [group] rows, `z_stride` floats apart
  float* err = nullptr;               // as z, or null
  int64_t z_stride = 0;
  uint64_t seed = 0;                  // dithered formats: block g was encoded with CodeBlockSeed(seed, g)
  float* variance = nullptr;          // [group, groups] of dithered codes, or null; needs err
  float* bias = nullptr;              // as variance, or null; needs variance
};
struct ScanParams {
  std::span<const ScanTask> tasks;
  CodeFormat format;
  int32_t group = 0, head_dim = 0;
};

// --- score: exact logits of rows ------------------------------------------------------------------------------------
struct ScoreTask {
  const float* q = nullptr;  // [group, head_dim]
  std::span<const RowRun> runs;
  float* z = nullptr;        // [group] rows of SUM counts, `z_stride` floats apart, in the order of the runs
  int64_t z_stride = 0;
};
struct ScoreParams {
  std::span<const ScoreTask> tasks;
  int32_t group = 0, head_dim = 0;
};

// --- score_pages: upper bound of z over the keys of each page of 16 (Quest, arXiv 2406.10774) -------------------
// z[h, p] = SUM_c max(q_c lo_c, q_c hi_c) / sqrt(head_dim), to fp32 accuracy (add 1e-5 of SUM |q_c| max(|lo_c|, |hi_c|) /
// sqrt(head_dim) where a proof is wanted); +inf where that is not a finite number.
struct ScorePagesTask {
  const float* q = nullptr;   // [group, head_dim]
  const Half* lo = nullptr;   // [pages, head_dim]
  const Half* hi = nullptr;
  int32_t pages = 0;          // may be 0
  float* z = nullptr;         // [group] rows of `pages`, `z_stride` floats apart
  int64_t z_stride = 0;
};
struct ScorePagesParams {
  std::span<const ScorePagesTask> tasks;
  int32_t group = 0, head_dim = 0;
};

// --- choose: which positions of the middle a step attends to (docs/selectors/) ------------------------------
// In sight are [0, sinks) and [lo, n); of these [0, sinks) and [hi, n) are kept always, and the middle [lo, hi) is chosen
// from. [sinks, lo) is out of the window (PSAW; without sinks: sinks = 0) and counts nowhere.
// 1. lse_all[h] = LSE of z[h, i] over what is in sight.
// 2. score s_i of i in the middle, in logs, by `rule`; kMaxWeight: s_i = max_h (z[h,i] - lse_all[h]).
// 3. candidates: all of the middle, or, if `resident` is given, i with its bit set or s_i > log_theta.
// 4. order by (s descending, position ascending): ranks p_1, p_2, ... Keep the first k.
// 5. dilation (CIS): p_1 .. p_m of these also bring p +- j, j <= r, inside the middle, candidates or not. exact_budget (CIS*):
//    walk the ranks, adding p, and while rank <= m then p - 1, p + 1, p - 2, p + 2, .. p + r, until exactly k distinct
//    positions are kept or the ranks end.
// 6. if target_drop >= 0, go on down the ranks, one position at a time, until for every head the dropped mass is at most
//    target_drop, or `cap` positions are kept (dilated ones included), or the ranks end:
//    dropped = U / (U + L), U = SUM exp(z + err) over what is in sight and not kept, L = SUM exp(z - err) over what is kept.
//    What is in sight and neither candidate nor kept counts as dropped. An infinite err is 100 % dropped until it is kept.
//    The quotient holds whatever the size of U and L (both may be e^-1000 of the largest weight). With a target below 1e-30 a
//    quotient below 1e-30 may count as reached or not.
// Logits: -inf is a weight of 0, ranked last; +inf ranks first. A NaN in sight makes lse_all of its head NaN and `met` 0 (lse_out
// too, if it is not kept); the position ranks as -inf, and by the weight rules so does the whole head.
// Backends may order two positions either way if their s differ by less than fp32 rounding, but equal logits tie exactly.
struct ChooseParams;
enum class GroupRule : uint8_t {
  kMaxWeight = 0,   // max over the group of softmax weights (in logs)
  kMeanWeight = 1,  // log of the mean over the group of softmax weights
  kMaxLogit = 2,    // max of raw logits
};
struct ChooseTask {
  const float* z = nullptr;    // [group] rows of n, `z_stride` floats apart; every visible position
  const float* err = nullptr;  // as z, or null for 0
  int64_t z_stride = 0;
  int32_t n = 0;               // visible positions
  int32_t sinks = 0;           // [0, sinks) is kept
  int32_t lo = 0, hi = 0;      // the middle; sinks <= lo <= hi <= n
  int32_t k = 0;               // middle positions wanted; clipped to the middle
  int32_t cap = 0;             // with target_drop: the most that widening may keep; at least k, or all of the middle
  float target_drop = -1;      // < 0: fixed k
  int32_t dilate_m = 0, dilate_r = 0;
  bool exact_budget = false;
  const uint64_t* resident = nullptr;  // bit i of word i / 64, [n / 64 rounded up]; or null
  float log_theta = 0;         // with `resident`: missing positions with s_i above it are candidates too
  GroupRule rule = GroupRule::kMaxWeight;
  float* pooled = nullptr;     // [n]: max(pooled, s) over all of the middle, or null; nothing else is touched
  bool pool_reset = false;     // pooled = s instead
  // Results.
  int32_t* chosen = nullptr;   // sorted kept positions of the middle; room for max_chosen()
  int32_t* count = nullptr;    // [1]
  float* lse_all = nullptr;    // [group] over what is in sight; -inf if nothing
  float* lse_out = nullptr;    // [group] of what is in sight and not kept; -inf if nothing
  float* lse_out_bound = nullptr;  // [group] as lse_out, of z + err; or null
  uint8_t* met = nullptr;      // [1] 1 if target_drop was reached (or is off); or null
  int32_t max_chosen() const;  // room that `chosen` must have
};
struct ChooseParams {
  std::span<const ChooseTask> tasks;
  int32_t group = 0;
};

// --- top_k: sorted positions of the k largest of score[lo, hi), ties to the lower position ------------------------
// NaN ranks as -inf.
struct TopKTask {
  const float* score = nullptr;  // indexed by position
  int32_t lo = 0, hi = 0, k = 0;
  int32_t* chosen = nullptr;     // [min(k, hi - lo)]
  int32_t* count = nullptr;      // [1]
};
struct TopKParams {
  std::span<const TopKTask> tasks;
};

// --- gather: rows to slots ------------------------------------------------------------------------------------------
struct RowCopy {
  const void* from = nullptr;  // a row
  Half* to = nullptr;          // [2, head_dim]
};
struct GatherParams {
  std::span<const RowCopy> rows;
  int32_t head_dim = 0;
  RowFormat format = RowFormat::kF16;  // of what is copied
};

// --- attend: exact attention over runs of rows ---------------------------------------------------------------------
// out[h] = SUM softmax(z) v, lse[h] = LSE of z, fp32 accumulation or better. No row at all, or none with z > -inf, gives
// out 0 and lse -inf. A logit that is NaN or +inf makes out and lse of its head NaN: it must not look like an answer.
struct AttendTask {
  const float* q = nullptr;  // [group, head_dim]
  std::span<const RowRun> runs;
  float* out = nullptr;      // [group, head_dim]
  float* lse = nullptr;      // [group]
};
struct AttendParams {
  std::span<const AttendTask> tasks;
  int32_t group = 0, head_dim = 0;
};

// --- prefill: causal attention of a chunk of queries ---------------------------------------------------------------
// Query t (position first + t) sees [0, sinks) and [start[t], first + t], nothing after first + t and nothing twice;
// start null = 0 for all. `runs` hold positions 0, 1, 2, ... and at least first + queries of them.
struct PrefillTask {
  const float* q = nullptr;   // [queries] rows of [group, head_dim], `q_stride` floats apart
  int64_t q_stride = 0;
  float* out = nullptr;       // as q, `out_stride` floats apart
  int64_t out_stride = 0;
  std::span<const RowRun> runs;  // positions 0, 1, 2, ...
  const int32_t* start = nullptr;  // [queries], each in [0, first + t]; or null
};
struct PrefillParams {
  std::span<const PrefillTask> tasks;
  int32_t queries = 0;
  int32_t first = 0;   // position of query 0
  int32_t sinks = 0;
  int32_t group = 0, head_dim = 0;
  bool on_device = false;  // only for tables with `settle`: q and out lie in the device's memory; out is there after settle(results)
};

// --- what runs behind the calls (all null in tables that finish all they begin) -----------------------------------------
// What later calls enqueue runs after what `stream`, of the device, has been given so far. Does not wait.
struct FollowParams {
  void* stream = nullptr;  // cudaStream_t
};
// Waits, and returns what went wrong behind the calls. An error leaves nothing under way.
struct SettleParams {
  bool results = true;   // until what was enqueued is done: outputs are there
  int32_t rows_but = 0;  // until the rows of all append calls but the last so many are in host memory
  bool ahead = true;     // with rows_but = 0: until copies to the device are done, too, which are then forgotten
  bool release = false;  // a prompt has ended: what only prompts need of the device's memory is given back
};
// The next prefill call will ask for `total` rows of each task, [0, rows) of them in these runs, which stay as and where they are until then.
// They begin to come to the device behind the other work. A hint: another prefill call may come instead.
struct ReadAheadParams {
  std::span<const std::span<const RowRun>> tasks;
  int32_t rows = 0, total = 0;
  int32_t head_dim = 0;
};

// Every entry returns kInvalid or kUnsupported (with nothing written) for shapes it does not take, naming them.
struct KernelTable {
  std::string_view name;  // "reference", "avx2", "avx512", "cuda"
  size_t (*code_block_bytes)(const CodeFormat& format, int32_t head_dim);  // 0 = unsupported format
  Status (*append)(const AppendParams&, const Launch&);
  Status (*encode)(const EncodeParams&, const Launch&);
  Status (*gate)(const GateParams&, const Launch&);
  Status (*scan)(const ScanParams&, const Launch&);
  Status (*score)(const ScoreParams&, const Launch&);
  Status (*score_pages)(const ScorePagesParams&, const Launch&);
  Status (*choose)(const ChooseParams&, const Launch&);
  Status (*top_k)(const TopKParams&, const Launch&);
  Status (*gather)(const GatherParams&, const Launch&);
  Status (*attend)(const AttendParams&, const Launch&);
  Status (*prefill)(const PrefillParams&, const Launch&);
  Status (*follow)(const FollowParams&, const Launch&) = nullptr;
  Status (*settle)(const SettleParams&, const Launch&) = nullptr;
  Status (*read_ahead)(const ReadAheadParams&, const Launch&) = nullptr;
};

const KernelTable& ReferenceKernels();
// The fastest table that this CPU runs: avx512, avx2 or reference.
const KernelTable& BestCpuKernels();
// By name; null if unknown or not runnable on this CPU.
const KernelTable* FindKernels(std::string_view name);

}  // namespace prehoc
