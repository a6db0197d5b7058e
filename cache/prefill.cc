// Many tokens of a prompt through one layer: rows to the host, index and ring as they fill, causal attention, and after the
// last token the first choice of every head.
#include <algorithm>

#include "base/half.h"
#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {

PrefillRule Sequence::Impl::RuleOfPrefill(int32_t layer) const {
  return selector().Prefill(layer, geometry().layers, prompt, visible());
}

Status Sequence::Impl::Prefill(int32_t layer_index, const LayerInput& in) {
  ScopedTimer timer(*cache->resources.clock, &step_report.times.prefill);
  TraceScope trace(tracer(), "prefill layer");
  trace.Say("layer", layer_index);
  if (in.q_skip < 0 || in.q_skip > count) {
    return {StatusCode::kInvalid, "q_skip = " + std::to_string(in.q_skip) + " of " + std::to_string(count) + " tokens"};
  }
  if (in.on_device && kernels().settle == nullptr) {
    return {StatusCode::kInvalid, "on_device: the kernels of this cache (" + std::string(kernels().name) +
                                      ") read host memory; copy q, k and v there"};
  }
  if (in.on_device && in.stream != nullptr) PREHOC_RETURN_IF_ERROR(kernels().follow({.stream = in.stream}, cache->launch()));
  Status status = RunPrefillLayer(layer_index, in);
  if (status.code() == StatusCode::kOutOfSpace && !behind.empty()) {  // what earlier layers hold may be what this one lacks
    PREHOC_RETURN_IF_ERROR(FinishLayers(0));
    status = RunPrefillLayer(layer_index, in);
  }
  PREHOC_RETURN_IF_ERROR(status);
  ++next_layer;
  if (LayersOverlap(in)) {
    // While the device attends: the next layer's blocks are made and its rows read, and layers before this one go to their tiers, unless
    // WhileOthersWork() has seen to that.
    PREHOC_RETURN_IF_ERROR(FinishLayers(2));
    if (next_layer < geometry().layers) PrepareNextLayer(next_layer);
    if (start_layer == filled_layers) PREHOC_RETURN_IF_ERROR(FillLayers(layer_index));  // the layer before, whose rows are in host memory
    TraceScope waiting(tracer(), "wait");
    PREHOC_RETURN_IF_ERROR(Settle({.results = true, .rows_but = 1}));
  }
  if (!repairing && visible() == prompt && in.q_skip < count) {
    TraceScope choosing(tracer(), "first choice");
    PREHOC_RETURN_IF_ERROR(Settle({.ahead = false}));  // this layer's rows are in host memory; the next one's may be on their way
    PREHOC_RETURN_IF_ERROR(Summarise(*behind.back()));
    const int64_t last = count - in.q_skip - 1;
    const auto row = static_cast<size_t>(geometry().heads) * static_cast<size_t>(geometry().head_dim);
    const float* query = in.q + last * static_cast<int64_t>(row);
    const float* before = in.q_pre_rope ? in.q_pre_rope + last * static_cast<int64_t>(row) : nullptr;
    std::vector<float> copies(in.on_device ? 2 * row : 0);
    if (in.on_device) {
      const DeviceMemory& device = *cache->resources.device;
      PREHOC_RETURN_IF_ERROR(device.Read(query, row * sizeof(float), copies.data()));
      if (before) PREHOC_RETURN_IF_ERROR(device.Read(before, row * sizeof(float), copies.data() + row));
      query = copies.data();
      if (before) before = copies.data() + row;
    }
    PREHOC_RETURN_IF_ERROR(FirstSelection(layer_index, query, before));
    if (FillsSlots() && selector().Residency().factor > 0 && cache->options.selector.kind != SelectorKind::kSharedCandidates) {
      PREHOC_RETURN_IF_ERROR(RankForStart(layer_index));  // before the next layer's scores take their place
      if (!LayersOverlap(in)) PREHOC_RETURN_IF_ERROR(FillLayers(next_layer));
    }
  }
  return LayersOverlap(in) ? Status() : FinishLayers(0);
}

Status Sequence::Impl::RunPrefillLayer(int32_t layer_index, const LayerInput& in) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  if (!repairing) PREHOC_RETURN_IF_ERROR(EnsureTails(layer, visible()));
  {
    TraceScope trace(tracer(), "append rows");
    PREHOC_RETURN_IF_ERROR(AppendRows(layer_index, in, first, count));
  }
  std::unique_ptr<PrefillLayer> now = std::move(ahead);
  if (!now || now->layer != layer_index) now = LookInto(layer_index);
  LayerBlocks& rows = *now->rows;
  if (!repairing) KeepQueries(layer, in);
  if (!repairing && visible() == prompt && selector().NeedsLabels()) {
    PREHOC_RETURN_IF_ERROR(BuildLabels(layer_index, rows, LastQueries(layer)));
  }
  if (in.q_skip < count) {
    PREHOC_RETURN_IF_ERROR(AttendPrefill(layer_index, rows, in, first + in.q_skip, count - in.q_skip));
  }
  // On a device attention is under way now, and hides what host code does for the index.
  if (!repairing) PREHOC_RETURN_IF_ERROR(IndexRows(layer_index, rows, visible()));
  step_report.prefill_frozen_rows += in.q_skip;
  behind.push_back(std::move(now));
  return {};
}

std::unique_ptr<PrefillLayer> Sequence::Impl::LookInto(int32_t layer_index) {
  const std::vector<BlockRef>& blocks = layers[static_cast<size_t>(layer_index)].blocks;
  auto look = std::make_unique<PrefillLayer>();
  look->layer = layer_index;
  look->blocks.assign(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(CeilDiv(visible(), geometry().chunk_tokens)));
  if (repairing) look->blocks.back() = repair_blocks[static_cast<size_t>(layer_index)];
  look->rows.emplace(cache->host.get(), geometry(), look->blocks, BlockUse::kStream);
  return look;
}

// Two layers hold blocks then: only where nothing has to leave host memory for that.
bool Sequence::Impl::LayersOverlap(const LayerInput& in) const {
  const int64_t blocks = CeilDiv(visible(), geometry().chunk_tokens) * geometry().layers;
  return in.on_device && !repairing && cache->host->capacity_blocks() >= blocks;
}

// What fails here is tried again, and told, when the layer comes.
void Sequence::Impl::PrepareNextLayer(int32_t layer_index) {
  TraceScope trace(tracer(), "read ahead");
  trace.Say("layer", layer_index);
  if (!EnsureTails(layers[static_cast<size_t>(layer_index)], visible()).ok() || complete() || first == 0) return;
  ahead = LookInto(layer_index);
  const auto runs = RunsUpTo(layer_index, *ahead->rows, first);
  bool begun = runs.ok();
  if (begun) {
    const std::vector<std::span<const RowRun>> tasks(runs->begin(), runs->end());
    begun = kernels().read_ahead({.tasks = tasks, .rows = static_cast<int32_t>(first), .total = static_cast<int32_t>(visible()),
                                  .head_dim = geometry().head_dim}, cache->launch()).ok();
  }
  if (!begun) ahead.reset();
}

Status Sequence::Impl::Summarise(PrefillLayer& done) {
  if (std::exchange(done.summarised, true) || repairing) return {};
  return AddKeysToSummaries(done.layer, *done.rows, first, visible());
}

Status Sequence::Impl::FinishLayers(size_t but) {
  if (behind.size() <= but) return {};
  TraceScope trace(tracer(), "finish layers");
  PREHOC_RETURN_IF_ERROR(Settle({.results = but == 0, .rows_but = static_cast<int32_t>(but)}));
  const int64_t size = geometry().chunk_tokens;
  while (behind.size() > but) {
    PrefillLayer& done = *behind.front();
    PREHOC_RETURN_IF_ERROR(Summarise(done));
    step_report.prefill_bytes_from_disk += done.rows->loaded() * static_cast<int64_t>(geometry().block_bytes());
    const int32_t layer_index = done.layer;
    behind.pop_front();
    // Chunks that began in this call are whole for good: from here on they may leave the host tier.
    if (repairing || first % size != 0) continue;
    const LayerState& layer = layers[static_cast<size_t>(layer_index)];
    SealChunks(layer_index, static_cast<int64_t>(layer.blocks.size() - layer.tail_pins.size()), visible() / size);
  }
  return {};
}

void Sequence::Impl::DropLayers() {
  if (open && !decoding()) Settle({}).IgnoreError();  // the call has its error, or none wants one
  behind.clear();
  ahead.reset();
}

Status Sequence::Impl::IndexRows(int32_t layer_index, LayerBlocks& rows, int64_t end) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  if (!selector().NeedsCodes() && !selector().NeedsPages()) return {};
  TraceScope trace(tracer(), "index");
  trace.Say("layer", layer_index);
  const int64_t group = cache->index_group();
  std::vector<IndexedGroup> groups;
  for (int64_t g = layer.coded / group; g < end / group; ++g) {
    for (int32_t h = 0; h < geometry().kv_heads; ++h) {
      PREHOC_ASSIGN_OR_RETURN(const std::byte* source, rows.Row(g * group, h));
      groups.push_back({h, g, source});
    }
  }
  PREHOC_RETURN_IF_ERROR(IndexGroups(layer_index, groups, cache->launch()));
  layer.coded = end / group * group;
  return {};
}

Status Sequence::Impl::IndexGroups(int32_t layer_index, std::span<const IndexedGroup> groups, const Launch& launch) {
  if (groups.empty()) return {};
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const CodeFormat format = cache->index_format();
  const auto dim = static_cast<size_t>(geometry().head_dim);
  const size_t block_bytes = kernels().code_block_bytes(format, geometry().head_dim);
  const bool coded = selector().NeedsCodes();
  // Bounds come for 16 tokens each; those of a larger page are put together from them.
  const auto parts = static_cast<size_t>(cache->index_group() / format.group_tokens);
  std::vector<std::byte> unkept(coded ? 0 : groups.size() * parts * block_bytes);
  std::vector<Half> lo(parts > 1 ? groups.size() * parts * dim : 0), hi(lo.size());
  std::vector<EncodeTask> tasks;
  for (const IndexedGroup& group : groups) {
    HeadState& head = layer.heads[static_cast<size_t>(group.kv_head)];
    const auto at = static_cast<size_t>(group.index);
    for (size_t part = 0; part < parts; ++part) {
      EncodeTask task;
      task.rows = group.rows + part * static_cast<size_t>(format.group_tokens) * geometry().stored_row_bytes();
      if (coded) task.seed = CodeBlockSeed(SeedOf(layer_index, group.kv_head), group.index);
      task.block = coded ? head.codes + at * block_bytes : unkept.data() + tasks.size() * block_bytes;
      if (head.page_lo) {
        const size_t bounds = static_cast<size_t>(format.group_tokens / 16) * dim;
        task.page_lo = parts > 1 ? lo.data() + tasks.size() * dim : head.page_lo + at * bounds;
        task.page_hi = parts > 1 ? hi.data() + tasks.size() * dim : head.page_hi + at * bounds;
      }
      tasks.push_back(task);
    }
  }
  PREHOC_RETURN_IF_ERROR(kernels().encode({.tasks = tasks, .format = format, .head_dim = geometry().head_dim, .rows = geometry().rows}, launch));
  for (size_t g = 0; parts > 1 && g < groups.size(); ++g) {
    HeadState& head = layer.heads[static_cast<size_t>(groups[g].kv_head)];
    const size_t to = static_cast<size_t>(groups[g].index) * dim;
    for (size_t c = 0; c < dim; ++c) {
      Half least = lo[g * parts * dim + c], most = hi[g * parts * dim + c];
      for (size_t part = 1; part < parts; ++part) {
        const Half other_lo = lo[(g * parts + part) * dim + c], other_hi = hi[(g * parts + part) * dim + c];
        if (HalfToFloat(other_lo) < HalfToFloat(least)) least = other_lo;
        if (HalfToFloat(other_hi) > HalfToFloat(most)) most = other_hi;
      }
      head.page_lo[to + c] = least;
      head.page_hi[to + c] = most;
    }
  }
  return {};
}

Status Sequence::Impl::FillRing(int32_t layer_index, LayerBlocks& rows, int64_t begin, int64_t end) {
  LayerState& layer = layers[static_cast<size_t>(layer_index)];
  const int64_t size = geometry().chunk_tokens;
  const auto row = static_cast<int64_t>(row_halfs());
  std::vector<RowCopy>& copies = scratch->copies;
  copies.clear();
  const auto copy = [&](int64_t from, int64_t to, auto&& target) -> Status {
    for (int64_t at = from; at < to;) {
      // As far as both the block and the ring run on.
      const int64_t run = std::min({(at / size + 1) * size - at, layout.ring - at % layout.ring, to - at});
      for (int32_t h = 0; h < geometry().kv_heads; ++h) {
        PREHOC_ASSIGN_OR_RETURN(const std::byte* source, rows.Row(at, h));
        AddRun(source, target(layer.heads[static_cast<size_t>(h)], at), run, &copies);
      }
      at += run;
    }
    return {};
  };
  PREHOC_RETURN_IF_ERROR(copy(std::max(begin, ring_begin), end, [&](HeadState& head, int64_t at) {
    return head.ring + at % layout.ring * row;
  }));
  PREHOC_RETURN_IF_ERROR(
      copy(begin, std::min<int64_t>(end, sinks), [&](HeadState& head, int64_t at) { return head.sinks + at * row; }));
  return kernels().gather({.rows = copies, .head_dim = geometry().head_dim, .format = geometry().rows}, cache->launch());
}

Status Sequence::Impl::AddKeysToSummaries(int32_t layer_index, LayerBlocks& rows, int64_t begin, int64_t end) {
  const SelectorOptions& options = cache->options.selector;
  const bool by_mass = options.kind == SelectorKind::kTwoClock && options.tc.gate == TwoClockOptions::Gate::kMass;
  if (by_mass) return AddKeysToVariances(layer_index, rows, begin, end);
  if (options.cis.gate == CisOptions::Gate::kCertified) return AddKeysToBalls(layer_index, rows, begin, end);
  return {};
}

Status Sequence::Impl::AddKeysToVariances(int32_t layer_index, LayerBlocks& rows, int64_t begin, int64_t end) {
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    KeyVariance& variance = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(h)].variance;
    if (begin == 0) variance.Reset(static_cast<size_t>(geometry().head_dim));
    // A step that was rolled back and is run again adds nothing twice.
    for (int64_t at = std::max(begin, variance.count()); at < end; ++at) {
      PREHOC_ASSIGN_OR_RETURN(const Half* row, rows.WideRow(at, h));
      variance.Add(row);
    }
    variance.Update();
  }
  return {};
}

Status Sequence::Impl::AddKeysToBalls(int32_t layer_index, LayerBlocks& rows, int64_t begin, int64_t end) {
  const auto dim = static_cast<size_t>(geometry().head_dim);
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    KeyBall& ball = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(h)].ball;
    std::vector<float> keys(static_cast<size_t>(end - begin) * dim);
    for (int64_t at = begin; at < end; ++at) {
      PREHOC_ASSIGN_OR_RETURN(const Half* row, rows.WideRow(at, h));
      std::transform(row, row + dim, keys.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(at - begin) * dim), HalfToFloat);
    }
    if (begin == 0) {
      ball = KeyBall(keys, geometry().head_dim);
    } else {
      for (size_t i = 0; i < keys.size(); i += dim) ball.Add(std::span(keys).subspan(i, dim));
    }
  }
  return {};
}

Result<std::vector<std::vector<RowRun>>> Sequence::Impl::RunsUpTo(int32_t layer_index, LayerBlocks& rows, int64_t end) {
  const int64_t size = geometry().chunk_tokens;
  std::vector<std::vector<RowRun>> runs;
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    std::vector<RowRun>& of_head = runs.emplace_back();
    if (complete() && !repairing) {  // the ring has them all
      of_head.push_back({layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(h)].ring, static_cast<int32_t>(end)});
      continue;
    }
    for (int64_t at = 0; at < end; at += size) {
      PREHOC_ASSIGN_OR_RETURN(const std::byte* source, rows.Rows(static_cast<size_t>(at / size), h));
      of_head.push_back({source, static_cast<int32_t>(std::min(size, end - at)), geometry().rows});
    }
  }
  return runs;
}

Status Sequence::Impl::AttendPrefill(int32_t layer_index, LayerBlocks& rows, const LayerInput& in, int64_t begin,
                                     int64_t queries) {
  TraceScope trace(tracer(), "attend");
  trace.Say("layer", layer_index).Say("queries", queries);
  const PrefillRule rule = RuleOfPrefill(layer_index);
  const int32_t dim = geometry().head_dim, group = geometry().group();
  const int64_t stride = static_cast<int64_t>(geometry().heads) * dim;
  PREHOC_ASSIGN_OR_RETURN(const auto runs, RunsUpTo(layer_index, rows, visible()));

  std::vector<int32_t> starts;
  if (rule.windowed) {
    for (int64_t t = 0; t < queries; ++t) {
      int64_t start = selector().WindowStart(layer_index, geometry().layers, begin + t + 1);
      if (start < sinks) start = 0;  // an edge among the sinks cuts none of them
      starts.push_back(static_cast<int32_t>(start));
      step_report.prefill_cut_keys += std::max<int64_t>(0, start - (rule.keep_sink ? sinks : 0)) * geometry().kv_heads;
    }
  }
  std::vector<PrefillTask> tasks;
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    PrefillTask task;
    task.q = in.q + static_cast<int64_t>(h) * group * dim;
    task.q_stride = stride;
    task.out = in.out + static_cast<int64_t>(h) * group * dim;
    task.out_stride = stride;
    task.runs = runs[static_cast<size_t>(h)];
    task.start = starts.empty() ? nullptr : starts.data();
    tasks.push_back(task);
  }
  PrefillParams params;
  params.tasks = tasks;
  params.queries = static_cast<int32_t>(queries);
  params.first = static_cast<int32_t>(begin);
  params.sinks = rule.windowed && rule.keep_sink ? sinks : 0;
  params.group = group;
  params.head_dim = dim;
  params.on_device = in.on_device;
  return kernels().prefill(params, cache->launch());
}

}  // namespace prehoc
