// Quest (arXiv 2406.10774; docs/selectors/quest.md): each page of keys has a minimum and a maximum per channel, which bound
// every logit in it; a head attends to the pages with the largest bounds, chosen anew at every step.
#include <algorithm>

#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class Quest final : public Selector {
 public:
  explicit Quest(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override {
    const QuestOptions& quest = options().quest;
    // Nothing of step 0 would be used later.
    if (context.step == 0 || context.layer < quest.dense_layers) return AttendAll();
    StepRule rule;
    rule.scorer = Scorer::kPages;
    rule.middle_only = true;
    rule.page = quest.page;
    rule.gqa_set = quest.gqa_set;
    // The page under way is kept, and is one of those that the budget pays for.
    const auto n = static_cast<int32_t>(context.n);
    rule.local = n - std::max(0, n - 1) / quest.page * quest.page;
    Budget budget = options().budget;
    budget.sinks = budget.local = 0;  // all of it is pages
    const int32_t pages = std::max(QuestOptions::kLeastPages, budget.MiddleK(context.n) / quest.page);
    rule.k = (pages - 1 - quest.sinks) * quest.page;
    return rule;
  }
};
}  // namespace

std::unique_ptr<Selector> MakeQuest(const SelectorOptions& options) { return std::make_unique<Quest>(options); }

}  // namespace prehoc::selector_internal
