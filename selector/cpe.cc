// CPE, all of PrHS together (docs/selectors/cpe.md): PSAW and ETF in prefill, CIS within PSAW's window in decode.
#include "selector/methods.h"

namespace prehoc::selector_internal {
namespace {
class Cpe final : public Selector {
 public:
  explicit Cpe(const SelectorOptions& options) : Selector(options) {}
  int64_t WindowStart(int32_t layer, int32_t layers, int64_t n) const override {
    return PsawStart(options(), layer, layers, n);
  }

 private:
  StepRule DoRule(const StepContext& context) const override {
    StepRule rule = CisRule(options(), context);
    ApplyPsaw(options(), context, &rule);
    return rule;
  }
  PrefillRule DoPrefill(int32_t layer, int32_t layers, int64_t prompt_tokens, int64_t chunk_end) const override {
    PrefillRule rule;
    ApplyPsaw(options(), &rule);
    ApplyEtf(options(), layer, layers, prompt_tokens, chunk_end, &rule);
    return rule;
  }
  std::string DoMethodTag(int64_t prompt_tokens) const override {
    const std::string psaw = PsawTag(options());
    const std::string etf = EtfTag(options(), prompt_tokens);
    return psaw.empty() || etf.empty() ? psaw + etf : psaw + "+" + etf;
  }
};
}  // namespace

std::unique_ptr<Selector> MakeCpe(const SelectorOptions& options) { return std::make_unique<Cpe>(options); }

}  // namespace prehoc::selector_internal
