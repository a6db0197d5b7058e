// One sequence from the inside. Each source file is one stage of the data's way:
//   sequence.cc    open, begin, end, roll back          prefill.cc     many tokens: append, index, attend, first choice
//   fast_clock.cc  one token: gate, scan, choose,       slow_clock.cc  what is resident: wanted rows in, others out
//                  fetch, attend                        restore.cc     a stored prefix back; repair of lost chunks
//   audit.cc       the exact truth on sampled steps      sharing.cc     HShare: labels, choices of other heads and layers
//   device_step.cc one token, fast and slow clock, as work of the device alone
#pragma once
#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/units.h"
#include "cache/internal/cache_impl.h"
#include "cache/internal/device_layout.h"
#include "cache/internal/device_step.h"
#include "cache/internal/key_variance.h"
#include "cache/internal/layer_blocks.h"
#include "cache/internal/residency.h"
#include "kernels/code_block.h"
#include "selector/borrow_map.h"
#include "selector/certificate.h"
#include "transfer/transfer_engine.h"

namespace prehoc {

// What is attended to at one step, as positions: [0, sinks), middle, [left, n).
struct AttendedSet {
  bool everything = false;  // of what is in sight: [0, sinks) and [lo, n)
  int32_t sinks = 0, lo = 0, left = 0, n = 0;
  std::vector<int32_t> middle;
  int32_t unread = -1;      // a whole step on the device: so many in the middle, whose list is still there (device_step.cc)
  int64_t size() const;
  std::vector<int32_t> Positions() const;
};

// The heads that choose together: the query heads of a KV head, or one of them (cis.gqa_set = per_query_head).
struct Unit {
  int32_t first_head = 0, heads = 0, kv_head = 0;
  // The choice in force.
  bool has_choice = false;
  int64_t chosen_at = 0;              // step
  int32_t local_left = 0;             // first local position at that step
  std::vector<float> anchor, anchor_pre;  // [heads, head_dim]: the queries that chose
  std::vector<int32_t> chosen;        // middle positions, sorted
  std::vector<float> dropped, dropped_bound;  // [heads] at that step, as shares; bound < 0 = none
  std::vector<double> lse_dropped;    // [heads] for the certified gate (selector/certificate.h)
  // Pooled scores of the middle, for the slow clock [stride].
  float* pooled = nullptr;
  int32_t pooled_scans = 0;           // since the pool was started
  bool pool_restart = true;           // the next scan starts it afresh
  // Of the last step, for LastStep() and audits.
  AttendedSet attended;
  bool selected = false;
  float cosine = -2;

  // Of the head that dropped the least: a position's weight is that of the head to which it matters most.
  double ThetaNow(const StepRule& rule) const { return rule.ThetaOf(dropped.empty() ? 0.0 : *std::min_element(dropped.begin(), dropped.end())); }
};

// Rows on their way to slots, to be used from `due` on (lag).
struct PendingFetch {
  int32_t kv_head = 0;
  int64_t due = 0;  // step
  std::vector<int32_t> positions, slots;
  std::vector<BlockPin> sources;
  TransferRequest request;
  // Rows of another format than the device's: no copy is under way, they are widened from where they are when they land, or their sources go.
  std::vector<const std::byte*> stored;
  Status widened;
};

// What a turn of the slow clock wants on the device, of one head.
struct WantedRows {
  int32_t kv_head = 0;
  std::vector<int32_t> positions;
};

// Rows of one layer that the next gather brings to slots already taken out: one gather for several heads waits once.
struct Arrivals {
  struct Head {
    int32_t kv_head = 0;
    size_t end = 0;  // of its part of `positions` and `slots`
  };
  std::vector<Head> heads;
  std::vector<int32_t> positions, slots;  // sorted by position within a head
  std::vector<RowCopy> stored, wide;      // of the host's format; fp16 rows of the ring, where that is another one

  void Clear() {
    heads.clear();
    positions.clear();
    slots.clear();
    stored.clear();
    wide.clear();
  }
};

struct HeadState {
  Half *sinks = nullptr, *ring = nullptr, *slots = nullptr;
  std::byte* codes = nullptr;
  Half *page_lo = nullptr, *page_hi = nullptr;
  std::byte* labels = nullptr;
  std::vector<int16_t> channels;  // that labels hold, best first; empty: not ranked yet
  HeadResidency residency;
  KeyBall ball;  // only for the certified gate
  KeyVariance variance;  // only for the mass gate
};

struct LayerState {
  std::vector<BlockRef> blocks;     // by chunk
  std::vector<BlockPin> tail_pins;  // of blocks that are still written to: the last ones
  std::vector<HeadState> heads;     // [kv_heads]
  std::vector<Unit> units;
  std::vector<PendingFetch> pending;
  int64_t coded = 0;                // positions that have codes
  // HShare (sharing.cc).
  int64_t labelled = 0;             // positions that have labels
  std::vector<float> queries;       // [any, heads, head_dim]: the prompt's last ones, up to queries_end; until it ends
  int64_t queries_end = 0;
  std::vector<std::vector<std::vector<int32_t>>> prompt_sets;  // [units][queries]: what these would choose
  BorrowMap head_source;            // by unit
};

// A layer of prefill whose host blocks are in use, or will be: its rows may be on their way there, and those before them on their way from
// there.
struct PrefillLayer {
  int32_t layer = -1;
  bool summarised = false;
  std::vector<BlockRef> blocks;
  std::optional<LayerBlocks> rows;  // of `blocks`
};

struct FastStep;
class ScopedTimer;

struct Sequence::Impl {
  Impl(CacheShared* shared, const DeviceLayout& device_layout, DeviceBuffer buffer,
       const SequenceOptions& sequence_options, ChunkKeyChain root);
  ~Impl();

  // sequence.cc
  static Result<std::unique_ptr<Impl>> Open(CacheShared* shared, const SequenceOptions& options);
  Status Begin(std::span<const int32_t> new_tokens, int64_t prompt_length);
  Status End();
  void Rollback();
  Status EnsureTails(LayerState& layer, int64_t end);
  void SealChunks(int32_t layer, int64_t first_chunk, int64_t end_chunk);
  Status AppendRows(int32_t layer, const LayerInput& in, int64_t begin, int64_t added);
  std::byte* TailBytes(LayerState& layer, int64_t chunk);
  bool ChunkIsShared(int64_t chunk) const;  // its rows depend on tokens and prefill alone
  std::string MethodOf(int64_t prompt_length) const { return variant + selector().MethodTag(prompt_length); }
  bool ExactNow() const;                    // the announced tokens' rows are such, too
  void Carve(const DeviceRequest& request);
  Status CheckCall(LayerId layer, bool decode) const;
  Status CheckInvariants() const;
  Result<HeadView> LastStep(int32_t layer, int32_t kv_head) const;  // kv_cache.cc

  // prefill.cc
  Status Prefill(int32_t layer, const LayerInput& in);
  Status RunPrefillLayer(int32_t layer, const LayerInput& in);
  std::unique_ptr<PrefillLayer> LookInto(int32_t layer);
  bool LayersOverlap(const LayerInput& in) const;
  void PrepareNextLayer(int32_t layer);
  // What host code does with the rows of layers that are attended to, once they are there; all but the last `but` of them.
  Status FinishLayers(size_t but);
  Status Summarise(PrefillLayer& done);
  Status Settle(const SettleParams& params) { return kernels().settle ? kernels().settle(params, cache->launch()) : Status(); }
  void DropLayers();  // after an error: nothing is under way, nothing is held
  Status IndexRows(int32_t layer, LayerBlocks& rows, int64_t end);  // codes and bounds of whole groups up to `end`
  struct IndexedGroup {
    int32_t kv_head = 0;
    int64_t index = 0;           // in groups of CacheShared::index_group()
    const std::byte* rows = nullptr;  // stored
  };
  Status IndexGroups(int32_t layer, std::span<const IndexedGroup> groups, const Launch& launch);
  // `num` stored rows that lie together on both sides.
  void AddRun(const std::byte* from, Half* to, int64_t num, std::vector<RowCopy>* copies) const {
    for (size_t i = 0; i < static_cast<size_t>(num); ++i) {
      copies->push_back({from + i * geometry().stored_row_bytes(), to + i * row_halfs()});
    }
  }
  Status FillRing(int32_t layer, LayerBlocks& rows, int64_t first, int64_t end);
  Status AttendPrefill(int32_t layer, LayerBlocks& rows, const LayerInput& in, int64_t first, int64_t count);
  // Runs of [0, end) in every KV head.
  Result<std::vector<std::vector<RowRun>>> RunsUpTo(int32_t layer, LayerBlocks& rows, int64_t end);
  // What a gate must know of all keys: their variances, or a ball around them; nothing where no gate asks.
  Status AddKeysToSummaries(int32_t layer, LayerBlocks& rows, int64_t first, int64_t end);
  Status AddKeysToVariances(int32_t layer, LayerBlocks& rows, int64_t first, int64_t end);
  Status AddKeysToBalls(int32_t layer, LayerBlocks& rows, int64_t first, int64_t end);
  PrefillRule RuleOfPrefill(int32_t layer) const;

  // fast_clock.cc
  Status Attend(int32_t layer, const LayerInput& in);
  Status FirstSelection(int32_t layer, const float* q, const float* q_pre);
  void Gate(FastStep& s);
  void GateByMass(FastStep& s);
  float GroupCosine(const std::vector<Unit>& units, int32_t kv_head, bool mean,
                    const std::function<float(const Unit&)>& cosine_of) const;
  Status CheckCertificates(FastStep& s);

  // select.cc
  Status Select(FastStep& s);
  Status Score(FastStep& s);
  Status ScoreResidents(FastStep& s, size_t index);
  Status ScorePages(FastStep& s);
  void SpreadPageScores(FastStep& s, int64_t coded);
  void RoundLogits(FastStep& s);
  Status Choose(FastStep& s, bool plain);
  Status AddVisibleNeighbours(FastStep& s);
  ChooseTask ChooseTaskFor(FastStep& s, size_t index);
  void Keep(FastStep& s, size_t index);
  void AllowForDither(FastStep& s);
  double LseOutside(const FastStep& s, size_t index, int32_t h, int32_t end, std::span<const int32_t> chosen) const;
  double SetBoundOutside(FastStep& s, size_t index, int32_t h, int32_t end, std::span<const int32_t> chosen) const;
  bool PoolIsDue(const FastStep& s) const;
  Status RefreshCandidates(FastStep& s);
  void PushRing(const HeadState& head, int64_t begin, int64_t end, std::vector<RowRun>* runs) const;
  int64_t ResidentCount(const HeadState& head) const;

  // sharing.cc
  void KeepQueries(LayerState& layer, const LayerInput& in);
  void ForgetQueries(LayerState& layer);  // those of the call that is undone
  std::span<const float> LastQueries(const LayerState& layer) const;
  Status BuildLabels(int32_t layer, LayerBlocks& rows, std::span<const float> queries);
  Status LabelRows(int32_t layer, LayerBlocks& rows, int64_t end);
  Status ScoreByLabels(FastStep& s);
  Status FindSources(FastStep& s);
  void FindLayerSources();
  const Unit* SourceOf(const FastStep& s, size_t index) const;
  void MarkBorrowers(FastStep& s);
  void TakeBorrowed(FastStep& s);

  // fetch_attend.cc
  Status Fetch(FastStep& s);
  Status AttendUnits(FastStep& s);
  Status CollectRuns(FastStep& s, size_t index);
  Status CollectEverything(FastStep& s, size_t index);
  // Runs of all that is in sight: from the ring as far as it goes back, else from the host.
  struct FarRows {
    int64_t host = 0, store = 0;  // rows that were not in the ring; of them, read from the store
  };
  Result<FarRows> SightRuns(const FastStep& s, int32_t kv_head, LayerBlocks& blocks, std::vector<RowRun>* runs) const;
  void NoteAttended(FastStep& s, size_t index);
  void Account(FastStep& s);
  void AccountMass(FastStep& s, size_t index);

  // slow_clock.cc
  Status SlowClock();
  bool RefreshDue(int32_t layer, int32_t kv_head) const;
  std::span<const int32_t> AllHeads() const;  // until the next call that asks for some
  bool FillsSlots() const { return !complete() && layout.slots > 0; }
  Status FillLayers(int32_t end);
  Status FillAtStart(int32_t layer);
  Status RankForStart(int32_t layer);
  Result<size_t> Rank(int32_t layer, std::span<const int32_t> kv_heads, std::span<WantedRows> wanted);
  void UseChoices(int32_t layer);
  Status Refresh(int32_t layer, std::span<const int32_t> kv_heads, int64_t lag);
  Result<size_t> RankPooled(int32_t layer, std::span<const int32_t> kv_heads, std::span<WantedRows> wanted);
  Status BringMissing(int32_t layer, std::span<WantedRows> wanted, int64_t lag);
  Result<std::span<const int32_t>> MakeRoomForMissing(int32_t layer, WantedRows& wanted, int64_t lag);
  Status PostBehind(int32_t layer, int32_t kv_head, LayerBlocks& rows, std::span<const int32_t> positions, int64_t lag);
  // Its rows are in their slots, or (an error) will not be. Waits.
  Status Arrive(PendingFetch& fetch, const HeadState& head);
  Status WidenStored(const PendingFetch& fetch, const HeadState& head);
  Status LandPending(int32_t layer, bool all = false);  // those that are due, or all
  // Frees slots until `wanted` are free, least pooled score first, sparing what a unit has chosen and `spare` (sorted).
  Status MakeRoom(int32_t layer, int32_t kv_head, int32_t wanted, std::span<const int32_t> spare);
  // Copies rows of `positions` (sorted, not on the device) to free slots now, as many as there are. Returns how many.
  Result<int64_t> BringIn(int32_t layer, int32_t kv_head, LayerBlocks& rows, std::span<const int32_t> positions);
  // The same in two steps, for several heads: slots are taken out, then all are copied. After an error of the first GiveBack() is due; after one of
  // the second all slots are back.
  Status Expect(int32_t layer, int32_t kv_head, LayerBlocks& rows, std::span<const int32_t> positions, Arrivals* arrivals);
  Result<int64_t> Land(int32_t layer, Arrivals& arrivals);
  void GiveBack(int32_t layer, Arrivals& arrivals);

  // device_step.cc
  static bool ShapeSteps(const CacheShared& cache, int64_t max_tokens, int32_t most, StepShape* shape);
  void CarveSteps(const StepShape& shape);
  Result<StepPlan> PlanStep(const LayerInput& io);
  Result<bool> MapHostRows();
  void DropStepPins();
  Status EnterSteps();
  Status LeaveSteps();
  Status ReadSteps();
  void WriteFixedTasks();
  void WriteTasksOfStep();
  void WriteTurns();
  // Of a KV head, counted over all layers.
  Unit& UnitAt(size_t unit);
  HeadState& HeadAt(size_t unit);
  step::ResidencyState StateOf(size_t unit) const;
  step::HostRows HostRowsOf(size_t unit) const;
  template <class Fn>
  Status InPlan(const Fn& fn) const {
    if (device_step == nullptr || !device_step->planned) return {StatusCode::kInvalid, "a step was enqueued that PlanStep() did not offer"};
    return WithinMemory(fn);
  }
  Status EnqueueBehind(void* stream);
  Status EnqueueLayer(int32_t layer, void* stream);
  Status EnqueueLast(void* stream);
  Status AfterLayer(int32_t layer);
  Status TakeLayer(int32_t layer);
  Status TakeStep();
  int64_t HeldByDevice() const;  // rows in slots, while steps are active; 0 if the device cannot be read
  Status ReadAttended(int32_t layer, int32_t kv_head, AttendedSet* set) const;

  // audit.cc
  bool AuditDue() const;
  Status Audit(FastStep& s);
  AuditedUnit Audited(const FastStep& s, size_t index) const;

  // restore.cc
  Status RestorePrefix(std::span<const int32_t> prompt);
  int64_t ChunksWorthLoading(const std::vector<BlockRef>& found, int64_t chunks) const;
  Result<int64_t> LoadPrefix(std::span<const int32_t> prompt);  // chunks
  Status EncodeBlock(int32_t layer, int64_t chunk, std::span<const std::byte> bytes);
  Status CopyToRing(int32_t layer, int64_t chunk, std::span<const std::byte> bytes);
  std::vector<ChunkIndex> LostChunks() const;
  Status BeginRepair(ChunkIndex chunk);
  Status EndRepair();

  // The row of a position on the device, or null.
  const Half* RowOnDevice(const HeadState& head, int64_t position) const {
    const auto size = static_cast<int64_t>(geometry().head_dim) * 2;
    if (position >= ring_begin) return head.ring + position % layout.ring * size;
    if (position < sinks) return head.sinks + position * size;
    const int32_t slot = head.residency.SlotOf(static_cast<int32_t>(position));
    return slot < 0 ? nullptr : head.slots + slot * size;
  }
  const KvGeometry& geometry() const { return cache->options.geometry; }
  const Selector& selector() const { return *cache->selector; }
  const KernelTable& kernels() const { return *cache->resources.kernels; }
  bool complete() const { return layout.complete(max_tokens); }
  StepRule RuleAt(int32_t layer, int64_t at_step) const {
    return selector().Rule({.layer = layer, .layers = geometry().layers, .step = at_step, .n = visible(), .complete = complete(), .reads_store = ReadsStore()});
  }
  // Rows are in the store alone, or will be: host memory cannot hold all of them, or did not.
  bool ReadsStore() const {
    const int64_t blocks = geometry().layers * CeilDiv(max_tokens, geometry().chunk_tokens);
    return cache->resources.store != nullptr && (store_was_read || blocks > cache->host->capacity_blocks());
  }
  size_t row_halfs() const { return static_cast<size_t>(geometry().head_dim) * 2; }
  uint64_t SeedOf(int32_t layer, int32_t kv_head) const {
    return CodeBlockSeed(dither_seed, int64_t{layer} * geometry().kv_heads + kv_head);
  }
  float* z(int32_t head) const { return z_ + static_cast<int64_t>(head) * layout.stride; }
  float* err(int32_t head) const { return err_ ? err_ + static_cast<int64_t>(head) * layout.stride : nullptr; }
  int64_t visible() const { return first + count; }
  bool decoding() const { return prompt == 0; }
  Tracer* tracer() const { return cache->resources.tracer; }

  CacheShared* const cache;
  const DeviceLayout layout;
  const int64_t max_tokens;
  AuditObserver* const observer;
  const int32_t sinks;  // rows kept apart; Budget::sinks
  DeviceBuffer memory;
  std::vector<uint64_t> bitmaps;  // of all heads, where host code cannot reach `memory`
  float *z_ = nullptr, *err_ = nullptr;
  std::vector<LayerState> layers;
  BorrowMap layer_source;    // HShare; empty: nobody borrows, neither layers nor heads

  int64_t length = 0;        // finished tokens
  int64_t restored_tokens = 0;
  int64_t exact_tokens = 0;  // leading tokens whose rows no sparse step has touched
  int64_t ring_begin = 0;    // the ring holds [ring_begin, visible); never goes back
  std::vector<int32_t> tokens;
  // The open call, if any.
  bool open = false;
  int64_t first = 0, count = 0;
  int64_t began_at = 0;      // clock, of the open call
  std::optional<TraceScope> call_trace;  // of the open call
  int64_t prompt = 0;        // whole prompt's length; 0 = decode
  int32_t next_layer = 0;
  // At a prompt's end: the layers whose wanted rows are on the device, and what the one after them wants, if that is known.
  int32_t filled_layers = 0, start_layer = -1;
  std::vector<WantedRows> at_start;
  int64_t step = 0;          // u of the open or last call
  bool store_was_read = false;  // by a decode step
  bool unsealed = false;     // whole chunks are still tails: there was no memory to seal them
  std::optional<ChunkIndex> repairing;
  std::vector<BlockRef> repair_blocks;  // [layers]
  std::vector<BlockPin> repair_pins;
  std::deque<std::unique_ptr<PrefillLayer>> behind;  // layers of the open call that are not finished, oldest first
  std::unique_ptr<PrefillLayer> ahead;               // the layer after them, or null
  int64_t last_prompt = 0;   // length of the last prompt, for what repairs its chunks
  const std::string variant;
  const uint64_t dither_seed;
  std::string method;        // how the first prompt was run: MethodOf() of it; in all keys
  std::string branch;        // of chunks with rows written under sparse attention: never shared
  ChunkKeyChain chain, next_chain;  // of finished tokens; of those announced too

  SequenceReport report, step_report;
  std::unique_ptr<FastStep> scratch;  // one step's working memory, reused
  std::unique_ptr<DeviceStep> device_step;  // null: whole steps on the device are not offered
};

// Adds the seconds of its life to a figure.
class ScopedTimer {
 public:
  ScopedTimer(const Clock& clock, double* seconds) : clock_(clock), seconds_(seconds), start_(clock.NowNanos()) {}
  ~ScopedTimer() { *seconds_ += clock_.SecondsSince(start_); }
  ScopedTimer(const ScopedTimer&) = delete;
  ScopedTimer& operator=(const ScopedTimer&) = delete;

 private:
  const Clock& clock_;
  double* const seconds_;
  const int64_t start_;
};

}  // namespace prehoc
