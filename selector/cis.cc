// CIS, clustered index sharing over time (PrHS, arXiv 2602.08329; docs/selectors/cis.md): a head selects at the start
// of a block of s steps and keeps the positions while its query stays near the one that selected them.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
int32_t DilatedRanks(CisOptions::DilateCount m, int32_t k) {
  switch (m) {
    case CisOptions::DilateCount::kCeilThird: return k / 3 + (k % 3 != 0);
    case CisOptions::DilateCount::kFloorThird: return k / 3;
    case CisOptions::DilateCount::kAll: return k;
    case CisOptions::DilateCount::kNone: return 0;
  }
  return 0;
}

class Cis final : public Selector {
 public:
  explicit Cis(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override { return CisRule(options(), context); }
};
}  // namespace

StepRule CisRule(const SelectorOptions& options, const StepContext& context) {
  const CisOptions& cis = options.cis;
  if (context.step == 0 && !cis.first_anchor_prompt) return AttendAll();  // step 1 finds no set and selects
  StepRule rule = ChooseK(options, cis.scorer, context.n);
  const int64_t phase = cis.stagger ? context.step + context.layer : context.step;
  rule.may_inherit = context.step > 0 && phase % cis.block != 0;
  rule.tau = cis.tau;
  rule.gate_batch = cis.gate_batch;
  rule.pre_rope = cis.cos_stage == CisOptions::CosStage::kPreRope;
  rule.scope = cis.gate_scope;
  rule.fail = cis.fail;
  rule.certified = cis.gate == CisOptions::Gate::kCertified;
  rule.delta_max = rule.certified ? cis.delta_max : 0;
  rule.dilate_m = cis.r > 0 ? DilatedRanks(cis.m, rule.k) : 0;
  rule.dilate_r = rule.dilate_m > 0 ? cis.r : 0;
  rule.clip_visible = rule.dilate_m > 0 && !cis.clip_middle;
  rule.dilate_later = rule.dilate_m > 0 && !cis.anchor_dilated;
  rule.exact_budget = cis.exact_budget;
  rule.gqa_set = cis.gqa_set;
  rule.half_logits = cis.half_logits;
  rule.local_held = cis.local_edge_held;
  return rule;
}

std::unique_ptr<Selector> MakeCis(const SelectorOptions& options) { return std::make_unique<Cis>(options); }

}  // namespace prehoc::selector_internal
