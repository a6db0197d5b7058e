// Oracle: the exact top k of every step. The ceiling for any selector with the same budget, and as slow as reading all
// of K.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class Oracle final : public Selector {
 public:
  explicit Oracle(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override {
    if (context.step == 0) return AttendAll();  // nothing of step 0 would be used later
    return ChooseK(options(), Scorer::kExact, context.n);
  }
};
}  // namespace

std::unique_ptr<Selector> MakeOracle(const SelectorOptions& options) { return std::make_unique<Oracle>(options); }

}  // namespace prehoc::selector_internal
