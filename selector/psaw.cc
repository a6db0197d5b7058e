// PSAW, a window that shortens with depth (PrHS, arXiv 2602.08329; docs/selectors/psaw.md): layer l of N does not see
// the first P_l(n) = floor((1 - c^((l - l_s)/(N - l_s))) n) of n positions, the sinks apart.
#include <algorithm>
#include <cmath>

#include "selector/methods.h"
#include "selector/text.h"

namespace prehoc::selector_internal {
namespace {
using Phase = PsawOptions::Phase;

bool InDecode(const PsawOptions& psaw) { return psaw.phase == Phase::kBoth || psaw.phase == Phase::kDecode; }
bool InPrefill(const PsawOptions& psaw) { return psaw.phase == Phase::kBoth || psaw.phase == Phase::kPrefill; }

class Psaw final : public Selector {
 public:
  explicit Psaw(const SelectorOptions& options) : Selector(options) {}
  int64_t WindowStart(int32_t layer, int32_t layers, int64_t n) const override {
    return PsawStart(options(), layer, layers, n);
  }

 private:
  StepRule DoRule(const StepContext& context) const override {
    StepRule rule = AttendAll();
    ApplyPsaw(options(), context, &rule);
    return rule;
  }
  PrefillRule DoPrefill(int32_t, int32_t, int64_t, int64_t) const override {
    PrefillRule rule;
    ApplyPsaw(options(), &rule);
    return rule;
  }
  std::string DoMethodTag(int64_t) const override { return PsawTag(options()); }
};
}  // namespace

int64_t CutByDepth(const DepthOptions& depth, bool base_one, int32_t layer, int32_t layers, int64_t n) {
  const double l = layer + (base_one ? 1 : 0);
  const double first = depth.l_s * layers;
  if (l < first) return 0;
  const double kept = std::pow(depth.c, (l - first) / (layers - first));
  // The nudge keeps (1 - 0.9) * 10 at 1, though 0.9 is not exact.
  return static_cast<int64_t>(std::floor((1 - kept) * static_cast<double>(n) + 1e-9));
}

int64_t PsawStart(const SelectorOptions& options, int32_t layer, int32_t layers, int64_t n) {
  if (options.psaw.phase == Phase::kOff) return 0;
  const int64_t cut = CutByDepth(options.psaw, options.psaw.layer_base_one, layer, layers, n);
  const int64_t start = std::max<int64_t>(0, std::min(cut, n - options.budget.local));
  return start - start % options.psaw.round;  // after the guard: down keeps more
}

void ApplyPsaw(const SelectorOptions& options, const StepContext& context, StepRule* rule) {
  if (!InDecode(options.psaw)) return;
  const int64_t start = PsawStart(options, context.layer, context.layers, context.n);
  rule->lo = static_cast<int32_t>(start);
  // An edge among the sinks cuts none of them: they go together, once it has passed the last one.
  rule->cut_sinks = !options.psaw.keep_sink && start >= options.budget.sinks && start > 0;
  rule->evict_cut = options.psaw.evict;
  rule->filter_each_step = options.psaw.filter_each_step && !rule->attend_all;
}

void ApplyPsaw(const SelectorOptions& options, PrefillRule* rule) {
  rule->windowed = InPrefill(options.psaw) && options.psaw.c < 1;
  rule->keep_sink = options.psaw.keep_sink;
}

std::string PsawTag(const SelectorOptions& options) {
  const PsawOptions& psaw = options.psaw;
  if (!InPrefill(psaw) || psaw.c >= 1) return {};
  // Sinks and local decide which keys a row saw, as c and l_s do.
  return "psaw(c=" + PrintNumber(psaw.c) + ",ls=" + PrintNumber(psaw.l_s) +
         ",sink=" + std::to_string(options.budget.sinks) + (psaw.keep_sink ? "" : ",cut") +
         ",local=" + std::to_string(options.budget.local) + ",base=" + (psaw.layer_base_one ? "1" : "0") +
         ",round=" + std::to_string(psaw.round) + ")";
}

std::unique_ptr<Selector> MakePsaw(const SelectorOptions& options) { return std::make_unique<Psaw>(options); }

}  // namespace prehoc::selector_internal
