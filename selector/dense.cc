// Dense: every visible position, at every step.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class Dense final : public Selector {
 public:
  explicit Dense(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext&) const override { return AttendAll(); }
};
}  // namespace

std::unique_ptr<Selector> MakeDense(const SelectorOptions& options) { return std::make_unique<Dense>(options); }

}  // namespace prehoc::selector_internal
