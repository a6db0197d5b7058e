// The methods told a second time, from METHODS 1.1 to 1.11 and without rules or kernels: what one layer attends to, step by
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

// One step of the layer; the sequence's key of this step is already among the n. Heads are query heads.
struct ReferenceInput {
  int64_t step = 0;             // u; 0 = the last prompt token
  int64_t n = 0;                // visible positions
  std::span<const double> z;    // [heads, n]: logits as the scorer sees them
  std::span<const double> err;  // [heads, n]: |true logit - z| at most; empty = exact
  std::span<const float> q;     // [heads, head_dim], after RoPE
  std::span<const float> q_pre; // before RoPE; may be empty unless cis.cos_stage = pre_rope
  std::span<const KeyBall> balls;  // [kv_heads]; may be empty unless cis.gate = certified
};

struct ReferenceDecision {
  std::vector<std::vector<int32_t>> attended;  // [heads], sorted; empty at step 0, whose attention belongs to prefill
  std::vector<bool> selected;                  // [heads]: a selection ran (a retrieval)
  std::vector<double> dropped;                 // [heads]: mass outside `attended` by z, of the positions in sight
  std::vector<double> bound;                   // [heads]: METHODS 1.7 on a reuse step with the certified gate, else -1
};

// z[h, i] = q_h . k_i / sqrt(head_dim) in fp64, for one KV head: q [group, head_dim], keys [n, head_dim].
std::vector<double> ReferenceLogits(std::span<const float> q, std::span<const float> keys, int32_t head_dim);

class ReferenceTrace {
 public:
  // `all_resident` = false simulates the slow clock of shared candidates; for every other method what is resident does not
  // change what is attended here. Requires valid options.
  ReferenceTrace(const SelectorOptions& options, const ReferenceShape& shape, bool all_resident = true);
  ~ReferenceTrace();

  // Steps come in order, each once.
  ReferenceDecision Step(const ReferenceInput& input);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace prehoc
