#include "cache/internal/device_layout.h"

#include <algorithm>

#include "base/units.h"

namespace prehoc {
namespace {
constexpr uint64_t kAlign = 64;

// Lays the parts out for a ring and a number of slots.
DeviceLayout Lay(const DeviceRequest& r, int32_t ring, int32_t slots) {
  const auto layers = static_cast<uint64_t>(r.geometry.layers);
  const auto heads = static_cast<uint64_t>(r.geometry.kv_heads);
  const uint64_t row = r.geometry.row_bytes();
  const auto tokens = static_cast<uint64_t>(r.max_tokens);
  DeviceLayout layout;
  layout.ring = ring;
  layout.slots = slots;
  layout.stride = static_cast<int64_t>(RoundUp(tokens, 16));
  const bool index = r.code_block_bytes > 0 || r.pages;
  layout.groups = index ? r.max_tokens / r.code_group : 0;
  const auto groups = static_cast<uint64_t>(layout.groups);

  uint64_t at = 0;
  const auto take = [&at](uint64_t bytes) {
    const uint64_t begin = at;
    at += RoundUp(bytes, kAlign);
    return begin;
  };
  layout.sinks_at = take(static_cast<uint64_t>(r.sinks) * row);
  layout.ring_at = take(static_cast<uint64_t>(ring) * row);
  layout.slots_at = take(static_cast<uint64_t>(slots) * row);
  layout.codes_at = take(groups * r.code_block_bytes);
  const uint64_t bounds = r.pages ? groups * static_cast<uint64_t>(r.code_group / r.page_tokens) * row / 2 : 0;
  layout.lo_at = take(bounds);
  layout.hi_at = take(bounds);
  layout.labels_at = take(tokens * r.label_bytes);
  const uint64_t bitmap = (tokens + 63) / 64 * 8;
  layout.slotted_at = take(bitmap);
  layout.resident_at = take(bitmap);
  layout.head_bytes = at;

  at *= layers * heads;
  const uint64_t floats = static_cast<uint64_t>(layout.stride) * sizeof(float);
  layout.pool_layers = r.pool_layers;
  layout.pool_at = take(static_cast<uint64_t>(r.pool_layers) * static_cast<uint64_t>(r.units) * floats);
  layout.z_at = take(r.scores ? static_cast<uint64_t>(r.geometry.heads) * floats : 0);
  layout.err_at = take(r.errors ? static_cast<uint64_t>(r.geometry.heads) * floats : 0);
  if (r.steps != nullptr && slots <= StepArrays::kMostSlots) {
    StepArrays::Carve(nullptr, *r.steps, slots, &layout.step_bytes);
    layout.steps_at = take(layout.step_bytes);
  }
  layout.bytes = at;
  return layout;
}
}  // namespace

Result<DeviceLayout> DeviceLayout::Fit(const DeviceRequest& r) {
  const auto whole = static_cast<int32_t>(RoundUp(static_cast<uint64_t>(r.max_tokens), 64));
  const auto ring = std::min(whole, static_cast<int32_t>(RoundUp(static_cast<uint64_t>(r.ring_min), 64)));
  DeviceRequest resident = r;
  resident.pool_layers = 0;  // nothing is ever fetched
  const bool limited = r.slots_min > 0 && r.slots_max > 0 && ring + std::max(r.slots_max, r.slots_min) < whole;
  if (const DeviceLayout all = Lay(resident, whole, 0); all.bytes <= r.bytes && !limited) return all;

  const DeviceLayout least = Lay(r, ring, r.slots_min);
  if (least.bytes > r.bytes) {
    const auto pairs = static_cast<double>(r.geometry.layers) * r.geometry.kv_heads;
    const double row = static_cast<double>(r.geometry.row_bytes());
    return {StatusCode::kOutOfSpace,
            "a device budget of " + FormatBytes(static_cast<double>(r.bytes)) + " does not hold a sequence of " +
                std::to_string(r.max_tokens) + " tokens: at least " + FormatBytes(static_cast<double>(least.bytes)) +
                " is needed (ring and sinks " + FormatBytes(pairs * row * (ring + r.sinks)) + ", one choice " +
                FormatBytes(pairs * row * r.slots_min) + ", index and scores the rest)"};
  }
  const uint64_t spare = r.bytes - least.bytes;
  const uint64_t a_row_each = static_cast<uint64_t>(r.geometry.layers) * static_cast<uint64_t>(r.geometry.kv_heads) *
                              r.geometry.row_bytes();
  const auto more = static_cast<int32_t>(std::min<uint64_t>(spare / a_row_each, static_cast<uint64_t>(whole)));
  int32_t most = limited ? std::max(r.slots_max, r.slots_min) : whole;
  if (r.steps != nullptr) most = std::min(most, std::max(StepArrays::kMostSlots, r.slots_min));
  DeviceLayout layout = r.slots_min > 0 ? Lay(r, ring, std::min(most, r.slots_min + more))
                                        : Lay(r, std::min(whole, ring + more / 64 * 64), 0);
  // Rounding each part up can cost a row per head.
  while (layout.bytes > r.bytes && layout.slots > r.slots_min) layout = Lay(r, layout.ring, layout.slots - 1);
  return layout;
}

}  // namespace prehoc
