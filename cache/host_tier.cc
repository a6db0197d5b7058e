#include "cache/host_tier.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/test_point.h"
#include "cache/internal/host_block.h"
#include "transfer/record_format.h"

namespace prehoc {
namespace {

// After so many refusals one turn of eviction looks only for blocks that can go without a write: a store that stalls or
// is full will not take the next one either.
constexpr int kMaxRefusals = 4;

// Bound to the key, so that bytes of another block do not pass either.
std::array<uint64_t, 2> SealOf(const ChunkKey& key, std::span<const std::byte> bytes) {
  const uint64_t seed = Hash64(std::as_bytes(std::span(key.chain)), static_cast<uint64_t>(key.layer));
  return Hash128(bytes, seed);
}

Status Damaged(const ChunkKey& key) {
  return {StatusCode::kCorrupt, "host tier: chunk " + key.ToString() + ": memory no longer holds what was sealed"};
}

Status LeftAlone() { return {StatusCode::kIoError, "the store failed of late and is not asked for now"}; }

Status Lost(const ChunkKey& key, const Status& why) {
  return why.WithContext("host tier: chunk " + key.ToString() + " is lost");
}

}  // namespace

Status HostTier::Options::Validate() const {
  if (block_bytes == 0) return {StatusCode::kInvalid, "host tier: block_bytes=0; give the bytes of one block"};
  if (max_queued_writes < 0) {
    return {StatusCode::kInvalid, "host tier: max_queued_writes=" + std::to_string(max_queued_writes) +
                                      "; use 0 (no write-behind) or more"};
  }
  if (read_deadline_nanos < 0 || (read_deadline_nanos > 0 && reader == nullptr)) {
    return {StatusCode::kInvalid, "host tier: read_deadline_nanos=" + std::to_string(read_deadline_nanos) +
                                      "; use 0 (none), or more with a reader"};
  }
  return {};
}

// One mutex guards every block. It is never held during I/O, copies of blocks, allocation from the arena (which may
// touch memory and post jobs) or calls of an executor or the store; under it only HostArena::Free() is called, so the
// order is: this mutex, then the arena's. A BlockRef must not die under it: its end comes back here, to Released().
//
// What keeps a block's memory in place while the mutex is not held:
//   pins > 0   a BlockPin; the block is in no list
//   !known     a tail: never in a list
//   writing    a Put() reads it; set and cleared by BeginWrite/EndWrite, and evictions pass over it
// What keeps a Block alive: the map, while one of handles, jobs, load or memory says so (ForgetIfUnusedLocked); a tail
// belongs to its BlockRefs. Memory on its way in belongs to the thread that loads, until FinishLoadLocked.
struct HostTier::Impl : std::enable_shared_from_this<HostTier::Impl> {
  // What one eviction has learnt so far.
  struct Turn {
    uint64_t id = 0;
    int refusals = 0;
    bool stalled = false;  // the store said kBusy
    bool flushed = false;
    Status refusal;        // the last one
  };
  struct Counters {
    uint64_t hits = 0, loads = 0, shared_loads = 0, load_errors = 0, load_nanos = 0;
    uint64_t evicted = 0, forgotten = 0, lost = 0, healed = 0, duplicates = 0, prefetches = 0, prefetches_refused = 0;
    uint64_t written = 0, dropped = 0, failed = 0, shed = 0;
    uint64_t late = 0;
    uint64_t verified = 0, corrupt = 0;  // checks of bytes in memory; and those that found damage
  };
  struct Releaser {
    Impl* impl;
    void operator()(Block* block) const { impl->Released(block); }
  };

  // Constant after Create().
  Options options;
  Executor* background = nullptr;
  ChunkStore* store = nullptr;
  const Clock* clock = nullptr;
  std::unique_ptr<HostArena> arena;

  mutable Mutex mutex;
  CondVar changed;  // a load or a write ended; with `reclaimers`, also: memory came free or a pin died
  std::unordered_map<ChunkKey, std::unique_ptr<Block>, ChunkKeyHash> map PREHOC_GUARDED_BY(mutex);
  BlockList streamed PREHOC_GUARDED_BY(mutex);
  BlockList kept PREHOC_GUARDED_BY(mutex);
  int64_t tails PREHOC_GUARDED_BY(mutex) = 0;
  int64_t resident PREHOC_GUARDED_BY(mutex) = 0;   // known blocks in memory
  int32_t transit PREHOC_GUARDED_BY(mutex) = 0;    // loads and writes under way: each ends without waiting for memory
  int32_t reclaimers PREHOC_GUARDED_BY(mutex) = 0;  // threads that wait for something to evict
  int32_t sharers PREHOC_GUARDED_BY(mutex) = 0;     // threads that wait for a load of another
  int32_t running PREHOC_GUARDED_BY(mutex) = 0;    // jobs under way
  int32_t queued_writes PREHOC_GUARDED_BY(mutex) = 0;
  bool closed PREHOC_GUARDED_BY(mutex) = false;
  uint64_t frees PREHOC_GUARDED_BY(mutex) = 0;     // blocks given back to the arena, ever
  uint64_t turns PREHOC_GUARDED_BY(mutex) = 0;
  uint64_t seals PREHOC_GUARDED_BY(mutex) = 0;
  Counters counters PREHOC_GUARDED_BY(mutex);

  BlockData& In(Block* block) const PREHOC_REQUIRES(mutex) { return block->data; }
  std::span<std::byte> BytesOf(BlockId memory) const { return arena->block(memory); }

  std::span<const std::byte> BytesOfTail(Block* tail) {
    MutexLock lock(mutex);
    PREHOC_CHECK(!In(tail).known && In(tail).memory.valid() && In(tail).pins == 0);
    return BytesOf(In(tail).memory);
  }

  // ---- who holds a block ----

  BlockRef RefLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    if (BlockRef ref = data.self.lock()) return ref;
    // The last reference may be dying right now, on its way to Released(): a second family of them begins.
    ++data.handles;
    BlockRef ref(block, Releaser{this});
    data.self = ref;
    return ref;
  }

  void Released(Block* block) {
    MutexLock lock(mutex);
    BlockData& data = In(block);
    if (--data.handles > 0) return;
    if (data.known) return ForgetIfUnusedLocked(block);
    if (data.memory.valid()) {
      FreeLocked(data.memory);
      --tails;
    }
    delete block;
  }

  void ForgetIfUnusedLocked(Block* block) PREHOC_REQUIRES(mutex) {
    const BlockData& data = In(block);
    if (data.handles > 0 || data.jobs > 0 || data.load != nullptr || data.memory.valid()) return;
    map.erase(ChunkKey(data.key));
  }

  void EndJobLocked(Block* block) PREHOC_REQUIRES(mutex) {
    --In(block).jobs;
    ForgetIfUnusedLocked(block);
  }

  // ---- memory ----

  void FreeLocked(BlockId memory) PREHOC_REQUIRES(mutex) {
    arena->Free(memory);
    ++frees;
    if (reclaimers > 0) changed.NotifyAll();
  }

  // `memory` holds the bytes of a known block. It is in a list from now on, unless pinned.
  void AdoptLocked(Block* block, BlockId memory) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    PREHOC_DCHECK(data.known && !data.memory.valid());
    data.memory = memory;
    data.lost = {};
    data.damaged = false;
    ++resident;
    if (data.pins == 0) LinkLocked(block);
  }

  void LinkLocked(Block* block) PREHOC_REQUIRES(mutex) {
    (In(block).use == BlockUse::kStream && !In(block).awaited ? streamed : kept).PushBack(block);
    if (reclaimers > 0) changed.NotifyAll();
  }

  void PinLocked(Block* block, int32_t count) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    if (data.list != nullptr) data.list->Remove(block);
    data.awaited = false;
    data.pins += count;
  }

  void Unpin(Block* block, BlockUse use) {
    MutexLock lock(mutex);
    BlockData& data = In(block);
    if (--data.pins > 0) return;
    data.use = use;
    data.checked = false;
    if (!data.known) return;
    LinkLocked(block);
    if (data.damaged && !data.writing) DropDamagedLocked(block);
  }

  // Takes away memory that does not hold what was sealed. Nobody pins or writes the block.
  void DropDamagedLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    PREHOC_DCHECK(data.list != nullptr && !data.writing);
    data.list->Remove(block);
    FreeLocked(std::exchange(data.memory, BlockId()));
    data.awaited = false;
    data.damaged = false;
    --resident;
    if (!data.stored) {
      data.lost = Lost(data.key, Damaged(data.key));
      ++counters.lost;
    }
    ForgetIfUnusedLocked(block);
  }

  // A pinned block was found damaged by the holder of a pin, who gives it up.
  void CondemnLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    if (!std::exchange(data.damaged, true)) ++counters.corrupt;
    if (--data.pins > 0) return;
    data.checked = false;
    LinkLocked(block);
    if (!data.writing) DropDamagedLocked(block);
  }

  // Takes the memory of a block that nothing keeps in place.
  BlockId EvictLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    PREHOC_DCHECK(data.list != nullptr && !data.writing);
    data.list->Remove(block);
    const BlockId memory = std::exchange(data.memory, BlockId());
    data.awaited = false;
    --resident;
    ++counters.evicted;
    if (!data.stored) {
      data.lost = Lost(data.key, {StatusCode::kNotFound, "it left memory before any store took it"});
      ++counters.forgotten;
    }
    ForgetIfUnusedLocked(block);
    return memory;
  }

  bool EvictableLocked(const BlockData& data, const Turn& turn) const PREHOC_REQUIRES(mutex) {
    if (data.writing || data.damaged || data.refused_in >= turn.id) return false;
    if (data.handles == 0) return true;
    return store != nullptr && (data.stored || turn.refusals < kMaxRefusals);
  }

  Block* VictimLocked(const Turn& turn, bool demand) const PREHOC_REQUIRES(mutex) {
    for (Block* block = streamed.back(); block != nullptr; block = In(block).before) {
      if (EvictableLocked(In(block), turn)) return block;
    }
    for (Block* block = kept.front(); block != nullptr; block = In(block).after) {
      // Whatever is behind it was used later: a prefetch that went on would push out what others wait for.
      if (!demand && In(block).awaited && In(block).handles > 0) return nullptr;
      if (EvictableLocked(In(block), turn)) return block;
    }
    return nullptr;
  }

  // A block of memory: a free one, else that of the next block to go. Waits for I/O of others if that may free some,
  // but not for a prefetch (`demand` false).
  Result<BlockId> TakeMemory(bool demand) {
    Turn turn;
    while (true) {
      uint64_t frees_before = 0;
      {
        MutexLock lock(mutex);
        frees_before = frees;
        if (turn.id == 0) turn.id = ++turns;
      }
      Result<BlockId> memory = arena->Allocate();
      if (memory.ok()) return memory;
      Block* victim = nullptr;
      PendingWrite write;
      {
        MutexLock lock(mutex);
        victim = VictimLocked(turn, demand);
        if (victim != nullptr) {
          if (store == nullptr) return EvictLocked(victim);
          write = BeginWriteLocked(victim);
        } else {
          if (frees != frees_before) continue;
          if (demand && transit > 0) {
            ++reclaimers;
            changed.Wait(mutex);
            --reclaimers;
            continue;
          }
          if (!demand || !turn.stalled || turn.flushed) return NothingToEvictLocked(memory.status(), turn);
        }
      }
      if (victim == nullptr) {
        FlushAndBeginAnew(&turn);
        continue;
      }
      const WriteResult result = Write(write);
      MutexLock lock(mutex);
      EndWriteLocked(victim, result);
      if (result.damaged) continue;
      BlockData& data = In(victim);
      if (!result.status.ok()) {
        data.refused_in = std::max(data.refused_in, turn.id);
        turn.refusal = result.status;
        turn.stalled |= result.status.code() == StatusCode::kBusy;
        ++turn.refusals;
      }
      if (data.pins == 0 && (result.status.ok() || data.handles == 0)) return EvictLocked(victim);
    }
  }

  // Every block that could go was refused, some because the store would have stalled: a flush ends that.
  void FlushAndBeginAnew(Turn* turn) {
    const Status flushed = store->Flush();
    MutexLock lock(mutex);
    turn->id = ++turns;
    turn->refusals = 0;
    turn->flushed = true;
    if (!flushed.ok()) turn->refusal = flushed;
  }

  Status NothingToEvictLocked(const Status& arena_status, const Turn& turn) const PREHOC_REQUIRES(mutex) {
    const int64_t stuck = streamed.size() + kept.size();
    std::string message = "host tier: " + arena_status.message() + ": " + std::to_string(resident - stuck) +
                          " pinned, " + std::to_string(tails) + " being filled";
    if (stuck > 0) {
      message += ", " + std::to_string(stuck) + " cannot be evicted";
      if (store == nullptr) {
        message += " because there is no store";
      } else if (!turn.refusal.ok()) {
        message += " (" + turn.refusal.ToString() + ")";
      }
    }
    return {StatusCode::kOutOfSpace, message + "; raise the host budget"};
  }

  // ---- writing ----

  struct PendingWrite {
    ChunkKey key;
    ChunkOrigin origin;
    std::array<uint64_t, 2> seal{};
    std::span<const std::byte> bytes;
  };
  struct WriteResult {
    Status status;
    bool wrote = false;    // else the store had it already
    bool damaged = false;  // the bytes are not what was sealed: they were not written
  };

  PendingWrite BeginWriteLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    PREHOC_DCHECK(!data.writing && data.memory.valid() && data.sealed);
    data.writing = true;
    ++transit;
    return {data.key, data.origin, data.seal, BytesOf(data.memory)};
  }

  WriteResult Write(const PendingWrite& write) const PREHOC_EXCLUDES(mutex) {
    PREHOC_TEST_POINT("host_tier.write");
    // Asked each time: a bounded store may have shed what it once took.
    if (store->Contains(write.key)) return {};
    if (options.health != nullptr && !options.health->Begin()) {
      return {.status = LeftAlone().WithContext("host tier")};
    }
    // Or the store would give damage a checksum that holds.
    const bool damaged = SealOf(write.key, write.bytes) != write.seal;
    const Status status = damaged ? Damaged(write.key) : store->Put(write.key, write.bytes, write.origin);
    if (options.health != nullptr) options.health->End(status);
    return {.status = status, .wrote = !damaged, .damaged = damaged};
  }

  // A block that was found damaged, and that nobody pins, is gone after this.
  void EndWriteLocked(Block* block, const WriteResult& result) PREHOC_REQUIRES(mutex) {
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

  bool WantsWriteLocked(Block* block) const PREHOC_REQUIRES(mutex) {
    const BlockData& data = In(block);
    return data.memory.valid() && !data.stored && !data.writing && !data.damaged;
  }

  // True if the caller has to post RunWriteBehind(block).
  bool QueueWriteLocked(Block* block) PREHOC_REQUIRES(mutex) {
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

  void PostWriteBehind(Block* block) {
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

  void RunWriteBehind(Block* block) {
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
    const WriteResult result = Write(write);
    MutexLock lock(mutex);
    EndWriteLocked(block, result);
    --queued_writes;
    --running;
    EndJobLocked(block);
  }

  // Writes a block that has a job of the caller, unless it is stored or gone.
  Status WriteNow(Block* block) {
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

  // Blocks in memory that the store did not take, oldest first; each with a job of the caller.
  std::vector<Block*> TakeUnwritten() {
    std::vector<std::pair<uint64_t, Block*>> found;
    {
      MutexLock lock(mutex);
      for (const auto& [key, block] : map) {
        BlockData& data = In(block.get());
        if (!data.memory.valid() || data.stored || data.damaged) continue;
        ++data.jobs;
        found.emplace_back(data.sealed_at, block.get());
      }
    }
    std::sort(found.begin(), found.end());
    std::vector<Block*> blocks;
    blocks.reserve(found.size());
    for (const auto& [order, block] : found) blocks.push_back(block);
    return blocks;
  }

  // ---- reading ----

  // Pins `block`, loading it if it must. `loaded`: this call read it.
  Result<std::span<std::byte>> Hold(Block* block, PinCheck check, bool* loaded) {
    while (true) {
      PREHOC_ASSIGN_OR_RETURN(const std::span<std::byte> bytes, HoldUnchecked(block, loaded));
      if ((check == PinCheck::kTrust && !options.verify_pins) || CheckPinned(block, bytes)) return bytes;
      // Its memory goes with the last pin; the store may have better bytes, or it is lost.
      *loaded = false;
    }
  }

  Result<std::span<std::byte>> HoldUnchecked(Block* block, bool* loaded) {
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

  // Waits for a load that the caller is a waiter of. False: its time was up; then nobody is pinned for, and its status says why.
  bool AwaitLocked(Block* block, BlockLoad* load) PREHOC_REQUIRES(mutex) {
    constexpr int64_t kLook = 5'000'000;  // the clock may be one that a test moves
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

  // The read goes on alone, with its memory; the block may be loaded, or made, by others.
  void GiveUpLocked(Block* block, BlockLoad* load) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    load->late = true;
    data.load = nullptr;
    --transit;  // nobody may wait for it to free something
    ++counters.late;
    ++counters.lost;
    data.stored = false;
    const Status why(StatusCode::kDeadline, "the store took more than " + std::to_string(options.read_deadline_nanos / 1'000'000) + " ms");
    data.lost = load->status = Lost(load->key, options.health != nullptr ? GivenUp(why) : why);
    if (options.health != nullptr) options.health->End(why);
    load->ended.NotifyAll();
    changed.NotifyAll();
  }

  // True if a block that the caller has pinned is as it was sealed; else the pin is gone. A tail has no seal: it is trusted.
  bool CheckPinned(Block* block, std::span<const std::byte> bytes) {
    std::array<uint64_t, 2> seal{};
    ChunkKey key;
    {
      MutexLock lock(mutex);
      const BlockData& data = In(block);
      if (!data.known || data.checked) return true;
      ++counters.verified;
      seal = data.seal;
      key = data.key;
    }
    PREHOC_TEST_POINT("host_tier.verify");
    const bool whole = SealOf(key, bytes) == seal;
    MutexLock lock(mutex);
    if (whole) {
      In(block).checked = true;
    } else {
      CondemnLocked(block);
    }
    return whole;
  }

  std::shared_ptr<BlockLoad> BeginLoadLocked(Block* block) PREHOC_REQUIRES(mutex) {
    PREHOC_DCHECK(store != nullptr && In(block).known);  // without a store a held block does not leave
    In(block).load = std::make_shared<BlockLoad>();
    In(block).load->key = In(block).key;
    return In(block).load;
  }

  void BeginTransit() {
    MutexLock lock(mutex);
    ++transit;
  }

  // Brings the bytes and pins the block for every waiter. Ends in load->done, now or, with a deadline, in a job.
  void Load(Block* block, const std::shared_ptr<BlockLoad>& load, bool demand) {
    // A prefetch waits for nobody, so others may wait for it from here on; a demand may itself be waiting for memory.
    if (!demand) BeginTransit();
    PREHOC_TEST_POINT("host_tier.reserve");
    const Result<BlockId> memory = TakeMemory(demand);
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

  // What an error of the store means where it is not asked to try again.
  static Status GivenUp(const Status& why) { return {StatusCode::kNotFound, why.message() + "; it is made anew instead"}; }

  void FinishRead(Block* block, BlockLoad* load, BlockId memory, int64_t start) {
    bool late = false;
    {
      MutexLock lock(mutex);
      late = load->late;
    }
    Status status(StatusCode::kDeadline, "nobody waits for it any more");
    if (!late) {
      PREHOC_TEST_POINT("host_tier.load");
      status = store->Get(load->key, BytesOf(memory));
    }
    const int64_t nanos = clock->NowNanos() - start;
    {
      MutexLock lock(mutex);
      load->deadline_at = INT64_MAX;  // from here on it comes in time
      late = load->late;
    }
    if (options.health != nullptr) {
      if (!late) options.health->End(status);
      if (status.code() == StatusCode::kIoError || status.code() == StatusCode::kDeadline) status = GivenUp(status);
    }
    if (status.ok()) {
      status = CompareSeal(block, SealOf(load->key, BytesOf(memory)));
      // A record that is not what was written goes, or it would keep the right one from being written.
      if (!status.ok()) store->Delete(load->key).IgnoreError();
    }
    MutexLock lock(mutex);
    if (!late) --transit;
    ++(status.ok() ? counters.loads : counters.load_errors);
    counters.load_nanos += static_cast<uint64_t>(nanos);
    if (late) {
      FinishLateLocked(block, memory, status.ok());
    } else {
      FinishLoadLocked(block, load, memory, std::move(status));
    }
    changed.NotifyAll();
  }

  // Nobody waits any more; but what came is as good as ever, if nothing else has come in its place.
  void FinishLateLocked(Block* block, BlockId memory, bool good) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    if (!good || data.memory.valid() || data.load != nullptr) return FreeLocked(memory);
    data.stored = true;
    AdoptLocked(block, memory);
  }

  // The store vouches for its record; that it is the very one which was written from here, only this tier knows.
  Status CompareSeal(Block* block, const std::array<uint64_t, 2>& seal) {
    MutexLock lock(mutex);
    BlockData& data = In(block);
    if (data.memory.valid()) return {};  // a Seal() brought the bytes meanwhile, and they are what counts
    if (!data.store_sealed) {
      data.seal = seal;
      data.sealed = data.store_sealed = true;
    }
    if (data.seal == seal) return {};
    data.store_sealed = false;
    ++counters.corrupt;
    return {StatusCode::kCorrupt, "host tier: chunk " + data.key.ToString() + ": the store gave other bytes than were sealed"};
  }

  void FinishLoadLocked(Block* block, BlockLoad* load, BlockId memory, Status status) PREHOC_REQUIRES(mutex) {
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

  bool QueuePrefetchLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    if (!data.known || data.memory.valid() || data.load != nullptr || data.prefetch_queued || !data.lost.ok()) {
      return false;
    }
    data.prefetch_queued = true;
    ++data.jobs;
    return true;
  }

  // False if the executor takes no more.
  bool PostPrefetch(Block* block) {
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

  void RunPrefetch(Block* block) {
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
      load = BeginLoadLocked(block);
      ++counters.prefetches;
      ++running;
    }
    Load(block, load, /*demand=*/false);
    MutexLock lock(mutex);
    --running;
    changed.NotifyAll();
    EndJobLocked(block);
  }

  // ---- sealing and finding ----

  // Gives the bytes of a duplicate tail to the block that has its key, if that one has none in memory.
  void MergeTailLocked(Block* tail, Block* canonical) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(canonical);
    const BlockId memory = std::exchange(In(tail).memory, BlockId());
    In(tail).lost = {StatusCode::kNotFound, "host tier: this tail was a duplicate; use the block that Seal() returned"};
    ++counters.duplicates;
    if (data.memory.valid()) return FreeLocked(memory);
    // Computed twice, bytes may differ in their last bits; what the store has stays what this block is.
    if (data.stored && data.store_sealed && data.seal != In(tail).seal) return FreeLocked(memory);
    if (data.seal != In(tail).seal) data.store_sealed = false;
    data.seal = In(tail).seal;
    data.sealed = true;
    counters.healed += !data.lost.ok();
    AdoptLocked(canonical, memory);
  }

  // True if the caller has to post RunWriteBehind(*canonical).
  bool SealLocked(Block* tail, const ChunkKey& key, const ChunkOrigin& origin, const std::array<uint64_t, 2>& seal,
                  Block** canonical) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(tail);
    PREHOC_CHECK(!data.known && data.memory.valid() && data.pins == 0);
    --tails;
    data.seal = seal;
    data.sealed = true;
    const auto [entry, inserted] = map.try_emplace(key);
    if (inserted) {
      entry->second.reset(tail);
      data.key = key;
      data.known = true;
      data.sealed_at = ++seals;
      ++resident;
      LinkLocked(tail);
    } else {
      MergeTailLocked(tail, entry->second.get());
    }
    *canonical = entry->second.get();
    In(*canonical).origin = origin;
    return QueueWriteLocked(*canonical);
  }

  // Fills `ref` if the map alone can answer.
  bool FindKnownLocked(const ChunkKey& key, std::optional<BlockRef>* ref) PREHOC_REQUIRES(mutex) {
    const auto found = map.find(key);
    if (found == map.end() || !In(found->second.get()).lost.ok()) return false;
    *ref = RefLocked(found->second.get());
    return true;
  }

  BlockRef FindStoredLocked(const ChunkKey& key) PREHOC_REQUIRES(mutex) {
    const auto [entry, inserted] = map.try_emplace(key);
    if (inserted) {
      entry->second = std::make_unique<Block>();
      In(entry->second.get()).key = key;
      In(entry->second.get()).known = true;
    }
    BlockData& data = In(entry->second.get());
    if (!data.memory.valid()) {
      data.stored = true;
      data.lost = {};
    }
    return RefLocked(entry->second.get());
  }

  Status CheckLocked() const PREHOC_REQUIRES(mutex);
  Status CheckBlockLocked(const ChunkKey& key, Block* block) const PREHOC_REQUIRES(mutex);
};

// ---- pins ----

BlockPin::BlockPin(BlockPin&& other) noexcept
    : tier_(std::exchange(other.tier_, nullptr)),
      block_(std::move(other.block_)),
      bytes_(std::exchange(other.bytes_, {})),
      use_(other.use_),
      loaded_(std::exchange(other.loaded_, false)) {}

BlockPin& BlockPin::operator=(BlockPin&& other) noexcept {
  BlockPin taken(std::move(other));
  std::swap(tier_, taken.tier_);
  std::swap(block_, taken.block_);
  std::swap(bytes_, taken.bytes_);
  std::swap(use_, taken.use_);
  std::swap(loaded_, taken.loaded_);
  return *this;
}

BlockPin::~BlockPin() {
  if (tier_ != nullptr) tier_->Unpin(this);
}

BlockPin HostTier::MakePin(const BlockRef& block, std::span<std::byte> bytes, BlockUse use, bool loaded) {
  BlockPin pin;
  pin.tier_ = this;
  pin.block_ = block;
  pin.bytes_ = bytes;
  pin.use_ = use;
  pin.loaded_ = loaded;
  return pin;
}

void HostTier::Unpin(BlockPin* pin) { impl_->Unpin(pin->block_.get(), pin->use_); }

// ---- the tier ----

HostTier::HostTier(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<HostTier>> HostTier::Create(const Options& options, Executor* executor, Executor* background,
                                                   ChunkStore* store) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  PREHOC_CHECK(executor != nullptr);
  if (store != nullptr && store->chunk_bytes() != options.block_bytes) {
    return Status(StatusCode::kInvalid, "host tier: block_bytes=" + std::to_string(options.block_bytes) +
                                            ", the store's chunks have " + std::to_string(store->chunk_bytes()) +
                                            " bytes; open the store with the same geometry");
  }
  auto impl = std::make_shared<Impl>();
  impl->options = options;
  impl->background = background != nullptr ? background : executor;
  impl->store = store;
  impl->clock = options.clock != nullptr ? options.clock : &SteadyClock::Get();
  HostArena::Options arena;
  arena.block_bytes = options.block_bytes;
  arena.budget = options.budget;
  arena.huge_pages = options.huge_pages;
  arena.registrar = options.registrar;
  PREHOC_ASSIGN_OR_RETURN(impl->arena, HostArena::Create(arena, executor));
  return std::unique_ptr<HostTier>(new HostTier(std::move(impl)));
}

HostTier::~HostTier() {
  {
    MutexLock lock(impl_->mutex);
    impl_->closed = true;
  }
  PREHOC_TEST_POINT("host_tier.close");
  MutexLock lock(impl_->mutex);
  while (impl_->running > 0) impl_->changed.Wait(impl_->mutex);
}

Result<BlockRef> HostTier::NewTail() {
  PREHOC_ASSIGN_OR_RETURN(const BlockId memory, impl_->TakeMemory(/*demand=*/true));
  const std::span<std::byte> bytes = impl_->BytesOf(memory);
  std::memset(bytes.data(), 0, bytes.size());
  auto block = std::make_unique<Block>();
  MutexLock lock(impl_->mutex);
  impl_->In(block.get()).memory = memory;
  ++impl_->tails;
  return impl_->RefLocked(block.release());
}

BlockRef HostTier::Seal(BlockRef tail, const ChunkKey& key, const ChunkOrigin& origin) {
  PREHOC_CHECK(tail != nullptr);
  Block* canonical = nullptr;
  bool post = false;
  BlockRef result;
  const std::array<uint64_t, 2> seal = SealOf(key, impl_->BytesOfTail(tail.get()));
  {
    MutexLock lock(impl_->mutex);
    post = impl_->SealLocked(tail.get(), key, origin, seal, &canonical);
    result = impl_->RefLocked(canonical);
  }
  if (post) impl_->PostWriteBehind(canonical);
  return result;
}

Result<BlockPin> HostTier::Pin(const BlockRef& block, BlockUse use, PinCheck check) {
  PREHOC_CHECK(block != nullptr);
  bool loaded = false;
  Result<std::span<std::byte>> bytes = impl_->Hold(block.get(), check, &loaded);
  if (!bytes.ok()) return bytes.status();
  return MakePin(block, *bytes, use, loaded);
}

std::optional<BlockPin> HostTier::TryPin(const BlockRef& block, BlockUse use) {
  PREHOC_CHECK(block != nullptr);
  std::span<std::byte> bytes;
  {
    MutexLock lock(impl_->mutex);
    const BlockId memory = impl_->In(block.get()).memory;
    if (!memory.valid() || impl_->In(block.get()).damaged) return std::nullopt;
    ++impl_->counters.hits;
    impl_->PinLocked(block.get(), 1);
    bytes = impl_->BytesOf(memory);
  }
  return MakePin(block, bytes, use, /*loaded=*/false);
}

std::optional<BlockRef> HostTier::Find(const ChunkKey& key) {
  std::optional<BlockRef> ref;
  {
    MutexLock lock(impl_->mutex);
    if (impl_->FindKnownLocked(key, &ref)) return ref;
  }
  if (impl_->store == nullptr || (impl_->options.health != nullptr && !impl_->options.health->Available())) return std::nullopt;
  if (!impl_->store->Contains(key)) return std::nullopt;
  MutexLock lock(impl_->mutex);
  return impl_->FindStoredLocked(key);
}

void HostTier::Prefetch(std::span<const BlockRef> blocks) {
  if (impl_->store == nullptr) return;
  for (const BlockRef& block : blocks) {
    bool post = false;
    {
      MutexLock lock(impl_->mutex);
      post = impl_->QueuePrefetchLocked(block.get());
    }
    if (post && !impl_->PostPrefetch(block.get())) return;
  }
}

BlockState HostTier::state(const BlockRef& block) const {
  MutexLock lock(impl_->mutex);
  const BlockData& data = impl_->In(block.get());
  if (data.memory.valid()) return data.known ? BlockState::kHost : BlockState::kTail;
  return data.lost.ok() ? BlockState::kStoreOnly : BlockState::kLost;
}

Status HostTier::Flush() {
  if (impl_->store == nullptr) return {};
  Status first;
  const auto note = [&](const Status& status) {
    if (first.ok()) first = status;
  };
  std::vector<Block*> todo = impl_->TakeUnwritten();
  for (bool again = false;; again = true) {
    std::vector<Block*> busy;
    Status stall;
    for (Block* block : todo) {
      const Status status = impl_->WriteNow(block);
      if (status.code() == StatusCode::kBusy) {
        stall = status;
        busy.push_back(block);
        continue;
      }
      note(status);
      MutexLock lock(impl_->mutex);
      impl_->EndJobLocked(block);
    }
    note(impl_->store->Flush());
    const bool helped = !again || busy.size() < todo.size();
    todo = std::move(busy);
    if (!todo.empty() && helped) continue;
    if (!todo.empty()) note(stall);
    break;
  }
  MutexLock lock(impl_->mutex);
  for (Block* block : todo) impl_->EndJobLocked(block);
  return first;
}

bool HostTier::FlipIdleBitForTest(uint64_t pick, uint64_t bit) {
  MutexLock lock(impl_->mutex);
  const BlockList& list = pick % 2 == 0 && impl_->streamed.size() > 0 ? impl_->streamed : impl_->kept;
  if (list.size() == 0) return false;
  Block* block = list.front();
  for (uint64_t i = pick / 2 % static_cast<uint64_t>(list.size()); i > 0; --i) block = impl_->In(block).after;
  const BlockData& data = impl_->In(block);
  if (data.writing || data.damaged) return false;
  const std::span<std::byte> bytes = impl_->BytesOf(data.memory);
  bytes[bit / 8 % bytes.size()] ^= std::byte{1} << (bit % 8);
  return true;
}

size_t HostTier::block_bytes() const { return impl_->options.block_bytes; }
int64_t HostTier::capacity_blocks() const { return impl_->arena->capacity_blocks(); }
int64_t HostTier::used_blocks() const { return impl_->arena->used_blocks(); }

void HostTier::VisitCounters(const CounterVisitor& visit) const {
  impl_->arena->VisitCounters(visit);
  Impl::Counters c;
  int64_t resident = 0, tails = 0, pinned = 0, waiting = 0, queued = 0;
  {
    MutexLock lock(impl_->mutex);
    c = impl_->counters;
    resident = impl_->resident;
    tails = impl_->tails;
    pinned = resident - impl_->streamed.size() - impl_->kept.size();
    waiting = impl_->sharers + impl_->reclaimers;
    queued = impl_->queued_writes;
  }
  const auto show = [&](const char* name, auto value) { visit(name, static_cast<double>(value)); };
  show("host.blocks", resident + tails);
  show("host.pinned", pinned);
  show("host.tails", tails);
  show("host.waiting", waiting);
  show("host.hits", c.hits);
  show("host.loads", c.loads);
  show("host.shared_loads", c.shared_loads);
  show("host.load_errors", c.load_errors);
  show("host.load_bytes", c.loads * block_bytes());
  show("host.load_nanos", c.load_nanos);
  show("host.evicted", c.evicted);
  show("host.forgotten", c.forgotten);
  show("host.lost", c.lost);
  show("host.healed", c.healed);
  show("host.duplicates", c.duplicates);
  show("host.prefetches", c.prefetches);
  show("host.prefetches_refused", c.prefetches_refused);
  show("host.verified_bytes", c.verified * block_bytes());
  show("host.corrupt", c.corrupt);
  show("host.late", c.late);
  show("write_behind.queued", queued);
  show("write_behind.written", c.written);
  show("write_behind.bytes", c.written * block_bytes());
  show("write_behind.dropped", c.dropped);
  show("write_behind.failed", c.failed);
  show("write_behind.shed", c.shed);
}

// ---- invariants ----

Status HostTier::Impl::CheckBlockLocked(const ChunkKey& key, Block* block) const {
  const BlockData& data = In(block);
  const auto bad = [&](const char* what) {
    return Status(StatusCode::kCorrupt, "host tier: chunk " + key.ToString() + " " + what);
  };
  if (!data.known || data.key != key) return bad("is under a key that is not its own");
  if (data.pins < 0 || data.handles < 0 || data.jobs < 0) return bad("has a count below zero");
  if (data.pins > 0 && !data.memory.valid()) return bad("is pinned and not in memory");
  if (data.writing && !data.memory.valid()) return bad("is being written and not in memory");
  if ((data.list != nullptr) != (data.memory.valid() && data.pins == 0)) return bad("is in a list, or not, wrongly");
  if (data.memory.valid() && !data.sealed) return bad("is in memory and was never sealed");
  if (data.damaged && !data.memory.valid()) return bad("is damaged and not in memory");
  if (!data.lost.ok() && data.memory.valid()) return bad("is lost and in memory");
  if (data.handles == 0 && data.jobs == 0 && data.load == nullptr && !data.memory.valid()) return bad("has no use");
  return {};
}

Status HostTier::Impl::CheckLocked() const {
  int64_t in_memory = 0, unpinned = 0;
  int32_t writing = 0, write_queued = 0;
  for (const auto& [key, block] : map) {
    PREHOC_RETURN_IF_ERROR(CheckBlockLocked(key, block.get()));
    const BlockData& data = In(block.get());
    in_memory += data.memory.valid();
    unpinned += data.list != nullptr;
    writing += data.writing;
    write_queued += data.write_queued;
  }
  const auto bad = [](const char* what) { return Status(StatusCode::kCorrupt, std::string("host tier: ") + what); };
  if (in_memory != resident) return bad("`resident` does not count the blocks in memory");
  if (unpinned != streamed.size() + kept.size()) return bad("the lists have lost or doubled a block");
  if (writing > transit) return bad("more blocks are being written than are on their way");
  if (write_queued > queued_writes) return bad("more writes are queued than counted");
  const int64_t used = arena->used_blocks();
  if (resident + tails > used || used > arena->capacity_blocks()) return bad("blocks and arena do not add up");
  return {};
}

Status HostTier::CheckInvariants() const {
  PREHOC_RETURN_IF_ERROR(impl_->arena->CheckInvariants());
  MutexLock lock(impl_->mutex);
  return impl_->CheckLocked();
}

}  // namespace prehoc
