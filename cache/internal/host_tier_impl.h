// What the host tier is made of. Internal to host_tier*.cc.
#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "cache/host_tier.h"
#include "cache/internal/host_block.h"
#include "transfer/record_format.h"

namespace prehoc {

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
  // After so many refusals one turn of eviction looks only for blocks that can go without a write: a store that stalls or
  // is full will not take the next one either.
  static constexpr int kMaxRefusals = 4;

  // Bound to the key, so that bytes of another block do not pass either.
  static uint64_t SeedOf(const ChunkKey& key) {
    return Hash64(std::as_bytes(std::span(key.chain)), static_cast<uint64_t>(key.layer));
  }
  static bool Holds(const ChunkSeal& seal, std::span<const std::byte> bytes) { return Hash128(bytes, seal.seed) == seal.hash; }
  // Words never fail: a state that has to be told may not get lost for want of them.
  static Status Damaged(const ChunkKey& key) noexcept {
    return WithWords(StatusCode::kCorrupt, [&]() -> Status {
      return {StatusCode::kCorrupt, "host tier: chunk " + key.ToString() + ": memory no longer holds what was sealed"};
    });
  }
  static Status LeftAlone() noexcept {
    return WithWords(StatusCode::kIoError, []() -> Status { return {StatusCode::kIoError, "host tier: the store failed of late and is not asked for now"}; });
  }
  static Status Lost(const ChunkKey& key, const Status& why) noexcept {
    return WithWords(why.code(), [&] { return why.WithContext("host tier: chunk " + key.ToString() + " is lost"); });
  }

  // What one eviction has learnt so far.
  struct Turn {
    uint64_t id = 0;
    int refusals = 0;
    bool stalled = false;  // the store said kBusy
    bool flushed = false;
    int64_t patience_ends = 0;  // clock; of waiting for others, once that has begun
    bool hung = false;          // it has ended
    Status refusal;        // the last one
  };
  struct Counters {
    uint64_t hits = 0, loads = 0, shared_loads = 0, load_errors = 0, load_nanos = 0;
    uint64_t evicted = 0, forgotten = 0, lost = 0, healed = 0, duplicates = 0, prefetches = 0, prefetches_refused = 0;
    uint64_t written = 0, replaced = 0, dropped = 0, failed = 0, shed = 0;
    uint64_t late = 0;
    uint64_t verified = 0, corrupt = 0;  // checks of bytes in memory; and those that found damage
  };
  struct Releaser {
    Impl* impl = nullptr;
    void operator()(Block* block) const {
      if (impl != nullptr) impl->Released(block);
    }
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
  // Blocks in memory that nobody pins: those that nobody holds either go before all others, or a sequence would lose rows to what
  // sequences left behind that are over.
  struct Unpinned {
    BlockList streamed, kept;
    int64_t size() const { return streamed.size() + kept.size(); }
  };
  Unpinned idle PREHOC_GUARDED_BY(mutex);
  Unpinned held PREHOC_GUARDED_BY(mutex);
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

  std::span<const std::byte> BytesOfTailLocked(Block* tail) const PREHOC_REQUIRES(mutex) {
    PREHOC_CHECK(!In(tail).known && In(tail).memory.valid() && In(tail).pins == 0);
    return BytesOf(In(tail).memory);
  }

  // ---- who holds a block ----

  BlockRef RefLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(block);
    if (BlockRef ref = data.self.lock()) return ref;
    // The last reference may be dying right now, on its way to Released(): a second family of them begins. Without memory for
    // its count shared_ptr calls the releaser, which does nothing yet.
    BlockRef ref(block, Releaser{});
    std::get_deleter<Releaser>(ref)->impl = this;
    ++data.handles;
    data.self = ref;
    if (data.handles == 1) RelinkLocked(block);
    return ref;
  }

  void Released(Block* block) {
    MutexLock lock(mutex);
    BlockData& data = In(block);
    if (--data.handles > 0) return;
    if (data.known) {
      RelinkLocked(block);
      return ForgetIfUnusedLocked(block);
    }
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
    const BlockData& data = In(block);
    Unpinned& lists = data.handles == 0 ? idle : held;
    (data.use == BlockUse::kStream && !data.awaited ? lists.streamed : lists.kept).PushBack(block);
    if (reclaimers > 0) changed.NotifyAll();
  }
  // Somebody holds it, or nobody does any more.
  void RelinkLocked(Block* block) PREHOC_REQUIRES(mutex) {
    BlockList* const list = In(block).list;
    if (list == nullptr) return;
    list->Remove(block);
    LinkLocked(block);
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
      data.lost = WithWords(StatusCode::kNotFound, [&] {
        return Lost(data.key, {StatusCode::kNotFound, "it left memory before any store took it"});
      });
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
    for (const Unpinned* lists : {&idle, &held}) {
      for (Block* block = lists->streamed.back(); block != nullptr; block = In(block).before) {
        if (EvictableLocked(In(block), turn)) return block;
      }
      for (Block* block = lists->kept.front(); block != nullptr; block = In(block).after) {
        // Whatever is behind it was used later: a prefetch that went on would push out what others wait for.
        if (!demand && In(block).awaited && In(block).handles > 0) return nullptr;
        if (EvictableLocked(In(block), turn)) return block;
      }
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
          ++In(victim).jobs;  // known until this has looked at it again
        } else {
          if (frees != frees_before) continue;
          if (demand && transit > 0 && !turn.hung && WorthWaitingLocked()) {
            ++reclaimers;
            turn.hung = !AwaitChangeLocked(&turn.patience_ends);
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
      const WriteResult result = WriteInTime(victim, write);
      MutexLock lock(mutex);
      if (!result.damaged && !result.status.ok()) NoteRefusalLocked(victim, result.status, &turn);
      const BlockData& data = In(victim);
      const bool may_go = data.pins == 0 && !data.writing && data.memory.valid() && !data.damaged;
      BlockId freed;
      if (may_go && (data.stored || data.handles == 0)) freed = EvictLocked(victim);
      EndJobLocked(victim);
      if (freed.valid()) return freed;
    }
  }

  void NoteRefusalLocked(Block* victim, const Status& status, Turn* turn) PREHOC_REQUIRES(mutex) {
    In(victim).refused_in = std::max(In(victim).refused_in, turn->id);
    turn->refusal = status;
    turn->stalled |= status.code() == StatusCode::kBusy;
    turn->hung |= status.code() == StatusCode::kDeadline;
    ++turn->refusals;
  }

  // With a deadline nobody waits for the writes of others while the store is known to hang.
  bool WorthWaitingLocked() const PREHOC_REQUIRES(mutex) {
    return options.write_deadline_nanos == 0 || options.health == nullptr || options.health->Available();
  }

  // Waits for `changed`, but not after *ends, which is set by the first call: false, and the store's health has been told.
  bool AwaitChangeLocked(int64_t* ends) PREHOC_REQUIRES(mutex) {
    if (options.write_deadline_nanos == 0) {
      changed.Wait(mutex);
      return true;
    }
    const int64_t now = clock->NowNanos();
    if (*ends == 0) *ends = now + options.write_deadline_nanos;
    if (now >= *ends) {
      if (options.health != nullptr) options.health->End({StatusCode::kDeadline, {}});
      return false;
    }
    changed.WaitFor(mutex, std::min(*ends - now, kLook));
    return true;
  }

  Status FlushStore() noexcept;

  // Every block that could go was refused, some because the store would have stalled: a flush ends that.
  void FlushAndBeginAnew(Turn* turn) {
    const Status flushed = FlushStore();
    MutexLock lock(mutex);
    turn->id = ++turns;
    turn->refusals = 0;
    turn->flushed = true;
    if (!flushed.ok()) turn->refusal = flushed;
  }

  Status NothingToEvictLocked(const Status& arena_status, const Turn& turn) const PREHOC_REQUIRES(mutex) {
    const int64_t stuck = idle.size() + held.size();
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

  // ---- writing (host_tier_write.cc) ----

  struct StoreCall;
  struct PendingWrite {
    ChunkKey key;
    ChunkOrigin origin;
    ChunkSeal seal;
    bool known_there = false;  // if the store has the key, then with just these bytes
    std::span<const std::byte> bytes;
  };
  struct WriteResult {
    Status status;
    bool wrote = false;    // else the store had it already
    bool replaced = false;  // another version of it
    bool same = false;     // the store has just these bytes, that is known
    bool damaged = false;  // the bytes are not what was sealed: they were not written
  };

  PendingWrite BeginWriteLocked(Block* block) PREHOC_REQUIRES(mutex);

  // The block is marked as being written, so this throws nothing.
  // `call`: whose wait this is; null = nobody's.
  WriteResult Write(const PendingWrite& write, StoreCall* call = nullptr) const noexcept PREHOC_EXCLUDES(mutex);

  // Write() and EndWriteLocked(), here or, with a deadline, in a job of the reader: kDeadline if that is late, and goes on. The caller
  // keeps the block known.
  WriteResult WriteInTime(Block* block, const PendingWrite& write) noexcept PREHOC_EXCLUDES(mutex);

  // What somebody waits for, with a deadline. Guarded by the mutex.
  struct StoreCall {
    explicit StoreCall(int64_t now) : began(now) {}
    const int64_t began;  // clock; when somebody began to wait
    bool done = false;
    bool late = false;  // whoever waited has been told
    CondVar ended;
    WriteResult result;
  };
  static constexpr int64_t kLook = 5'000'000;  // between two looks at a clock that may be one that a test moves
  // True if `call` was done in time; else it is late from now on, and the store's health has been told.
  bool AwaitCall(StoreCall* call) PREHOC_EXCLUDES(mutex);
  Status LateCall() const noexcept;

  // A block that was found damaged, and that nobody pins, is gone after this.
  void EndWriteLocked(Block* block, const WriteResult& result) PREHOC_REQUIRES(mutex);

  bool WantsWriteLocked(Block* block) const PREHOC_REQUIRES(mutex);

  // True if the caller has to post RunWriteBehind(block).
  bool QueueWriteLocked(Block* block) PREHOC_REQUIRES(mutex);

  void PostWriteBehind(Block* block);

  void RunWriteBehind(Block* block);

  // Writes a block that has a job of the caller, unless it is stored or gone.
  Status WriteNow(Block* block);

  // Blocks in memory that the store did not take, oldest first; each with a job of the caller.
  std::vector<Block*> TakeUnwritten();

  // ---- reading (host_tier_read.cc) ----

  // Pins `block`, loading it if it must. `loaded`: this call read it.
  Result<std::span<std::byte>> Hold(Block* block, PinCheck check, bool* loaded);

  Result<std::span<std::byte>> HoldUnchecked(Block* block, bool* loaded);

  // Waits for a load that the caller is a waiter of. False: its time was up; then nobody is pinned for, and its status says why.
  bool AwaitLocked(Block* block, BlockLoad* load) PREHOC_REQUIRES(mutex);

  // The read goes on alone, with its memory; the block may be loaded, or made, by others.
  void GiveUpLocked(Block* block, BlockLoad* load) PREHOC_REQUIRES(mutex);

  // True if a block that the caller has pinned is as it was sealed; else the pin is gone. A tail has no seal: it is trusted.
  bool CheckPinned(Block* block, std::span<const std::byte> bytes);

  std::shared_ptr<BlockLoad> BeginLoadLocked(Block* block) PREHOC_REQUIRES(mutex);

  void BeginTransit();

  // Brings the bytes and pins the block for every waiter. Ends in load->done, now or, with a deadline, in a job.
  void Load(Block* block, const std::shared_ptr<BlockLoad>& load, bool demand);

  // What an error of the store means where it is not asked to try again.
  static Status GivenUp(const Status& why) noexcept {
    return WithWords(StatusCode::kNotFound, [&]() -> Status { return {StatusCode::kNotFound, why.message() + "; it is made anew instead"}; });
  }

  void FinishRead(Block* block, BlockLoad* load, BlockId memory, int64_t start);

  // Nobody waits any more; but what came is as good as ever, if nothing else has come in its place.
  void FinishLateLocked(Block* block, BlockId memory, bool good) PREHOC_REQUIRES(mutex);

  // False: while it read, a Seal() gave the block other bytes, which took the record's place in the store and left memory again.
  bool ReadOnce(Block* block, BlockLoad* load, BlockId memory, int64_t start) PREHOC_EXCLUDES(mutex);

  // The store vouches for its record, which is what `read` says of it; that it is the very one which was written from here, only this
  // tier knows. A pass over `bytes`, unless they are seen for the first time. `seal`: in, the block's before the read; out, what the
  // bytes were compared with. Nothing if they differ, and that seal came during the read.
  std::optional<Status> CompareSeal(Block* block, const ChunkSeal& read, std::span<const std::byte> bytes, ChunkSeal* seal);

  void FinishLoadLocked(Block* block, BlockLoad* load, BlockId memory, Status status) PREHOC_REQUIRES(mutex);

  bool QueuePrefetchLocked(Block* block) PREHOC_REQUIRES(mutex);

  // False if the executor takes no more.
  bool PostPrefetch(Block* block);

  void RunPrefetch(Block* block);

  // ---- sealing and finding ----

  // Gives the bytes of a duplicate tail to the block that has its key, if that one has none in memory.
  void MergeTailLocked(Block* tail, Block* canonical) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(canonical);
    const BlockId memory = std::exchange(In(tail).memory, BlockId());
    In(tail).lost = WithWords(StatusCode::kNotFound, []() -> Status {
      return {StatusCode::kNotFound, "host tier: this tail was a duplicate; use the block that Seal() returned"};
    });
    ++counters.duplicates;
    if (data.memory.valid()) return FreeLocked(memory);
    // Computed twice, bytes may differ in their last bits; what the store has stays what this block is.
    if (data.stored && data.store_sealed && data.seal != In(tail).seal) return FreeLocked(memory);
    if (data.seal != In(tail).seal) data.store_sealed = false;
    data.stored &= data.store_sealed;  // nobody has read what the store has: it will be compared
    data.seal = In(tail).seal;
    data.sealed = true;
    counters.healed += !data.lost.ok();
    AdoptLocked(canonical, memory);
  }

  // With which a tail is sealed: that of the block which has the key, so that the two can be compared.
  uint64_t SeedLocked(const ChunkKey& key) const PREHOC_REQUIRES(mutex) {
    const auto found = map.find(key);
    return found != map.end() && In(found->second.get()).sealed ? In(found->second.get()).seal.seed : SeedOf(key);
  }

  // True if the caller has to post RunWriteBehind(canonical->get()). What may throw comes first.
  bool SealLocked(Block* tail, const ChunkKey& key, const ChunkOrigin& origin, const ChunkSeal& seal,
                  BlockRef* canonical) PREHOC_REQUIRES(mutex) {
    BlockData& data = In(tail);
    PREHOC_CHECK(!data.known && data.memory.valid() && data.pins == 0);
    auto entry = map.find(key);
    const bool inserted = entry == map.end();
    *canonical = RefLocked(inserted ? tail : entry->second.get());
    if (inserted) entry = map.try_emplace(key).first;
    --tails;
    data.seal = seal;
    data.sealed = true;
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
    In(canonical->get()).origin = origin;
    return QueueWriteLocked(canonical->get());
  }

  // Fills `ref` if the map alone can answer.
  bool FindKnownLocked(const ChunkKey& key, std::optional<BlockRef>* ref) PREHOC_REQUIRES(mutex) {
    const auto found = map.find(key);
    if (found == map.end() || !In(found->second.get()).lost.ok()) return false;
    *ref = RefLocked(found->second.get());
    return true;
  }

  BlockRef FindStoredLocked(const ChunkKey& key) PREHOC_REQUIRES(mutex) {
    auto entry = map.find(key);
    const bool inserted = entry == map.end();
    if (inserted) {
      auto block = std::make_unique<Block>();
      In(block.get()).key = key;
      In(block.get()).known = true;
      entry = map.try_emplace(key, std::move(block)).first;
    }
    BlockData& data = In(entry->second.get());
    BlockRef ref;
    try {
      ref = RefLocked(entry->second.get());
    } catch (const std::bad_alloc&) {
      if (inserted) map.erase(entry);
      throw;
    }
    if (!data.memory.valid()) {
      data.stored = true;
      data.lost = {};
    }
    return ref;
  }

  Status CheckLocked() const PREHOC_REQUIRES(mutex);
  Status CheckBlockLocked(const ChunkKey& key, Block* block) const PREHOC_REQUIRES(mutex);
};

}  // namespace prehoc
