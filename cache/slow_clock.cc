// The slow clock: what is resident. Each (layer, KV head) turns every `refresh` steps: the best positions of the pooled
// scores are wanted; those that are missing come in, others make room.
#include <algorithm>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {

// At the end of every step, and at the end of the prompt (step 0) for all heads at once.
Status Sequence::Impl::SlowClock() {
  if (complete() || layout.slots == 0) return {};
  ScopedTimer timer(*cache->resources.clock, decoding() ? &step_report.times.slow_clock : &step_report.times.prefill);
  TraceScope trace(tracer(), "slow clock");
  trace.Say("step", step);
  const ResidencyRule rule = selector().Residency();
  const bool residents_only = cache->options.selector.kind == SelectorKind::kSharedCandidates;
  for (int32_t l = 0; l < geometry().layers; ++l) {
    PREHOC_RETURN_IF_ERROR(LandPending(l));
    for (int32_t h = 0; h < geometry().kv_heads; ++h) {
      if (!decoding()) {
        PREHOC_RETURN_IF_ERROR(FillAtStart(l, h));
      } else if (!residents_only && rule.factor > 0 && RefreshDue(l, h)) {
        PREHOC_RETURN_IF_ERROR(Refresh(l, h, rule.lag));
      }
    }
  }
  return {};
}

bool Sequence::Impl::RefreshDue(int32_t layer, int32_t kv_head) const {
  const ResidencyRule rule = selector().Residency();
  const int64_t offset = rule.stagger ? int64_t{layer} * geometry().kv_heads + kv_head : 0;
  return (step + offset) % rule.refresh == 0;
}

// After the prompt: wanted rows by the first choice's scores, or just what was chosen.
Status Sequence::Impl::FillAtStart(int32_t layer_index, int32_t kv_head) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  if (selector().Residency().factor > 0) {
    if (cache->options.selector.kind == SelectorKind::kSharedCandidates) return {};  // its choice came with a refresh
    return Refresh(layer_index, kv_head, 0);
  }
  std::vector<int32_t>& chosen = scratch->wanted;
  chosen.clear();
  for (const Unit& unit : layer.units) {
    if (unit.kv_head == kv_head) chosen.insert(chosen.end(), unit.chosen.begin(), unit.chosen.end());
  }
  return BringMissing(layer_index, kv_head, chosen, 0);
}

Status Sequence::Impl::Refresh(int32_t layer_index, int32_t kv_head, int64_t lag) {
  TraceScope trace(tracer(), "refresh");
  trace.Say("layer", layer_index).Say("kv_head", kv_head);
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const ResidencyRule rule = selector().Residency();
  float* pooled = nullptr;
  int32_t scans = 0;
  for (Unit& unit : layer.units) {
    if (unit.kv_head != kv_head) continue;
    scans = std::max(scans, unit.pooled_scans);
    if (pooled == nullptr) {
      pooled = unit.pooled;
    } else {  // query heads that choose alone share the slots of their KV head
      for (int64_t i = 0; i < visible(); ++i) pooled[i] = std::max(pooled[i], unit.pooled[i]);
    }
  }
  if (scans == 0 || pooled == nullptr) return {};  // nothing was looked at since the last turn
  if (decoding()) ++step_report.refreshes;
  const StepRule step_rule =
      selector().Rule({.layer = layer_index, .layers = geometry().layers, .step = step, .n = visible()});
  if (step_rule.attend_all) return {};

  const Budget& budget = cache->options.selector.budget;
  const int32_t most = budget.mass > 0 ? budget.MiddleCap(visible()) : budget.MiddleK(visible());
  const auto wanted_rows = static_cast<int32_t>(std::min<double>(rule.factor * most, layout.slots));
  std::vector<int32_t>& wanted = scratch->wanted;
  wanted.resize(static_cast<size_t>(std::max(0, wanted_rows)));
  int32_t found = 0;
  TopKTask task;
  task.score = pooled;
  task.lo = step_rule.lo;
  task.hi = static_cast<int32_t>(visible()) - step_rule.local;
  task.k = wanted_rows;
  task.chosen = wanted.data();
  task.count = &found;
  PREHOC_RETURN_IF_ERROR(kernels().top_k({.tasks = {&task, 1}}, cache->launch()));
  wanted.resize(static_cast<size_t>(found));
  for (Unit& unit : layer.units) {
    if (unit.kv_head == kv_head && unit.pooled_scans >= rule.pool) unit.pool_restart = true;
  }
  return BringMissing(layer_index, kv_head, wanted, lag);
}

// Those of `wanted` that are not on the device, or will leave the ring before the next turn.
Status Sequence::Impl::BringMissing(int32_t layer_index, int32_t kv_head, std::vector<int32_t>& wanted, int64_t lag) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  HeadState& head = layer.heads[static_cast<size_t>(kv_head)];
  const ResidencyRule rule = selector().Residency();
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  const int64_t safe = visible() - layout.ring + rule.refresh + lag + 1;  // from here on the ring keeps it until then
  std::vector<int32_t>& missing = scratch->missing;
  missing.clear();
  for (const int32_t position : wanted) {
    if (position >= std::max(safe, ring_begin) || head.residency.SlotOf(position) >= 0) continue;
    if (position < sinks && ring_begin > 0) continue;
    const auto under_way = [&](const PendingFetch& fetch) {
      return fetch.kv_head == kv_head && std::binary_search(fetch.positions.begin(), fetch.positions.end(), position);
    };
    if (std::any_of(layer.pending.begin(), layer.pending.end(), under_way)) continue;
    missing.push_back(position);
  }
  if (missing.empty()) return {};
  PREHOC_RETURN_IF_ERROR(MakeRoom(layer_index, kv_head, static_cast<int32_t>(missing.size()), wanted));
  // Without room for all, the lowest positions would win; that is as good as any choice among wanted ones.
  if (static_cast<int64_t>(missing.size()) > head.residency.free_slots()) {
    missing.resize(static_cast<size_t>(head.residency.free_slots()));
  }
  LayerBlocks rows(cache->host.get(), geometry(), layer.blocks, BlockUse::kKeep);
  if (lag > 0) {
    PREHOC_RETURN_IF_ERROR(PostBehind(layer_index, kv_head, rows, missing, lag));
  } else {
    PREHOC_ASSIGN_OR_RETURN(const int64_t landed, BringIn(layer_index, kv_head, rows, missing));
    if (decoding()) step_report.rows_behind += landed;
  }
  if (decoding()) {
    step_report.bytes_from_host += static_cast<int64_t>(missing.size() * geometry().stored_row_bytes());
    step_report.bytes_from_disk += rows.loaded() * static_cast<int64_t>(geometry().block_bytes());
  } else {
    step_report.prefill_bytes_from_disk += rows.loaded() * static_cast<int64_t>(geometry().block_bytes());
  }
  return {};
}

Status Sequence::Impl::MakeRoom(int32_t layer_index, int32_t kv_head, int32_t wanted, std::span<const int32_t> spare) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  HeadState& head = layer.heads[static_cast<size_t>(kv_head)];
  const int32_t short_of = wanted - head.residency.free_slots();
  if (short_of <= 0) return {};
  const float* pooled = nullptr;
  std::vector<int32_t> kept(spare.begin(), spare.end());
  for (const Unit& unit : layer.units) {
    if (unit.kv_head != kv_head) continue;
    if (pooled == nullptr) pooled = unit.pooled;
    kept.insert(kept.end(), unit.chosen.begin(), unit.chosen.end());
    kept.insert(kept.end(), unit.attended.middle.begin(), unit.attended.middle.end());
  }
  std::sort(kept.begin(), kept.end());
  std::vector<int32_t> out;
  for (const int32_t position : head.residency.positions()) {
    if (!std::binary_search(kept.begin(), kept.end(), position)) out.push_back(position);
  }
  if (static_cast<int32_t>(out.size()) > short_of) {
    const DeviceMemory& device = *cache->resources.device;
    std::vector<float> read(pooled != nullptr && !device.host_accessible() ? static_cast<size_t>(visible()) : 0);
    if (!read.empty()) {
      PREHOC_RETURN_IF_ERROR(device.Read(pooled, read.size() * sizeof(float), read.data()));
      pooled = read.data();
    }
    // Without scores the oldest positions go first.
    const auto worse = [&](int32_t a, int32_t b) { return pooled && pooled[a] != pooled[b] ? pooled[a] < pooled[b] : a < b; };
    std::nth_element(out.begin(), out.begin() + short_of, out.end(), worse);
    out.resize(static_cast<size_t>(short_of));
    std::sort(out.begin(), out.end());
  }
  head.residency.Evict(out, ring_begin);
  return {};
}

Result<int64_t> Sequence::Impl::BringIn(int32_t layer_index, int32_t kv_head, LayerBlocks& rows,
                                        std::span<const int32_t> positions) {
  HeadState& head = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(kv_head)];
  const auto landed = std::min<size_t>(positions.size(), static_cast<size_t>(head.residency.free_slots()));
  const auto row = static_cast<int64_t>(row_halfs());
  std::vector<RowCopy>& copies = scratch->copies;
  std::vector<int32_t>& slots = scratch->slots;
  copies.clear();
  slots.clear();
  copies.reserve(landed);
  slots.reserve(landed);  // a slot that was taken out is on a list
  size_t stored = 0;  // of `copies`, the first ones: of the host's format
  for (const int32_t position : positions.first(landed)) {
    const void* source = head.ring + position % layout.ring * row;
    if (position < ring_begin) {
      auto found = WithinMemory([&] { return rows.Row(position, kv_head); });
      if (!found.ok()) {
        for (const int32_t slot : slots) head.residency.GiveBack(slot);
        return std::move(found).status();
      }
      source = *found;
      stored += geometry().rows != RowFormat::kF16;
    }
    slots.push_back(head.residency.Reserve());
    copies.push_back({source, head.slots + slots.back() * row});
  }
  const Status copied = WithinMemory([&]() -> Status {
    const std::span<const RowCopy> all = copies;
    const auto gather = [&](std::span<const RowCopy> of, RowFormat format) {
      return of.empty() ? Status() : kernels().gather({.rows = of, .head_dim = geometry().head_dim, .format = format}, cache->launch());
    };
    PREHOC_RETURN_IF_ERROR(gather(all.first(stored), geometry().rows));
    return gather(all.subspan(stored), RowFormat::kF16);
  });
  if (!copied.ok()) {
    for (const int32_t slot : slots) head.residency.GiveBack(slot);
    return copied;
  }
  head.residency.Publish(positions.first(landed), slots);
  return static_cast<int64_t>(landed);
}

// The same, behind the following steps: the rows are used `lag` steps from now.
Status Sequence::Impl::PostBehind(int32_t layer_index, int32_t kv_head, LayerBlocks& rows,
                                  std::span<const int32_t> positions, int64_t lag) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  HeadState& head = layer.heads[static_cast<size_t>(kv_head)];
  const auto row = static_cast<int64_t>(row_halfs());
  const int64_t size = geometry().chunk_tokens;
  PendingFetch fetch;
  fetch.kv_head = kv_head;
  fetch.due = step + lag;
  const bool widens = geometry().rows != RowFormat::kF16;
  std::vector<TransferPiece> pieces;
  int64_t pinned_chunk = -1;
  for (const int32_t position : positions) {
    PREHOC_ASSIGN_OR_RETURN(const std::byte* source, rows.Row(position, kv_head));
    if (position / size != pinned_chunk) {  // the source stays where it is until the copy is done
      pinned_chunk = position / size;
      PREHOC_ASSIGN_OR_RETURN(BlockPin pin, cache->host->Pin(layer.blocks[static_cast<size_t>(pinned_chunk)]));
      fetch.sources.push_back(std::move(pin));
    }
    if (widens) {
      fetch.stored.push_back(source);
    } else {
      pieces.push_back({source, nullptr, geometry().row_bytes()});
    }
  }
  fetch.positions.assign(positions.begin(), positions.end());
  fetch.slots.reserve(positions.size());
  layer.pending.reserve(layer.pending.size() + 1);
  for (size_t i = 0; i < positions.size(); ++i) {
    fetch.slots.push_back(head.residency.Reserve());
    if (!widens) pieces[i].dst = reinterpret_cast<std::byte*>(head.slots + fetch.slots.back() * row);
  }
  if (widens) {
    layer.pending.push_back(std::move(fetch));
    return {};
  }
  auto request = WithinMemory([&] { return cache->resources.transfer->Prepare(std::move(pieces)); });
  Status status = request.status();
  if (status.ok()) status = WithinMemory([&] { return request->Post(); });
  if (!status.ok()) {
    for (const int32_t slot : fetch.slots) head.residency.GiveBack(slot);
    return status;
  }
  fetch.request = std::move(request).value();
  layer.pending.push_back(std::move(fetch));
  return {};
}

Status Sequence::Impl::Arrive(PendingFetch& fetch, const HeadState& head) {
  if (geometry().rows == RowFormat::kF16) return fetch.request.Wait();
  if (!fetch.stored.empty()) {
    fetch.widened = WithinMemory([&] { return WidenStored(fetch, head); });
    fetch.stored.clear();
  }
  return fetch.widened;
}

Status Sequence::Impl::WidenStored(const PendingFetch& fetch, const HeadState& head) {
  std::vector<RowCopy>& copies = scratch->copies;
  copies.clear();
  for (size_t i = 0; i < fetch.slots.size(); ++i) {
    copies.push_back({fetch.stored[i], head.slots + static_cast<size_t>(fetch.slots[i]) * row_halfs()});
  }
  return kernels().gather({.rows = copies, .head_dim = geometry().head_dim, .format = geometry().rows}, cache->launch());
}

// Rows whose time has come. A copy that failed brings nothing: its rows stay in the host tier and are fetched when chosen.
Status Sequence::Impl::LandPending(int32_t layer_index, bool all) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  for (auto fetch = layer.pending.begin(); fetch != layer.pending.end();) {
    if (!all && fetch->due > step) {
      ++fetch;
      continue;
    }
    HeadState& head = layer.heads[static_cast<size_t>(fetch->kv_head)];
    HeadResidency& residency = head.residency;
    const Status status = Arrive(*fetch, head);
    // A step may have fetched some of them meanwhile.
    std::vector<int32_t> positions, slots;
    positions.reserve(fetch->positions.size());
    slots.reserve(fetch->positions.size());
    for (size_t i = 0; i < fetch->positions.size(); ++i) {
      if (!status.ok() || residency.SlotOf(fetch->positions[i]) >= 0) {
        residency.GiveBack(fetch->slots[i]);
      } else {
        positions.push_back(fetch->positions[i]);
        slots.push_back(fetch->slots[i]);
      }
    }
    residency.Publish(positions, slots);
    step_report.rows_behind += static_cast<int64_t>(positions.size());
    step_report.failed_fetches += !status.ok();
    fetch = layer.pending.erase(fetch);
  }
  return {};
}

}  // namespace prehoc
