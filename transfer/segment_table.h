// What a store of segments knows in memory: which record is where, and what every byte on disk is for. No I/O.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/mutex.h"
#include "base/status.h"
#include "transfer/chunk_store.h"
#include "transfer/direct_file.h"
#include "transfer/segment_keys.h"

namespace prehoc {

// Safe from any thread; never waits. About 200 bytes a record.
//
// Life of a record: BeginWrite -> Publish (in a memtable; counted at what it will cost on disk) -> AddSegment (in a
// file, whose real size counts) -> DropOldest with its file, or published again under a new number, which leaves the
// old copy without an entry. Numbers are given in the order of writing. Life of a file: AddSegment -> DropOldest ->
// leaving (deleted, but a reader may keep its bytes on disk) -> gone.
class SegmentTable {
 public:
  struct Place {
    uint64_t number = 0;
    uint64_t segment = 0;       // 0 = in a memtable
    uint64_t block_offset = 0;  // in the segment's file
    std::shared_ptr<const DirectFile> file;  // of the segment, if KeepFile() was called
  };
  struct Oldest {
    uint64_t segment = 0;
    std::string name;                  // of its file, as AddSegment() had it
    std::vector<ListedRecord> wanted;  // live records that were read since they were written
  };
  struct Dropped {
    uint64_t bytes = 0;
    uint64_t records = 0;  // live ones, gone now
    std::shared_ptr<const DirectFile> file;
  };
  struct Totals {
    uint64_t records = 0, segments = 0;
    uint64_t segment_bytes = 0, pending_bytes = 0, leaving_bytes = 0, peak_bytes = 0;
    uint64_t disk_bytes() const { return segment_bytes + pending_bytes + leaving_bytes; }
  };

  explicit SegmentTable(size_t max_open_files) : max_open_files_(max_open_files) {}

  // --- records ---
  std::optional<Place> Find(const ChunkKey& key) const;
  // As Find(), and remembers that the record was read.
  std::optional<Place> FindToRead(const ChunkKey& key);
  // Forgets the record; `number`, if given, must still be its number. Returns the number, nothing if there was none.
  std::optional<uint64_t> Erase(const ChunkKey& key, std::optional<uint64_t> number = {});

  // A write of `bytes` on disk is about to happen, in order of numbers. Its flush may end before Publish().
  void BeginWrite(uint64_t number, uint64_t bytes);
  void AbortWrite(uint64_t number);  // it did not happen
  void Publish(const ChunkKey& key, uint64_t number);

  // --- files ---
  // A file with these records came into being; it holds everything written with numbers up to `last_number`.
  void AddSegment(uint64_t segment, std::string name, uint64_t bytes, uint64_t last_number, SegmentKeys keys);
  // As AddSegment() for all files of a store that is being opened, which knows no records yet.
  struct Found {
    uint64_t segment = 0;
    std::string name;
    uint64_t bytes = 0;
    SegmentKeys keys;
  };
  void Load(std::vector<Found> files);

  // The oldest file, and up to `most` of its records that deserve a second chance, those counted by CountMoved()
  // included.
  std::optional<Oldest> FindOldest(uint64_t most) const;
  void CountMoved(uint64_t segment);
  // Forgets the oldest file and the records that are live in it. Its bytes count as leaving.
  Dropped DropOldest();
  void Left(uint64_t bytes);  // they are gone from the disk

  // Keeps `file` open for FindToRead(); closes the one kept longest if there are too many.
  void KeepFile(uint64_t segment, std::shared_ptr<const DirectFile> file);

  // Every record that is in a file, in the order of writing.
  struct Listed {
    ChunkKey key;
    uint64_t number = 0;
    uint64_t segment = 0;
  };
  std::vector<Listed> ListRecords() const;
  struct File {
    uint64_t segment = 0;
    std::string name;
    uint64_t bytes = 0;
  };
  std::vector<File> ListFiles() const;  // oldest first

  Totals totals() const;
  // kCorrupt with the first rule that does not hold. O(records).
  Status CheckInvariants() const;

 private:
  struct Entry {
    uint64_t number = 0;
    uint64_t segment = 0;
    uint64_t block_offset = 0;
    bool read = false;  // since it was written with this number
  };
  struct Segment {
    std::string name;
    uint64_t bytes = 0;
    uint64_t moved = 0;
    std::vector<ListedRecord> records;
    std::shared_ptr<const DirectFile> file;
  };
  struct Pending {
    uint64_t number = 0;
    uint64_t bytes = 0;
  };
  std::optional<Place> PlaceLocked(const Entry& entry) const PREHOC_REQUIRES(mutex_);
  void UpdatePeakLocked() PREHOC_REQUIRES(mutex_);
  bool IsLiveLocked(const ListedRecord& record) const PREHOC_REQUIRES(mutex_);

  const size_t max_open_files_;
  mutable Mutex mutex_;
  std::unordered_map<ChunkKey, Entry, ChunkKeyHash> index_ PREHOC_GUARDED_BY(mutex_);
  std::map<uint64_t, Segment> segments_ PREHOC_GUARDED_BY(mutex_);  // by file number: oldest first
  std::deque<Pending> pending_ PREHOC_GUARDED_BY(mutex_);           // in order of writing
  std::deque<uint64_t> open_files_ PREHOC_GUARDED_BY(mutex_);       // segments that may have one, kept longest first
  Totals totals_ PREHOC_GUARDED_BY(mutex_);                         // `records` and `segments` are filled on demand
};

}  // namespace prehoc
