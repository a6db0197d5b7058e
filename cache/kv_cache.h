// The facade: a KV cache in tiers (device, host, disk), shared by sequences; and one sequence of it.
//
//   auto cache = KvCache::Create(options, resources);
//   auto seq = (*cache)->OpenWithPrefix(sequence_options, tokens);     // longest verified prefix restored
//   for each chunk of the rest:   seq->Begin(chunk_tokens, prompt_tokens);
//                                 for each layer: seq->Prefill(layer, q, k, v, out);     seq->End();
//   for each new token:           seq->Begin({token}, 0);
//                                 for each layer: seq->Attend(layer, q, k, v, out);      seq->End();
//   seq->Report();
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/counters.h"
#include "base/device_memory.h"
#include "base/executor.h"
#include "base/geometry.h"
#include "base/host_registrar.h"
#include "base/ids.h"
#include "base/result.h"
#include "base/trace.h"
#include "cache/report.h"
#include "cache/tier_health.h"
#include "kernels/function_table.h"
#include "kernels/step_kernels.h"
#include "selector/selector.h"
#include "transfer/chunk_store.h"
#include "transfer/transfer_engine.h"

namespace prehoc {

struct CacheOptions {
  KvGeometry geometry;
  uint64_t host_budget = uint64_t{1} << 30;  // [bytes], hard; must hold at least one layer of the longest sequence
  std::array<uint8_t, 32> model{};           // fingerprint: what decides K and V besides the tokens
  std::string tenant_salt;                   // sequences of different salts never share a value
  SelectorOptions selector;
  CodeFormat codes;
  bool huge_pages = true;
  bool verify_pins = false;  // blocks in host memory are compared with their checksum at every use, not only when they go to
                             // another sequence or to the store; costs a pass over what attention reads
  // A store that fails or hangs is left alone for a while, and what it does not give is made anew; a prefix is taken from it only
  // where that is predicted to be faster than computing it. Off: every error of the store is the caller's, and every hit is used.
  bool guard_store = true;
  TierHealth::Options health;
  int64_t read_deadline_nanos = 0;  // [ns] that anybody waits for one read of the store; 0 = as long as it takes. Read by jobs
                                    // of CacheResources::io, which needs a job thread for each that may hang
  int64_t write_deadline_nanos = 0; // [ns] that anybody waits for one write of the store, or for its flush; likewise
  int64_t audit_every = 64;  // decode steps between audits with exact scores; 0 = never
  bool persist_decode = true;  // chunks that hold generated tokens go to the store too (under a key of their own)
  Status Validate() const;
};

// What the cache runs on; everything outlives it.
struct CacheResources {
  Executor* executor = nullptr;        // parallel loops; required
  Executor* background = nullptr;      // write-behind jobs; null = `executor`
  Executor* io = nullptr;              // loops that wait for the store (a prefix coming back); null = `executor`. More
                                       // threads than CPUs pay: while one waits, another verifies and indexes
  DeviceMemory* device = nullptr;      // its budget is the device budget; required
  ChunkStore* store = nullptr;         // disk tier, or null
  const KernelTable* kernels = nullptr;  // null = BestCpuKernels()
  void* stream = nullptr;              // Launch::stream of these kernels
  HostRegistrar* registrar = nullptr;  // pins the host tier for the device; required where host code cannot reach `device`
  TransferEngine* transfer = nullptr;  // copies that run behind the steps; null = on `background`; required with tc.lag > 0 where
                                       // host code cannot reach `device`
  const Clock* clock = nullptr;        // null = SteadyClock
  const step::StepKernels* step_kernels = nullptr;  // of the device: what Sequence::PlanStep() enqueues; null = it never offers anything
  Tracer* tracer = nullptr;            // told what runs when, from every thread (docs/cli.md, --trace); null = nobody
};

// One unit (query heads that choose together) of one audited step, with the truth beside what was done. Everything is
// only valid during the call.
struct AuditedUnit {
  int64_t step = 0;               // u
  int32_t layer = 0, kv_head = 0, first_head = 0, heads = 0;
  int32_t n = 0;                  // visible positions, the current one included
  int32_t cut_begin = 0, cut_end = 0;  // [cut_begin, cut_end) is out of sight (PSAW); no logits are given for it
  const float* q = nullptr;           // [heads, head_dim]
  const float* q_pre_rope = nullptr;  // [heads, head_dim], or null where the engine does not keep it
  // The rest is empty where the layer attends to everything by rule: nothing was dropped.
  std::span<const float> logits;      // [heads, in sight], exact
  std::span<const float> lse;         // [heads], of all in sight
  std::span<const int32_t> attended;  // sorted positions
  int32_t sinks = 0, left = 0;        // attended at any rate: [0, sinks) and [left, n)
  std::span<const double> dropped;    // [heads], the exact share left out
  std::span<const float> estimate, bound;  // [heads], what the step knew of it; bound < 0 = nothing
  std::span<const float> bound_statistical;  // [heads] as bound, at a confidence; or empty
  std::span<const double> output_error;    // [heads], |o_S - o| / |o|
  bool scanned = false;               // chose in this very step
  int64_t age = 0;                    // steps since the choice in force
};

class AuditObserver {
 public:
  virtual ~AuditObserver() = default;
  virtual void OnUnit(const AuditedUnit& unit) = 0;  // from the thread that steps the sequence
};

struct SequenceOptions {
  int64_t max_tokens = 0;       // prompt and answer together; required; the index and the ring are sized by it
  uint64_t device_bytes = 0;    // of the device budget; 0 = all that is left
  std::string variant;          // what decides K and V besides model, tokens and method (a RoPE that depends on length);
                                // part of every key
  int64_t device_slots = 0;     // most rows of the middle per (layer, KV head) on the device, whatever else would fit, but
                                // no fewer than one choice takes; 0 = as many as fit
  AuditObserver* observer = nullptr;  // sees every audited unit; outlives the sequence
  uint64_t dither_seed = 0;     // of dithered codes. A statistical bound takes queries to know nothing of it
};

// fp32, contiguous, row-major, K and Q after RoPE.
struct LayerInput {
  const float* q = nullptr;   // [count - q_skip, heads, head_dim]
  const float* q_pre_rope = nullptr;  // as q, before RoPE; only for cis.cos_stage = pre_rope
  const float* k = nullptr;   // [count, kv_heads, head_dim]
  const float* v = nullptr;   // [count, kv_heads, head_dim]
  float* out = nullptr;       // [count - q_skip, heads, head_dim]
  int64_t q_skip = 0;         // leading tokens without a query (frozen by ETF)
  // All pointers are to memory of the device that host code cannot reach; only for Prefill(), and only if Sequence::takes_device_memory().
  // `out` is complete when Prefill() returns.
  bool on_device = false;
  void* stream = nullptr;     // on_device: what writes q, k and v was enqueued on this stream (cudaStream_t); null: it is finished
};

// One sequence. One thread at a time; different sequences may run at once.
class Sequence {
 public:
  ~Sequence();
  int64_t length() const;        // tokens that every layer has
  int64_t restored() const;      // of them, taken from a tier at Open
  int64_t max_tokens() const;
  int32_t chunk_tokens() const;
  int64_t prompt_length() const; // of the last prompt, whatever was before it included
  bool takes_device_memory() const;  // see LayerInput::on_device

  // Announces tokens [length(), length() + tokens.size()). prompt_tokens: length of the whole prompt, this sequence's
  // earlier tokens included (prefill), or 0 (decode; exactly one token).
  // kInvalid (a call is open, too many tokens), kOutOfSpace (beyond max_tokens).
  Status Begin(std::span<const int32_t> tokens, int64_t prompt_tokens);
  PrefillRule FreezeRule(LayerId layer) const;

  // Appends K and V of the announced tokens to `layer`, then attends causally and densely (within the PSAW window).
  // Every layer once, in order. Rows go to the host tier, the index is built as groups fill. From on_device input they go to the host
  // behind the next layer's work, as long as the whole sequence has room there; errors of that are returned by a later call.
  // kOutOfSpace (every budget full), kCorrupt or kNotFound (an earlier chunk is lost: LostChunks()), kIoError.
  Status Prefill(LayerId layer, const LayerInput& input);

  // Optional, between two layers of prefill from on_device input, while the device works on what is not the cache's: what Prefill() has left
  // to be done with earlier layers' rows. Errors are those of Prefill(), which does it otherwise.
  Status WhileOthersWork();

  // The same for one decode token: append, then the fast clock: gate, scan, choose, fetch what matters, attend.
  Status Attend(LayerId layer, const LayerInput& input);

  // A decode step as work of the device alone, in the place of the Attend() calls. After Begin(): PlanStep(); if it offers a step, enqueue
  // EnqueueLayer() of every layer behind the work that makes its q, k and v; EnqueueBehind(), copies that may run beside all of this step,
  // on a stream of their own from its start on; and EnqueueLast() behind all of them. When that work is done: End(). What was enqueued for a plan may be
  // captured and replayed, in the place of these calls, for every later plan with the same id.
  struct StepPlan {
    uint64_t id = 0;     // 0: not offered for this step; use Attend()
    bool pause = false;  // an audit is due: nothing is replayed, and after each layer its work is waited for and AfterLayer() is called
  };
  // `io` is in memory that the device reads: buffers that all layers use, one after the other. Offered with two clocks (codes, a gate by the cosine of
  // a KV head's queries or none, no bounds, no mass budgets) and dense, where all rows that may be wanted are on the device or, held there from now
  // on, in host memory. The slow clock's rows are used two steps after it wanted them. kOutOfSpace, kCuda as Attend().
  Result<StepPlan> PlanStep(const LayerInput& io);
  Status EnqueueBehind(void* stream);
  Status EnqueueLayer(LayerId layer, void* stream);
  Status EnqueueLast(void* stream);
  Status AfterLayer(LayerId layer);

  // Ends the step: the slow clock turns, full chunks are sealed and written behind, length() grows.
  Status End();
  // After an error, or instead of End(): as if Begin() had not been called.
  void Rollback();

  // Chunks whose rows no tier can give any more (corrupted or shed by a full store). Recompute them in order:
  // BeginRepair(chunk), Prefill() of every layer for its tokens, EndRepair(); then run the failed step again.
  std::vector<ChunkIndex> LostChunks() const;
  Status BeginRepair(ChunkIndex chunk);
  Status EndRepair();
  std::span<const int32_t> tokens() const;  // [length()]

  const SequenceReport& Report() const;  // of finished steps
  // One line per tier, for people: rows resident on the device, blocks in the host arena and in the store.
  struct Residency {
    int64_t device_rows = 0, device_slots = 0;    // summed over (layer, KV head); slots excludes ring and sinks
    int64_t host_blocks = 0, disk_only_blocks = 0, lost_blocks = 0;  // of this sequence
  };
  Residency CountResidency() const;
  Status CheckInvariants() const;

  // For laboratories: what the last finished step did in one head.
  struct HeadView {
    std::vector<int32_t> attended;  // sorted positions
    bool selected = false;          // ran a selection in that step
    float cosine = 0;               // of the gate; -2 where none was computed
  };
  Result<HeadView> LastStep(LayerId layer, KvHeadId head) const;

 private:
  friend class KvCache;
  struct Impl;
  explicit Sequence(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Safe from any thread. Outlives its sequences. Memory that the system does not give is kOutOfSpace, "out of memory", from every
// call here and of Sequence that returns a Status or a Result, and leaves things as any other error does; nothing throws but LostChunks(),
// whose list may find no memory (std::bad_alloc), with nothing changed.
class KvCache {
 public:
  // kInvalid names the option; kOutOfSpace if the host budget cannot be had; kUnsupported names what is not offered where host code
  // cannot reach the device's memory.
  static Result<std::unique_ptr<KvCache>> Create(const CacheOptions& options, const CacheResources& resources);
  ~KvCache();

  // kOutOfSpace: the device budget does not hold the index, the ring and one choice; the message says how much would.
  Result<std::unique_ptr<Sequence>> Open(const SequenceOptions& options);
  // As Open(), then restores the longest prefix of `tokens` whose chunks are in the host tier or the store and pass
  // verification; at most tokens.size() - 1, so that the last token is always run. `prompt_tokens` as in Begin().
  // A damaged chunk ends the prefix there and is counted; the rest is computed as if it had never been stored.
  Result<std::unique_ptr<Sequence>> OpenWithPrefix(const SequenceOptions& options, std::span<const int32_t> tokens);

  // Waits until everything written behind is in the store, then flushes it.
  Status Flush();

  const CacheOptions& options() const;
  const Selector& selector() const;
  const KernelTable& kernels() const;
  bool FlipIdleBitForTest(uint64_t pick, uint64_t bit);  // see HostTier
  // device.*, host.*, store.*, write_behind.*, health.*; each tier with its budget and its peak.
  void VisitCounters(const CounterVisitor& visit) const;

 private:
  struct Impl;
  explicit KvCache(std::unique_ptr<Impl> impl);
  Result<std::unique_ptr<Sequence>> RestoreAndOpen(const SequenceOptions& options, std::span<const int32_t> tokens);
  std::unique_ptr<Impl> impl_;
};

}  // namespace prehoc
