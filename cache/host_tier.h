// The blocks of all sequences: in the host arena, in the store, or in both; shared by key. Knows nothing of attention.
//
//   NewTail() --> tail (private, written to) --Seal(key)--> host <--> host and store <--> store only
//                                                             |            (written behind; evicted; loaded by Pin)
//                                                             +--> lost: no tier has it any more; Seal() of the same key heals it
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/clock.h"
#include "base/counters.h"
#include "base/executor.h"
#include "base/ids.h"
#include "base/result.h"
#include "base/trace.h"
#include "cache/tier_health.h"
#include "transfer/chunk_store.h"
#include "transfer/host_arena.h"

namespace prehoc {

// One chunk of one layer. Whoever holds a BlockRef keeps the block known; a block that nobody holds stays for prefix
// reuse until its memory is wanted.
class Block;
using BlockRef = std::shared_ptr<Block>;

enum class BlockState : uint8_t { kTail, kHost, kStoreOnly, kLost };

// What a use says about the next one: a streamed block will not be wanted before all others of its kind (one layer
// after the other, over and over), so the one used last is the first to go, before any kept one; a kept one goes when
// it has not been used for longest. Blocks that nobody holds go before all that somebody does. The pin that dies last decides; a tail that was
// never pinned is kept.
enum class BlockUse : uint8_t { kStream, kKeep };

// Whether a pin of a block that is in memory already compares its bytes with what Seal() saw: one pass over them. A block that
// comes from the store is always compared.
enum class PinCheck : uint8_t { kTrust, kVerify };

// The block's bytes stay in host memory, where they are, while this lives. Moves, does not copy. Dies before the tier.
class [[nodiscard]] BlockPin {
 public:
  BlockPin() = default;
  BlockPin(BlockPin&& other) noexcept;
  BlockPin& operator=(BlockPin&& other) noexcept;
  ~BlockPin();

  explicit operator bool() const { return block_ != nullptr; }
  std::span<std::byte> bytes() const { return bytes_; }  // [block_bytes]; written to only while the block is a tail
  bool loaded() const { return loaded_; }                // this pin brought the bytes from the store

 private:
  friend class HostTier;
  class HostTier* tier_ = nullptr;
  BlockRef block_;
  std::span<std::byte> bytes_;
  BlockUse use_ = BlockUse::kKeep;
  bool loaded_ = false;
};

// Safe from any thread. Outlives its pins and refs. What it evicts, and when, is told at Pin().
//
// Never more memory than the budget: a block leaves it before another takes its place. Pinned blocks and tails never
// leave. A block that the store does not have is stored first, and stays if the store refuses it; only one that nobody
// holds goes even then. The store's Contains() is believed, so it is Pin() that may find a block lost.
class HostTier {
 public:
  struct Options {
    size_t block_bytes = 0;         // required
    size_t row_bytes = 0;           // of a row of a block: blocks lie whole rows apart, as kernels count them; 0 = need not
    uint64_t budget = 0;            // [bytes] of host memory, hard
    bool huge_pages = true;
    bool verify_pins = false;       // every pin of an idle block is PinCheck::kVerify
    HostRegistrar* registrar = nullptr;  // pins the memory for a device; or null. Outlives the tier and both executors' jobs
    int32_t max_queued_writes = 64;  // write-behind jobs under way; beyond it a block waits for its eviction or for Flush()
    const Clock* clock = nullptr;    // of load_nanos and deadlines; null = SteadyClock
    Tracer* tracer = nullptr;        // of the store's reads and writes; null = nobody
    // With `health` the store is asked only while it works: else, and when a read fails, its blocks count as lost and are made
    // anew (kNotFound in the place of kIoError and kDeadline), and nothing is found in it. Outlives the tier; null = always asked.
    TierHealth* health = nullptr;
    // Whoever needs a block waits no longer than this for one read of the store; 0 = as long as it takes. The read goes on and
    // keeps its memory. Needs `reader`, whose jobs read: as many threads as reads may hang at once. Outlives the tier.
    int64_t read_deadline_nanos = 0;
    Executor* reader = nullptr;
    // The same for one write that somebody waits for, and for a flush of the store; a write that is late goes on, and its block stays in
    // memory until then. 0 = as long as it takes.
    int64_t write_deadline_nanos = 0;
    Status Validate() const;         // kInvalid, naming the field and its value
  };
  // `executor` touches memory; `background` runs write-behind and prefetches (null = `executor`); `store` may be null.
  // All outlive the tier. kInvalid (options; a store of other chunks), kOutOfSpace (the system has no memory).
  static Result<std::unique_ptr<HostTier>> Create(const Options& options, Executor* executor, Executor* background,
                                                  ChunkStore* store);
  // Waits for the write-behind that runs. What is still queued is not written: Flush() first.
  ~HostTier();

  // A zeroed private block. It stays in host memory until it is sealed or let go.
  // kOutOfSpace: everything else is pinned, or cannot be evicted because no store takes it; says which.
  Result<BlockRef> NewTail();

  // The tail is whole: from now on it is immutable, found by `key`, evictable and written behind. Returns the block to
  // use from here on: `tail` itself, or the one that already has this key (then the tail's memory is given back).
  // A lost block of this key becomes whole again, for all who hold it; one that only the store has is in memory again.
  // Takes the checksum that every later check compares with: one pass over the bytes.
  // Requires that `tail` came from NewTail(), was not sealed before, and that nobody pins it. Never waits.
  // `origin` goes to the store with the bytes.
  BlockRef Seal(BlockRef tail, const ChunkKey& key, const ChunkOrigin& origin = {});

  // Brings the bytes into host memory if they are not there, evicting others, and keeps them there.
  // kOutOfSpace (everything else is pinned or cannot be evicted), kIoError, kDeadline (the block stays as it is), kCorrupt or
  // kNotFound (no tier has it: the block is lost from now on). Waits for the store. Two threads that want the same
  // block read it once, and get the same error. A block in memory costs a lock and no allocation.
  // Damage that a check finds is dropped and counted, and the bytes come from the store if it has them.
  Result<BlockPin> Pin(const BlockRef& block, BlockUse use = BlockUse::kKeep, PinCheck check = PinCheck::kTrust);
  // Only if it is in host memory now; waits for nothing but a lock. Checks nothing, verify_pins or not.
  std::optional<BlockPin> TryPin(const BlockRef& block, BlockUse use = BlockUse::kKeep);

  // The block of `key`, if host memory or the store has it (the store's word is not verified before Pin()). Reads nothing.
  std::optional<BlockRef> Find(const ChunkKey& key);

  // Loads in the background what is not in host memory, as far as blocks can be evicted for it: never blocks that were
  // prefetched and not used yet. What the executor refuses is left to Pin(). Errors show at Pin().
  void Prefetch(std::span<const BlockRef> blocks);

  BlockState state(const BlockRef& block) const;

  // Writes everything sealed so far that the store did not take yet, oldest first, waits for it, then flushes the store.
  // kBusy from the store is tried again after the store's flush, as long as that helps. Returns the first error; the
  // other blocks are written all the same, unless a deadline was missed (kDeadline): then nothing more is asked of the store. Without a store there is nothing to do.
  Status Flush();

  size_t block_bytes() const;
  std::span<std::byte> range() const;  // HostArena::range(): where the bytes of all pins lie
  size_t block_stride() const;      // of the budget that a block takes
  int64_t capacity_blocks() const;
  int64_t used_blocks() const;
  // host.{of the arena: see HostArena; blocks, pinned, tails, waiting, hits, loads, shared_loads, load_errors, load_bytes,
  // load_nanos, evicted, forgotten, lost, healed, duplicates, prefetches, prefetches_refused, verified_bytes, corrupt, late} and
  // write_behind.{queued, written, bytes, replaced, dropped, failed, shed}: waiting = callers that wait for the I/O of others now; late = reads given up;
  // forgotten = went unstored, as nobody held them; replaced = of `written`, in the place of another version;
  // dropped = the store would have stalled; shed = a queue was full.
  void VisitCounters(const CounterVisitor& visit) const;
  // Flips one bit of a sealed block that nobody uses, as failing memory would; `pick` says which. False if there is none.
  bool FlipIdleBitForTest(uint64_t pick, uint64_t bit);
  // Walks every block. kCorrupt with the first rule that does not hold. O(blocks).
  Status CheckInvariants() const;

 private:
  friend class BlockPin;
  struct Impl;
  explicit HostTier(std::shared_ptr<Impl> impl);
  BlockPin MakePin(const BlockRef& block, std::span<std::byte> bytes, BlockUse use, bool loaded);
  void Unpin(BlockPin* pin);
  std::shared_ptr<Impl> impl_;  // jobs know it weakly: one that comes late finds nothing and does nothing
};

}  // namespace prehoc
