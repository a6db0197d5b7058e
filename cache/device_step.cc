// Whole decode steps on the device: the fast clock and the slow one enqueued at once, so that the host is needed before a step and after
// it only, and what is enqueued can be replayed as a graph. The method is that of fast_clock.cc to slow_clock.cc; what these do and this
// does not is not offered, and takes their way. Where rows are read from the host, all of them are held in its memory meanwhile.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
constexpr int64_t kLookAgainSteps = 64;  // until rows that were not all in host memory are looked for again
constexpr int32_t kOldChoice = 1 << 20;  // age of no choice
// Look-ups of so many heads go with their choice; those of more keep its blocks from leaving, and are a launch of their own: with 8 heads a step of 128K
// is 1 % faster so, with 64 at 32K it took 8 % longer than in the build before (bench/results/h200/README.md).
constexpr int32_t kMostResolvedWithin = 16;

// An identity for what is enqueued, of all sequences of the process.
uint64_t NewId() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

// How many rows attention's plan is made for: about so many, changing seldom.
int32_t RowsBucket(int64_t rows) {
  int64_t step = 256;
  while (step * 8 < rows) step *= 2;
  return static_cast<int32_t>(CeilDiv(rows, step) * step);
}
}  // namespace

StepArrays StepArrays::Carve(std::byte* base, const StepShape& shape, int32_t slots, size_t* bytes) {
  StepArrays a;
  size_t at = 0;
  const auto take = [&]<class T>(T*& to, size_t num) {
    to = base != nullptr ? reinterpret_cast<T*>(base + at) : nullptr;
    at += RoundUp(num * sizeof(T), 64);
  };
  const auto units = static_cast<size_t>(shape.units()), turns = static_cast<size_t>(shape.turns), group = static_cast<size_t>(shape.group);
  const auto most = static_cast<size_t>(shape.most), rows = static_cast<size_t>(slots), lists = slots > 0 ? turns : 0;
  const size_t state = slots > 0 ? units : 0, words = static_cast<size_t>(shape.words());
  const auto section = [&](std::byte*& begin, size_t& size, const auto& parts) {
    const size_t from = at;
    take(begin, 0);
    parts();
    size = at - from;
  };
  section(a.now, a.now_bytes, [&] {
    take(a.n, 1), take(a.first, 1), take(a.zero, 1);
    take(a.select, most > 0 ? units : 0), take(a.want, lists), take(a.refresh, lists), take(a.land, lists), take(a.gather, lists);
  });
  section(a.fixed, a.fixed_bytes, [&] {
    take(a.append, units), take(a.gate, units), take(a.resolve, units), take(a.attend, units), take(a.adopt, state);
    take(a.chunk_row, static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.chunks()));
  });
  section(a.results, a.results_bytes, [&] {
    take(a.count, units), take(a.hold, units), take(a.misses, units), take(a.far, 1);
    take(a.lse_all, units * group), take(a.lse_out, units * group), take(a.lse, units * group), take(a.fetched, 2 * turns);
  });
  take(a.chosen, units * most), take(a.refs, most > 0 ? units * (most + 4) : 0), take(a.keep, state * most);
  take(a.num_refs, units), take(a.age, units), take(a.anchor, units * group * static_cast<size_t>(shape.head_dim));
  take(a.slot_of, state * static_cast<size_t>(shape.max_tokens)), take(a.owner, state * rows), take(a.resident, state * words);
  const size_t room = state * static_cast<size_t>(SpareRoom(slots));
  take(a.spare, state), take(a.spare_slot, room), take(a.spare_position, room), take(a.used, state * rows);
  for (int32_t** const list : {&a.wanted, &a.position, &a.sources, &a.targets}) take(*list, 2 * lists * rows);
  take(a.wanted_count, 2 * turns), take(a.unused, turns);
  take(a.select_space, shape.select_space), take(a.attend_space, shape.attend_space), take(a.choose_space, shape.choose_space);
  *bytes = at;
  return a;
}

// What steps need beside the rest of a sequence's device memory; false: they are not offered here.
bool Sequence::Impl::ShapeSteps(const CacheShared& cache, int64_t max_tokens, int32_t most, StepShape* shape) {
  const step::StepKernels* const steps = cache.resources.step_kernels;
  const SelectorOptions& options = cache.options.selector;
  const KvGeometry& geometry = cache.geometry();
  const CodeFormat& codes = cache.options.codes;
  const bool two_clock = options.kind == SelectorKind::kTwoClock;
  if (steps == nullptr || (!two_clock && options.kind != SelectorKind::kDense) || cache.options.verify_pins) return false;
  if (two_clock && (options.tc.scorer != Scorer::kCodes || options.tc.gate != TwoClockOptions::Gate::kCosine ||
                    options.tc.cos_stage != CisOptions::CosStage::kPostRope || options.tc.gate_scope != CisOptions::GateScope::kKvHead ||
                    options.BoundInForce() != BoundKind::kNone || options.budget.mass > 0 || codes.dither ||
                    (codes.bits != 2 && codes.bits != 4 && codes.bits != 8))) {
    return false;
  }
  *shape = {.layers = geometry.layers, .kv_heads = geometry.kv_heads, .group = geometry.group(), .head_dim = geometry.head_dim,
            .max_tokens = static_cast<int32_t>(max_tokens), .chunk_tokens = geometry.chunk_tokens, .most = two_clock ? most : 0};
  const ResidencyRule rule = cache.selector->Residency();
  if (two_clock && rule.turns()) {
    shape->turns = rule.stagger ? static_cast<int32_t>(CeilDiv(shape->units(), rule.refresh)) : shape->units();
  }
  // A shape that these kernels refuse is one that they do not offer.
  const auto add = [](Result<size_t> bytes, size_t* most_bytes) {
    if (bytes.ok()) *most_bytes = std::max(*most_bytes, *bytes);
    return bytes.ok();
  };
  step::AttendParams attend{.num_tasks = shape->kv_heads, .host_format = geometry.rows, .group = shape->group, .head_dim = shape->head_dim};
  for (int64_t rows = 256; rows < 2 * max_tokens; rows += std::max<int64_t>(256, rows / 8)) {
    attend.max_rows = RowsBucket(rows);
    if (!add(steps->attend_workspace(attend), &shape->attend_space)) return false;
  }
  if (shape->most == 0) return true;
  for (const bool gated : {false, true}) {
    const step::SelectParams select{.num_tasks = shape->kv_heads, .max_n = shape->max_tokens, .format = codes, .group = shape->group,
                                    .head_dim = shape->head_dim, .gated = gated};
    if (!add(steps->select_workspace(select), &shape->select_space)) return false;
  }
  const step::ChooseParams want{.num_tasks = shape->turns, .max_n = shape->max_tokens, .group = 1, .rule = GroupRule::kMaxLogit};
  return add(steps->choose_workspace(want), &shape->choose_space);
}

void Sequence::Impl::CarveSteps(const StepShape& shape) {
  if (layout.step_bytes == 0) return;
  auto made = std::make_unique<DeviceStep>();
  made->shape = shape;
  size_t bytes = 0;
  made->at = StepArrays::Carve(memory.data() + layout.steps_at, shape, layout.slots, &bytes);
  made->now.resize(made->at.now_bytes);
  made->fixed.resize(made->at.fixed_bytes);
  made->results.resize(made->at.results_bytes);
  made->pins.resize(static_cast<size_t>(shape.layers));
  made->misses.resize(static_cast<size_t>(shape.units()));
  made->pooled.resize(static_cast<size_t>(shape.units()));
  device_step = std::move(made);  // whole, or not at all
  DropStepPins();  // no chunk is there yet
}

Result<Sequence::StepPlan> Sequence::Impl::PlanStep(const LayerInput& io) {
  if (!open || !decoding() || next_layer != 0) return Status{StatusCode::kInvalid, "PlanStep() belongs after Begin() of a decode step"};
  DeviceStep* const d = device_step.get();
  if (d == nullptr || d->planned) return StepPlan{};
  TraceScope trace(tracer(), "plan step");
  trace.Say("step", step);
  const StepRule rule = RuleAt(0, step);
  DeviceStep::Way way = DeviceStep::Way::kNone;
  if (first >= sinks && rule.lo <= rule.sinks && !rule.cut_sinks) {
    if (rule.attend_all && ring_begin == 0) way = DeviceStep::Way::kEverything;
    if (!rule.attend_all && rule.k <= d->shape.most && step > 0) way = DeviceStep::Way::kChoose;
  }
  ScopedTimer timer(*cache->resources.clock, &step_report.times.plan);
  // Another way keeps other state.
  if (way != d->way) PREHOC_RETURN_IF_ERROR(LeaveSteps());
  bool offered = way != DeviceStep::Way::kNone && step >= d->look_again;
  if (offered) {
    PREHOC_ASSIGN_OR_RETURN(offered, MapHostRows());
    if (!offered) d->look_again = step + kLookAgainSteps;
  }
  if (!offered) {
    PREHOC_RETURN_IF_ERROR(LeaveSteps());
    DropStepPins();
    return StepPlan{};
  }
  if (!d->active) PREHOC_RETURN_IF_ERROR(EnterSteps());
  const bool same_rule = rule.sinks == d->rule.sinks && rule.local == d->rule.local && rule.may_inherit == d->rule.may_inherit &&
                         rule.tau == d->rule.tau && rule.max_age == d->rule.max_age;  // k and theta are in each step's tasks
  d->rule = rule;
  const int32_t rows = RowsBucket(way == DeviceStep::Way::kEverything ? visible() : rule.sinks + rule.k + rule.local);
  const bool same_io = io.q == d->io.q && io.k == d->io.k && io.v == d->io.v && io.out == d->io.out;
  if (way != d->way || rows != d->max_rows || !same_io || !same_rule) {
    // The plan of attention's workspace is another one.
    const std::vector<std::byte> zeros(d->shape.attend_space);
    PREHOC_RETURN_IF_ERROR(cache->resources.device->Write(zeros.data(), zeros.size(), d->at.attend_space));
    d->id = NewId();
    d->way = way;
    d->max_rows = rows;
    d->io = io;
    d->fixed_changed = true;
  }
  if (d->fixed_changed) {
    WriteFixedTasks();
    PREHOC_RETURN_IF_ERROR(cache->resources.device->Write(d->fixed.data(), d->fixed.size(), d->at.fixed));
    d->fixed_changed = false;
  }
  WriteTasksOfStep();
  PREHOC_RETURN_IF_ERROR(cache->resources.device->Write(d->now.data(), d->now.size(), d->at.now));
  d->planned = true;
  d->pause = AuditDue() && (!rule.attend_all || observer != nullptr);
  return StepPlan{.id = d->id, .pause = d->pause};
}

// --- where rows are in host memory --------------------------------------------------------------------------------------------

// Fills the table of chunks. False: a row that a step may want is in no block that can be held, or at no address that a row number tells, or no longer
// where copies that are on their way look for it.
Result<bool> Sequence::Impl::MapHostRows() {
  DeviceStep& d = *device_step;
  const auto chunks = static_cast<size_t>(d.shape.chunks());
  const auto row_bytes = static_cast<int64_t>(geometry().stored_row_bytes());
  const std::span<std::byte> range = cache->host->range();
  if (static_cast<int64_t>(range.size()) / row_bytes > std::numeric_limits<int32_t>::max()) return false;
  for (int32_t l = 0; l < geometry().layers; ++l) {
    LayerState& layer = layers[static_cast<size_t>(l)];
    PREHOC_RETURN_IF_ERROR(EnsureTails(layer, visible()));
    std::vector<BlockPin>& pins = d.pins[static_cast<size_t>(l)];
    const size_t tails = layer.blocks.size() - layer.tail_pins.size();
    int32_t* const rows = d.Here(d.at.chunk_row) + static_cast<size_t>(l) * chunks;
    const auto put = [&](size_t chunk, const std::byte* bytes) {
      const int64_t off = bytes - range.data();
      const auto row = static_cast<int32_t>(off / row_bytes);
      if (off % row_bytes != 0 || (d.active && rows[chunk] >= 0 && rows[chunk] != row)) return false;
      d.fixed_changed |= rows[chunk] != row;
      rows[chunk] = row;
      return true;
    };
    while (layout.slots > 0 && pins.size() < tails) {
      const size_t chunk = pins.size();
      // Some of the tier stays for others: blocks that are held here can make no room.
      const int64_t capacity = cache->host->capacity_blocks(), spare = std::max<int64_t>(2 * geometry().layers, capacity / (cache->resources.store ? 2 : 16));
      if (cache->held_for_steps.load() + spare >= capacity) return false;
      std::optional<BlockPin> pin = cache->host->TryPin(layer.blocks[chunk]);
      if (!pin) return false;
      pins.push_back(std::move(*pin));
      ++cache->held_for_steps;
      if (!put(chunk, pins.back().bytes().data())) return false;
    }
    for (size_t t = 0; t < layer.tail_pins.size(); ++t) {
      if (!put(tails + t, layer.tail_pins[t].bytes().data())) return false;
    }
  }
  return true;
}

void Sequence::Impl::DropStepPins() {
  if (device_step == nullptr) return;
  for (std::vector<BlockPin>& pins : device_step->pins) {
    cache->held_for_steps -= static_cast<int64_t>(pins.size());
    pins.clear();
  }
  // Chunks that are not held are not there.
  int32_t* const rows = device_step->Here(device_step->at.chunk_row);
  std::fill_n(rows, static_cast<size_t>(device_step->shape.layers) * static_cast<size_t>(device_step->shape.chunks()), -1);
  device_step->fixed_changed = true;
}

// --- in and out -------------------------------------------------------------------------------------------------------------------

// What the host knows of choices and slots becomes the device's.
Status Sequence::Impl::EnterSteps() {
  DeviceStep& d = *device_step;
  const StepArrays& at = d.at;
  const DeviceMemory& device = *cache->resources.device;
  const auto units = static_cast<size_t>(d.shape.units()), most = static_cast<size_t>(d.shape.most), slots = static_cast<size_t>(layout.slots);
  const size_t floats = static_cast<size_t>(d.shape.group) * static_cast<size_t>(d.shape.head_dim), words = static_cast<size_t>(d.shape.words());
  const auto most_tokens = static_cast<size_t>(d.shape.max_tokens);
  for (int32_t l = 0; l < geometry().layers; ++l) PREHOC_RETURN_IF_ERROR(LandPending(l, /*all=*/true));
  const auto write = [&](const auto& from, auto* to) { return device.Write(from.data(), from.size() * sizeof(from[0]), to); };
  std::vector<int32_t> chosen(units * most), age(units, kOldChoice), owner(slots > 0 ? units * slots : 0, -1);
  std::vector<float> anchor(units * floats);
  std::vector<int16_t> slot_of(slots > 0 ? units * most_tokens : 0, -1);
  std::vector<uint64_t> resident(slots > 0 ? units * words : 0);
  const std::vector<step::SpareSlots::State> spare(slots > 0 ? units : 0);  // the first adopt() makes some
  std::vector<uint8_t> used(slots > 0 ? units * slots : 0);
  std::fill(d.results.begin(), d.results.end(), std::byte{0});
  for (size_t u = 0; u < units; ++u) {
    const Unit& unit = UnitAt(u);
    if (unit.has_choice && unit.chosen.size() <= most && unit.anchor.size() == floats) {
      std::copy(unit.chosen.begin(), unit.chosen.end(), chosen.begin() + static_cast<std::ptrdiff_t>(u * most));
      d.Here(at.count)[u] = static_cast<int32_t>(unit.chosen.size());
      std::copy(unit.anchor.begin(), unit.anchor.end(), anchor.begin() + static_cast<std::ptrdiff_t>(u * floats));
      age[u] = static_cast<int32_t>(std::min<int64_t>(step - unit.chosen_at - 1, kOldChoice));  // this step's gate adds one
    }
    if (slots == 0) continue;
    const HeadResidency& residency = HeadAt(u).residency;
    for (const int32_t position : residency.positions()) {
      const int32_t slot = residency.SlotOf(position);
      slot_of[u * most_tokens + static_cast<size_t>(position)] = static_cast<int16_t>(slot);
      owner[u * slots + static_cast<size_t>(slot)] = position;
      used[u * slots + static_cast<size_t>(slot)] = unit.has_choice && std::binary_search(unit.chosen.begin(), unit.chosen.end(), position);
    }
    std::copy_n(residency.resident_bits(), words, resident.begin() + static_cast<std::ptrdiff_t>(u * words));
  }
  std::fill(d.misses.begin(), d.misses.end(), 0);
  for (std::vector<int32_t>& list : d.turning) list.clear();
  PREHOC_RETURN_IF_ERROR(write(chosen, at.chosen));
  PREHOC_RETURN_IF_ERROR(write(age, at.age));
  PREHOC_RETURN_IF_ERROR(write(anchor, at.anchor));
  PREHOC_RETURN_IF_ERROR(write(slot_of, at.slot_of));
  PREHOC_RETURN_IF_ERROR(write(owner, at.owner));
  PREHOC_RETURN_IF_ERROR(write(resident, at.resident));
  PREHOC_RETURN_IF_ERROR(write(spare, at.spare));
  PREHOC_RETURN_IF_ERROR(write(used, at.used));
  PREHOC_RETURN_IF_ERROR(write(d.results, at.results));
  // A step that broke off may have left them in any state.
  const std::vector<std::byte> zeros(std::max({d.shape.select_space, d.shape.attend_space, d.shape.choose_space}));
  PREHOC_RETURN_IF_ERROR(device.Write(zeros.data(), d.shape.select_space, at.select_space));
  PREHOC_RETURN_IF_ERROR(device.Write(zeros.data(), d.shape.attend_space, at.attend_space));
  PREHOC_RETURN_IF_ERROR(device.Write(zeros.data(), d.shape.choose_space, at.choose_space));
  d.active = true;
  d.fixed_changed = true;
  return {};
}

// And back. What was on its way to slots is forgotten: it lies in host memory, too. If the device can no longer be read, or there is no memory to read it
// into, nothing is chosen or resident from now on, and the error is returned.
Status Sequence::Impl::LeaveSteps() {
  if (device_step == nullptr || !std::exchange(device_step->active, false)) return {};
  device_step->planned = device_step->pause = false;
  DropStepPins();
  const Status status = WithinMemory([&] { return ReadSteps(); });
  if (status.ok()) return {};
  // What the host knew before is of slots that have had other rows since.
  for (LayerState& layer : layers) {
    for (Unit& unit : layer.units) {
      unit.has_choice = false;
      unit.chosen.clear();
      unit.attended.unread = -1;
      unit.attended.middle.clear();
    }
    for (HeadState& head : layer.heads) head.residency.Restore({}, {}, ring_begin, open ? visible() : length);
  }
  return status;
}

Status Sequence::Impl::ReadSteps() {
  DeviceStep& d = *device_step;
  const DeviceMemory& device = *cache->resources.device;
  const auto units = static_cast<size_t>(d.shape.units()), most = static_cast<size_t>(d.shape.most), slots = static_cast<size_t>(layout.slots);
  const size_t floats = static_cast<size_t>(d.shape.group) * static_cast<size_t>(d.shape.head_dim);
  std::vector<int32_t> chosen(units * most), age(units), owner(slots > 0 ? units * slots : 0);
  std::vector<float> anchor(units * floats);
  const auto read = [&](const auto* from, auto& to) { return device.Read(from, to.size() * sizeof(to[0]), to.data()); };
  PREHOC_RETURN_IF_ERROR(device.Read(d.at.results, d.results.size(), d.results.data()));
  PREHOC_RETURN_IF_ERROR(read(d.at.chosen, chosen));
  PREHOC_RETURN_IF_ERROR(read(d.at.age, age));
  PREHOC_RETURN_IF_ERROR(read(d.at.anchor, anchor));
  PREHOC_RETURN_IF_ERROR(read(d.at.owner, owner));
  const int64_t n = open ? visible() : length;
  for (size_t u = 0; u < units; ++u) {
    Unit& unit = UnitAt(u);
    const int32_t num = d.Here(d.at.count)[u];
    unit.has_choice = most > 0 && age[u] < kOldChoice && num >= 0 && num <= static_cast<int32_t>(most);
    const int32_t unread = std::exchange(unit.attended.unread, -1);
    unit.chosen.clear();
    if (unit.has_choice) {
      const auto from = chosen.begin() + static_cast<std::ptrdiff_t>(u * most);
      unit.chosen.assign(from, from + num);
      if (unread >= 0) unit.attended.middle.assign(from, from + std::min(unread, num));
      unit.anchor.assign(anchor.begin() + static_cast<std::ptrdiff_t>(u * floats), anchor.begin() + static_cast<std::ptrdiff_t>((u + 1) * floats));
    }
    if (slots == 0) continue;
    std::vector<std::pair<int32_t, int32_t>> held;
    for (size_t slot = 0; slot < slots; ++slot) {
      if (owner[u * slots + slot] >= 0) held.emplace_back(owner[u * slots + slot], static_cast<int32_t>(slot));
    }
    std::sort(held.begin(), held.end());
    std::vector<int32_t> positions, places;
    for (const auto& [position, slot] : held) positions.push_back(position), places.push_back(slot);
    HeadAt(u).residency.Restore(positions, places, ring_begin, n);
  }
  return {};
}

// --- tasks ------------------------------------------------------------------------------------------------------------------------

void Sequence::Impl::WriteFixedTasks() {
  DeviceStep& d = *device_step;
  const StepArrays& at = d.at;
  const StepShape& shape = d.shape;
  const auto row = static_cast<int64_t>(row_halfs());
  const auto most = static_cast<size_t>(shape.most), slots = static_cast<size_t>(layout.slots);
  const int64_t floats = int64_t{shape.group} * shape.head_dim;
  const std::span<std::byte> range = cache->host->range();
  const auto host_rows = static_cast<int64_t>(range.size() / geometry().stored_row_bytes());
  const bool everything = d.way == DeviceStep::Way::kEverything;
  for (size_t u = 0; u < static_cast<size_t>(shape.units()); ++u) {
    const HeadState& head = HeadAt(u);
    const auto h = static_cast<int64_t>(u % static_cast<size_t>(shape.kv_heads));
    const float* const q = d.io.q + h * floats;
    const auto ring_row = static_cast<int32_t>((head.ring - head.sinks) / row), slot_row = static_cast<int32_t>((head.slots - head.sinks) / row);
    d.Here(at.append)[u] = {.k = d.io.k + h * shape.head_dim, .v = d.io.v + h * shape.head_dim,
                            .stride = shape.head_dim, .first = at.first, .rows = head.ring, .ring_rows = layout.ring, .count = 1,
                            .blocks = head.codes, .host_rows = range.data(), .host_limit = host_rows, .host = HostRowsOf(u)};
    step::AttendTask& attend = d.Here(at.attend)[u] = {.q = q, .out = d.io.out + h * floats,
                                                       .lse = at.lse + u * static_cast<size_t>(shape.group), .rows = head.sinks,
                                                       .row_limit = slot_row + int64_t{layout.slots}, .ring_row = ring_row, .ring_rows = layout.ring,
                                                       .n = at.n};
    if (everything) {
      attend.local = std::numeric_limits<int32_t>::max() / 2;
      attend.ring_rows = std::numeric_limits<int32_t>::max() / 2;  // nothing has left the ring
      continue;
    }
    attend.sinks = d.rule.sinks, attend.local = d.rule.local;
    attend.refs = at.refs + u * (most + 4), attend.num_refs = at.num_refs + u, attend.refs_room = shape.most;
    attend.host_rows = slots > 0 ? range.data() : nullptr, attend.host_limit = slots > 0 ? host_rows : 0;
    d.Here(at.gate)[u] = {.q = q, .anchor = at.anchor + u * static_cast<size_t>(floats), .hold = at.hold + u, .age = at.age + u};
    step::ResolveTask& resolve = d.Here(at.resolve)[u] = {
        .at = {.slots = layout.slots, .max_n = shape.max_tokens}, .chosen = at.chosen + u * most, .count = at.count + u, .room = shape.most, .n = at.n,
        .slot_row = slot_row, .ring_row = ring_row, .ring_rows = layout.ring, .refs = at.refs + u * (most + 4), .num_refs = at.num_refs + u,
        .misses = at.misses + u, .far = at.far, .host = HostRowsOf(u), .hold = d.rule.may_inherit ? at.hold + u : nullptr, .q = q,
        .anchor = at.anchor + u * static_cast<size_t>(floats), .age = at.age + u};
    if (slots == 0) continue;
    resolve.at = StateOf(u);
    attend.keep = resolve.keep = at.keep + u * most;
    attend.slots = head.slots, attend.slot_limit = layout.slots;
    d.Here(at.adopt)[u] = {.at = resolve.at, .n = at.n, .ring_rows = layout.ring};
  }
}

Unit& Sequence::Impl::UnitAt(size_t unit) {
  const auto heads = static_cast<size_t>(geometry().kv_heads);
  return layers[unit / heads].units[unit % heads];
}
HeadState& Sequence::Impl::HeadAt(size_t unit) {
  const auto heads = static_cast<size_t>(geometry().kv_heads);
  return layers[unit / heads].heads[unit % heads];
}
step::HostRows Sequence::Impl::HostRowsOf(size_t unit) const {
  const StepShape& shape = device_step->shape;
  const auto heads = static_cast<size_t>(shape.kv_heads), chunks = static_cast<size_t>(shape.chunks());
  return {.chunk_row = device_step->at.chunk_row + unit / heads * chunks, .chunk_tokens = shape.chunk_tokens, .num_chunks = shape.chunks(),
          .head_row = static_cast<int32_t>(unit % heads) * shape.chunk_tokens};
}
step::ResidencyState Sequence::Impl::StateOf(size_t unit) const {
  const StepArrays& at = device_step->at;
  const StepShape& shape = device_step->shape;
  const auto room = static_cast<size_t>(StepArrays::SpareRoom(layout.slots));
  return {.slot_of = at.slot_of + unit * static_cast<size_t>(shape.max_tokens), .owner = at.owner + unit * static_cast<size_t>(layout.slots),
          .resident = at.resident + unit * static_cast<size_t>(shape.words()), .slots = layout.slots, .max_n = shape.max_tokens,
          .spare = {.state = at.spare + unit, .slot = at.spare_slot + unit * room, .position = at.spare_position + unit * room,
                    .used = at.used + unit * static_cast<size_t>(layout.slots), .room = static_cast<int32_t>(room)}};
}

void Sequence::Impl::WriteTasksOfStep() {
  DeviceStep& d = *device_step;
  const StepArrays& at = d.at;
  const StepShape& shape = d.shape;
  *d.Here(at.n) = static_cast<int32_t>(visible());
  *d.Here(at.first) = static_cast<int32_t>(first);
  *d.Here(at.zero) = 0;
  if (d.way != DeviceStep::Way::kChoose) return;
  const auto most = static_cast<size_t>(shape.most), group = static_cast<size_t>(shape.group), turns = static_cast<size_t>(shape.turns);
  const ResidencyRule residency = selector().Residency();
  // Scores are pooled over the scans before a head's turn: as many as the rule says, and at least one however long a choice is kept.
  const int64_t window = d.rule.may_inherit && d.rule.max_age == 0 ? residency.refresh : std::max(residency.pool, d.rule.max_age + 2);
  std::vector<int32_t>& due = d.turning[step % 2];
  due.clear();
  for (size_t u = 0; u < static_cast<size_t>(shape.units()); ++u) {
    const Unit& unit = UnitAt(u);
    const HeadState& head = HeadAt(u);
    step::SelectTask& task = d.Here(at.select)[u] = {.source = {.q = d.io.q + int64_t{unit.first_head} * shape.head_dim, .blocks = head.codes,
                                                                .rows = head.ring, .ring_rows = layout.ring, .n = at.n}};
    task.rule = {.sinks = d.rule.sinks, .local = d.rule.local, .k = d.rule.k, .hold = d.rule.may_inherit ? at.hold + u : nullptr, .room = shape.most,
                 .chosen = at.chosen + u * most, .count = at.count + u, .lse_all = at.lse_all + u * group, .lse_out = at.lse_out + u * group};
    d.pooled[u] = 0;
    if (layout.slots == 0) continue;
    if (d.rule.theta > 0) {
      task.rule.resident = StateOf(u).resident;
      task.rule.log_theta = static_cast<float>(std::log(unit.ThetaNow(d.rule)));
    }
    if (turns == 0 || unit.pooled == nullptr) continue;
    const int64_t offset = residency.stagger ? static_cast<int64_t>(u) : 0, into = (step + offset) % residency.refresh;
    const int64_t until = (residency.refresh - into) % residency.refresh;  // steps to this head's turn
    if (until < window) {
      d.pooled[u] = 1;
      task.rule.pooled = unit.pooled;
      task.rule.pool_level = task.rule.lse_all;
      task.rule.pool_reset = unit.pool_restart;
    }
    if (until == 0) due.push_back(static_cast<int32_t>(u));
  }
  if (layout.slots > 0 && turns > 0) WriteTurns();
}

// The slow clock's part: what the heads whose turn it is want, and what those of the step before are to get.
void Sequence::Impl::WriteTurns() {
  DeviceStep& d = *device_step;
  const StepArrays& at = d.at;
  const auto turns = static_cast<size_t>(d.shape.turns), slots = static_cast<size_t>(layout.slots), parity = static_cast<size_t>(step % 2);
  const ResidencyRule residency = selector().Residency();
  const std::span<std::byte> range = cache->host->range();
  const auto wanted_rows = static_cast<int32_t>(std::min<double>(residency.factor * d.rule.k, layout.slots - StepArrays::SpareRoom(layout.slots)));
  // The task of the i-th unit that turns in a step of this parity. Nobody's: nothing is wanted, and nothing is on its way.
  const auto task_of = [&](size_t of, size_t i) {
    const std::vector<int32_t>& units = d.turning[of];
    const size_t list = of * turns + i, rows = list * slots;
    step::RefreshTask task{.wanted = at.wanted + rows, .wanted_count = at.zero, .n = at.n, .ring_rows = layout.ring, .position = at.position + rows,
                           .from_piece = at.sources + rows, .to_piece = at.targets + rows, .count = at.fetched + list};
    if (i >= units.size()) return task;
    const auto unit = static_cast<size_t>(units[i]);
    task.at = StateOf(unit);
    task.host = HostRowsOf(unit);
    task.wanted_count = at.wanted_count + list;
    return task;
  };
  for (size_t i = 0; i < turns; ++i) {
    d.Here(at.refresh)[i] = task_of(parity, i);
    step::RefreshTask& land = d.Here(at.land)[i] = task_of(1 - parity, i);
    const bool arrives = i < d.turning[1 - parity].size();
    if (!arrives) land.count = at.zero;
    step::GatherTask& gather = d.Here(at.gather)[i] = {.from = range.data(), .from_piece = land.from_piece, .to_piece = land.to_piece, .count = land.count,
                                                       .from_limit = static_cast<int64_t>(range.size() / geometry().stored_row_bytes())};
    if (arrives) {
      gather.to = reinterpret_cast<std::byte*>(HeadAt(static_cast<size_t>(d.turning[1 - parity][i])).slots);
      gather.to_limit = layout.slots;
    }
    // What the ring keeps until the next turn needs no slot.
    const size_t list = parity * turns + i;
    step::ChooseTask& want = d.Here(at.want)[i] = {.n = at.zero};
    want.rule = {.sinks = d.rule.sinks, .local = std::max(d.rule.local, layout.ring - residency.refresh - 2), .room = layout.slots,
                 .chosen = at.wanted + list * slots, .count = at.wanted_count + list, .lse_all = at.unused + i};
    if (i >= d.turning[parity].size()) continue;
    const auto turning = static_cast<size_t>(d.turning[parity][i]);
    const Unit& unit = UnitAt(turning);
    want.z = unit.pooled;
    want.z_stride = layout.stride;
    // Heads that have not looked at anything since their last turn want nothing new.
    const bool looked = unit.pooled_scans > 0 || (d.pooled[turning] && !d.rule.may_inherit);
    if (looked) want.n = at.n, want.rule.k = wanted_rows;
    step_report.refreshes += looked;
  }
}

// --- what is enqueued -------------------------------------------------------------------------------------------------------------

Status Sequence::Impl::EnqueueBehind(void* stream) {
  const DeviceStep& d = *device_step;
  if (d.way != DeviceStep::Way::kChoose || layout.slots == 0 || d.shape.turns == 0) return {};
  constexpr int32_t kBlocks = 8;  // enough for what the link gives; the others compute
  return cache->resources.step_kernels->gather({.tasks = d.at.gather, .num_tasks = d.shape.turns,
                                                .piece_bytes = static_cast<int32_t>(geometry().stored_row_bytes()), .rows = geometry().rows,
                                                .head_dim = geometry().head_dim, .max_blocks = kBlocks}, stream);
}

Status Sequence::Impl::EnqueueLayer(int32_t layer, void* stream) {
  const DeviceStep& d = *device_step;
  const step::StepKernels& kernels = *cache->resources.step_kernels;
  const StepShape& shape = d.shape;
  const size_t from = static_cast<size_t>(layer) * static_cast<size_t>(shape.kv_heads);
  const CodeFormat format = selector().NeedsCodes() ? cache->options.codes : CodeFormat{};
  // Gates go with append, look-ups of few heads with the choice: a launch costs more than they do.
  step::GateParams gates;
  if (d.way == DeviceStep::Way::kChoose && d.rule.may_inherit) {
    const float tau = d.rule.tau <= -1 ? -3.0f : static_cast<float>(d.rule.tau);  // -2 is a cosine of no use
    gates = {.tasks = d.at.gate + from, .num_tasks = shape.kv_heads, .group = shape.group, .head_dim = shape.head_dim, .tau = tau,
             .max_age = d.rule.max_age > 0 ? d.rule.max_age : kOldChoice};
  }
  PREHOC_RETURN_IF_ERROR(kernels.append({.tasks = d.at.append + from, .num_tasks = shape.kv_heads, .max_count = 1, .format = format,
                                         .head_dim = shape.head_dim, .host_format = geometry().rows, .gate = gates}, stream));
  if (d.way == DeviceStep::Way::kChoose) {
    const bool within = shape.kv_heads <= kMostResolvedWithin;
    PREHOC_RETURN_IF_ERROR(kernels.select({.tasks = d.at.select + from, .num_tasks = shape.kv_heads, .max_n = shape.max_tokens, .format = format,
                                           .group = shape.group, .head_dim = shape.head_dim, .gated = d.rule.may_inherit,
                                           .resolves = within ? d.at.resolve + from : nullptr, .workspace = d.at.select_space,
                                           .workspace_bytes = shape.select_space}, stream));
    if (!within) {
      PREHOC_RETURN_IF_ERROR(kernels.resolve({.tasks = d.at.resolve + from, .num_tasks = shape.kv_heads, .group = shape.group,
                                              .head_dim = shape.head_dim}, stream));
    }
  }
  return kernels.attend({.tasks = d.at.attend + from, .num_tasks = shape.kv_heads, .max_rows = d.max_rows, .host_format = geometry().rows,
                         .group = shape.group, .head_dim = shape.head_dim, .workspace = d.at.attend_space, .workspace_bytes = shape.attend_space}, stream);
}

Status Sequence::Impl::EnqueueLast(void* stream) {
  const DeviceStep& d = *device_step;
  const StepShape& shape = d.shape;
  if (d.way != DeviceStep::Way::kChoose || layout.slots == 0) return {};
  const step::StepKernels& kernels = *cache->resources.step_kernels;
  if (shape.turns > 0) PREHOC_RETURN_IF_ERROR(kernels.land({.tasks = d.at.land, .num_tasks = shape.turns, .max_n = shape.max_tokens}, stream));
  PREHOC_RETURN_IF_ERROR(kernels.adopt({.tasks = d.at.adopt, .num_tasks = shape.units()}, stream));
  if (shape.turns == 0) return {};
  PREHOC_RETURN_IF_ERROR(kernels.choose({.tasks = d.at.want, .num_tasks = shape.turns, .max_n = shape.max_tokens, .group = 1, .rule = GroupRule::kMaxLogit,
                                         .workspace = d.at.choose_space, .workspace_bytes = shape.choose_space}, stream));
  return kernels.refresh({.tasks = d.at.refresh, .num_tasks = shape.turns, .max_n = shape.max_tokens}, stream);
}

// --- what came of it --------------------------------------------------------------------------------------------------------------

// The layer's results, which `results` has, become what the units and the report say.
Status Sequence::Impl::TakeLayer(int32_t layer_index) {
  DeviceStep& d = *device_step;
  const StepShape& shape = d.shape;
  const auto group = static_cast<size_t>(shape.group);
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  FastStep& s = *scratch;
  s.Reset(layer_index, layer.units, layer.heads.size());
  s.u = step;
  s.n = static_cast<int32_t>(visible());
  s.rule = d.rule;
  const auto row_bytes = static_cast<int64_t>(geometry().row_bytes());
  for (size_t i = 0; i < layer.units.size(); ++i) {
    const size_t u = static_cast<size_t>(layer_index) * static_cast<size_t>(shape.kv_heads) + i;
    Unit& unit = layer.units[i];
    UnitStep& now = s.units[i];
    const bool everything = d.way == DeviceStep::Way::kEverything, held = !everything && d.rule.may_inherit && d.Here(d.at.hold)[u] != 0;
    now.way = everything ? Way::kEverything : held ? Way::kInherit : Way::kSelect;
    std::copy_n(d.Here(d.at.lse) + u * group, group, now.lse.begin());
    std::copy_n(d.Here(d.at.lse_all) + u * group, group, now.lse_all.begin());
    std::copy_n(d.Here(d.at.lse_out) + u * group, group, now.lse_out.begin());
    NoteAttended(s, i);
    unit.cosine = -2;
    if (!everything) {
      const int32_t num = d.Here(d.at.count)[u];
      if (num < 0 || num > shape.most) {
        return {StatusCode::kCorrupt, "layer " + std::to_string(layer_index) + ", KV head " + std::to_string(i) + " chose " + std::to_string(num) +
                                          " positions of at most " + std::to_string(shape.most)};
      }
      unit.attended.middle.clear();
      unit.attended.unread = num;
      if (held) {
        step_report.bytes_gate += unit.heads * int64_t{shape.head_dim} * static_cast<int64_t>(2 * sizeof(float));
      } else {
        unit.has_choice = true;
        unit.chosen_at = s.u;
        unit.local_left = s.n - s.rule.local;
        const int64_t coded = s.n / cache->options.codes.group_tokens * cache->options.codes.group_tokens;
        step_report.bytes_codes += coded / cache->options.codes.group_tokens *
                                   static_cast<int64_t>(kernels().code_block_bytes(cache->options.codes, shape.head_dim));
        step_report.bytes_exact_keys += (s.n - coded) * row_bytes / 2;
        if (d.pooled[u]) unit.pooled_scans = unit.pool_restart ? 1 : unit.pooled_scans + 1, unit.pool_restart = false;
      }
      const int64_t missed = d.Here(d.at.misses)[u] - d.misses[u];
      d.misses[u] += missed;
      step_report.rows_in_step += missed;
      step_report.triples_in_step += missed > 0;
      step_report.rows_host += missed;
      step_report.rows_device -= missed;  // Account() counts every attended row there first
      step_report.bytes_from_host += missed * static_cast<int64_t>(geometry().stored_row_bytes());
    }
    step_report.bytes_attended += unit.attended.size() * row_bytes;
  }
  Account(s);
  return {};
}

// A look at a layer that has just been computed, before the next one overwrites its queries.
Status Sequence::Impl::AfterLayer(int32_t layer_index) {
  DeviceStep& d = *device_step;
  const DeviceMemory& device = *cache->resources.device;
  PREHOC_RETURN_IF_ERROR(device.Read(d.at.results, d.results.size(), d.results.data()));
  PREHOC_RETURN_IF_ERROR(TakeLayer(layer_index));
  FastStep& s = *scratch;
  const size_t floats = static_cast<size_t>(geometry().heads) * static_cast<size_t>(geometry().head_dim);
  std::vector<float> q(floats), out(floats);
  PREHOC_RETURN_IF_ERROR(device.Read(d.io.q, floats * sizeof(float), q.data()));
  PREHOC_RETURN_IF_ERROR(device.Read(d.io.out, floats * sizeof(float), out.data()));
  s.in = {.q = q.data(), .out = out.data()};
  for (Unit& unit : layers[static_cast<size_t>(layer_index)].units) PREHOC_RETURN_IF_ERROR(ReadAttended(layer_index, unit.kv_head, &unit.attended));
  PREHOC_RETURN_IF_ERROR(Audit(s));
  s.in = {};
  ++next_layer;
  return {};
}

// The list that a step left on the device.
Status Sequence::Impl::ReadAttended(int32_t layer, int32_t kv_head, AttendedSet* set) const {
  if (set->unread < 0) return {};
  const size_t unit = static_cast<size_t>(layer) * static_cast<size_t>(geometry().kv_heads) + static_cast<size_t>(kv_head);
  set->middle.resize(static_cast<size_t>(set->unread));
  PREHOC_RETURN_IF_ERROR(cache->resources.device->Read(device_step->at.chosen + unit * static_cast<size_t>(device_step->shape.most),
                                                       set->middle.size() * sizeof(int32_t), set->middle.data()));
  set->unread = -1;
  return {};
}

int64_t Sequence::Impl::HeldByDevice() const {
  std::vector<int32_t> owner(static_cast<size_t>(device_step->shape.units()) * static_cast<size_t>(layout.slots));
  if (!cache->resources.device->Read(device_step->at.owner, owner.size() * sizeof(int32_t), owner.data()).ok()) return 0;
  return std::count_if(owner.begin(), owner.end(), [](int32_t position) { return position >= 0; });
}

// After the stream was waited for.
Status Sequence::Impl::TakeStep() {
  ScopedTimer timer(*cache->resources.clock, &step_report.times.plan);
  DeviceStep& d = *device_step;
  PREHOC_RETURN_IF_ERROR(cache->resources.device->Read(d.at.results, d.results.size(), d.results.data()));
  if (*d.Here(d.at.far) != 0) {
    return {StatusCode::kCorrupt, "a step on the device chose " + std::to_string(*d.Here(d.at.far)) + " positions whose rows are not in host memory"};
  }
  if (d.pause && next_layer != geometry().layers) {
    return {StatusCode::kInvalid, "End() of a step with pauses after AfterLayer() of " + std::to_string(next_layer) + " of " +
                                      std::to_string(geometry().layers) + " layers"};
  }
  for (; next_layer < geometry().layers; ++next_layer) PREHOC_RETURN_IF_ERROR(TakeLayer(next_layer));
  for (LayerState& layer : layers) {
    if (selector().NeedsCodes()) layer.coded = visible() / cache->index_group() * cache->index_group();
  }
  if (layout.slots > 0 && d.way == DeviceStep::Way::kChoose && d.shape.turns > 0) {
    const size_t parity = static_cast<size_t>(step % 2);
    for (size_t i = 0; i < d.turning[parity].size(); ++i) {
      const auto u = static_cast<size_t>(d.turning[parity][i]);
      Unit& unit = UnitAt(u);
      const int64_t fetched = d.Here(d.at.fetched)[parity * static_cast<size_t>(d.shape.turns) + i];
      step_report.rows_behind += fetched;
      step_report.bytes_from_host += fetched * static_cast<int64_t>(geometry().stored_row_bytes());
      unit.pool_restart = true;
      unit.pooled_scans = 0;
    }
  }
  d.planned = d.pause = false;
  return {};
}

}  // namespace prehoc
