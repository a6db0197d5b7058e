#include "transfer/rocksdb_store.h"

#include <rocksdb/db.h>
#include <rocksdb/listener.h>
#include <rocksdb/write_batch.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <optional>
#include <vector>

#include "base/mutex.h"
#include "base/test_point.h"
#include "base/units.h"
#include "transfer/record_format.h"
#include "transfer/rocksdb_settings.h"
#include "transfer/segment_table.h"
#include "transfer/store_directory.h"

namespace prehoc {
namespace {

// Filter, index entry, listed key, block trailer: what a record costs on disk beyond its bytes, rounded up.
constexpr uint64_t kRecordOverhead = 256;
// A tombstone with its share of all that.
constexpr uint64_t kTombstoneBytes = 256;
// Footer, properties and meta index of one file.
constexpr uint64_t kFileOverhead = 8 * kKiB;
// OPTIONS, CURRENT, IDENTITY, LOCK, the note.
constexpr uint64_t kSmallFiles = 128 * kKiB;
// Descriptors of our own; RocksDB has some, too.
constexpr size_t kMaxOpenFiles = 256;

rocksdb::Slice AsSlice(const SegmentKey& key) { return {key.data(), key.size()}; }

// kBusy with who holds the store, if that is what RocksDB's words mean.
Status HeldByOther(const std::string& words, const std::string& path) {
  if (words.find("lock hold by current process") != std::string::npos) {
    return {StatusCode::kBusy, "store " + path + ": is open in this process already"};
  }
  if (words.find("While lock file") == std::string::npos) return {};
  return {StatusCode::kBusy, "store " + path + ": " + LockHolder(path) + " holds it (" + path +
                                 "/LOCK); stop it, use another directory, or open with read_only"};
}

uint64_t ManifestBytes(uint64_t budget) { return std::clamp<uint64_t>(budget / 64, 64 * kKiB, 2 * kMiB); }

}  // namespace

Status RocksDbStore::Options::Validate() const {
  const auto bad = [&](const char* field, uint64_t value, const char* rule) {
    return Status(StatusCode::kInvalid,
                  "store " + path + ": " + field + "=" + std::to_string(value) + " " + rule);
  };
  if (path.empty()) return {StatusCode::kInvalid, "store: path is empty; give a directory"};
  if (chunk_bytes == 0 || chunk_bytes > 64 * kMiB) return bad("chunk_bytes", chunk_bytes, "is not in 1 to 64 MiB");
  if (budget < 16 * kMiB) return bad("budget", budget, "is less than 16 MiB");
  if (budget > (uint64_t{1} << 46)) return bad("budget", budget, "is over 64 TiB");
  if (chunk_bytes > budget / 16) return bad("chunk_bytes", chunk_bytes, "is more than a sixteenth of the budget");
  if (segment_bytes != 0 && (segment_bytes < 128 * kKiB || segment_bytes > budget / 16)) {
    return bad("segment_bytes", segment_bytes, "is not in 128 KiB to a sixteenth of the budget");
  }
  return {};
}

// Threads: `write_mutex` serialises everything that changes RocksDB, so that numbers and eviction have one order. What
// is known in memory has a lock of its own (SegmentTable), never held across I/O. RocksDB's flush thread comes in
// through OnFlushCompleted() and takes no lock of ours but that one. Reads take it, and none for writing, unless they
// find damage.
struct RocksDbStore::Impl final : public rocksdb::EventListener {
  // A file that was deleted; a flush or a reader that began before may keep its bytes on disk for a while.
  struct Leaving {
    std::string path;
    std::shared_ptr<const DirectFile> file;  // may be null
    uint64_t bytes = 0;
  };

  Options options;
  RecordContext context;
  uint64_t usable = 0;  // budget less what MANIFEST and the small files may take
  uint64_t slack = 0;   // of that: room for what is leaving, and for records on their way out of the oldest file
  uint64_t segment_bytes = 0;
  bool direct_io = false;
  std::string where;  // "store <path>", for messages
  std::unique_ptr<rocksdb::DB> db;

  mutable Mutex write_mutex;
  // Tombstones that a stalled or failed write did not take; they go with the next write.
  std::vector<SegmentKey> unwritten_tombstones PREHOC_GUARDED_BY(write_mutex);
  // After an I/O error nothing is written until reopened: RocksDB's state may be older than ours.
  Status write_error PREHOC_GUARDED_BY(write_mutex);
  std::vector<Leaving> leaving PREHOC_GUARDED_BY(write_mutex);

  SegmentTable table{kMaxOpenFiles};

  mutable Mutex mutex;
  Status background_error PREHOC_GUARDED_BY(mutex);    // of a flush; as write_error
  bool disk_was_full PREHOC_GUARDED_BY(mutex) = false;  // a flush failed, and RocksDB waits to be told to try again
  std::vector<AlignedBuffer> scratch PREHOC_GUARDED_BY(mutex);  // not in use; as many as reads were under way at once

  // Statistics only: nothing is ordered by them.
  struct Counters {
    std::atomic<uint64_t> gets{0}, hits{0}, misses{0}, corrupt{0}, puts{0}, put_dropped{0}, evicted{0}, rescued{0};
    std::atomic<uint64_t> read_bytes{0}, written_bytes{0}, verified_bytes{0}, file_reads{0};
  } counters;
  static void Add(std::atomic<uint64_t>& counter, uint64_t n = 1) { counter.fetch_add(n, std::memory_order_relaxed); }

  ValueShape shape;
  uint64_t record_bytes() const { return shape.record_bytes; }
  uint64_t record_cost() const {
    return shape.value_bytes() + kRecordOverhead + (shape.aligned ? ValueShape::kPage : 0);
  }

  Status OpenDb();
  Status LoadTable();

  // --- from RocksDB's threads ---
  void OnTableFileCreated(const rocksdb::TableFileCreationInfo& info) override {
    if (info.status.ok()) ::chmod(info.file_path.c_str(), 0600);
  }
  void OnFlushBegin(rocksdb::DB*, const rocksdb::FlushJobInfo&) override { PREHOC_TEST_POINT("rocksdb_store.flush"); }
  void OnFlushCompleted(rocksdb::DB*, const rocksdb::FlushJobInfo& info) override;
  void OnBackgroundError(rocksdb::BackgroundErrorReason, rocksdb::Status* error) override { NoteError(*error); }
  void OnErrorRecoveryBegin(rocksdb::BackgroundErrorReason, rocksdb::Status, bool* auto_recovery) override {
    *auto_recovery = false;  // when to try again is CheckDisk()'s to say
  }
  void NoteError(const rocksdb::Status& error);

  // --- reading ---
  // The record at `place`, unverified beyond what CheckRecord() checks with `verify`; its payload is copied to `out`, its
  // header to `header`.
  Status Read(const ChunkKey& key, const SegmentTable::Place& place, std::span<std::byte> out, VerifyPayload verify,
              RecordHeader* header);
  Status ReadFile(const ChunkKey& key, const SegmentTable::Place& place, std::span<std::byte> out, VerifyPayload verify,
                  RecordHeader* header);
  // The record's bytes within `value`, unverified.
  Result<std::span<const std::byte>> GetRecord(const ChunkKey& key, uint64_t number, rocksdb::PinnableSlice* value);
  Status ReadDb(const ChunkKey& key, uint64_t number, std::span<std::byte> out, VerifyPayload verify,
                RecordHeader* header);
  Status TakePayload(const ChunkKey& key, std::span<const std::byte> record, std::span<std::byte> out,
                     VerifyPayload verify, RecordHeader* header) const;
  Result<std::shared_ptr<const DirectFile>> FileOf(const SegmentTable::Place& place);
  Status ReadHeader(const ChunkKey& key, const SegmentTable::Place& place, RecordHeader* header);
  // The tap, if there is one, then the check.
  Status Check(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload, VerifyPayload verify) const;
  AlignedBuffer TakeScratch();
  void GiveScratch(AlignedBuffer buffer);

  // --- writing ---
  Status Put(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin, bool replace) PREHOC_EXCLUDES(write_mutex);
  Status CheckWritableLocked() PREHOC_REQUIRES(write_mutex);
  Status CheckDisk();
  Status MakeRoomLocked(uint64_t bytes) PREHOC_REQUIRES(write_mutex);
  Status EvictOldestLocked() PREHOC_REQUIRES(write_mutex);
  void ReapLeavingLocked() PREHOC_REQUIRES(write_mutex);
  // Writes a record (none if `header` is empty: tombstones only) as a new number of `key`, the tombstone of number `replaced`, if given, and
  // what tombstones wait: all or nothing.
  Status WriteLocked(const ChunkKey& key, std::span<const std::byte> header, std::span<const std::byte> payload,
                     std::optional<uint64_t> replaced = {}) PREHOC_REQUIRES(write_mutex);
  Status DropLocked(const ChunkKey& key, std::optional<uint64_t> number) PREHOC_REQUIRES(write_mutex);
};

Status RocksDbStore::Impl::OpenDb() {
  direct_io = options.direct_io;
  while (true) {
    rocksdb::Options db_options =
        MakeRocksDbOptions({segment_bytes, ManifestBytes(options.budget), direct_io, shape.aligned});
    if (options.env != nullptr) db_options.env = options.env;
    // RocksDB shares ownership of listeners; the store closes the database before it dies, so it need not.
    db_options.listeners.push_back(std::shared_ptr<rocksdb::EventListener>(std::shared_ptr<void>(), this));
    rocksdb::DB* opened = nullptr;
    const rocksdb::Status status = options.read_only
                                       ? rocksdb::DB::OpenForReadOnly(db_options, options.path, &opened)
                                       : rocksdb::DB::Open(db_options, options.path, &opened);
    if (status.ok()) {
      db.reset(opened);
      return {};
    }
    const std::string text = status.ToString();
    if (direct_io && text.find("irect I/O") != std::string::npos) {
      direct_io = false;  // tmpfs and others
      continue;
    }
    if (const Status held = HeldByOther(text, options.path); !held.ok()) return held;
    Status ours = FromRocksDb(status, where);
    if (ours.code() != StatusCode::kCorrupt) return ours;
    return {ours.code(), ours.message() + "; delete the directory, it is a cache"};
  }
}

Status RocksDbStore::Impl::LoadTable() {
  rocksdb::TablePropertiesCollection properties;
  PREHOC_RETURN_IF_ERROR(FromRocksDb(db->GetPropertiesOfAllTables(&properties), where));
  std::vector<rocksdb::LiveFileMetaData> files;
  db->GetLiveFilesMetaData(&files);
  std::vector<SegmentTable::Found> found;
  for (const rocksdb::LiveFileMetaData& file : files) {
    const auto own = properties.find(file.db_path + file.name);
    if (own == properties.end()) return {StatusCode::kCorrupt, where + ": file " + file.name + " has no properties"};
    auto keys = ReadSegmentKeys(*own->second, file.name);
    if (!keys.ok()) return keys.status().WithContext(where);
    found.push_back({file.file_number, file.name, file.size, std::move(*keys)});
  }
  table.Load(std::move(found));
  return {};
}

void RocksDbStore::Impl::OnFlushCompleted(rocksdb::DB*, const rocksdb::FlushJobInfo& info) {
  auto keys = ReadSegmentKeys(info.table_properties, info.file_path);
  struct stat file {};
  const bool exists = ::stat(info.file_path.c_str(), &file) == 0;
  if (!keys.ok() || !exists) {
    MutexLock lock(mutex);
    background_error = {StatusCode::kIoError, where + ": flushed file " + info.file_path + " cannot be read back"};
    return;
  }
  table.AddSegment(info.file_number, info.file_path.substr(info.file_path.rfind('/')),
                   static_cast<uint64_t>(file.st_size), info.largest_seqno, std::move(*keys));
}

void RocksDbStore::Impl::NoteError(const rocksdb::Status& error) {
  const Status ours = FromRocksDb(error, where);
  MutexLock lock(mutex);
  if (ours.code() == StatusCode::kOutOfSpace) {
    disk_was_full = true;
  } else if (background_error.ok()) {
    background_error = ours;
  }
}

// --- reading ---

AlignedBuffer RocksDbStore::Impl::TakeScratch() {
  MutexLock lock(mutex);
  if (scratch.empty()) return {};
  AlignedBuffer buffer = std::move(scratch.back());
  scratch.pop_back();
  return buffer;
}

void RocksDbStore::Impl::GiveScratch(AlignedBuffer buffer) {
  MutexLock lock(mutex);
  scratch.push_back(std::move(buffer));
}

Status RocksDbStore::Impl::Check(const ChunkKey& key, std::span<std::byte> header, std::span<std::byte> payload,
                                 VerifyPayload verify) const {
  if (options.tap == nullptr) return CheckRecord(context, key, header, payload, verify);
  uint64_t ticket = 0;
  PREHOC_RETURN_IF_ERROR(options.tap->OnRead(key, header, payload, &ticket));
  const Status check = CheckRecord(context, key, header, payload, verify);
  options.tap->OnChecked(key, ticket, check);
  return check;
}

Status RocksDbStore::Impl::TakePayload(const ChunkKey& key, std::span<const std::byte> record, std::span<std::byte> out,
                                       VerifyPayload verify, RecordHeader* header) const {
  if (record.size() != sizeof(RecordHeader) + out.size()) {
    return {StatusCode::kCorrupt, where + ": chunk " + key.ToString() + ": record of " + std::to_string(record.size()) +
                                      " bytes, expected " + std::to_string(sizeof(RecordHeader) + out.size())};
  }
  std::memcpy(header, record.data(), sizeof *header);
  std::memcpy(out.data(), record.data() + sizeof *header, out.size());
  // Where the bytes are now, so that the copy is checked, too.
  return Check(key, std::as_writable_bytes(std::span(header, 1)), out, verify).WithContext(where);
}

Result<std::shared_ptr<const DirectFile>> RocksDbStore::Impl::FileOf(const SegmentTable::Place& place) {
  if (place.file != nullptr) return place.file;
  char name[32];
  std::snprintf(name, sizeof name, "/%06llu.sst", static_cast<unsigned long long>(place.segment));
  PREHOC_ASSIGN_OR_RETURN(std::shared_ptr<const DirectFile> file, DirectFile::Open(options.path + name, direct_io));
  table.KeepFile(place.segment, file);
  return file;
}

Status RocksDbStore::Impl::ReadHeader(const ChunkKey& key, const SegmentTable::Place& place, RecordHeader* header) {
  if (place.segment == 0) {  // in no file yet
    rocksdb::PinnableSlice value;
    PREHOC_ASSIGN_OR_RETURN(const auto record, GetRecord(key, place.number, &value));
    if (record.size() < sizeof *header) return {StatusCode::kCorrupt, where + ": chunk " + key.ToString() + ": too short"};
    std::memcpy(header, record.data(), sizeof *header);
    return CheckHeader(context, key, *header, options.chunk_bytes).WithContext(where);
  }
  PREHOC_ASSIGN_OR_RETURN(const std::shared_ptr<const DirectFile> file, FileOf(place));
  AlignedBuffer buffer;
  PREHOC_ASSIGN_OR_RETURN(const auto bytes, file->Read(shape.RecordOffset(place.block_offset), sizeof *header, &buffer));
  std::memcpy(header, bytes.data(), sizeof *header);
  return CheckHeader(context, key, *header, options.chunk_bytes).WithContext(where);
}

Status RocksDbStore::Impl::ReadFile(const ChunkKey& key, const SegmentTable::Place& place, std::span<std::byte> out,
                                    VerifyPayload verify, RecordHeader* header) {
  PREHOC_ASSIGN_OR_RETURN(const std::shared_ptr<const DirectFile> file, FileOf(place));
  AlignedBuffer buffer = TakeScratch();
  const uint64_t offset = shape.RecordOffset(place.block_offset);
  const uint64_t payload = offset + sizeof(RecordHeader);
  const bool in_place = payload % ValueShape::kPage == 0 && out.size() % ValueShape::kPage == 0 &&
                        reinterpret_cast<uintptr_t>(out.data()) % ValueShape::kPage == 0;
  Status status;
  if (in_place) {
    const auto before = file->ReadInPlace(payload, out, &buffer);
    status = before.ok() ? Check(key, before->last(sizeof(RecordHeader)), out, verify) : before.status();
    if (status.ok()) std::memcpy(header, before->last(sizeof *header).data(), sizeof *header);
  } else {
    const auto record = file->Read(offset, record_bytes(), &buffer);
    status = record.ok() ? TakePayload(key, *record, out, verify, header) : record.status();
  }
  GiveScratch(std::move(buffer));
  return status;
}

Result<std::span<const std::byte>> RocksDbStore::Impl::GetRecord(const ChunkKey& key, uint64_t number, rocksdb::PinnableSlice* value) {
  rocksdb::ReadOptions read_options;
  // Always: RocksDB asserts what it finds in a block, and the packaged library is built with assertions, so a damaged
  // length in an unchecked block would end the process.
  read_options.verify_checksums = true;
  read_options.fill_cache = false;
  const SegmentKey db_key = MakeSegmentKey(number, key);
  const rocksdb::Status status = db->Get(read_options, db->DefaultColumnFamily(), AsSlice(db_key), value);
  if (!status.ok()) return FromRocksDb(status, where + ": chunk " + key.ToString());
  if (value->size() < shape.pad) return {StatusCode::kCorrupt, where + ": chunk " + key.ToString() + ": too short"};
  return std::as_bytes(std::span(value->data(), value->size())).subspan(shape.pad);
}

Status RocksDbStore::Impl::ReadDb(const ChunkKey& key, uint64_t number, std::span<std::byte> out,
                                  VerifyPayload verify, RecordHeader* header) {
  rocksdb::PinnableSlice value;
  PREHOC_ASSIGN_OR_RETURN(const auto record, GetRecord(key, number, &value));
  return TakePayload(key, record, out, verify, header);
}

Status RocksDbStore::Impl::Read(const ChunkKey& key, const SegmentTable::Place& place, std::span<std::byte> out,
                                VerifyPayload verify, RecordHeader* header) {
  // The short way: one direct read of the record where its file should have it. Whatever is wrong with that, the answer
  // is RocksDB's.
  if (place.segment != 0 && ReadFile(key, place, out, verify, header).ok()) {
    Add(counters.file_reads);
    return {};
  }
  return ReadDb(key, place.number, out, verify, header);
}

// --- writing ---

Status RocksDbStore::Impl::CheckWritableLocked() {
  if (options.read_only) return {StatusCode::kUnsupported, where + ": is open read-only"};
  if (!write_error.ok()) return write_error;
  MutexLock lock(mutex);
  return background_error;
}

Status RocksDbStore::Impl::CheckDisk() {
  bool was_full = false;
  {
    MutexLock lock(mutex);
    was_full = disk_was_full;
  }
  // After a flush that failed, two memtables wait to be written.
  const uint64_t wanted = std::max(options.min_free_bytes, was_full ? 2 * segment_bytes : 0);
  struct statvfs file_system {};
  if (::statvfs(options.path.c_str(), &file_system) == 0) {
    const uint64_t free = uint64_t{file_system.f_bavail} * file_system.f_frsize;
    if (free < wanted) {
      return {StatusCode::kOutOfSpace, where + ": the disk has " + FormatBytes(static_cast<double>(free)) + " left, " +
                                           FormatBytes(static_cast<double>(wanted)) +
                                           " are to stay free (min_free_bytes); free some, or lower it"};
    }
  }
  if (!was_full) return {};
  PREHOC_RETURN_IF_ERROR(FromRocksDb(db->Resume(), where));  // writes what the flush could not
  MutexLock lock(mutex);
  disk_was_full = false;
  return {};
}

void RocksDbStore::Impl::ReapLeavingLocked() {
  if (leaving.empty()) return;
  const auto has_name = [](const Leaving& file) {
    return file.file != nullptr ? file.file->has_name() : ::access(file.path.c_str(), F_OK) == 0;
  };
  // A flush that was under way takes the names of files away when it ends; a read that was does not.
  if (std::any_of(leaving.begin(), leaving.end(), has_name)) db->EnableFileDeletions(false).PermitUncheckedError();
  std::erase_if(leaving, [&](const Leaving& file) {
    if (has_name(file) || file.file.use_count() > 1) return false;
    table.Left(file.bytes);
    return true;
  });
}

Status RocksDbStore::Impl::MakeRoomLocked(uint64_t bytes) {
  while (true) {
    const SegmentTable::Totals totals = table.totals();
    // Each memtable will be a file with its own overhead.
    const uint64_t needed = totals.segment_bytes + totals.pending_bytes + 2 * kFileOverhead + bytes;
    if (needed + slack <= usable || (totals.leaving_bytes > 0 && needed + totals.leaving_bytes <= usable)) return {};
    if (totals.leaving_bytes > 0) {
      ReapLeavingLocked();
      if (!leaving.empty()) return {StatusCode::kBusy, where + ": a dropped file is still being read or written about"};
      continue;
    }
    if (totals.segments == 0) {
      if (needed <= usable) return {};
      return {StatusCode::kBusy, where + ": the whole budget waits to be written"};
    }
    PREHOC_RETURN_IF_ERROR(EvictOldestLocked());
  }
}

Status RocksDbStore::Impl::EvictOldestLocked() {
  const uint64_t most = options.second_chance ? segment_bytes / 2 / record_cost() : 0;
  const auto oldest = table.FindOldest(most);
  if (!oldest) return {};
  // Written again before the file goes, so that no read misses them; `slack` has the room.
  std::vector<std::byte> record(record_bytes());
  for (const ListedRecord& wanted : oldest->wanted) {
    const SegmentTable::Place place{wanted.number, oldest->segment, wanted.block_offset, nullptr};
    const auto payload = std::span(record).subspan(sizeof(RecordHeader));
    RecordHeader found;
    const Status read = Read(wanted.key, place, payload, VerifyPayload::kYes, &found);
    if (!read.ok()) {
      // What is damaged dies with its file.
      if (read.code() == StatusCode::kCorrupt) Add(counters.corrupt);
      continue;
    }
    const RecordHeader header = EncodeHeader(context, wanted.key, payload, OriginOf(found));
    PREHOC_RETURN_IF_ERROR(WriteLocked(wanted.key, std::as_bytes(std::span(&header, 1)), payload));
    table.CountMoved(oldest->segment);
    Add(counters.rescued);
  }
  SegmentTable::Dropped dropped = table.DropOldest();
  Add(counters.evicted, dropped.records);
  leaving.push_back({options.path + oldest->name, std::move(dropped.file), dropped.bytes});
  if (const rocksdb::Status status = db->DeleteFile(oldest->name); !status.ok()) {
    write_error = FromRocksDb(status, where + ": dropping " + oldest->name);
    return write_error;
  }
  ReapLeavingLocked();
  return {};
}

Status RocksDbStore::Impl::WriteLocked(const ChunkKey& key, std::span<const std::byte> header,
                                       std::span<const std::byte> payload, std::optional<uint64_t> replaced) {
  const bool has_record = !header.empty();
  if (!has_record && unwritten_tombstones.empty()) return {};
  // This thread is the only writer, so the write gets the next sequence number; it serves as the record's own.
  const uint64_t number = db->GetLatestSequenceNumber() + 1;
  const SegmentKey db_key = MakeSegmentKey(number, key);
  const size_t tombstones = unwritten_tombstones.size() + replaced.has_value();
  const size_t keys_bytes = kSegmentKeyBytes * (tombstones + 1);
  rocksdb::WriteBatch batch(shape.pad + header.size() + payload.size() + keys_bytes + 64);
  uint64_t cost = tombstones * kTombstoneBytes;
  if (has_record) {
    cost += record_cost();
    const rocksdb::Slice key_part = AsSlice(db_key);
    static constexpr std::array<char, ValueShape::kPage> kZeros = {};
    const std::array<rocksdb::Slice, 3> parts = {
        rocksdb::Slice(kZeros.data(), shape.pad),
        rocksdb::Slice(reinterpret_cast<const char*>(header.data()), header.size()),
        rocksdb::Slice(reinterpret_cast<const char*>(payload.data()), payload.size())};
    batch.Put(rocksdb::SliceParts(&key_part, 1), rocksdb::SliceParts(parts.data(), 3)).PermitUncheckedError();
  }
  if (replaced) batch.Delete(AsSlice(MakeSegmentKey(*replaced, key))).PermitUncheckedError();
  for (const SegmentKey& dead : unwritten_tombstones) batch.Delete(AsSlice(dead)).PermitUncheckedError();
  table.BeginWrite(number, cost);  // before the write: its flush may end before we are back
  rocksdb::WriteOptions write_options;
  write_options.disableWAL = true;   // it would write every byte twice; see docs/formats.md
  write_options.no_slowdown = true;  // a dropped cache write is right, a stalled caller is not
  const rocksdb::Status status = db->Write(write_options, &batch);
  if (!status.ok()) {
    table.AbortWrite(number);
    const Status ours = FromRocksDb(status, where);
    if (ours.code() == StatusCode::kOutOfSpace) {
      NoteError(status);
    } else if (ours.code() != StatusCode::kBusy) {
      write_error = ours;
    }
    return ours;
  }
  unwritten_tombstones.clear();
  if (has_record) table.Publish(key, number);
  return {};
}

Status RocksDbStore::Impl::DropLocked(const ChunkKey& key, std::optional<uint64_t> number) {
  const auto erased = table.Erase(key, number);
  if (!erased || options.read_only) return {};
  unwritten_tombstones.push_back(MakeSegmentKey(*erased, key));
  const Status status = WriteLocked({}, {}, {});
  // Gone from the index in any case; the tombstone, which only matters after a restart, goes with the next write.
  return status.code() == StatusCode::kBusy ? Status() : status;
}

RocksDbStore::RocksDbStore(size_t chunk_bytes, std::unique_ptr<Impl> impl)
    : ChunkStore(chunk_bytes), impl_(std::move(impl)) {}

Result<std::unique_ptr<RocksDbStore>> RocksDbStore::Open(const Options& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->where = "store " + options.path;
  impl->shape = ValueShape::For(sizeof(RecordHeader), options.chunk_bytes);
  auto context = RecordContext::Create(options.identity);
  if (!context.ok()) return context.status().WithContext(impl->where);
  impl->context = std::move(*context);
  const uint64_t largest = options.budget > 32 * kGiB ? 64 * kMiB : 32 * kMiB;
  impl->segment_bytes = options.segment_bytes != 0 ? options.segment_bytes
                                                   : std::clamp<uint64_t>(options.budget / 32, 256 * kKiB, largest);
  impl->usable = options.budget - 2 * ManifestBytes(options.budget) - kSmallFiles;
  impl->slack = impl->segment_bytes + (options.second_chance ? impl->segment_bytes / 2 : 0);
  const StoreNote note{kStoreVersion, options.identity, options.chunk_bytes};
  PREHOC_RETURN_IF_ERROR(
      PrepareStoreDirectory(options.path, note, options.create_if_missing, options.read_only));
  PREHOC_RETURN_IF_ERROR(impl->OpenDb());
  std::unique_ptr<RocksDbStore> store(new RocksDbStore(options.chunk_bytes, std::move(impl)));
  PREHOC_RETURN_IF_ERROR(store->impl_->LoadTable());
  if (!options.read_only) {
    RestrictFiles(options.path);
    MutexLock lock(store->impl_->write_mutex);
    // The budget may be smaller than it was.
    while (store->impl_->table.totals().segment_bytes > store->impl_->usable) {
      PREHOC_RETURN_IF_ERROR(store->impl_->EvictOldestLocked());
    }
  }
  return store;
}

Result<std::vector<std::string>> RocksDbStore::Salvage(const Options& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  const std::string where = "store " + options.path;
  PREHOC_ASSIGN_OR_RETURN(const StoreNote note, ReadStoreNote(options.path));
  PREHOC_RETURN_IF_ERROR(CheckStoreNote(note, {kStoreVersion, options.identity, options.chunk_bytes}).WithContext(where));
  PREHOC_ASSIGN_OR_RETURN(const StoreFiles before, ListStoreFiles(options.path));
  if (!before.links.empty()) return CheckStoreFiles(options.path);
  const ValueShape shape = ValueShape::For(sizeof(RecordHeader), options.chunk_bytes);
  const rocksdb::Options db_options = MakeRocksDbOptions({kMiB, ManifestBytes(options.budget), false, shape.aligned});
  const rocksdb::Status status = rocksdb::RepairDB(options.path, db_options);
  PREHOC_RETURN_IF_ERROR(HeldByOther(status.ToString(), options.path));
  PREHOC_RETURN_IF_ERROR(FromRocksDb(status, where));
  // RocksDB puts what it cannot read aside.
  std::error_code error;
  std::filesystem::remove_all(options.path + "/lost", error);
  RestrictFiles(options.path);
  PREHOC_ASSIGN_OR_RETURN(const StoreFiles after, ListStoreFiles(options.path));
  std::vector<std::string> gone;
  std::set_difference(before.tables.begin(), before.tables.end(), after.tables.begin(), after.tables.end(), std::back_inserter(gone));
  return gone;
}

RocksDbStore::~RocksDbStore() {
  if (impl_->db == nullptr) return;
  if (!impl_->options.read_only) DoFlush().IgnoreError();
  impl_->db->Close().PermitUncheckedError();  // before the listener, which is Impl, dies
  impl_->db.reset();
}

Status RocksDbStore::DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) {
  Impl& impl = *impl_;
  Impl::Add(impl.counters.gets);
  const VerifyPayload verify = impl.options.verify ? VerifyPayload::kYes : VerifyPayload::kNo;
  Status status{StatusCode::kNotFound, impl.where + ": no chunk " + key.ToString()};
  std::optional<uint64_t> tried;
  // Again only if the record moved to a new number while it was read, which one read sees once or not at all.
  for (auto place = impl.table.FindToRead(key); place && place->number != tried; place = impl.table.FindToRead(key)) {
    tried = place->number;
    RecordHeader header;
    status = impl.Read(key, *place, out, verify, &header);
    if (status.ok()) {
      *seal = SealOf(header);
      Impl::Add(impl.counters.hits);
      Impl::Add(impl.counters.read_bytes, out.size());
      if (impl.options.verify) Impl::Add(impl.counters.verified_bytes, out.size());
      return {};
    }
    PREHOC_TEST_POINT("rocksdb_store.get_failed");
  }
  const auto place = impl.table.Find(key);
  if (!place || place->number != tried) {
    Impl::Add(impl.counters.misses);
    if (!tried) return status;
    return {StatusCode::kNotFound, impl.where + ": chunk " + key.ToString() + " was dropped while it was read"};
  }
  if (impl.options.read_only && status.code() == StatusCode::kNotFound) {
    // The process that writes this store dropped the file.
    impl.table.Erase(key, tried).has_value();
    Impl::Add(impl.counters.misses);
    return status;
  }
  if (status.code() == StatusCode::kNotFound || status.code() == StatusCode::kCorrupt) {
    Impl::Add(impl.counters.corrupt);
    MutexLock write_lock(impl.write_mutex);
    impl.DropLocked(key, tried).IgnoreError();  // what the caller needs to hear is below
    return {StatusCode::kCorrupt, status.message()};
  }
  return status;
}

Status RocksDbStore::DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  return impl_->Put(key, data, origin, /*replace=*/false);
}

Status RocksDbStore::DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  return impl_->Put(key, data, origin, /*replace=*/true);
}

Result<ChunkSeal> RocksDbStore::DoPeek(const ChunkKey& key) {
  const auto place = impl_->table.Find(key);
  if (!place) return {StatusCode::kNotFound, impl_->where + ": no chunk " + key.ToString()};
  RecordHeader header;
  PREHOC_RETURN_IF_ERROR(impl_->ReadHeader(key, *place, &header));
  return SealOf(header);
}

Status RocksDbStore::Impl::Put(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin, bool replace) {
  if (options.read_only) return {StatusCode::kUnsupported, where + ": is open read-only"};
  if (!replace && table.Find(key)) return {};
  RecordHeader header = EncodeHeader(context, key, data, origin);  // outside the lock: it reads all bytes
  std::vector<std::byte> tapped;
  bool lost = false;
  if (options.tap != nullptr) {
    tapped.assign(data.begin(), data.end());
    lost = !options.tap->OnWrite(key, std::as_writable_bytes(std::span(&header, 1)), tapped);
    data = tapped;
  }
  MutexLock write_lock(write_mutex);
  if (!replace && table.Find(key)) return {};
  Status status = CheckWritableLocked();
  if (status.ok()) status = CheckDisk();
  if (status.ok()) status = MakeRoomLocked(record_cost());
  if (status.ok() && !lost) {
    // The old one as it is now: making room may have dropped it, or written it again.
    const auto old = replace ? table.Find(key) : std::nullopt;
    status = WriteLocked(key, std::as_bytes(std::span(&header, 1)), data, old ? std::optional(old->number) : std::nullopt);
  }
  if (!status.ok()) {
    Add(counters.put_dropped);
    return status;
  }
  Add(counters.puts);
  Add(counters.written_bytes, data.size());
  return {};
}

bool RocksDbStore::DoContains(const ChunkKey& key) const { return impl_->table.Find(key).has_value(); }

Status RocksDbStore::DoDelete(const ChunkKey& key) {
  if (impl_->options.read_only) return {StatusCode::kUnsupported, impl_->where + ": is open read-only"};
  MutexLock write_lock(impl_->write_mutex);
  return impl_->DropLocked(key, {});
}

Status RocksDbStore::DoFlush() {
  Impl& impl = *impl_;
  if (impl.options.read_only) return {};
  rocksdb::FlushOptions flush_options;
  flush_options.wait = true;
  flush_options.allow_write_stall = true;  // meanwhile Put() says kBusy rather than wait
  {
    MutexLock write_lock(impl.write_mutex);
    PREHOC_RETURN_IF_ERROR(impl.CheckWritableLocked());
    PREHOC_RETURN_IF_ERROR(impl.CheckDisk());
  }
  // Not under the lock: whoever puts does not wait for the disk.
  PREHOC_RETURN_IF_ERROR(FromRocksDb(impl.db->Flush(flush_options), impl.where));
  {
    MutexLock write_lock(impl.write_mutex);
    if (impl.unwritten_tombstones.empty()) return {};
    // They found the memtables full; now they fit.
    PREHOC_RETURN_IF_ERROR(impl.WriteLocked({}, {}, {}));
  }
  return FromRocksDb(impl.db->Flush(flush_options), impl.where);
}

uint64_t RocksDbStore::DoResidentBytes() const { return impl_->table.totals().records * impl_->record_bytes(); }

uint64_t RocksDbStore::DoBudget() const { return impl_->options.budget; }

std::vector<RocksDbStore::RecordPlace> RocksDbStore::ListRecords() const {
  std::vector<RecordPlace> records;
  for (const SegmentTable::Listed& listed : impl_->table.ListRecords()) records.push_back({listed.key, listed.segment});
  return records;
}

std::vector<RocksDbStore::SegmentPlace> RocksDbStore::ListSegments() const {
  std::vector<SegmentPlace> segments;
  for (SegmentTable::File& file : impl_->table.ListFiles()) {
    segments.push_back({file.segment, file.name.substr(file.name.find_first_not_of('/')), file.bytes});
  }
  return segments;
}

Result<RecordHeader> RocksDbStore::Inspect(const ChunkKey& key, VerifyPayload verify) const {
  const auto place = impl_->table.Find(key);
  if (!place) return Status(StatusCode::kNotFound, impl_->where + ": no chunk " + key.ToString());
  RecordHeader header;
  if (verify == VerifyPayload::kNo && impl_->ReadHeader(key, *place, &header).ok()) return header;
  std::vector<std::byte> payload(chunk_bytes());
  PREHOC_RETURN_IF_ERROR(impl_->Read(key, *place, payload, verify, &header));
  return header;
}

uint64_t RocksDbStore::segment_count() const { return impl_->table.totals().segments; }

uint64_t RocksDbStore::disk_bytes() const { return impl_->table.totals().disk_bytes(); }

void RocksDbStore::DoVisitCounters(const CounterVisitor& visit) const {
  const Impl& impl = *impl_;
  const SegmentTable::Totals totals = impl.table.totals();
  const auto show = [&](const char* name, uint64_t value) { visit(name, static_cast<double>(value)); };
  show("store.gets", impl.counters.gets);
  show("store.hits", impl.counters.hits);
  show("store.misses", impl.counters.misses);
  show("store.corrupt", impl.counters.corrupt);
  show("store.puts", impl.counters.puts);
  show("store.put_dropped", impl.counters.put_dropped);
  show("store.evicted", impl.counters.evicted);
  show("store.rescued", impl.counters.rescued);
  show("store.read_bytes", impl.counters.read_bytes);
  show("store.verified_bytes", impl.counters.verified_bytes);
  show("store.written_bytes", impl.counters.written_bytes);
  show("store.resident_bytes", totals.records * impl.record_bytes());
  show("store.peak_bytes", totals.peak_bytes);
  show("store.budget_bytes", impl.options.budget);
  show("store.segments", totals.segments);
  show("store.file_reads", impl.counters.file_reads);
  show("store.direct_io", impl.direct_io ? 1 : 0);
}

Status RocksDbStore::CheckInvariants() const {
  PREHOC_RETURN_IF_ERROR(impl_->table.CheckInvariants().WithContext(impl_->where));
  if (!impl_->options.read_only && impl_->table.totals().disk_bytes() > impl_->options.budget) {
    return {StatusCode::kCorrupt, impl_->where + ": over the budget"};
  }
  return {};
}

}  // namespace prehoc
