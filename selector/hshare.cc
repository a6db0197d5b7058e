// HShare (ICLR 2025, OpenReview Tb5PY5vwp6; docs/selectors/hshare.md): a choice is shared with later steps, with heads of
// the same layer and with later layers that chose alike over the prompt. Who shares with whom: borrow_map.h.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class HShare final : public Selector {
 public:
  explicit HShare(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override {
    const HShareOptions& hshare = options().hshare;
    StepRule rule = ChooseK(options(), Scorer::kLabels, context.n);
    rule.middle_only = true;
    rule.gqa_set = hshare.gqa_set;
    rule.borrows = true;
    // By length, as published: all layers and heads choose at the same steps, so that a source has just chosen.
    rule.may_inherit = context.step > 0 && context.n % hshare.steps != 0;
    rule.tau = -1;
    rule.local_held = !hshare.keep_list;
    return rule;
  }
};
}  // namespace

std::unique_ptr<Selector> MakeHShare(const SelectorOptions& options) { return std::make_unique<HShare>(options); }

}  // namespace prehoc::selector_internal
