// What a cache offers where its device tier is out of reach of host code: the CPU build's methods that read logits, page bounds or
// labels there are refused by name rather than run on something else.
#include <algorithm>
#include <cstdint>
#include <string>

#include "cache/internal/cache_impl.h"

namespace prehoc {
namespace {
Status NotOffered(const std::string& what, const std::string& instead) {
  return {StatusCode::kUnsupported, what + " is not offered with device memory that the host cannot reach; " + instead};
}

bool ChoosesAsCis(SelectorKind kind) {
  return kind == SelectorKind::kCis || kind == SelectorKind::kCpe;
}

// On an H200 a step that attends to all of 64K positions of 8 KV heads takes as long as one that chooses; at 32K it is 10 % faster
// (bench/results/h200/README.md). So many bytes of K and V of a layer are about where choosing begins to pay.
constexpr int64_t kDenseBytes = int64_t{256} << 20;
}  // namespace

// In host memory choosing pays from a few hundred positions on, where budgets begin to leave something out.
int32_t DenseBelow(const KvGeometry& geometry, const DeviceMemory& device) {
  if (device.host_accessible()) return 0;
  return static_cast<int32_t>(std::min<int64_t>(kDenseBytes / (geometry.kv_heads * static_cast<int64_t>(geometry.row_bytes())), INT32_MAX));
}

Status CheckOffered(const CacheShared& cache) {
  if (cache.resources.device->host_accessible()) return {};
  const SelectorOptions& o = cache.options.selector;
  const Selector& selector = *cache.selector;
  for (const SelectorKind kind : {SelectorKind::kQuest, SelectorKind::kHShare, SelectorKind::kSharedCandidates}) {
    if (o.kind == kind) return NotOffered("selector " + std::string(SelectorKindName(kind)), "use tc, cis, psaw, window or dense");
  }
  if (o.BoundInForce() != BoundKind::kNone) return NotOffered("a bound (bound, max_dropped_mass)", "use bound=none and audits");
  if (o.budget.mass > 0) return NotOffered("budget=mass(...)", "use a share or a number of positions");
  if (selector.NeedsPages() || selector.NeedsLabels()) return NotOffered("cis.scorer=pages", "use codes or exact");
  if (ChoosesAsCis(o.kind)) {
    if (o.cis.gate == CisOptions::Gate::kCertified) return NotOffered("cis.gate=certified", "use cis.gate=cosine");
    if (o.cis.exact_budget) return NotOffered("cis.budget=cis*", "use cis.budget=cis");
    if (o.cis.half_logits) return NotOffered("cis.precision=f16", "use f32");
  }
  if (selector.ChoosesPerQueryHead() && selector.Residency().factor > 0) {
    return NotOffered("cis.gqa_set=per_query_head with a slow clock", "let the heads of a group choose together");
  }
  if (selector.Residency().lag > 0 && cache.own_transfer != nullptr) {
    return NotOffered("tc.lag > 0 without a transfer engine of the device", "give CacheResources::transfer, or use tc.lag=0");
  }
  // Shapes, as the kernels see them: a call without tasks is checked and does nothing.
  const Launch launch = cache.launch();
  return cache.resources.kernels->attend({.tasks = {}, .group = cache.geometry().group(), .head_dim = cache.geometry().head_dim}, launch);
}

}  // namespace prehoc
