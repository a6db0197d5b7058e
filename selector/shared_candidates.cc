// Shared candidates (docs/selectors/sc.md): every `refresh` steps the factor * k best middle positions become resident;
// each step chooses k among the residents alone. Cheap, and blind to a head that jumps to a new place.
#include <algorithm>

#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class SharedCandidates final : public Selector {
 public:
  explicit SharedCandidates(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext& context) const override {
    StepRule rule = ChooseK(options(), options().sc.inner, context.n);
    rule.residents_only = true;
    return rule;
  }
  ResidencyRule DoResidency() const override {
    const SharedCandidatesOptions& sc = options().sc;
    // Only a refresh looks at every position, so that is what a certificate has to hasten.
    const int32_t certify = options().certify_every;
    const int32_t refresh = certify > 0 ? std::min(sc.refresh, certify) : sc.refresh;
    return {.factor = sc.factor, .refresh = refresh, .pool = sc.pool, .lag = sc.lag, .stagger = false};
  }
};
}  // namespace

std::unique_ptr<Selector> MakeSharedCandidates(const SelectorOptions& options) {
  return std::make_unique<SharedCandidates>(options);
}

}  // namespace prehoc::selector_internal
