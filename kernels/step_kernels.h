// What one decode step of a layer runs, in a form that needs no CPU within the step: the fast and the slow clock of a device. The semantics are those of
// kernels/function_table.h, entry by entry; what differs is where things lie. Tasks and everything that they point to are in memory that the
// backend reads (device or pinned), and what changes from step to step (lengths, counts, flags) is behind a pointer, so that a captured graph
// can be replayed.
//
// Task arrays outlive the enqueued work, and no work on the stream writes them (on sm_90 they are read while earlier kernels still run); what tasks
// point to is ordered by the stream as usual. Pointers are aligned to 16 bytes, counts may be 0. A position or row that does not exist never
// reaches a load: each entry says what it reports instead.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/half.h"
#include "base/result.h"
#include "kernels/function_table.h"

namespace prehoc::step {

enum class RowType : uint8_t { kF16 = 0, kBF16 = 1 };

// Rows in host memory may be of another format (row_codec.h): each is then the name of one fp16 row, which is what the device has and uses.
//
// Where a head's rows lie in host memory that the device reads: position p in row chunk_row[p / chunk_tokens] + head_row + p % chunk_tokens of
// whatever base the task names. A chunk that is not there has -1.
struct HostRows {
  const int32_t* chunk_row = nullptr;  // [num_chunks]; null: position p is row head_row + p
  int32_t chunk_tokens = 0, num_chunks = 0;
  int32_t head_row = 0;
};

// --- gate ------------------------------------------------------------------------------------------------------------
struct GateTask {
  const float* q = nullptr;       // [group, head_dim]
  const float* anchor = nullptr;  // [group, head_dim]
  float* cosine = nullptr;        // [1]; or null
  uint8_t* hold = nullptr;        // [1] 1 if cosine > tau, and *age < max_age if there is an age; or null
  const int32_t* age = nullptr;   // [1] steps since the choice was made; or null
};
struct GateParams {
  const GateTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t group = 0, head_dim = 0;
  float tau = 0;
  int32_t max_age = 0x7fffffff;
};

// --- append: fp32 K and V become rows; a group that is complete becomes a code block (append + encode) ---------------
// Position p lies in row p % ring_rows. Blocks of bf16 keys are those of the keys rounded to fp16: exact for
// 2^-14 <= |k| <= 65504, else off by at most 2^-25, or infinite and so unbounded.
struct AppendTask {
  const float* k = nullptr;        // [count] vectors, `stride` floats apart
  const float* v = nullptr;
  int64_t stride = 0;              // [floats]
  const int32_t* first = nullptr;  // [1] positions before this call
  void* rows = nullptr;            // [ring_rows, 2, head_dim]
  int32_t ring_rows = 0;           // a multiple of group_tokens, at least count + group_tokens; first + count if never wrapped
  int32_t count = 0;               // new tokens, at most max_count
  std::byte* blocks = nullptr;     // block g is of positions g * group_tokens ..; null = no codes
  Half* page_lo = nullptr;         // [positions / 16, head_dim] bounds of each page of 16 in whole groups; or null
  Half* page_hi = nullptr;
  void* host_rows = nullptr;       // base of `host`: the rows are written there, too, in host_format, but for chunks that are not there; or null
  int64_t host_limit = 0;          // [rows]
  HostRows host;
};
struct AppendParams {
  const AppendTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t max_count = 0;  // of any task; one above it appends nothing
  CodeFormat format;
  RowType type = RowType::kF16;
  int32_t head_dim = 0;
  RowFormat host_format = RowFormat::kF16;  // another one needs rows of kF16: `rows` get what rows of that format stand for
  GateParams gate;  // done beside, by the same launch; nothing that it reads or writes is of the append tasks
};

// --- select: logits from the codes, and choice of k ---------------------------------------------------------------------
// Positions below coded = *n / group_tokens * group_tokens have codes; the others are scored from their rows in the ring.
struct ScanSource {
  const float* q = nullptr;           // [group, head_dim]
  const std::byte* blocks = nullptr;  // [coded / group_tokens] code blocks
  const void* rows = nullptr;         // [ring_rows, 2, head_dim]: as in AppendTask
  int32_t ring_rows = 0;              // at least group_tokens
  const int32_t* n = nullptr;         // [1] visible positions, at most max_n
};
// Of *n visible positions, sinks' = min(sinks, n) are kept, the last `local` are kept, and the middle [lo, hi) between is
// chosen from: hi = max(sinks', n - local), lo = min(hi, max(sinks', n - window)). Then as ChooseTask of function_table.h, but
// for target_drop and exact_budget, which are not offered here.
struct ChooseRule {
  int32_t sinks = 0, local = 0;
  int32_t window = 0x7fffffff;         // PSAW: positions before n - window are out of sight
  int32_t k = 0;
  int32_t dilate_m = 0, dilate_r = 0;  // used only with params.dilate
  const uint64_t* resident = nullptr;  // [max_n / 64 rounded up]; or null
  float log_theta = 0;
  float* pooled = nullptr;             // [max_n]; or null
  const float* pool_level = nullptr;   // [group] pooled scores are the largest z - pool_level of a head, where it is finite (else z); or null: the score.
                                       // It may be lse_all, which then is the last call's: what is scored need not be kept until this one's is known
  uint8_t pool_reset = 0;
  const uint8_t* hold = nullptr;       // [1]: if 1, the results of the last call stand, and nothing is read or written; or null
  // Results.
  int32_t room = 0;                    // of `chosen`; more are never written
  int32_t* chosen = nullptr;           // sorted positions
  int32_t* count = nullptr;            // [1]; -1 if n is outside [0, max_n] or `room` was too small
  float* lse_all = nullptr;            // [group]
  float* lse_out = nullptr;            // [group]; or null, which saves a pass
};
// From logits in memory.
struct ChooseTask {
  const float* z = nullptr;  // [group] rows, `z_stride` floats apart
  int64_t z_stride = 0;
  const int32_t* n = nullptr;
  ChooseRule rule;
};
// scan and choose in one launch: the logits never leave the chip where they fit into its shared memory (or L2).
struct ResolveTask;
struct SelectTask {
  ScanSource source;
  ChooseRule rule;
};
struct ChooseParams {
  const ChooseTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t max_n = 0;
  int32_t group = 0;
  GroupRule rule = GroupRule::kMaxWeight;
  bool dilate = false;             // some task dilates
  std::byte* workspace = nullptr;  // of ChooseWorkspaceBytes(); zeroed once before its first use, then left to this entry; calls
  size_t workspace_bytes = 0;      // that share one are ordered
};
// How: with all logits kept, or only with those that reach a bar (select_bars.cuh), which pays where the others would not stay in a cache. The choice
// is the same. kBars is taken for code blocks of 64 tokens, up to 4 heads, rules that take a maximum, and without dilation.
enum class SelectBy : uint8_t { kAny = 0, kLogits = 1, kBars = 2 };
struct SelectParams {
  const SelectTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t max_n = 0;
  CodeFormat format;
  RowType type = RowType::kF16;
  int32_t group = 0, head_dim = 0;
  GroupRule rule = GroupRule::kMaxWeight;
  bool dilate = false;
  SelectBy by = SelectBy::kAny;
  bool gated = false;           // tasks may hold: the blocks of those that do work for the others. No faster where none does
  GateParams gate;              // done first, of all tasks (whose rule.hold they write) or none: in the same launch where each task has a block
  int32_t* restarts = nullptr;  // [1] += tasks whose candidates were not enough, which were scanned again; or null
  const ResolveTask* resolves = nullptr;  // [num_tasks] resolved by the same launch, each when its task has chosen or holds: chosen, count, n and
                                          // hold are those of the task, and so are the bits of residents, if there are any. Or null
  std::byte* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// --- attend: exact attention over sinks, chosen rows and the local window -----------------------------------------------
// Attended are positions [0, min(sinks, n)) in rows sink_row + p, the last min(local, n - sinks) positions in rows
// ring_row + p % ring_rows, and the rows that `refs` name: ref >= 0 is row `ref` of `rows`, ref < 0 is row ~ref of `host_rows`
// (pinned memory, read where it lies). Dense attention over [0, n) is sinks = 0, local = n, ring_rows > n.
// Logits are formed from q and the softmax weights as sums of two halves of the row type: errors are some 2^-21 (fp16) or
// 2^-16 (bf16) of SUM |q_c k_c|. A row that does not exist, or an infinite or NaN key, makes out and lse of every head NaN.
struct AttendTask {
  const float* q = nullptr;    // [group, head_dim]
  float* out = nullptr;        // [group, head_dim]
  float* lse = nullptr;        // [group]; or null
  const void* rows = nullptr;  // [row_limit, 2, head_dim]
  int64_t row_limit = 0;
  int32_t sink_row = 0, ring_row = 0, ring_rows = 0;
  int32_t sinks = 0, local = 0;
  const int32_t* n = nullptr;         // [1] visible positions
  const int32_t* refs = nullptr;      // [refs_room] readable, the first *num_refs count; or null
  const int32_t* num_refs = nullptr;  // [1]; outside [0, refs_room] as one row that does not exist
  int32_t refs_room = 0;
  const void* host_rows = nullptr;    // [host_limit] rows of host_format; or null
  int64_t host_limit = 0;
  const int16_t* keep = nullptr;      // [refs_room]: where refs[i] is a row of the host, its fp16 row is also written to slot keep[i], if that exists; or null
  void* slots = nullptr;              // [slot_limit, 2, head_dim]; none of those that `keep` names is among the rows attended to
  int32_t slot_limit = 0;
};
struct AttendParams {
  const AttendTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t max_rows = 0;  // about as many as a task attends to: how far the keys are split. Any number of rows is right
  RowType type = RowType::kF16;
  RowFormat host_format = RowFormat::kF16;  // another one needs rows of kF16
  int32_t group = 0, head_dim = 0;
  std::byte* workspace = nullptr;  // as for choose
  size_t workspace_bytes = 0;
};

// --- residency: where the rows of chosen positions are, and which are to be -----------------------------------------------------
// Slots that are free in advance: rows that a step has to read from the host stay in them. What leaves for it was not attended to since a hand that goes
// round the slots came by last (CLOCK, or second chance: Corbato 1968), and leaves between steps: no slot is written while it may be read.
struct SpareSlots {
  struct State {
    int32_t free = 0;   // spare slots
    int32_t taken = 0;  // by this step; more than `free` = those that there was no room for, too
    int32_t hand = 0;   // slot that is looked at next
  };
  State* state = nullptr;       // [1]; null: rows are not kept
  int16_t* slot = nullptr;      // [room], the first `free` of them
  int32_t* position = nullptr;  // [room] what is to be in those taken
  uint8_t* used = nullptr;      // [slots] 1 = attended to since the hand came by
  int32_t room = 0;             // spare slots, at most
};
// A head's rows of the middle lie in `slots` slots; a position that is in none is read from the host. Without slots all may be null: what is not in
// the ring is on the host, and no bits are kept.
struct ResidencyState {
  int16_t* slot_of = nullptr;    // [max_n] slot of a position; -1 = none
  int32_t* owner = nullptr;      // [slots] position in a slot; -1 = free, -2 = on its way, -3 = spare
  uint64_t* resident = nullptr;  // [max_n / 64 rounded up] bit of every position that is in a slot or in the ring
  int32_t slots = 0;             // at most 32767
  int32_t max_n = 0;
  SpareSlots spare;
};
// resolve: chosen positions become what attend reads. Position p is row ring_row + p % ring_rows if the ring holds it (p >= *n - ring_rows),
// else slot_row + its slot, else ~row of `host`. A position outside [0, min(*n, max_n)), or of a chunk that is not there, becomes a row that does
// not exist. Where a head has chosen anew (hold is null or 0) its query becomes the anchor and its age 0; else the age grows. Then the bits
// of the ring follow: *n - 1 is resident from now on, and *n - ring_rows, which the next position will overwrite, only if it is in a slot.
struct ResolveTask {
  ResidencyState at;
  const int32_t* chosen = nullptr;  // [*count]
  const int32_t* count = nullptr;   // [1]; outside [0, room] as one position that does not exist
  int32_t room = 0;
  const int32_t* n = nullptr;
  int32_t slot_row = 0, ring_row = 0, ring_rows = 0;
  int32_t* refs = nullptr;          // [room]; or null: positions are rows, there is nothing to look up, and num_refs may be null, too
  int16_t* keep = nullptr;          // [room] for rows of the host: the slot to be kept in, -1 = none. Or null: nothing is kept
  int32_t* num_refs = nullptr;      // [1]
  int64_t* misses = nullptr;        // [1] += rows to be read from the host; or null
  int32_t* far = nullptr;           // [1] += chosen positions of chunks that are not there; or null
  HostRows host;
  const uint8_t* hold = nullptr;    // [1] or null
  const float* q = nullptr;         // [group, head_dim]; or null: no anchor
  float* anchor = nullptr;
  int32_t* age = nullptr;           // [1]; or null
};

struct ResolveParams {
  const ResolveTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t group = 0, head_dim = 0;
};

// refresh: of `wanted` positions (sorted, different) those in no slot get one, of the free slots first, then of those whose owner is not
// wanted; as many as there are. Their former owners are not resident from now on, unless the ring of the next position has them,
// [*n + 1 - ring_rows, *n]. What is to be copied is listed for gather: piece from_piece[i] is the host row of position[i], to_piece[i] its slot.
// Positions of chunks that are not there are not wanted. When the copies are done, Land() makes the new ones resident.
struct RefreshTask {
  ResidencyState at;
  const int32_t* wanted = nullptr;
  const int32_t* wanted_count = nullptr;  // [1]; positions outside [0, max_n) and a count outside [0, slots] are not wanted
  HostRows host;
  const int32_t* n = nullptr;             // [1] or null: no ring
  int32_t ring_rows = 0;
  int32_t* position = nullptr;            // [slots]
  int32_t* from_piece = nullptr;          // [slots]
  int32_t* to_piece = nullptr;            // [slots]
  int32_t* count = nullptr;               // [1]
  float* pooled = nullptr;                // [max_n] scores that start anew: -inf; or null
};

struct RefreshParams {
  const RefreshTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t max_n = 0;
};

// adopt, after a step's last attend and land: the positions whose rows were kept are resident from now on (their slots are free if they have landed
// meanwhile). Then the hand goes on, once round at most, until `room` slots are spare: free ones become so, those used have a second chance, others lose
// their owners as in refresh.
struct AdoptTask {
  ResidencyState at;
  const int32_t* n = nullptr;  // as in RefreshTask
  int32_t ring_rows = 0;
};
struct AdoptParams {
  const AdoptTask* tasks = nullptr;
  int32_t num_tasks = 0;
};

// --- gather: pieces of pinned host memory (or device memory) to slots ---------------------------------------------------
// With rows of another format than kF16 a piece of `from` is one of them, and a piece of `to` the fp16 row that it stands for.
struct GatherTask {
  const std::byte* from = nullptr;     // [from_limit] pieces
  std::byte* to = nullptr;             // [to_limit] pieces
  const int32_t* from_piece = nullptr; // [*count]
  const int32_t* to_piece = nullptr;   // [*count], all different
  const int32_t* count = nullptr;      // [1]
  int64_t from_limit = 0, to_limit = 0;
  int32_t* refused = nullptr;          // [1] += pieces that do not exist, which are left alone; or null
};
struct GatherParams {
  const GatherTask* tasks = nullptr;
  int32_t num_tasks = 0;
  int32_t piece_bytes = 0;  // of `from`; a multiple of 16
  RowFormat rows = RowFormat::kF16;
  int32_t head_dim = 0;     // only with other rows, whose bytes piece_bytes then are
  int32_t max_blocks = 16;  // of 512 threads, over all tasks: the SMs that this may take from others
};

// The entries of one backend. Each enqueues on `stream` and returns at once (the reference works at once, in the calling thread); allocates
// nothing; leaves nothing enqueued when it returns an error: kInvalid or kUnsupported, naming field and value, for shapes that it does not take.
struct StepKernels {
  std::string_view name;  // "reference", "cuda"
  Status (*append)(const AppendParams& params, void* stream);
  Status (*gate)(const GateParams& params, void* stream);
  Status (*select)(const SelectParams& params, void* stream);
  Status (*resolve)(const ResolveParams& params, void* stream);
  Status (*attend)(const AttendParams& params, void* stream);
  Status (*choose)(const ChooseParams& params, void* stream);
  Status (*refresh)(const RefreshParams& params, void* stream);
  Status (*land)(const RefreshParams& params, void* stream);
  Status (*adopt)(const AdoptParams& params, void* stream);
  Status (*gather)(const GatherParams& params, void* stream);
  // Bytes of workspace that a call wants; only the shapes of `params` are looked at. May be 0.
  Result<size_t> (*select_workspace)(const SelectParams& params);
  Result<size_t> (*choose_workspace)(const ChooseParams& params);
  Result<size_t> (*attend_workspace)(const AttendParams& params);
};

// Plain C++ over the reference kernels, for tests and for the meaning of the others. fp16 rows only.
const StepKernels& ReferenceStepKernels();

}  // namespace prehoc::step
