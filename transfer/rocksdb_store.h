// The disk tier: records in RocksDB, in segments that are written once and dropped whole.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "transfer/chunk_store.h"
#include "transfer/record_format.h"
#include "transfer/record_tap.h"

namespace rocksdb {
class Env;
}

namespace prehoc {

// Survives restarts and crashes; what was put since the last flush is lost with a crash (there is no log).
//
// A record is written once, into RocksDB's memtable, and from there into one file (a segment of `segment_bytes`);
// there is no compaction, so write amplification is 1. When the budget is reached the oldest segment is dropped. Its
// records that were read since they were written get a second chance: they move to the newest segment, as far as they
// fill no more than half of it. Which records exist is known in memory (about 200 bytes a record) and rebuilt at
// Open() from a list in each file's properties, without reading values.
//
// Put() never waits for the disk except to drop a segment; with both memtables full it returns kBusy. Get() reads
// with one direct I/O and verifies the record's own checksum instead of RocksDB's.
class RocksDbStore final : public ChunkStore {
 public:
  struct Options {
    std::string path;            // required; created with mode 0700 (its parents too) if `create_if_missing`
    StoreIdentity identity;      // what the records are for; another identity found on disk is refused
    size_t chunk_bytes = 0;      // required, 1 to 64 MiB; at its best from 64 KiB to 4 MiB
    uint64_t budget = 8ull << 30;      // [bytes] on disk, hard; memtables count as what they will be; at least 16 MiB
    uint64_t segment_bytes = 0;        // [bytes] of a memtable and so of a file; 0 = budget / 32, within 256 KiB and
                                       // 32 MiB (64 MiB for budgets over 32 GiB); twice this is held in memory
    uint64_t min_free_bytes = 256ull << 20;  // Put() returns kOutOfSpace when the file system has less
    bool create_if_missing = true;
    bool read_only = false;      // takes no lock, writes nothing; Put, Delete: kUnsupported
    bool direct_io = true;       // falls back to buffered I/O where the file system has none; see store.direct_io
    bool second_chance = true;   // off: strictly oldest first
    bool verify = true;          // off: only the header is compared (for measuring what verification costs)
    RecordTap* tap = nullptr;    // faults on purpose; outlives the store. Costs a copy of each record written
    rocksdb::Env* env = nullptr;  // through which RocksDB writes its files, for disks that fail on purpose; null = the system's.
                                  // Outlives the store
    Status Validate() const;     // kInvalid, naming the field and its value
  };

  // Returns kInvalid (options; a store of another identity; a directory that is no store), kNotFound (missing and not
  // to be created), kBusy (another process, or another store of this one, holds it), kIoError (permissions, disk),
  // kCorrupt (files that RocksDB refuses: delete the directory, it is a cache).
  static Result<std::unique_ptr<RocksDbStore>> Open(const Options& options);

  // For a store that Open() calls corrupt: makes RocksDB's list of files anew from those that can be read. Records are not
  // looked at; files that cannot be read are deleted, their names returned. Codes as Open(), which is to be called next.
  static Result<std::vector<std::string>> Salvage(const Options& options);

  // Flushes; errors are lost, so call Flush() first where they matter.
  ~RocksDbStore() override;

  // For whoever looks through a store. Records that are still in memtables are not listed: Flush() first.
  struct RecordPlace {
    ChunkKey key;
    uint64_t segment = 0;  // number of its file
  };
  struct SegmentPlace {
    uint64_t number = 0;
    std::string name;  // within the directory
    uint64_t bytes = 0;
  };
  std::vector<RecordPlace> ListRecords() const;    // in the order of writing
  std::vector<SegmentPlace> ListSegments() const;  // oldest first
  // The header of a listed record; its payload is read and verified as well if `verify`. Drops and counts nothing: what is
  // damaged stays. kNotFound, kCorrupt, kIoError.
  Result<RecordHeader> Inspect(const ChunkKey& key, VerifyPayload verify) const;

  uint64_t segment_count() const;
  uint64_t disk_bytes() const;  // what the budget is held against: files, and memtables as what they will be
  Status CheckInvariants() const;

 private:
  struct Impl;
  RocksDbStore(size_t chunk_bytes, std::unique_ptr<Impl> impl);
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override;
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Status DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Result<ChunkSeal> DoPeek(const ChunkKey& key) override;
  bool DoContains(const ChunkKey& key) const override;
  Status DoDelete(const ChunkKey& key) override;
  Status DoFlush() override;
  uint64_t DoResidentBytes() const override;
  uint64_t DoBudget() const override;
  // Adds store.{segments,rescued,direct_io,verified_bytes}.
  void DoVisitCounters(const CounterVisitor& visit) const override;

  std::unique_ptr<Impl> impl_;
};

}  // namespace prehoc
