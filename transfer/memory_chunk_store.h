// The RAM-only tier: records in ordinary memory under a hard byte budget, least recently used out first.
#pragma once
#include <list>
#include <memory>
#include <unordered_map>

#include "base/mutex.h"
#include "transfer/chunk_store.h"
#include "transfer/record_format.h"
#include "transfer/record_tap.h"

namespace prehoc {

// A record being read is never evicted, so the memory of all records, those in use included, stays within the
// budget; a Put() that finds nothing to evict returns kBusy. Flush() has nothing to do: the process's end is the
// end of the records. Costs chunk_bytes + 128 bytes a record, plus about 200 bytes of index outside the budget.
class MemoryChunkStore final : public ChunkStore {
 public:
  struct Options {
    StoreIdentity identity;
    size_t chunk_bytes = 0;                // required
    uint64_t budget = UINT64_MAX;          // [bytes] of records, headers included
    RecordTap* tap = nullptr;              // faults on purpose; outlives the store. Costs a copy of each record read
    Status Validate() const;               // kInvalid; the budget must hold one record
  };
  static Result<std::unique_ptr<MemoryChunkStore>> Create(const Options& options);

  // Flips one bit of a stored record, as failing memory would. For tests of whatever lies above.
  Status FlipBitForTest(const ChunkKey& key, size_t bit);
  Status CheckInvariants() const;

 private:
  // A record [header, payload] whose memory counts until its last reader lets go.
  using Record = std::shared_ptr<std::byte[]>;
  struct Entry {
    ChunkKey key;
    Record record;
  };
  using Lru = std::list<Entry>;
  struct Counters {
    uint64_t gets = 0, hits = 0, misses = 0, corrupt = 0, puts = 0, put_dropped = 0, evicted = 0;
    uint64_t read_bytes = 0, written_bytes = 0, peak_bytes = 0;
  };

  MemoryChunkStore(const Options& options, RecordContext context);
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override;
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Status DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Result<ChunkSeal> DoPeek(const ChunkKey& key) override;
  bool DoContains(const ChunkKey& key) const override;
  Status DoDelete(const ChunkKey& key) override;
  Status DoFlush() override { return {}; }
  uint64_t DoResidentBytes() const override;
  uint64_t DoBudget() const override { return budget_; }
  void DoVisitCounters(const CounterVisitor& visit) const override;

  Status Write(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin, bool replace);
  Status Check(const ChunkKey& key, RecordHeader* header, std::span<std::byte> payload) const;  // the tap, if there is one, then the check
  uint64_t record_bytes() const { return sizeof(RecordHeader) + chunk_bytes(); }
  // [records] whose memory counts.
  uint64_t HeldLocked() const PREHOC_REQUIRES(mutex_) { return lru_.size() + removed_.size() + reserved_; }
  Status ReserveLocked() PREHOC_REQUIRES(mutex_);       // makes room for one record and counts it as held
  void EraseLocked(Lru::iterator it) PREHOC_REQUIRES(mutex_);
  void ReapLocked() PREHOC_REQUIRES(mutex_);            // forgets removed records whose readers are gone

  const RecordContext context_;
  const uint64_t budget_;
  RecordTap* const tap_;
  mutable Mutex mutex_;
  Lru lru_ PREHOC_GUARDED_BY(mutex_);  // most recently used first
  std::unordered_map<ChunkKey, Lru::iterator, ChunkKeyHash> index_ PREHOC_GUARDED_BY(mutex_);
  std::list<Record> removed_ PREHOC_GUARDED_BY(mutex_);  // deleted while being read: still held
  uint64_t reserved_ PREHOC_GUARDED_BY(mutex_) = 0;      // [records] promised to Put()s under way
  Counters counters_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc
