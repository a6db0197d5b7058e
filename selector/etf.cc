// ETF, early token freezing (PrHS, arXiv 2602.08329; METHODS 1.4): in prefill, layer l leaves the first
// E_l(n) = floor((1 - c^((l - l_s)/(N - l_s))) n) tokens as they are. Decode is dense.
#include <algorithm>

#include "selector/methods.h"
#include "selector/text.h"

namespace prehoc::selector_internal {
namespace {
class Etf final : public Selector {
 public:
  explicit Etf(const SelectorOptions& options) : Selector(options) {}

 private:
  StepRule DoRule(const StepContext&) const override { return AttendAll(); }
  PrefillRule DoPrefill(int32_t layer, int32_t layers, int64_t prompt_tokens, int64_t chunk_end) const override {
    PrefillRule rule;
    ApplyEtf(options(), layer, layers, prompt_tokens, chunk_end, &rule);
    return rule;
  }
  std::string DoMethodTag(int64_t prompt_tokens) const override { return EtfTag(options(), prompt_tokens); }
};
}  // namespace

void ApplyEtf(const SelectorOptions& options, int32_t layer, int32_t layers, int64_t prompt_tokens, int64_t chunk_end,
              PrefillRule* rule) {
  const int64_t extent = options.etf.n == EtfOptions::Extent::kPrompt ? prompt_tokens : chunk_end;
  const int64_t cut = CutByDepth(options.etf, true, layer, layers, extent);
  // The last token is never frozen: its logits are needed.
  rule->frozen = std::clamp<int64_t>(cut, 0, std::max<int64_t>(0, extent - 1));
  rule->reuse_kv = options.etf.mode == EtfOptions::Mode::kReuseKv;
}

std::string EtfTag(const SelectorOptions& options, int64_t prompt_tokens) {
  const EtfOptions& etf = options.etf;
  if (etf.c >= 1) return {};
  return std::string("etf(mode=") + (etf.mode == EtfOptions::Mode::kReuseKv ? "reuse_kv" : "carry") +
         ",c=" + PrintNumber(etf.c) + ",ls=" + PrintNumber(etf.l_s) +
         (etf.n == EtfOptions::Extent::kPrompt ? ",T=" + std::to_string(prompt_tokens) : ",n=chunk") + ")";
}

std::unique_ptr<Selector> MakeEtf(const SelectorOptions& options) { return std::make_unique<Etf>(options); }

}  // namespace prehoc::selector_internal
