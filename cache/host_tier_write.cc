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
  return {data.key, data.origin, data.seal, data.store_sealed, BytesOf(data.memory)};
}

HostTier::Impl::WriteResult HostTier::Impl::Write(const PendingWrite& write, StoreCall* call) const noexcept {
  PREHOC_TEST_POINT("host_tier.write");
  // Asked each time: a bounded store may have shed what it once took.
  const bool there = store->Contains(write.key);
  if (there && write.known_there) return {.same = true};
  // Unseen, a version of it is better than none.
  if (options.health != nullptr && !options.health->Begin()) return there ? WriteResult{} : WriteResult{.status = LeftAlone()};
  TraceScope trace(options.tracer, "store write");
  trace.Say("layer", write.key.layer).Say("bytes", static_cast<int64_t>(options.block_bytes));
  // Or the store would give damage a checksum that holds.
  const bool damaged = !Holds(write.seal, write.bytes);
  bool same = false, replaced = false;
  const Status status = damaged ? Damaged(write.key) : WithinMemory([&]() -> Status {
    if (!there) return store->Put(write.key, write.bytes, write.origin);
    // Computed anew by somebody who did not have it: K and V of the same tokens may differ in their last bits. Whoever holds this block
    // has seen these, and gets no others.
    const Result<ChunkSeal> stored = store->Peek(write.key);
    same = stored.ok() && Holds(*stored, write.bytes);
    if (same) return {};
    if (!stored.ok() && stored.status().code() != StatusCode::kNotFound && stored.status().code() != StatusCode::kCorrupt) return stored.status();
    replaced = true;
    return store->Replace(write.key, write.bytes, write.origin);
  });
  trace.Say("code", static_cast<int64_t>(status.code()));
  bool late = false;
  if (call != nullptr) {
    MutexLock lock(mutex);
    late = call->late;
  }
  if (options.health != nullptr && !late) options.health->End(status);
  return {.status = status, .wrote = !damaged && !same, .replaced = replaced, .same = status.ok(), .damaged = damaged};
}

Status HostTier::Impl::LateCall() const noexcept {
  return WithWords(StatusCode::kDeadline, [&]() -> Status {
    return {StatusCode::kDeadline,
            "host tier: the store took more than " + std::to_string(options.write_deadline_nanos / 1'000'000) + " ms to write or flush"};
  });
}

bool HostTier::Impl::AwaitCall(StoreCall* call) {
  MutexLock lock(mutex);
  while (!call->done) {
    const int64_t left = call->began + options.write_deadline_nanos - clock->NowNanos();
    if (left <= 0) {
      call->late = true;
      ++counters.late;
      if (options.health != nullptr) options.health->End({StatusCode::kDeadline, {}});
      return false;
    }
    call->ended.WaitFor(mutex, std::min(left, kLook));
  }
  return true;
}

HostTier::Impl::WriteResult HostTier::Impl::WriteInTime(Block* block, const PendingWrite& write) noexcept {
  std::shared_ptr<StoreCall> call;
  const auto run = [this, block, write](StoreCall* of) {
    const WriteResult result = Write(write, of);
    MutexLock lock(mutex);
    EndWriteLocked(block, result);
    return result;
  };
  Status posted(StatusCode::kBusy, {});
  const bool there = store->Contains(write.key);
  if (options.write_deadline_nanos > 0 && !(there && write.known_there)) {  // what is there already takes no time
    if (options.health != nullptr && !options.health->Available()) {
      const WriteResult refused{.status = there ? Status() : LeftAlone()};
      MutexLock lock(mutex);
      EndWriteLocked(block, refused);
      return refused;
    }
    {
      MutexLock lock(mutex);
      ++running;  // the tier waits for it before it goes
      ++In(block).jobs;
    }
    posted = WithinMemory([&] {
      call = std::make_shared<StoreCall>(clock->NowNanos());
      return options.reader->Post([this, block, run, call] {
        const WriteResult result = run(call.get());
        MutexLock lock(mutex);
        call->result = result;
        call->done = true;
        call->ended.NotifyAll();
        --running;
        changed.NotifyAll();
        EndJobLocked(block);
      });
    });
    if (!posted.ok()) {
      MutexLock lock(mutex);
      --running;
      --In(block).jobs;  // the caller's own keeps it, or the list does
    }
  }
  if (!posted.ok()) return run(nullptr);
  if (!AwaitCall(call.get())) return {.status = LateCall()};
  MutexLock lock(mutex);
  return call->result;
}

Status HostTier::Impl::FlushStore() noexcept {
  TraceScope trace(options.tracer, "store flush");
  const auto flush = [this] { return WithinMemory([&] { return store->Flush(); }); };
  if (options.write_deadline_nanos == 0) return flush();
  std::shared_ptr<StoreCall> call;
  {
    MutexLock lock(mutex);
    ++running;
  }
  const Status posted = WithinMemory([&] {
    call = std::make_shared<StoreCall>(clock->NowNanos());
    return options.reader->Post([this, flush, call] {
      const Status status = flush();
      MutexLock lock(mutex);
      call->result.status = status;
      call->done = true;
      call->ended.NotifyAll();
      --running;
      changed.NotifyAll();
    });
  });
  if (!posted.ok()) {
    {
      MutexLock lock(mutex);
      --running;
    }
    return flush();
  }
  if (!AwaitCall(call.get())) return LateCall();
  MutexLock lock(mutex);
  return call->result.status;
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
    counters.replaced += result.replaced;
    data.store_sealed |= result.same;
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
    for (int64_t patience_ends = 0; In(block).writing;) {
      if (!AwaitChangeLocked(&patience_ends)) return LateCall();
    }
    if (!WantsWriteLocked(block)) return {};
    write = BeginWriteLocked(block);
  }
  return WriteInTime(block, write).status;
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
