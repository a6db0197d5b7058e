// The methods told a second time, from docs/selectors/ and without rules or kernels: what one layer attends to, step by
// step, given the logits. Slow and plain on purpose: tests hold the rules and the whole pipeline against it.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "selector/certificate.h"
#include "selector/options.h"

namespace prehoc {

struct ReferenceShape {
  int32_t layer = 0;   // 0-based
  int32_t layers = 1;
  int32_t kv_heads = 1;
  int32_t group = 1;
  int32_t head_dim = 0;
  int32_t heads() const { return kv_heads * group; }
};

// One of the prompt's last queries.
struct ReferenceRow {
  int64_t n = 0;                   // positions that it sees
  std::span<const double> scores;  // [heads, n]
};

// One step of the layer; the sequence's key of this step is already among the n. Heads are query heads.
struct ReferenceInput {
  int64_t step = 0;             // u; 0 = the last prompt token
  int64_t n = 0;                // visible positions
  std::span<const double> z;    // [heads, n]: logits as the scorer sees them
  // [heads, n]: what orders positions where that is no logit: page bounds (quest), label scores (hshare). Else empty.
  std::span<const double> scores;
  std::span<const ReferenceRow> rows;  // hshare, step 0: what the borrow maps come from, the last query included
  std::span<const double> err;  // [heads, n]: |true logit - z| at most; empty = exact
  std::span<const float> q;     // [heads, head_dim], after RoPE
  std::span<const float> q_pre; // before RoPE; may be empty unless cis.cos_stage or tc.cos_stage = pre_rope
  std::span<const float> variance;  // [kv_heads, head_dim], of the keys' channels; may be empty unless tc.gate = mass
  std::span<const KeyBall> balls;  // [kv_heads]; may be empty unless cis.gate = certified
  // [heads], for cis.gate_batch = batch: the gate's figure (-2 = unusable) of the same head in the other sequences of
  // the batch, the least of them. Empty = a batch of one.
  std::span<const double> batch;
};

struct ReferenceDecision {
  // [heads], sorted, each position once. Empty at step 0, whose attention belongs to prefill.
  std::vector<std::vector<int32_t>> attended;
  // [heads]: a retrieval ran, that is, all positions in sight were scored in order to choose.
  //   quest                every step: the bounds of all pages
  //   hshare               a choice of its own, by labels; not one that is borrowed or of an earlier step
  //   oracle, CIS, CPE     a selection: no set yet, a block start, or the gate failed (with reselect_once too)
  //   two clocks           a scan: no choice yet, too old, or the gate failed. What is fetched after it does not matter
  //   shared candidates    a refresh of the slow clock. Choosing k among the residents, as every step does, is none,
  //                        even when everything is resident; with max_dropped_mass every step scores all, and is one
  //   not                  an inherited choice; a step that attends to all in sight, be it because n is small or by
  //                        cis.fail = dense; dense, window, PSAW and ETF
  // Heads that choose together share the flag: count one head per group, or each with a gqa_set of per_query_head.
  // Step 0 can select; rho leaves it out.
  std::vector<bool> selected;
  // [heads]: mass outside the set by z, of the positions in sight (PSAW's window). At step 0: of the set it would
  // attend to.
  std::vector<double> dropped;
  // [heads]: the certificate on a step that kept its choice by the certified gate, else -1. Over the positions in
  // sight.
  std::vector<double> bound;
};

// z[h, i] = q_h . k_i / sqrt(head_dim) in fp64, for one KV head: q [group, head_dim], keys [n, head_dim].
std::vector<double> ReferenceLogits(std::span<const float> q, std::span<const float> keys, int32_t head_dim);

// For each position the bound of its page: SUM_c max(q_c min_c, q_c max_c) / sqrt(head_dim), minimum and maximum over the
// keys of its page of `page` positions. Shapes as above.
std::vector<double> ReferencePageBounds(std::span<const float> q, std::span<const float> keys, int32_t head_dim,
                                        int32_t page);

// HShare's labels of one KV head. Channels: the `count` with the largest (sum of |q_c|) (sum of |k_c|), over `queries`
// [any number, head_dim] and keys; equal ones by number. Scores [group, n]: q~ . k~ / sqrt(count) over these channels, with
// 4 bits after rounding each to 16 levels between its least and its largest.
std::vector<int32_t> ReferenceChannels(std::span<const float> queries, std::span<const float> keys, int32_t head_dim,
                                       int32_t count);
std::vector<double> ReferenceLabelScores(std::span<const float> q, std::span<const float> keys, int32_t head_dim,
                                         std::span<const int32_t> channels, int32_t bits);

class ReferenceTrace {
 public:
  // `all_resident` = false: shared candidates choose among what their slow clock has made resident. A refresh comes
  // before the choice of its step, and with lag L its rows serve from L steps later on (the first ones at once).
  // Weights are shares of what the step scored: everything at a refresh, else the residents, sinks and local included.
  // No other method is changed by it here: two clocks attend to what they chose, as with tc.theta = 0. Requires valid
  // options.
  ReferenceTrace(const SelectorOptions& options, const ReferenceShape& shape, bool all_resident = true);
  ~ReferenceTrace();

  // hshare: who borrows from whom among `layers`, in order, after step 0 of all of them. From step 1 on they must be
  // stepped in this order. Traces that were never told choose for themselves.
  static void ShareLayers(std::span<const std::unique_ptr<ReferenceTrace>> layers);

  // Steps come in order, each at most once; n never shrinks.
  ReferenceDecision Step(const ReferenceInput& input);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace prehoc
