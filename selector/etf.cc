// ETF, early token freezing (PrHS, arXiv 2602.08329; docs/selectors/etf.md): in prefill, layer l leaves the first
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
  const EtfOptions& etf = options.etf;
  const DepthOptions depth = options.EtfDepth();
  const int64_t extent = etf.n == EtfOptions::Extent::kPrompt ? prompt_tokens : chunk_end;
  // The last token is never frozen: its logits are needed.
  rule->frozen = std::clamp<int64_t>(CutByDepth(depth, true, layer, layers, extent), 0, std::max<int64_t>(0, extent - 1));
  rule->reuse_kv = etf.mode == EtfOptions::Mode::kReuseKv;
  if (!rule->reuse_kv) return;
  // Layer l_s, the last one in which every token computes K and V (l counts from 1). There is always one: layer 1 has
  // nothing below it to reuse, so it freezes nothing.
  const int32_t start = std::max(0, static_cast<int32_t>(depth.l_s * layers) - 1);
  if (layer <= start) rule->frozen = 0;
  if (etf.reuse_from == EtfOptions::ReuseFrom::kStart) rule->reuse_layer = start;
}

std::string EtfTag(const SelectorOptions& options, int64_t prompt_tokens) {
  const EtfOptions& etf = options.etf;
  if (etf.c >= 1) return {};
  const char* mode = "carry";
  if (etf.mode == EtfOptions::Mode::kReuseKv) {
    mode = etf.reuse_from == EtfOptions::ReuseFrom::kStart ? "reuse_kv_start" : "reuse_kv_last";
  }
  // T also with etf.n = chunk: the last piece of prefill ends there.
  return std::string("etf(mode=") + mode + ",c=" + PrintNumber(etf.c) + ",ls=" + PrintNumber(options.EtfDepth().l_s) +
         ",n=" + (etf.n == EtfOptions::Extent::kPrompt ? "prompt" : "chunk") + ",T=" + std::to_string(prompt_tokens) + ")";
}

std::unique_ptr<Selector> MakeEtf(const SelectorOptions& options) { return std::make_unique<Etf>(options); }

}  // namespace prehoc::selector_internal
