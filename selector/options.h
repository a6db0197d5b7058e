// Every open choice of the methods as a knob, with its default (docs/selectors/). One flat struct, so
// that a run can be described, compared and repeated. Names in the comments are those of the command line.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/status.h"

namespace prehoc {

enum class SelectorKind : uint8_t {
  kDense, kWindow, kOracle, kCis, kPsaw, kEtf, kCpe, kSharedCandidates, kTwoClock, kQuest, kHShare
};

// How positions are judged when a head selects.
enum class Scorer : uint8_t { kNone, kExact, kCodes, kPages, kLabels };

// What is claimed of the mass that a step drops, beside its estimate.
enum class BoundKind : uint8_t { kNone, kProven, kStatistical };

// Total positions per KV head and step: sinks + chosen + local.
struct Budget {
  int32_t sinks = 8;         // budget.sinks
  int32_t local = 32;        // budget.local: the last positions, the current one included
  double fraction = 1.0 / 16;  // of the visible positions (--budget 1/16); used when tokens == 0
  int32_t tokens = 0;        // fixed total (--budget 512)
  double mass = 0;           // > 0: --budget mass(0.95): keep until the estimated kept mass reaches it ...
  double cap_fraction = 0.125;  // ... or this share of the visible positions: mass(0.95,cap=1/8)
  int32_t cap_tokens = 0;    // ... or this many: mass(0.95,cap=1024)

  // Positions of the middle for n visible ones; never negative.
  int32_t MiddleK(int64_t n) const;
  int32_t MiddleCap(int64_t n) const;  // MiddleK for a fixed budget
  // "1/16", "0.1", "512", "mass(0.95)", "mass(0.95,cap=1/8)". kInvalid with what is accepted.
  static Result<Budget> Parse(std::string_view text);
  std::string ToString() const;
};

struct CisOptions {
  int32_t block = 16;          // cis.block s: an unconditional selection every s steps
  double tau = 0.8;            // cis.tau: share while cosine > tau; <= -1 always, >= 1 never
  enum class CosStage : uint8_t { kPostRope, kPreRope } cos_stage = CosStage::kPostRope;
  // cis.gate_scope: whose cosines decide together. A set that a group shares is kept or replaced as a whole, so
  // kQueryHead differs from kKvHead only with gqa_set = kPerQueryHead.
  enum class GateScope : uint8_t { kKvHead, kQueryHead, kGroupMean, kLayer } gate_scope = GateScope::kKvHead;
  bool gate_batch = false;     // cis.gate_batch: sequence | batch (the least cosine of the sequences that step together)
  enum class OnFail : uint8_t { kReselect, kReselectOnce, kDense } fail = OnFail::kReselect;
  bool stagger = false;        // cis.phase: aligned | staggered ((u + l) mod s)
  bool first_anchor_prompt = true;  // cis.first_anchor: prompt | decode
  bool anchor_dilated = true;  // cis.anchor_attends: dilated | plain
  enum class DilateCount : uint8_t { kCeilThird, kFloorThird, kAll, kNone } m = DilateCount::kCeilThird;
  int32_t r = 1;               // cis.r
  bool clip_middle = true;     // cis.clip: middle | visible (neighbours may lie in the local window, and outlive it)
  enum class GqaSet : uint8_t { kMaxWeight, kMeanWeight, kMaxLogit, kPerQueryHead } gqa_set = GqaSet::kMaxWeight;
  bool half_logits = false;    // cis.precision: f32 | f16
  bool local_edge_held = false;  // cis.local_edge: slides | held
  bool exact_budget = false;   // cis.budget: cis | cis* (CIS*)
  Scorer scorer = Scorer::kExact;  // cis.scorer: exact | codes | pages
  enum class Gate : uint8_t { kCosine, kCertified } gate = Gate::kCosine;
  double delta_max = 0.05;     // cis.delta_max, for the certified gate
};

struct DepthOptions {   // PSAW and ETF share this shape: c = kept fraction of the last layer
  double c = 0.9;       // psaw.c, etf.c in (0, 1]
  double l_s = 0.5;     // psaw.l_s, etf.l_s: the layer after which the cut grows, as a fraction of the layers
};
struct PsawOptions : DepthOptions {
  enum class Phase : uint8_t { kBoth, kPrefill, kDecode, kOff } phase = Phase::kBoth;
  bool keep_sink = true;        // psaw.keep_sink
  bool layer_base_one = true;   // psaw.layer_base: 1 (last layer reaches c) | 0
  int32_t round = 1;            // psaw.round: the edge goes down to a multiple of this many tokens; 1 = exact
  bool filter_each_step = false;  // psaw.cis_filter: select | step
  bool evict = false;           // psaw.evict: rows that decode can never see again may be freed
};
struct EtfOptions : DepthOptions {
  static constexpr double kAsPsaw = -1;
  EtfOptions() { l_s = kAsPsaw; }  // etf.l_s: psaw (the same as psaw.l_s) or a share of its own
  enum class Mode : uint8_t { kCarry, kReuseKv } mode = Mode::kCarry;
  // etf.reuse_from, with mode = kReuseKv: whose K and V a frozen token keeps: those of layer l_s, or of the last layer
  // that computed it.
  enum class ReuseFrom : uint8_t { kStart, kLast } reuse_from = ReuseFrom::kStart;
  enum class Extent : uint8_t { kPrompt, kChunk } n = Extent::kPrompt;  // etf.n: prompt | chunk
};

// The slow clock, and what a step may bring (docs/selectors/tc.md).
struct TwoClockOptions {
  static constexpr int32_t kAuto = -1;
  // tc.gate: what decides whether a choice is kept: the cosine of the queries, or the mass that it is expected to miss.
  enum class Gate : uint8_t { kCosine, kMass } gate = Gate::kCosine;
  double epsilon = 0.01;     // tc.epsilon, for the mass gate: at most this share of the mass may be missed more
  double tau = 0.9;          // tc.tau; <= -1 always inherits until max_age, >= 1 scans every step ("off")
  CisOptions::CosStage cos_stage = CisOptions::CosStage::kPostRope;    // tc.cos_stage: the queries that the cosine compares
  CisOptions::GateScope gate_scope = CisOptions::GateScope::kKvHead;   // tc.gate_scope: kv_head | group_mean | layer
  int32_t max_age = 16;      // tc.max_age: steps a choice may be inherited
  Scorer scorer = Scorer::kCodes;  // tc.scorer: codes | exact
  // tc.theta: a missing position heavier than this is fetched within the step; auto: ThetaOfMemory(), or kThetaOfStore while some of a sequence's
  // rows may have to be read from the store.
  static constexpr double kThetaOfStore = 0.001;
  // All that k positions may leave out is then 2 % of the mass at most: with ten times as much facts were lost at 16K and at 128K alike
  // (docs/selectors/tc.md). k is that of a fixed budget, 0 of one by mass.
  static constexpr double ThetaOfMemory(int32_t k) { return std::min(0.0001, 0.02 / std::max(k, 1)); }
  // With auto theta grows, head by head, to this share of what the head's last choice left out anyway, over k: where attention is flat all that is chosen
  // weighs more than a fixed theta, and is not worth its way.
  static constexpr double kThetaOfDropped = 0.25;
  double theta = kAuto;
  double factor = 4;         // tc.factor c: wanted = c * k
  int32_t refresh = 0;       // tc.refresh s, steps; 0 = rows stay by their use alone
  int32_t pool = 16;         // tc.pool w, scans
  int32_t lag = 0;           // tc.lag: steps between deciding a fetch and its rows being used
  bool stagger = true;       // tc.stagger: layers and heads refresh at different steps
  // tc.dense_below: while the device holds every row and fewer positions than this are visible, a step attends to all of them;
  // auto: what pays on the cache's device (KvCache::Create), 0 where nobody says.
  int32_t dense_below = kAuto;
};
struct SharedCandidatesOptions {
  double factor = 4;         // sc.factor
  int32_t refresh = 16;      // sc.refresh
  int32_t pool = 1;          // sc.pool
  int32_t lag = 0;           // sc.lag
  Scorer inner = Scorer::kExact;  // sc.inner: exact | codes, to choose among the candidates
};

struct QuestOptions {
  static constexpr int32_t kLeastPages = 3;  // kept whatever the budget, as published; the last page is one of them
  int32_t page = 16;         // quest.page: positions of a page
  int32_t dense_layers = 2;  // quest.dense_layers: the first layers attend to everything
  int32_t sinks = 0;         // quest.sinks: so many first pages are kept whatever their bounds
  CisOptions::GqaSet gqa_set = CisOptions::GqaSet::kPerQueryHead;  // quest.gqa_set
};

struct HShareOptions {
  double layers = 0.75;      // hshare.layers: at least this share of the layers chooses; the others borrow
  double heads = 0.75;       // hshare.heads: of the heads of such a layer
  int32_t steps = 2;         // hshare.steps: a choice serves so many
  double channels = 0.25;    // hshare.channels: share of a key's channels that its label holds
  int32_t bits = 4;          // hshare.bits per channel of a label: 4, or 16 = as stored
  bool keep_list = false;    // hshare.list: discard (what leaves the local window stays until the next choice) | keep
  int32_t map_queries = 32;  // hshare.map_queries: of the prompt's end, that tell who borrows from whom
  CisOptions::GqaSet gqa_set = CisOptions::GqaSet::kPerQueryHead;  // hshare.gqa_set
};

struct SelectorOptions {
  SelectorKind kind = SelectorKind::kTwoClock;
  Budget budget;
  CisOptions cis;
  PsawOptions psaw;
  EtfOptions etf;
  TwoClockOptions tc;
  SharedCandidatesOptions sc;
  QuestOptions quest;
  HShareOptions hshare;
  // >= 0: widen each head's set, from the budget on, until the bound is at most this, or attend densely.
  double max_dropped_mass = -1;
  // bound: none | proven (by the error bounds of the scores) | statistical (by the variance of dithered codes). At every step
  // that selects; none means proven where max_dropped_mass is set.
  BoundKind bound = BoundKind::kNone;
  double bound_confidence = 0.999;  // bound.confidence, of a statistical bound: per query head and step
  // bound.scope, of a statistical bound: head (all positions of a head at once, so that the level holds for whatever set the
  // codes choose) | set (the set alone, whose errors average out, with what codes gain by choosing it on average: tighter, no promise).
  enum class BoundScope : uint8_t { kHead, kSet } bound_scope = BoundScope::kHead;
  int32_t certify_every = 0;     // n > 0: a fresh scan at least every n steps

  // Sets one knob by name: Set("cis.tau", "0.7"), Set("budget", "1/32"). kInvalid: an unknown name gives the nearest
  // valid ones; a bad value gives what is accepted.
  Status Set(std::string_view knob, std::string_view value);
  Status Validate() const;  // kInvalid, naming the knob and its value
  // Every knob that this kind uses as "name=value", in a fixed order: for reports and for telling runs apart.
  std::vector<std::string> Describe() const;

  BoundKind BoundInForce() const;
  DepthOptions EtfDepth() const;  // etf.c, and etf.l_s with kAsPsaw resolved
  Budget Kept() const;  // `budget` with the sinks and the local window that this kind keeps: quest counts in pages
};

// "dense", "window", "oracle", "cis", "psaw", "etf", "cpe", "sc", "tc", "quest", "hshare". kInvalid with the nearest
// valid names.
Result<SelectorKind> ParseSelectorKind(std::string_view name);
std::string_view SelectorKindName(SelectorKind kind);
std::vector<std::string_view> SelectorKindNames();
std::vector<std::string> KnobNames();

}  // namespace prehoc
