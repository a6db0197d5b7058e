// A stored prefix comes back, and lost chunks are made anew.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "cache/internal/fast_step.h"
#include "cache/internal/sequence_impl.h"

namespace prehoc {

// Codes and bounds of one block. Different blocks may run at once.
Status Sequence::Impl::EncodeBlock(int32_t layer_index, int64_t chunk, std::span<const std::byte> bytes) {
  if (!selector().NeedsCodes() && !selector().NeedsPages()) return {};
  const int64_t group = cache->index_group();
  const int64_t num = geometry().chunk_tokens / group;
  std::vector<IndexedGroup> groups;
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    const std::byte* rows = bytes.data() + static_cast<size_t>(h) * geometry().head_block_bytes();
    for (int64_t g = 0; g < num; ++g) {
      groups.push_back({h, chunk * num + g, rows + static_cast<size_t>(g * group) * geometry().stored_row_bytes()});
    }
  }
  return IndexGroups(layer_index, groups, {.stream = cache->resources.stream});
}

// Where everything is resident a whole block has its place in the ring, whatever becomes of the others.
Status Sequence::Impl::CopyToRing(int32_t layer_index, int64_t chunk, std::span<const std::byte> bytes) {
  std::vector<RowCopy> copies;
  for (int32_t h = 0; h < geometry().kv_heads; ++h) {
    const std::byte* rows = bytes.data() + static_cast<size_t>(h) * geometry().head_block_bytes();
    Half* ring = layers[static_cast<size_t>(layer_index)].heads[static_cast<size_t>(h)].ring;
    AddRun(rows, ring + chunk * geometry().chunk_tokens * static_cast<int64_t>(row_halfs()), geometry().chunk_tokens, &copies);
  }
  return kernels().gather({.rows = copies, .head_dim = geometry().head_dim, .format = geometry().rows}, {.stream = cache->resources.stream});
}

// Of `chunks` known ones [chunks, layers]: all that host memory has, and what follows from the store if that is worth it.
int64_t Sequence::Impl::ChunksWorthLoading(const std::vector<BlockRef>& found, int64_t chunks) const {
  if (!cache->health) return chunks;
  const int64_t num_layers = geometry().layers;
  int64_t in_memory = chunks, reads = 0;
  for (int64_t i = 0; i < chunks * num_layers; ++i) {
    if (cache->host->state(found[static_cast<size_t>(i)]) != BlockState::kStoreOnly) continue;
    in_memory = std::min(in_memory, i / num_layers);
    ++reads;
  }
  if (reads == 0) return chunks;
  const int64_t size = geometry().chunk_tokens;
  return in_memory + cache->health->WorthRestoring(chunks - in_memory, reads, in_memory * size, (chunks - in_memory) * size);
}

// Every block of the longest known prefix is read and verified once, and indexed while it is in the CPU's cache.
Result<int64_t> Sequence::Impl::LoadPrefix(std::span<const int32_t> wanted) {
  const int64_t size = geometry().chunk_tokens;
  const int64_t num_layers = geometry().layers;
  const int64_t whole = (static_cast<int64_t>(wanted.size()) - 1) / size;
  ChunkKeyChain keys(cache->KeyRoot(method));
  std::vector<BlockRef> found;  // [chunks, layers]
  int64_t chunks = 0;
  for (; chunks < whole; ++chunks) {
    keys.Append(wanted.subspan(static_cast<size_t>(chunks * size), static_cast<size_t>(size)));
    for (int32_t l = 0; l < num_layers; ++l) {
      std::optional<BlockRef> block = cache->host->Find(keys.Key(ChunkIndex(static_cast<int32_t>(chunks)), LayerId(l)));
      if (!block) break;
      found.push_back(std::move(*block));
    }
    if (static_cast<int64_t>(found.size()) < (chunks + 1) * num_layers) break;
  }

  chunks = ChunksWorthLoading(found, chunks);
  const int64_t start = cache->resources.clock->NowNanos();
  std::atomic<int64_t> good{chunks};
  std::atomic<int64_t> loaded{0}, corrupt{0}, missing{0};
  cache->resources.io->ParallelFor(chunks * num_layers, [&](int64_t i) {
    const int64_t chunk = i / num_layers;
    if (chunk >= good.load(std::memory_order_relaxed)) return;
    auto pin = cache->host->Pin(found[static_cast<size_t>(i)], BlockUse::kStream, PinCheck::kVerify);
    Status status = pin.status();
    if (pin.ok()) {
      loaded += pin->loaded();
      status = EncodeBlock(static_cast<int32_t>(i % num_layers), chunk, pin->bytes());
      if (status.ok() && complete()) status = CopyToRing(static_cast<int32_t>(i % num_layers), chunk, pin->bytes());
    }
    if (status.ok()) return;
    corrupt += status.code() == StatusCode::kCorrupt;
    missing += status.code() == StatusCode::kNotFound;
    for (int64_t seen = good.load(); chunk < seen && !good.compare_exchange_weak(seen, chunk);) {
    }
  });
  chunks = good.load();
  if (cache->health) cache->health->OnRestore(loaded.load(), cache->resources.clock->NowNanos() - start);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t l = 0; l < num_layers; ++l) {
      layers[static_cast<size_t>(l)].blocks.push_back(found[static_cast<size_t>(chunk * num_layers + l)]);
    }
  }
  report.prefill_bytes_from_disk += loaded.load() * static_cast<int64_t>(geometry().block_bytes());
  report.corrupt_chunks += corrupt.load();
  report.missing_chunks += missing.load();
  return chunks;
}

Status Sequence::Impl::RestorePrefix(std::span<const int32_t> wanted) {
  if (wanted.empty()) return {};
  method = MethodOf(static_cast<int64_t>(wanted.size()));
  PREHOC_ASSIGN_OR_RETURN(const int64_t chunks, LoadPrefix(wanted));
  const int64_t size = geometry().chunk_tokens;
  const int64_t end = chunks * size;
  chain = ChainOf(cache->KeyRoot(method), wanted.first(static_cast<size_t>(end)), geometry().chunk_tokens);
  next_chain = chain;
  ring_begin = std::max<int64_t>(0, end - layout.ring);
  for (int32_t l = 0; l < geometry().layers && end > 0; ++l) {
    LayerState& layer = layers[static_cast<size_t>(l)];
    LayerBlocks rows(cache->host.get(), geometry(), layer.blocks, BlockUse::kStream);
    PREHOC_RETURN_IF_ERROR(FillRing(l, rows, 0, complete() ? std::min<int64_t>(end, sinks) : end));
    PREHOC_RETURN_IF_ERROR(AddKeysToSummaries(l, rows, 0, end));
    layer.coded = end;
    for (HeadState& head : layer.heads) {
      head.residency.EnterRing(ring_begin, end);
    }
  }
  tokens.assign(wanted.begin(), wanted.begin() + end);
  length = exact_tokens = restored_tokens = end;
  last_prompt = static_cast<int64_t>(wanted.size());
  report.prompt_tokens += end;
  report.restored_tokens += end;
  return {};
}

std::vector<ChunkIndex> Sequence::Impl::LostChunks() const {
  std::vector<ChunkIndex> lost;
  const int64_t chunks = length / geometry().chunk_tokens;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const bool any = std::any_of(layers.begin(), layers.end(), [&](const LayerState& layer) {
      return cache->host->state(layer.blocks[static_cast<size_t>(chunk)]) == BlockState::kLost;
    });
    if (any) lost.push_back(ChunkIndex(static_cast<int32_t>(chunk)));
  }
  return lost;
}

Status Sequence::Impl::BeginRepair(ChunkIndex chunk) {
  const int64_t size = geometry().chunk_tokens;
  if (open) return {StatusCode::kInvalid, "BeginRepair() while a call is open: Rollback() it first"};
  if (!chunk.valid() || (chunk.value() + 1) * size > length) {
    return {StatusCode::kInvalid, "chunk " + std::to_string(chunk.value()) + " is not a whole chunk of this sequence"};
  }
  PREHOC_RETURN_IF_ERROR(LeaveSteps());
  std::vector<BlockRef> blocks;
  std::vector<BlockPin> pins;
  for (int32_t l = 0; l < geometry().layers; ++l) {
    PREHOC_ASSIGN_OR_RETURN(BlockRef block, cache->host->NewTail());
    PREHOC_ASSIGN_OR_RETURN(BlockPin pin, cache->host->Pin(block));
    blocks.push_back(std::move(block));
    pins.push_back(std::move(pin));
  }
  repair_pins = std::move(pins);
  repair_blocks = std::move(blocks);
  first = chunk.value() * size;
  count = size;
  prompt = std::max(last_prompt, first + count);
  next_layer = 0;
  step_report = SequenceReport{};
  repairing = chunk;
  call_trace.emplace(tracer(), TraceWord("repair")).Say("first", first).Say("tokens", count);
  open = true;
  return {};
}

Status Sequence::Impl::EndRepair() {
  if (!open || !repairing) return {StatusCode::kInvalid, "EndRepair() without BeginRepair()"};
  if (next_layer != geometry().layers) {
    return {StatusCode::kInvalid, "EndRepair() after " + std::to_string(next_layer) + " of " +
                                      std::to_string(geometry().layers) + " layers"};
  }
  const auto at = static_cast<size_t>(repairing->value());
  for (int32_t l = 0; l < geometry().layers; ++l) {
    // The index must describe the rows that are there now, to the last bit.
    PREHOC_RETURN_IF_ERROR(EncodeBlock(l, repairing->value(), repair_pins[static_cast<size_t>(l)].bytes()));
    repair_pins[static_cast<size_t>(l)] = BlockPin();
    BlockRef& block = layers[static_cast<size_t>(l)].blocks[at];
    block = cache->host->Seal(std::move(repair_blocks[static_cast<size_t>(l)]), chain.Key(*repairing, LayerId(l)),
                              chain.Origin(*repairing));
  }
  ++report.recomputed_chunks;
  call_trace.reset();
  repairing.reset();
  repair_pins.clear();
  repair_blocks.clear();
  open = false;
  return {};
}

}  // namespace prehoc
