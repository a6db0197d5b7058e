// Blocks on their way to the store: write-behind, evictions, Flush().
#include <algorithm>
#include <utility>
#include <vector>

#include "base/test_point.h"
#include "cache/internal/host_tier_impl.h"

namespace prehoc {

HostTier::Impl::PendingWrite HostTier::Impl::BeginWriteLocked(Block* block) {
  BlockData& data = In(block);
  PREHOC_DCHECK(!data.writing && data.memory.valid() && data.sealed);
  data.writing = true;
  ++transit;
  return {data.key, data.origin, data.seal, BytesOf(data.memory)};
}

HostTier::Impl::WriteResult HostTier::Impl::Write(const PendingWrite& write) const noexcept {
  PREHOC_TEST_POINT("host_tier.write");
  // Asked each time: a bounded store may have shed what it once took.
  if (store->Contains(write.key)) return {};
  if (options.health != nullptr && !options.health->Begin()) {
    return {.status = LeftAlone()};
  }
  TraceScope trace(options.tracer, "store write");
  trace.Say("layer", write.key.layer).Say("bytes", static_cast<int64_t>(options.block_bytes));
  // Or the store would give damage a checksum that holds.
  const bool damaged = SealOf(write.key, write.bytes) != write.seal;
  const Status status = damaged ? Damaged(write.key) : WithinMemory([&] { return store->Put(write.key, write.bytes, write.origin); });
  trace.Say("code", static_cast<int64_t>(status.code()));
  if (options.health != nullptr) options.health->End(status);
  return {.status = status, .wrote = !damaged, .damaged = damaged};
}

void HostTier::Impl::EndWriteLocked(Block* block, const WriteResult& result) {
  BlockData& data = In(block);
  data.writing = false;
  data.stored = result.status.ok();
  --transit;
  if (result.damaged) {
    if (!std::exchange(data.damaged, true)) ++counters.corrupt;
  } else if (data.stored) {
    counters.written += result.wrote;
    data.store_sealed |= result.wrote;
  } else {
    ++(result.status.code() == StatusCode::kBusy ? counters.dropped : counters.failed);
  }
  changed.NotifyAll();
  if (result.damaged && data.pins == 0) DropDamagedLocked(block);
}

bool HostTier::Impl::WantsWriteLocked(Block* block) const {
  const BlockData& data = In(block);
  return data.memory.valid() && !data.stored && !data.writing && !data.damaged;
}

bool HostTier::Impl::QueueWriteLocked(Block* block) {
  BlockData& data = In(block);
  if (store == nullptr || data.write_queued || !WantsWriteLocked(block)) return false;
  if (queued_writes >= options.max_queued_writes) {
    ++counters.shed;
    return false;
  }
  data.write_queued = true;
  ++data.jobs;
  ++queued_writes;
  return true;
}

void HostTier::Impl::PostWriteBehind(Block* block) {
  const Status taken = background->Post([weak = weak_from_this(), block] {
    if (const auto impl = weak.lock()) impl->RunWriteBehind(block);
  });
  if (taken.ok()) return;
  MutexLock lock(mutex);
  In(block).write_queued = false;
  --queued_writes;
  ++counters.shed;
  EndJobLocked(block);
}

void HostTier::Impl::RunWriteBehind(Block* block) {
  PendingWrite write;
  {
    MutexLock lock(mutex);
    if (closed) return;
    In(block).write_queued = false;
    if (!WantsWriteLocked(block)) {
      --queued_writes;
      return EndJobLocked(block);
    }
    write = BeginWriteLocked(block);
    ++running;
  }
  const WriteResult result = [&] {
    TraceScope trace(options.tracer, "write behind");
    return Write(write);
  }();
  MutexLock lock(mutex);
  EndWriteLocked(block, result);
  --queued_writes;
  --running;
  EndJobLocked(block);
}

Status HostTier::Impl::WriteNow(Block* block) {
  PendingWrite write;
  {
    MutexLock lock(mutex);
    while (In(block).writing) changed.Wait(mutex);
    if (!WantsWriteLocked(block)) return {};
    write = BeginWriteLocked(block);
  }
  const WriteResult result = Write(write);
  MutexLock lock(mutex);
  EndWriteLocked(block, result);
  return result.status;
}

std::vector<Block*> HostTier::Impl::TakeUnwritten() {
  std::vector<std::pair<uint64_t, Block*>> found;
  std::vector<Block*> blocks;
  {
    MutexLock lock(mutex);
    found.reserve(map.size());
    blocks.reserve(map.size());
    for (const auto& [key, block] : map) {
      BlockData& data = In(block.get());
      if (!data.memory.valid() || data.stored || data.damaged) continue;
      ++data.jobs;
      found.emplace_back(data.sealed_at, block.get());
    }
  }
  std::sort(found.begin(), found.end());
  for (const auto& [order, block] : found) blocks.push_back(block);
  return blocks;
}

}  // namespace prehoc
