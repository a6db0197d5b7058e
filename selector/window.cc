// Window: the sinks and the last positions, as many as the budget allows (StreamingLLM, arXiv 2309.17453). The floor
// that any selector has to beat.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class Window final : public Selector {
 public:
  explicit Window(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override {
    StepRule rule;
    rule.local = options().budget.local + options().budget.MiddleK(context.n);
    return rule;
  }
};
}  // namespace

std::unique_ptr<Selector> MakeWindow(const SelectorOptions& options) { return std::make_unique<Window>(options); }

}  // namespace prehoc::selector_internal
