// Blocks on their way from the store: pins, deadlines, checks, prefetches.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/test_point.h"
#include "cache/internal/host_tier_impl.h"

namespace prehoc {

Result<std::span<std::byte>> HostTier::Impl::Hold(Block* block, PinCheck check, bool* loaded) {
  while (true) {
    PREHOC_ASSIGN_OR_RETURN(const std::span<std::byte> bytes, HoldUnchecked(block, loaded));
    if ((check == PinCheck::kTrust && !options.verify_pins) || CheckPinned(block, bytes)) return bytes;
    // Its memory goes with the last pin; the store may have better bytes, or it is lost.
    *loaded = false;
  }
}

Result<std::span<std::byte>> HostTier::Impl::HoldUnchecked(Block* block, bool* loaded) {
  std::shared_ptr<BlockLoad> load;
  {
    MutexLock lock(mutex);
    BlockData& data = In(block);
    while (data.load != nullptr && !data.memory.valid()) {
      load = data.load;
      ++load->waiters;
      ++sharers;
      const bool told = AwaitLocked(block, load.get());
      --sharers;
      if (!told) return load->status;
      if (load->abandoned) continue;
      if (!load->status.ok()) return load->status;
      ++counters.shared_loads;
      return BytesOf(data.memory);
    }
    if (data.memory.valid()) {
      if (data.damaged) return Damaged(data.key);
      ++counters.hits;
      PinLocked(block, 1);
      return BytesOf(data.memory);
    }
    if (!data.lost.ok()) return data.lost;
    load = BeginLoadLocked(block);
    load->waiters = 1;
  }
  Load(block, load, /*demand=*/true);
  MutexLock lock(mutex);
  if (!AwaitLocked(block, load.get())) return load->status;
  if (!load->status.ok()) return load->status;
  *loaded = load->from_store;
  return BytesOf(In(block).memory);
}

bool HostTier::Impl::AwaitLocked(Block* block, BlockLoad* load) {
  while (!load->done) {
    if (options.read_deadline_nanos == 0) {
      load->ended.Wait(mutex);
      continue;
    }
    const int64_t left = load->deadline_at - clock->NowNanos();
    if (left <= 0 && !load->late) GiveUpLocked(block, load);
    if (load->late) return false;
    load->ended.WaitFor(mutex, std::min(left, kLook));
  }
  return true;
}

void HostTier::Impl::GiveUpLocked(Block* block, BlockLoad* load) {
  BlockData& data = In(block);
  load->late = true;
  data.load = nullptr;
  --transit;  // nobody may wait for it to free something
  ++counters.late;
  ++counters.lost;
  data.stored = false;
  const Status why = WithWords(StatusCode::kDeadline, [&]() -> Status {
    return {StatusCode::kDeadline, "the store took more than " + std::to_string(options.read_deadline_nanos / 1'000'000) + " ms"};
  });
  data.lost = load->status = Lost(load->key, options.health != nullptr ? GivenUp(why) : why);
  if (options.health != nullptr) options.health->End(why);
  load->ended.NotifyAll();
  changed.NotifyAll();
}

bool HostTier::Impl::CheckPinned(Block* block, std::span<const std::byte> bytes) {
  ChunkSeal seal;
  {
    MutexLock lock(mutex);
    const BlockData& data = In(block);
    if (!data.known || data.checked) return true;
    ++counters.verified;
    seal = data.seal;
  }
  PREHOC_TEST_POINT("host_tier.verify");
  const bool whole = Holds(seal, bytes);
  MutexLock lock(mutex);
  if (whole) {
    In(block).checked = true;
  } else {
    CondemnLocked(block);
  }
  return whole;
}

std::shared_ptr<BlockLoad> HostTier::Impl::BeginLoadLocked(Block* block) {
  PREHOC_DCHECK(store != nullptr && In(block).known);  // without a store a held block does not leave
  In(block).load = std::make_shared<BlockLoad>();
  In(block).load->key = In(block).key;
  return In(block).load;
}

void HostTier::Impl::BeginTransit() {
  MutexLock lock(mutex);
  ++transit;
}

void HostTier::Impl::Load(Block* block, const std::shared_ptr<BlockLoad>& load, bool demand) {
  // A prefetch waits for nobody, so others may wait for it from here on; a demand may itself be waiting for memory.
  if (!demand) BeginTransit();
  PREHOC_TEST_POINT("host_tier.reserve");
  const Result<BlockId> memory = WithinMemory([&] { return TakeMemory(demand); });
  if (demand && memory.ok()) BeginTransit();
  if (!memory.ok()) {
    MutexLock lock(mutex);
    if (!demand) --transit;
    load->abandoned = !demand;
    FinishLoadLocked(block, load.get(), BlockId(), memory.status());
    changed.NotifyAll();
    return;
  }
  if (options.health != nullptr && !options.health->Begin()) {
    MutexLock lock(mutex);
    --transit;
    ++counters.load_errors;
    FinishLoadLocked(block, load.get(), *memory, GivenUp(LeftAlone()));
    changed.NotifyAll();
    return;
  }
  const int64_t start = clock->NowNanos();
  if (options.read_deadline_nanos > 0) {
    MutexLock lock(mutex);
    load->deadline_at = start + options.read_deadline_nanos;
    running += demand;
    In(block).jobs += demand;
  }
  if (demand && options.read_deadline_nanos > 0) {
    // The tier waits for `running` before it goes, so the job needs no other hold on it.
    const Status taken = options.reader->Post([this, block, load, start, id = *memory] {
      FinishRead(block, load.get(), id, start);
      MutexLock lock(mutex);
      --running;
      changed.NotifyAll();
      EndJobLocked(block);
    });
    if (taken.ok()) return;
    MutexLock lock(mutex);
    --running;
    --In(block).jobs;  // the caller holds the block
  }
  FinishRead(block, load.get(), *memory, start);
}

void HostTier::Impl::FinishRead(Block* block, BlockLoad* load, BlockId memory, int64_t start) {
  while (!ReadOnce(block, load, memory, start)) continue;
}

bool HostTier::Impl::ReadOnce(Block* block, BlockLoad* load, BlockId memory, int64_t start) {
  bool late = false;
  ChunkSeal seal;
  {
    MutexLock lock(mutex);
    late = load->late;
    seal = In(block).seal;
  }
  Status got(StatusCode::kDeadline, {});  // nobody waits for it any more
  std::optional<Status> status = got;
  if (!late) {
    PREHOC_TEST_POINT("host_tier.load");
    TraceScope trace(options.tracer, "store read");
    trace.Say("layer", load->key.layer).Say("bytes", static_cast<int64_t>(options.block_bytes));
    ChunkSeal read;
    got = WithinMemory([&] { return store->Get(load->key, BytesOf(memory), &read); });
    trace.Say("code", static_cast<int64_t>(got.code()));
    status = got.ok() ? CompareSeal(block, read, BytesOf(memory), &seal) : got;
    if (!status.has_value()) return false;
    // A record that is not what was written goes, or it would keep the right one from being written.
    if (got.ok() && !status->ok()) WithinMemory([&] { return store->Delete(load->key); }).IgnoreError();
  }
  const int64_t nanos = clock->NowNanos() - start;
  MutexLock lock(mutex);
  late = load->late;
  // What was compared with is no longer what the block is, and not here to be used instead.
  if (status->ok() && !In(block).memory.valid() && In(block).seal != seal) return false;
  if (options.health != nullptr) {
    if (!late) options.health->End(got);
    if (got.code() == StatusCode::kIoError || got.code() == StatusCode::kDeadline) status = GivenUp(got);
  }
  if (!late) --transit;
  ++(status->ok() ? counters.loads : counters.load_errors);
  counters.load_nanos += static_cast<uint64_t>(nanos);
  if (late) {
    FinishLateLocked(block, memory, status->ok());
  } else {
    FinishLoadLocked(block, load, memory, *std::move(status));
  }
  changed.NotifyAll();
  return true;
}

void HostTier::Impl::FinishLateLocked(Block* block, BlockId memory, bool good) {
  BlockData& data = In(block);
  if (!good || data.memory.valid() || data.load != nullptr) return FreeLocked(memory);
  data.stored = true;
  AdoptLocked(block, memory);
}

std::optional<Status> HostTier::Impl::CompareSeal(Block* block, const ChunkSeal& read, std::span<const std::byte> bytes, ChunkSeal* seal) {
  const ChunkSeal before = std::exchange(*seal, {});
  // What these bytes have by the seed of the block's own seal, once that was asked for.
  ChunkSeal found;
  for (bool hashed = false;; hashed = true) {
    {
      MutexLock lock(mutex);
      BlockData& data = In(block);
      if (data.memory.valid()) return Status();  // a Seal() brought the bytes meanwhile, and they are what counts
      if (!data.sealed) {
        data.seal = *seal = read;
        data.sealed = data.store_sealed = true;
        return Status();
      }
      if (hashed && found.seed == data.seal.seed) {
        *seal = data.seal;
        if (found != data.seal && data.seal != before) return std::nullopt;
        data.store_sealed = found == data.seal;
        if (data.store_sealed) return Status();
        ++counters.corrupt;
        return WithWords(StatusCode::kCorrupt, [&]() -> Status {
          return {StatusCode::kCorrupt, "host tier: chunk " + data.key.ToString() + ": the store gave other bytes than were sealed"};
        });
      }
      found.seed = data.seal.seed;
    }
    found.hash = Hash128(bytes, found.seed);
  }
}

void HostTier::Impl::FinishLoadLocked(Block* block, BlockLoad* load, BlockId memory, Status status) {
  BlockData& data = In(block);
  data.load = nullptr;
  load->done = true;
  load->ended.NotifyAll();
  load->from_store = status.ok();
  const bool gone = status.code() == StatusCode::kCorrupt || status.code() == StatusCode::kNotFound;
  if (gone) data.stored = false;
  bool adopted = false;
  if (status.ok() && !data.memory.valid()) {
    data.awaited = load->waiters == 0;
    AdoptLocked(block, std::exchange(memory, BlockId()));
    adopted = true;
  }
  if (memory.valid()) FreeLocked(memory);
  if (data.memory.valid()) {
    // From the store, or from a Seal() of the same key meanwhile: then the store's trouble does not matter.
    load->abandoned = false;
    if (load->waiters > 0) PinLocked(block, load->waiters);
    // What a Seal() brought may have lain there unpinned since.
    data.checked |= adopted && load->waiters > 0;
    return;
  }
  if (gone) {
    data.lost = Lost(load->key, status);
    ++counters.lost;
    load->status = data.lost;
  } else {
    load->status = std::move(status);
  }
}

bool HostTier::Impl::QueuePrefetchLocked(Block* block) {
  BlockData& data = In(block);
  if (!data.known || data.memory.valid() || data.load != nullptr || data.prefetch_queued || !data.lost.ok()) {
    return false;
  }
  data.prefetch_queued = true;
  ++data.jobs;
  return true;
}

bool HostTier::Impl::PostPrefetch(Block* block) {
  const Status taken = background->Post([weak = weak_from_this(), block] {
    if (const auto impl = weak.lock()) impl->RunPrefetch(block);
  });
  if (taken.ok()) return true;
  MutexLock lock(mutex);
  In(block).prefetch_queued = false;
  ++counters.prefetches_refused;
  EndJobLocked(block);
  return false;
}

void HostTier::Impl::RunPrefetch(Block* block) {
  std::shared_ptr<BlockLoad> load;
  {
    MutexLock lock(mutex);
    if (closed) return;
    BlockData& data = In(block);
    data.prefetch_queued = false;
    // Nobody holds it any more, or somebody was faster.
    if (data.handles == 0 || data.memory.valid() || data.load != nullptr || !data.lost.ok()) {
      return EndJobLocked(block);
    }
    const Status begun = WithinMemory([&]() PREHOC_NO_TSA -> Status {
      load = BeginLoadLocked(block);
      return {};
    });
    if (!begun.ok()) return EndJobLocked(block);
    ++counters.prefetches;
    ++running;
  }
  Load(block, load, /*demand=*/false);
  MutexLock lock(mutex);
  --running;
  changed.NotifyAll();
  EndJobLocked(block);
}

}  // namespace prehoc
