#include <algorithm>
#include <numeric>
#include <random>

#include "cache/internal/fast_step.h"
#include "cache/internal/labels.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {
namespace {
// Chunks with rows written under sparse attention depend on every choice before them: a key that nobody else can have.
std::string NewBranch() {
  std::random_device device;
  std::string branch = "branch:";
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = device();
    branch.append(reinterpret_cast<const char*>(&word), sizeof word);
  }
  return branch;
}

std::vector<Unit> MakeUnits(const CacheShared& cache) {
  const KvGeometry& geometry = cache.geometry();
  const int32_t together = cache.selector->ChoosesPerQueryHead() ? 1 : geometry.group();
  std::vector<Unit> units;
  for (int32_t head = 0; head < geometry.heads; head += together) {
    Unit unit;
    unit.first_head = head;
    unit.heads = together;
    unit.kv_head = head / geometry.group();
    unit.dropped.assign(static_cast<size_t>(together), 0);
    unit.dropped_bound.assign(static_cast<size_t>(together), -1);
    units.push_back(std::move(unit));
  }
  return units;
}

// The largest choice and local window at any length of the sequence, by asking the selector itself.
struct Extent {
  int32_t local = 0, middle = 0;
  bool chooses = false;
};
Extent ExtentOf(const Selector& selector, int32_t num_layers, int64_t max_tokens) {
  Extent extent;
  for (int64_t n = max_tokens; n > 0; n = n * 3 / 4) {
    // The first layers may attend to everything (quest.dense_layers), the last ones see less (PSAW).
    for (const int32_t layer : {0, num_layers - 1}) {
      const StepRule rule = selector.Rule({.layer = layer, .layers = num_layers, .step = 1, .n = n});
      extent.local = std::max({extent.local, rule.local, rule.page});
      if (rule.attend_all || rule.scorer == Scorer::kNone) continue;
      extent.chooses = true;
      const int32_t wanted = selector.options().budget.mass > 0 ? selector.options().budget.MiddleCap(n) : rule.k;
      extent.middle = std::max(extent.middle, wanted + 2 * rule.dilate_m * rule.dilate_r);
    }
  }
  return extent;
}
}  // namespace

int64_t AttendedSet::size() const {
  const int64_t chosen = unread >= 0 ? unread : static_cast<int64_t>(middle.size());
  return everything ? int64_t{sinks} + n - lo : int64_t{sinks} + chosen + n - left;
}

std::vector<int32_t> AttendedSet::Positions() const {
  std::vector<int32_t> all(static_cast<size_t>(sinks));
  std::iota(all.begin(), all.end(), 0);
  if (!everything) all.insert(all.end(), middle.begin(), middle.end());
  for (int32_t i = everything ? lo : left; i < n; ++i) all.push_back(i);
  return all;
}

Result<std::unique_ptr<Sequence::Impl>> Sequence::Impl::Open(CacheShared* shared, const SequenceOptions& options) {
  const KvGeometry& geometry = shared->geometry();
  const Selector& selector = *shared->selector;
  if (options.device_slots < 0) {
    return {StatusCode::kInvalid, "device_slots = " + std::to_string(options.device_slots) + " is negative; 0 means as many as fit"};
  }
  if (options.max_tokens < 1 || options.max_tokens > INT32_MAX / 2) {
    return {StatusCode::kInvalid, "max_tokens = " + std::to_string(options.max_tokens) + " is not between 1 and 2^30"};
  }
  const int64_t chunks = CeilDiv(options.max_tokens, geometry.chunk_tokens);
  if (shared->host->capacity_blocks() < chunks + geometry.layers) {
    return {StatusCode::kOutOfSpace,
            "a host budget of " + FormatBytes(static_cast<double>(shared->options.host_budget)) +
                " does not hold one layer of " + std::to_string(options.max_tokens) + " tokens and the last chunk of all: " +
                FormatBytes(static_cast<double>((chunks + geometry.layers) * static_cast<int64_t>(shared->host->block_stride()))) +
                " is needed"};
  }

  const Extent extent = ExtentOf(selector, geometry.layers, options.max_tokens);
  const ResidencyRule residency = selector.Residency();
  DeviceRequest request;
  request.geometry = geometry;
  request.max_tokens = options.max_tokens;
  const DeviceMemory& device = *shared->resources.device;
  const uint64_t left = device.budget() - std::min(device.budget(), device.used());
  request.bytes = options.device_bytes > 0 ? std::min<uint64_t>(options.device_bytes, left) : left;
  request.sinks = selector.options().Kept().sinks;
  // What leaves the local window stays until a refresh can have seen it.
  // A window whose edge is held falls behind by so many positions.
  const auto held = static_cast<int32_t>(std::min<int64_t>(selector.HeldSteps(), options.max_tokens));
  request.ring_min = extent.local + held + shared->index_group() +
                     (residency.turns() ? residency.refresh + residency.lag + 1 : 0);
  request.slots_min = extent.chooses ? std::max(extent.middle, 1) : 0;
  request.slots_max = static_cast<int32_t>(std::min<int64_t>(options.device_slots, options.max_tokens));
  request.units = static_cast<int32_t>(MakeUnits(*shared).size());
  request.code_group = shared->index_group();
  if (selector.NeedsCodes()) {
    request.code_block_bytes = shared->resources.kernels->code_block_bytes(shared->options.codes, geometry.head_dim);
  }
  request.pages = selector.NeedsPages();
  if (selector.NeedsLabels()) request.label_bytes = LabelFormat::Of(selector.options().hshare, geometry.head_dim).bytes();
  request.page_tokens = selector.NeedsCodes() ? 16 : selector.PageTokens();
  // Without turns scores are pooled at the prompt's end alone, layer by layer.
  const bool each = residency.turns() || selector.options().kind != SelectorKind::kTwoClock;
  request.pool_layers = residency.factor <= 0 ? 0 : each ? geometry.layers : 1;
  request.scores = extent.chooses;
  request.errors = extent.chooses && selector.NeedsErrorBounds();
  StepShape shape;
  const int32_t most_chosen = static_cast<int32_t>(std::min<int64_t>(extent.chooses ? extent.middle : 0, options.max_tokens));
  Result<DeviceLayout> fit = Status{StatusCode::kUnsupported, "no whole steps"};
  if (ShapeSteps(*shared, options.max_tokens, most_chosen, &shape)) {
    DeviceRequest with_steps = request;
    with_steps.steps = &shape;
    if (shape.turns > 0) with_steps.ring_min += residency.refresh + 1;  // what a turn does not want stays until the next one's rows are there
    fit = DeviceLayout::Fit(with_steps);
  }
  // A budget that has no room for them is no reason to refuse.
  if (!fit.ok()) fit = DeviceLayout::Fit(request);
  PREHOC_ASSIGN_OR_RETURN(const DeviceLayout layout, std::move(fit));
  PREHOC_ASSIGN_OR_RETURN(DeviceBuffer buffer, shared->resources.device->Allocate(layout.bytes, "sequence"));

  auto impl = std::make_unique<Impl>(shared, layout, std::move(buffer), options, ChunkKeyChain(shared->KeyRoot("")));
  impl->Carve(request);
  impl->CarveSteps(shape);
  return impl;
}

Sequence::Impl::Impl(CacheShared* shared, const DeviceLayout& device_layout, DeviceBuffer buffer,
                     const SequenceOptions& sequence_options, ChunkKeyChain root)
    : cache(shared), layout(device_layout), max_tokens(sequence_options.max_tokens),
      observer(sequence_options.observer), sinks(shared->options.selector.Kept().sinks), memory(std::move(buffer)), variant(sequence_options.variant),
      dither_seed(sequence_options.dither_seed), branch(NewBranch()), chain(root),
      next_chain(std::move(root)), scratch(std::make_unique<FastStep>()) {}

Sequence::Impl::~Impl() {
  DropLayers();
  DropStepPins();
}

void Sequence::Impl::Carve(const DeviceRequest& request) {
  const auto num_layers = static_cast<size_t>(geometry().layers);
  const auto num_heads = static_cast<size_t>(geometry().kv_heads);
  std::byte* base = memory.data();
  // Bitmaps are read and written by host code; kernels get those that they need with their tasks.
  const auto words = static_cast<size_t>((max_tokens + 63) / 64);
  if (!cache->resources.device->host_accessible()) bitmaps.assign(num_layers * num_heads * 2 * words, 0);
  layers.resize(num_layers);
  for (size_t l = 0; l < num_layers; ++l) {
    LayerState& layer = layers[l];
    layer.units = MakeUnits(*cache);
    const size_t pool = l % static_cast<size_t>(std::max(layout.pool_layers, 1));
    for (size_t u = 0; u < layer.units.size() && layout.pool_layers > 0; ++u) {
      layer.units[u].pooled = reinterpret_cast<float*>(base + layout.pool_at) +
                              static_cast<int64_t>(pool * layer.units.size() + u) * layout.stride;
    }
    for (size_t h = 0; h < num_heads; ++h) {
      std::byte* at = base + (l * num_heads + h) * layout.head_bytes;
      HeadState head;
      head.sinks = reinterpret_cast<Half*>(at + layout.sinks_at);
      head.ring = reinterpret_cast<Half*>(at + layout.ring_at);
      head.slots = reinterpret_cast<Half*>(at + layout.slots_at);
      if (request.code_block_bytes > 0) head.codes = at + layout.codes_at;
      if (request.pages) {
        head.page_lo = reinterpret_cast<Half*>(at + layout.lo_at);
        head.page_hi = reinterpret_cast<Half*>(at + layout.hi_at);
      }
      if (request.label_bytes > 0) head.labels = at + layout.labels_at;
      auto* slotted = reinterpret_cast<uint64_t*>(at + layout.slotted_at);
      auto* resident = reinterpret_cast<uint64_t*>(at + layout.resident_at);
      if (!bitmaps.empty()) {
        slotted = bitmaps.data() + (l * num_heads + h) * 2 * words;
        resident = slotted + words;
      }
      head.residency = HeadResidency(slotted, resident, max_tokens, layout.slots);
      layer.heads.push_back(std::move(head));
    }
  }
  if (request.scores) z_ = reinterpret_cast<float*>(base + layout.z_at);
  if (request.errors) err_ = reinterpret_cast<float*>(base + layout.err_at);
}

Status Sequence::Impl::Begin(std::span<const int32_t> new_tokens, int64_t prompt_length) {
  const auto added = static_cast<int64_t>(new_tokens.size());
  if (open) return {StatusCode::kInvalid, "Begin() while a call is open: End() or Rollback() it first"};
  if (added == 0) return {StatusCode::kInvalid, "Begin() without tokens"};
  if (prompt_length == 0 && added != 1) {
    return {StatusCode::kInvalid, "decode takes one token at a time, not " + std::to_string(added)};
  }
  if (prompt_length != 0 && length + added > prompt_length) {
    return {StatusCode::kInvalid, "tokens up to " + std::to_string(length + added) + " in a prompt of " +
                                      std::to_string(prompt_length)};
  }
  if (length + added > max_tokens) {
    return {StatusCode::kOutOfSpace, "token " + std::to_string(length + added) + " is beyond max_tokens = " +
                                         std::to_string(max_tokens)};
  }
  if (prompt_length != 0) PREHOC_RETURN_IF_ERROR(LeaveSteps());
  if (length == 0) {
    method = MethodOf(prompt_length);
    chain = next_chain = ChunkKeyChain(cache->KeyRoot(method));
  }
  if (std::exchange(unsealed, false)) {
    for (int32_t l = 0; l < geometry().layers; ++l) {
      const LayerState& layer = layers[static_cast<size_t>(l)];
      SealChunks(l, static_cast<int64_t>(layer.blocks.size() - layer.tail_pins.size()), chain.size());
    }
  }
  first = length;
  count = added;
  prompt = prompt_length;
  next_layer = filled_layers = 0;
  start_layer = -1;
  step_report = SequenceReport{};
  tokens.resize(static_cast<size_t>(length));
  tokens.insert(tokens.end(), new_tokens.begin(), new_tokens.end());

  // Hashes of the chunks that these tokens complete.
  const int64_t size = geometry().chunk_tokens;
  if (visible() / size > length / size) {
    next_chain = chain;
    for (int64_t chunk = length / size; chunk < visible() / size; ++chunk) {
      const auto chunk_tokens = std::span(tokens).subspan(static_cast<size_t>(chunk * size), static_cast<size_t>(size));
      next_chain.Append(chunk_tokens, ChunkIsShared(chunk) ? std::string_view{} : std::string_view{branch});
    }
  }
  // A position that leaves the ring is gone from the device, unless a slot holds it. Rollback does not bring it back.
  const int64_t ring_end = std::max<int64_t>(ring_begin, visible() - layout.ring);
  for (LayerState& layer : layers) {
    for (HeadState& head : layer.heads) {
      head.residency.LeaveRing(ring_begin, std::min(ring_end, length));
      head.residency.EnterRing(std::max(ring_end, length), visible());
    }
  }
  ring_begin = ring_end;
  if (decoding()) ++step;
  began_at = cache->resources.clock->NowNanos();
  if (decoding()) {
    call_trace.emplace(tracer(), TraceWord("step")).Say("step", step).Say("position", first);
  } else {
    call_trace.emplace(tracer(), TraceWord("prefill")).Say("first", first).Say("tokens", count);
  }
  open = true;
  return {};
}

bool Sequence::Impl::ChunkIsShared(int64_t chunk) const {
  return (chunk + 1) * geometry().chunk_tokens <= (ExactNow() ? visible() : exact_tokens);
}

bool Sequence::Impl::ExactNow() const {
  const SelectorOptions& selected = cache->options.selector;
  const bool freezes = selected.kind == SelectorKind::kEtf || selected.kind == SelectorKind::kCpe;
  // Freezing by chunk depends on where the pieces of prefill end, which no key tells.
  if (freezes && selected.etf.n == EtfOptions::Extent::kChunk) return false;
  if (exact_tokens != first) return false;
  return decoding() ? cache->options.selector.kind == SelectorKind::kDense : MethodOf(prompt) == method;
}

Status Sequence::Impl::CheckCall(LayerId layer, bool decode) const {
  if (!open) return {StatusCode::kInvalid, "a layer was given without Begin()"};
  if (layer.value() != next_layer) {
    return {StatusCode::kInvalid, "layer " + std::to_string(layer.value()) + " was given, layer " +
                                      std::to_string(next_layer) + " is next"};
  }
  if (decode != decoding()) {
    return {StatusCode::kInvalid, decode ? "Attend() within a prompt: use Prefill()" : "Prefill() in decode: use Attend()"};
  }
  return {};
}

Status Sequence::Impl::EnsureTails(LayerState& layer, int64_t end) {
  const int64_t size = geometry().chunk_tokens;
  while (static_cast<int64_t>(layer.blocks.size()) * size < end) {
    layer.blocks.reserve(layer.blocks.size() + 1);  // both lists grow, or none
    layer.tail_pins.reserve(layer.tail_pins.size() + 1);
    PREHOC_ASSIGN_OR_RETURN(BlockRef block, cache->host->NewTail());
    PREHOC_ASSIGN_OR_RETURN(BlockPin pin, cache->host->Pin(block));
    layer.blocks.push_back(std::move(block));
    layer.tail_pins.push_back(std::move(pin));
  }
  return {};
}

void Sequence::Impl::SealChunks(int32_t layer_index, int64_t first_chunk, int64_t end_chunk) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  if (first_chunk < end_chunk) {
    // Copies under way may read from the block that is to be sealed.
    for (PendingFetch& fetch : layer.pending) {
      Arrive(fetch, layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(fetch.kv_head)]).IgnoreError();  // LandPending() asks again
      fetch.sources.clear();
    }
  }
  for (int64_t chunk = first_chunk; chunk < end_chunk; ++chunk) {
    if (!cache->options.persist_decode && !ChunkIsShared(chunk)) return;  // stays a tail, and with it all after it
    PREHOC_CHECK(!layer.tail_pins.empty());
    layer.tail_pins.erase(layer.tail_pins.begin());
    BlockRef& block = layer.blocks[static_cast<size_t>(chunk)];
    const ChunkIndex index(static_cast<int32_t>(chunk));
    const ChunkKeyChain& keys = chunk < chain.size() ? chain : next_chain;
    try {
      block = cache->host->Seal(block, keys.Key(index, LayerId(layer_index)), keys.Origin(index));
    } catch (const std::bad_alloc&) {  // stays a tail, too, until the next call seals it
      unsealed = true;
      layer.tail_pins.insert(layer.tail_pins.begin(), std::move(*cache->host->TryPin(block)));
      return;
    }
  }
}

// Rows go to their host block and, unless it is made anew, to the ring and the sinks, which are read without it.
Status Sequence::Impl::AppendRows(int32_t layer_index, const LayerInput& in, int64_t begin, int64_t added) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const int64_t size = geometry().chunk_tokens;
  const int64_t dim = geometry().head_dim;
  const int64_t stride = dim * geometry().kv_heads;
  std::vector<AppendTask>& tasks = scratch->append;
  tasks.clear();
  for (int64_t at = begin; at < begin + added;) {
    const int64_t chunk = at / size;
    const int64_t run = std::min((chunk + 1) * size, begin + added) - at;
    std::byte* block = TailBytes(layer, chunk);
    for (int32_t h = 0; h < geometry().kv_heads; ++h) {
      AppendTask task;
      task.k = in.k + (at - begin) * stride + h * dim;
      task.v = in.v + (at - begin) * stride + h * dim;
      task.stride = stride;
      task.rows = block + static_cast<size_t>(h) * geometry().head_block_bytes() + static_cast<size_t>(at % size) * geometry().stored_row_bytes();
      task.count = static_cast<int32_t>(run);
      tasks.push_back(task);
    }
    at += run;
  }
  const auto copy = [&](int64_t from, int64_t to, auto&& target) {
    if (from >= to) return;
    for (int32_t h = 0; h < geometry().kv_heads; ++h) {
      const int64_t offset = (from - begin) * stride + h * dim;
      tasks.push_back({.k = in.k + offset, .v = in.v + offset, .stride = stride, .rows = target(layer.heads[static_cast<size_t>(h)]),
                       .count = static_cast<int32_t>(to - from), .widened = true});
    }
  };
  if (!repairing) {
    for (int64_t at = std::max(begin, ring_begin); at < begin + added;) {
      const int64_t end = std::min(at + layout.ring - at % layout.ring, begin + added);  // as far as the ring runs on
      copy(at, end, [&](const HeadState& head) { return head.ring + at % layout.ring * 2 * dim; });
      at = end;
    }
    copy(begin, std::min<int64_t>(begin + added, sinks), [&](const HeadState& head) { return head.sinks + begin * 2 * dim; });
  }
  return kernels().append({.tasks = tasks, .head_dim = geometry().head_dim, .format = geometry().rows, .on_device = in.on_device}, cache->launch());
}

std::byte* Sequence::Impl::TailBytes(LayerState& layer, int64_t chunk) {
  if (repairing) return repair_pins[static_cast<size_t>(next_layer)].bytes().data();
  const int64_t first_tail = static_cast<int64_t>(layer.blocks.size() - layer.tail_pins.size());
  PREHOC_CHECK(chunk >= first_tail);
  return layer.tail_pins[static_cast<size_t>(chunk - first_tail)].bytes().data();
}

Status Sequence::Impl::End() {
  if (!open) return {StatusCode::kInvalid, "End() without Begin()"};
  if (repairing) return {StatusCode::kInvalid, "End() of a repair: use EndRepair()"};
  const bool on_device = device_step != nullptr && device_step->planned;
  if (on_device) PREHOC_RETURN_IF_ERROR(TakeStep());
  if (next_layer != geometry().layers) {
    return {StatusCode::kInvalid, "End() after " + std::to_string(next_layer) + " of " + std::to_string(geometry().layers) +
                                      " layers"};
  }
  PREHOC_RETURN_IF_ERROR(FinishLayers(0));
  const bool prompt_done = !decoding() && visible() == prompt;
  if (prompt_done) PREHOC_RETURN_IF_ERROR(Settle({.release = true}));
  if ((decoding() && !on_device) || prompt_done) PREHOC_RETURN_IF_ERROR(SlowClock());

  const int64_t size = geometry().chunk_tokens;
  for (int32_t l = 0; l < geometry().layers; ++l) {
    LayerState& layer = layers[static_cast<size_t>(l)];
    SealChunks(l, static_cast<int64_t>(layer.blocks.size() - layer.tail_pins.size()), visible() / size);
  }
  if (ExactNow()) exact_tokens = visible();
  if (decoding()) {
    step_report.decode_steps = 1;
    store_was_read = store_was_read || step_report.bytes_from_disk > 0;
  } else {
    step_report.prompt_tokens = count;
    if (cache->health) cache->health->OnPrefill(first, count, cache->resources.clock->NowNanos() - began_at);
    last_prompt = prompt;
    step = 0;
    for (LayerState& layer : layers) {
      if (prompt_done) layer.queries.clear();  // for the maps of this prompt alone
    }
  }
  if (visible() / size > length / size) std::swap(chain, next_chain);  // Begin() made it anew; a copy might find no memory
  length = visible();
  report.Merge(step_report);
  call_trace.reset();
  open = false;
  return {};
}

void Sequence::Impl::Rollback() {
  if (!open) return;
  if (call_trace) call_trace->Say("rolled_back", 1);
  call_trace.reset();
  DropLayers();
  if (device_step != nullptr && device_step->planned) {
    // It broke off somewhere; what heads chose in it may be of any queries.
    LeaveSteps().IgnoreError();  // what cannot be read is forgotten, too
    for (LayerState& layer : layers) {
      for (Unit& unit : layer.units) unit.has_choice = false;
    }
  }
  if (decoding() && !repairing) --step;
  // Blocks that began with the announced tokens go; the one that was there keeps its earlier rows.
  const auto kept = static_cast<size_t>(CeilDiv(length, geometry().chunk_tokens));
  for (LayerState& layer : layers) {
    while (layer.blocks.size() > kept) {
      if (!layer.tail_pins.empty()) layer.tail_pins.pop_back();
      layer.blocks.pop_back();
    }
    layer.labelled = std::min(layer.labelled, length);
    ForgetQueries(layer);
    layer.coded = std::min(layer.coded, length / cache->index_group() * cache->index_group());
  }
  for (LayerState& layer : layers) {
    for (HeadState& head : layer.heads) {
      head.residency.Forget(length);  // rows of a prompt whose end was not reached
      head.residency.LeaveRing(length, visible());
    }
  }
  tokens.resize(static_cast<size_t>(length));
  start_layer = -1;
  repairing.reset();
  scratch->blocks.reset();
  repair_pins.clear();
  repair_blocks.clear();
  open = false;
}

Status Sequence::Impl::CheckInvariants() const {
  const int64_t n = open ? visible() : length;
  for (const LayerState& layer : layers) {
    if (!open && static_cast<int64_t>(layer.blocks.size()) < CeilDiv(length, geometry().chunk_tokens)) {
      return {StatusCode::kCorrupt, "a layer has fewer blocks than its length needs"};
    }
    for (size_t h = 0; h < layer.heads.size(); ++h) {
      int32_t pending = 0;
      for (const PendingFetch& fetch : layer.pending) {
        if (fetch.kv_head == static_cast<int32_t>(h)) pending += static_cast<int32_t>(fetch.slots.size());
      }
      PREHOC_RETURN_IF_ERROR(layer.heads[h].residency.CheckInvariants(ring_begin, n, pending));
    }
  }
  return {};
}

}  // namespace prehoc
