// Two clocks (docs/selectors/tc.md), the default: whenever the gate does not hold, a head looks at every position
// through the codes; only what is resident changes slowly.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class TwoClock final : public Selector {
 public:
  explicit TwoClock(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override {
    const TwoClockOptions& tc = options().tc;
    StepRule rule = ChooseK(options(), tc.scorer, context.n);
    rule.by_mass = tc.gate == TwoClockOptions::Gate::kMass;
    rule.epsilon = rule.by_mass ? tc.epsilon : 0;
    rule.may_inherit = context.step > 0 && (rule.by_mass || tc.tau < 1) && tc.max_age > 0;
    rule.tau = tc.tau;
    rule.pre_rope = !rule.by_mass && tc.cos_stage == CisOptions::CosStage::kPreRope;
    rule.scope = tc.gate_scope;
    rule.max_age = tc.max_age;
    rule.theta = tc.theta >= 0 ? tc.theta : context.reads_store ? TwoClockOptions::kThetaOfStore : TwoClockOptions::ThetaOfMemory(rule.k);
    rule.theta_of_dropped = tc.theta >= 0 ? 0 : TwoClockOptions::kThetaOfDropped;
    if (context.complete && context.n < tc.dense_below) rule.attend_all = true;  // looking would cost more than it saves
    return rule;
  }
  ResidencyRule DoResidency() const override {
    const TwoClockOptions& tc = options().tc;
    return {.factor = tc.factor, .refresh = tc.refresh, .pool = tc.pool, .lag = tc.lag, .stagger = tc.stagger};
  }
};
}  // namespace

std::unique_ptr<Selector> MakeTwoClock(const SelectorOptions& options) { return std::make_unique<TwoClock>(options); }

}  // namespace prehoc::selector_internal
