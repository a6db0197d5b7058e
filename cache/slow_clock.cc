// The slow clock: what is resident. Each (layer, KV head) turns every `refresh` steps: the best positions of the pooled
// scores are wanted; those that are missing come in, others make room.
#include <algorithm>
#include <numeric>
#include <utility>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {

// At the end of every step; at the end of the prompt what is left of filling slots.
Status Sequence::Impl::SlowClock() {
  if (!FillsSlots()) return {};
  ScopedTimer timer(*cache->resources.clock, decoding() ? &step_report.times.slow_clock : &step_report.times.prefill);
  TraceScope trace(tracer(), "slow clock");
  trace.Say("step", step);
  if (!decoding()) return FillLayers(geometry().layers);
  const ResidencyRule rule = selector().Residency();
  const bool residents_only = cache->options.selector.kind == SelectorKind::kSharedCandidates;
  std::vector<int32_t>& heads = scratch->due_heads;
  for (int32_t l = 0; l < geometry().layers; ++l) {
    PREHOC_RETURN_IF_ERROR(LandPending(l));
    if (!residents_only && rule.turns()) {
      heads.clear();
      for (int32_t h = 0; h < geometry().kv_heads; ++h) {
        if (RefreshDue(l, h)) heads.push_back(h);
      }
      PREHOC_RETURN_IF_ERROR(Refresh(l, heads, rule.lag));
    }
  }
  return {};
}

bool Sequence::Impl::RefreshDue(int32_t layer, int32_t kv_head) const {
  const ResidencyRule rule = selector().Residency();
  const int64_t offset = rule.stagger ? int64_t{layer} * geometry().kv_heads + kv_head : 0;
  return (step + offset) % rule.refresh == 0;
}

std::span<const int32_t> Sequence::Impl::AllHeads() const {
  scratch->due_heads.resize(static_cast<size_t>(geometry().kv_heads));
  std::iota(scratch->due_heads.begin(), scratch->due_heads.end(), 0);
  return scratch->due_heads;
}

// After the prompt: layers below `end`, as far as they have not been filled yet.
Status Sequence::Impl::FillLayers(int32_t end) {
  TraceScope trace(tracer(), "fill slots");
  trace.Say("layers", end - filled_layers);
  for (; filled_layers < end; ++filled_layers) {
    PREHOC_RETURN_IF_ERROR(LandPending(filled_layers));
    PREHOC_RETURN_IF_ERROR(FillAtStart(filled_layers));
    UseChoices(filled_layers);
  }
  return {};
}

// After the prompt: wanted rows by the first choice's scores, or just what was chosen.
Status Sequence::Impl::FillAtStart(int32_t layer_index) {
  if (selector().Residency().factor > 0) {
    // A layer that was not ranked wants nothing: all of its tokens were skipped, or (shared candidates) its choice came with a refresh.
    return start_layer == layer_index ? BringMissing(layer_index, at_start, 0) : Status();
  }
  const LayerState& layer = layers[static_cast<size_t>(layer_index)];
  std::vector<WantedRows>& wanted = scratch->wanted;
  wanted.resize(static_cast<size_t>(geometry().kv_heads));
  for (size_t h = 0; h < wanted.size(); ++h) {
    wanted[h].kv_head = static_cast<int32_t>(h);
    wanted[h].positions.clear();
    for (const Unit& unit : layer.units) {
      if (unit.kv_head != wanted[h].kv_head) continue;
      wanted[h].positions.insert(wanted[h].positions.end(), unit.chosen.begin(), unit.chosen.end());
    }
  }
  return BringMissing(layer_index, wanted, 0);
}

// What FillAtStart() is going to bring, while the scores are at hand: then they make room for the next layer's, and the device is busy.
Status Sequence::Impl::RankForStart(int32_t layer_index) {
  start_layer = -1;
  at_start.resize(static_cast<size_t>(geometry().kv_heads));
  PREHOC_ASSIGN_OR_RETURN(const size_t found, Rank(layer_index, AllHeads(), at_start));
  at_start.resize(found);
  start_layer = layer_index;
  return {};
}

// What the prompt's last position chose counts as used by it.
void Sequence::Impl::UseChoices(int32_t layer_index) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  for (const Unit& unit : layer.units) {
    HeadResidency& residency = layer.heads[static_cast<size_t>(unit.kv_head)].residency;
    for (const int32_t position : unit.chosen) {
      if (const int32_t slot = residency.SlotOf(position); slot >= 0) residency.Use(slot, step);
    }
  }
}

Status Sequence::Impl::Refresh(int32_t layer_index, std::span<const int32_t> kv_heads, int64_t lag) {
  if (kv_heads.empty()) return {};
  TraceScope trace(tracer(), "refresh");
  trace.Say("layer", layer_index).Say("kv_heads", static_cast<int64_t>(kv_heads.size()));
  std::vector<WantedRows>& wanted = scratch->wanted;
  if (wanted.size() < kv_heads.size()) wanted.resize(kv_heads.size());
  PREHOC_ASSIGN_OR_RETURN(const size_t found, Rank(layer_index, kv_heads, wanted));
  return BringMissing(layer_index, std::span<WantedRows>(wanted).first(found), lag);
}

// Fills `wanted` from the front; how many heads want something.
Result<size_t> Sequence::Impl::Rank(int32_t layer_index, std::span<const int32_t> kv_heads, std::span<WantedRows> wanted) {
  PREHOC_ASSIGN_OR_RETURN(const size_t found, RankPooled(layer_index, kv_heads, wanted));
  const ResidencyRule rule = selector().Residency();
  for (const WantedRows& of : wanted.first(found)) {
    for (Unit& unit : layers[static_cast<size_t>(layer_index)].units) {
      if (unit.kv_head == of.kv_head && unit.pooled_scans >= rule.pool) unit.pool_restart = true;
    }
  }
  return found;
}

// The best positions of each head that was looked at since its last turn. Returns how many heads those are.
Result<size_t> Sequence::Impl::RankPooled(int32_t layer_index, std::span<const int32_t> kv_heads, std::span<WantedRows> wanted) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const StepRule step_rule = RuleAt(layer_index, step);
  const Budget& budget = cache->options.selector.budget;
  const int32_t most = budget.mass > 0 ? budget.MiddleCap(visible()) : budget.MiddleK(visible());
  const auto rows = static_cast<int32_t>(std::clamp<double>(selector().Residency().factor * most, 0, layout.slots));
  std::vector<TopKTask>& tasks = scratch->top_k;
  tasks.clear();
  std::vector<int32_t>& found = scratch->found;
  found.assign(kv_heads.size(), 0);
  for (const int32_t kv_head : kv_heads) {
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
    if (scans == 0 || pooled == nullptr) continue;
    step_report.refreshes += decoding();
    if (step_rule.attend_all) continue;
    WantedRows& of = wanted[tasks.size()];
    of.kv_head = kv_head;
    of.positions.resize(static_cast<size_t>(rows));
    TopKTask task;
    task.score = pooled;
    task.lo = step_rule.lo;
    task.hi = static_cast<int32_t>(visible()) - step_rule.local;
    task.k = rows;
    task.chosen = of.positions.data();
    task.count = &found[tasks.size()];
    tasks.push_back(task);
  }
  PREHOC_RETURN_IF_ERROR(kernels().top_k({.tasks = tasks}, cache->launch()));
  for (size_t i = 0; i < tasks.size(); ++i) wanted[i].positions.resize(static_cast<size_t>(found[i]));
  return tasks.size();
}

Status Sequence::Impl::BringMissing(int32_t layer_index, std::span<WantedRows> wanted, int64_t lag) {
  LayerBlocks rows(cache->host.get(), geometry(), layers[static_cast<size_t>(layer_index)].blocks, BlockUse::kKeep);
  Arrivals& arrivals = scratch->arrivals;
  arrivals.Clear();
  int64_t fetched = 0;
  const auto bring = [&]() -> Status {
    for (WantedRows& of : wanted) {
      PREHOC_ASSIGN_OR_RETURN(const std::span<const int32_t> missing, MakeRoomForMissing(layer_index, of, lag));
      fetched += static_cast<int64_t>(missing.size());
      if (missing.empty()) continue;
      PREHOC_RETURN_IF_ERROR(lag > 0 ? PostBehind(layer_index, of.kv_head, rows, missing, lag)
                                     : Expect(layer_index, of.kv_head, rows, missing, &arrivals));
    }
    return {};
  };
  if (Status status = WithinMemory(bring); !status.ok()) {
    GiveBack(layer_index, arrivals);
    return status;
  }
  PREHOC_ASSIGN_OR_RETURN(const int64_t landed, Land(layer_index, arrivals));
  if (decoding()) {
    step_report.rows_behind += landed;
    step_report.bytes_from_host += fetched * static_cast<int64_t>(geometry().stored_row_bytes());
    step_report.bytes_from_disk += rows.loaded() * static_cast<int64_t>(geometry().block_bytes());
  } else {
    step_report.prefill_bytes_from_disk += rows.loaded() * static_cast<int64_t>(geometry().block_bytes());
  }
  return {};
}

// Those of `wanted` that are not on the device, or will leave the ring before the next turn; sorts `wanted`. No more than slots are
// free for now. Valid until the next call.
Result<std::span<const int32_t>> Sequence::Impl::MakeRoomForMissing(int32_t layer_index, WantedRows& wanted, int64_t lag) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  HeadState& head = layer.heads[static_cast<size_t>(wanted.kv_head)];
  const ResidencyRule rule = selector().Residency();
  std::vector<int32_t>& positions = wanted.positions;
  if (!std::is_sorted(positions.begin(), positions.end())) std::sort(positions.begin(), positions.end());
  positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
  const int64_t safe = visible() - layout.ring + rule.refresh + lag + 1;  // from here on the ring keeps it until then
  std::vector<int32_t>& missing = scratch->missing;
  missing.clear();
  for (const int32_t position : positions) {
    if (position >= std::max(safe, ring_begin) || head.residency.SlotOf(position) >= 0) continue;
    if (position < sinks && ring_begin > 0) continue;
    const auto under_way = [&](const PendingFetch& fetch) {
      return fetch.kv_head == wanted.kv_head && std::binary_search(fetch.positions.begin(), fetch.positions.end(), position);
    };
    if (std::any_of(layer.pending.begin(), layer.pending.end(), under_way)) continue;
    missing.push_back(position);
  }
  if (missing.empty()) return std::span<const int32_t>();
  PREHOC_RETURN_IF_ERROR(MakeRoom(layer_index, wanted.kv_head, static_cast<int32_t>(missing.size()), positions));
  // Without room for all, the lowest positions win; that is as good as any choice among wanted ones.
  if (static_cast<int64_t>(missing.size()) > head.residency.free_slots()) {
    missing.resize(static_cast<size_t>(head.residency.free_slots()));
  }
  return std::span<const int32_t>(missing);
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
    if (pooled == nullptr && selector().Residency().turns()) pooled = unit.pooled;
    kept.insert(kept.end(), unit.chosen.begin(), unit.chosen.end());
    kept.insert(kept.end(), unit.attended.middle.begin(), unit.attended.middle.end());
  }
  std::sort(kept.begin(), kept.end());
  const DeviceMemory& device = *cache->resources.device;
  std::vector<float> read(pooled != nullptr && !device.host_accessible() ? static_cast<size_t>(visible()) : 0);
  if (!read.empty()) {
    PREHOC_RETURN_IF_ERROR(device.Read(pooled, read.size() * sizeof(float), read.data()));
    pooled = read.data();
  }
  // The lowest scores go first; without scores of recent steps what was attended to longest ago. Then the oldest positions.
  std::vector<std::pair<double, int32_t>> worth;
  const std::span<const int32_t> positions = head.residency.positions(), slots = head.residency.slots();
  for (size_t i = 0; i < positions.size(); ++i) {
    const int32_t position = positions[i];
    if (std::binary_search(kept.begin(), kept.end(), position)) continue;
    worth.emplace_back(pooled != nullptr ? static_cast<double>(pooled[position]) : static_cast<double>(head.residency.UsedAt(slots[i])), position);
  }
  const size_t leave = std::min(worth.size(), static_cast<size_t>(short_of));
  std::nth_element(worth.begin(), worth.begin() + static_cast<std::ptrdiff_t>(leave), worth.end());
  std::vector<int32_t> out(leave);
  std::transform(worth.begin(), worth.begin() + static_cast<std::ptrdiff_t>(leave), out.begin(), [](const auto& of) { return of.second; });
  std::sort(out.begin(), out.end());
  head.residency.Evict(out, ring_begin);
  return {};
}

Result<int64_t> Sequence::Impl::BringIn(int32_t layer_index, int32_t kv_head, LayerBlocks& rows,
                                        std::span<const int32_t> positions) {
  Arrivals& arrivals = scratch->arrivals;
  arrivals.Clear();
  if (Status status = WithinMemory([&] { return Expect(layer_index, kv_head, rows, positions, &arrivals); }); !status.ok()) {
    GiveBack(layer_index, arrivals);
    return status;
  }
  return Land(layer_index, arrivals);
}

Status Sequence::Impl::Expect(int32_t layer_index, int32_t kv_head, LayerBlocks& rows, std::span<const int32_t> positions,
                              Arrivals* arrivals) {
  HeadState& head = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(kv_head)];
  positions = positions.first(std::min<size_t>(positions.size(), static_cast<size_t>(head.residency.free_slots())));
  const auto row = static_cast<int64_t>(row_halfs());
  const auto size = static_cast<int64_t>(geometry().chunk_tokens);
  // A slot that was taken out is on a list, whatever fails then: room for all comes first.
  const size_t slots_before = arrivals->slots.size();
  for (auto* list : {&arrivals->stored, &arrivals->wide}) list->reserve(list->size() + positions.size());
  arrivals->heads.reserve(arrivals->heads.size() + 1);
  arrivals->slots.reserve(slots_before + positions.size());
  arrivals->positions.insert(arrivals->positions.end(), positions.begin(), positions.end());
  for (size_t i = 0; i < positions.size(); ++i) arrivals->slots.push_back(head.residency.Reserve());
  arrivals->heads.push_back({kv_head, arrivals->slots.size()});
  std::vector<RowCopy>& near = geometry().rows == RowFormat::kF16 ? arrivals->stored : arrivals->wide;  // one gather, if one can take both
  const int32_t* slot = arrivals->slots.data() + slots_before;
  const std::byte* of_chunk = nullptr;
  int64_t chunk = -1;
  for (const int32_t position : positions) {
    Half* const to = head.slots + *slot++ * row;
    if (position >= ring_begin) {
      near.push_back({head.ring + position % layout.ring * row, to});
      continue;
    }
    if (position / size != chunk) {
      chunk = position / size;
      PREHOC_ASSIGN_OR_RETURN(of_chunk, rows.Rows(static_cast<size_t>(chunk), kv_head));
    }
    arrivals->stored.push_back({of_chunk + static_cast<size_t>(position % size) * geometry().stored_row_bytes(), to});
  }
  return {};
}

void Sequence::Impl::GiveBack(int32_t layer_index, Arrivals& arrivals) {
  size_t slot = 0;
  for (const Arrivals::Head& of : arrivals.heads) {
    HeadResidency& residency = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(of.kv_head)].residency;
    for (; slot < of.end; ++slot) residency.GiveBack(arrivals.slots[slot]);
  }
  arrivals.Clear();
}

Result<int64_t> Sequence::Impl::Land(int32_t layer_index, Arrivals& arrivals) {
  const Status copied = WithinMemory([&]() -> Status {
    const auto gather = [&](std::span<const RowCopy> of, RowFormat format) {
      return of.empty() ? Status() : kernels().gather({.rows = of, .head_dim = geometry().head_dim, .format = format}, cache->launch());
    };
    PREHOC_RETURN_IF_ERROR(gather(arrivals.stored, geometry().rows));
    return gather(arrivals.wide, RowFormat::kF16);
  });
  if (!copied.ok()) {
    GiveBack(layer_index, arrivals);
    return copied;
  }
  size_t begin = 0;
  for (const Arrivals::Head& of : arrivals.heads) {
    HeadResidency& residency = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(of.kv_head)].residency;
    residency.Publish(std::span<const int32_t>(arrivals.positions).subspan(begin, of.end - begin),
                      std::span<const int32_t>(arrivals.slots).subspan(begin, of.end - begin));
    begin = of.end;
  }
  return static_cast<int64_t>(arrivals.slots.size());
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
