#include "transfer/rocksdb_store.h"

#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/listener.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/table_properties.h>
#include <rocksdb/write_batch.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "base/mutex.h"
#include "base/test_point.h"
#include "base/units.h"
#include "transfer/record_format.h"
#include "transfer/store_directory.h"

namespace prehoc {
namespace {

constexpr char kKeysProperty[] = "prehoc.keys";
// Filter, index entry, listed key, block trailer: what a record costs on disk beyond its bytes, rounded up.
constexpr uint64_t kRecordOverhead = 256;
// A tombstone with its share of all that.
constexpr uint64_t kTombstoneBytes = 256;
// Footer, properties and meta index of one file.
constexpr uint64_t kFileOverhead = 8 * kKiB;

// The key of a record in RocksDB: its number, big-endian, so that files of different age never overlap; then the
// chunk's key, so that a file's keys can be listed. Numbers grow and are never used again.
constexpr size_t kDbKeyBytes = 8 + 32 + 4;
using DbKey = std::array<char, kDbKeyBytes>;

DbKey MakeDbKey(uint64_t number, const ChunkKey& key) {
  DbKey db_key;
  for (size_t i = 0; i < 8; ++i) db_key[i] = static_cast<char>(number >> (56 - 8 * i));
  std::memcpy(db_key.data() + 8, key.chain.data(), 32);
  std::memcpy(db_key.data() + 40, &key.layer, 4);
  return db_key;
}

struct ListedKey {
  uint64_t number = 0;
  ChunkKey key;
};

ListedKey ParseDbKey(const char* bytes) {
  ListedKey listed;
  for (size_t i = 0; i < 8; ++i) listed.number = (listed.number << 8) | static_cast<uint8_t>(bytes[i]);
  std::memcpy(listed.key.chain.data(), bytes + 8, 32);
  std::memcpy(&listed.key.layer, bytes + 40, 4);
  return listed;
}

rocksdb::Slice AsSlice(const DbKey& key) { return {key.data(), key.size()}; }

// Lists a file's keys in its properties, so that the index can be rebuilt without reading values:
// per entry one byte (0 = record, 1 = tombstone) and the key.
class KeyLister final : public rocksdb::TablePropertiesCollector {
 public:
  rocksdb::Status AddUserKey(const rocksdb::Slice& key, const rocksdb::Slice&, rocksdb::EntryType type,
                             rocksdb::SequenceNumber, uint64_t) override {
    list_ += type == rocksdb::kEntryPut ? '\0' : '\1';
    list_.append(key.data(), key.size());
    return rocksdb::Status::OK();
  }
  // Called twice: for the file, and for what the flush listener is told.
  rocksdb::Status Finish(rocksdb::UserCollectedProperties* properties) override {
    properties->emplace(kKeysProperty, list_);
    return rocksdb::Status::OK();
  }
  rocksdb::UserCollectedProperties GetReadableProperties() const override { return {}; }
  const char* Name() const override { return "prehoc.KeyLister"; }

 private:
  std::string list_;
};

class KeyListerFactory final : public rocksdb::TablePropertiesCollectorFactory {
 public:
  rocksdb::TablePropertiesCollector* CreateTablePropertiesCollector(Context) override { return new KeyLister; }
  const char* Name() const override { return "prehoc.KeyLister"; }
};

struct KeyList {
  std::vector<ListedKey> records;
  std::vector<uint64_t> tombstones;  // numbers of records that are gone
};

Result<KeyList> ParseKeyList(const rocksdb::TableProperties& properties, const std::string& file) {
  const auto found = properties.user_collected_properties.find(kKeysProperty);
  if (found == properties.user_collected_properties.end() ||
      found->second.size() != properties.num_entries * (1 + kDbKeyBytes)) {
    return {StatusCode::kCorrupt, "file " + file + " has no usable list of its keys"};
  }
  KeyList list;
  for (size_t i = 0; i < found->second.size(); i += 1 + kDbKeyBytes) {
    const ListedKey listed = ParseDbKey(found->second.data() + i + 1);
    if (found->second[i] == '\0') {
      list.records.push_back(listed);
    } else {
      list.tombstones.push_back(listed.number);
    }
  }
  return list;
}

// The library never prints and leaves no log files; what matters comes back as a Status.
class SilentLogger final : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
};

Status FromRocksDb(const rocksdb::Status& status, const std::string& context) {
  if (status.ok()) return {};
  StatusCode code = StatusCode::kIoError;
  if (status.IsNotFound()) code = StatusCode::kNotFound;
  if (status.IsCorruption()) code = StatusCode::kCorrupt;
  if (status.IsIncomplete() || status.IsBusy() || status.IsTimedOut()) code = StatusCode::kBusy;
  if (status.IsNoSpace() || status.subcode() == rocksdb::Status::kSpaceLimit || status.IsMemoryLimit()) code = StatusCode::kOutOfSpace;
  return {code, context + ": " + status.ToString()};
}

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

// Threads: `write_mutex` serialises everything that changes RocksDB, so that numbers and eviction have one order;
// `mutex` guards what is known in memory and is never held across a call into RocksDB. Order: write_mutex, then mutex.
// RocksDB's flush thread comes in through OnFlushCompleted() and takes `mutex` only.
//
// Life of a record: Put -> pending (in a memtable; counted at what it will cost on disk) -> in a segment (the file's
// real size counts) -> dropped with its segment, or moved on as a new record with a new number.
struct RocksDbStore::Impl final : public rocksdb::EventListener {
  struct Entry {
    uint64_t number = 0;
    bool read = false;  // since it was written with this number
  };
  struct Segment {
    uint64_t file_number = 0;
    uint64_t bytes = 0;
    std::string name;  // as DeleteFile() wants it
    std::vector<ListedKey> records;
  };
  struct Pending {
    uint64_t sequence = 0;  // RocksDB's, of the write
    uint64_t bytes = 0;
  };

  Options options;
  RecordContext context;
  uint64_t usable = 0;  // budget less what MANIFEST and the small files may take
  uint64_t segment_bytes = 0;
  bool direct_io = false;
  std::string where;  // "store <path>", for messages
  std::unique_ptr<rocksdb::DB> db;

  mutable Mutex write_mutex;
  // Tombstones that a stalled or failed write did not take; they go with the next write.
  std::vector<DbKey> unwritten_tombstones PREHOC_GUARDED_BY(write_mutex);
  // After an I/O error nothing is written until reopened: RocksDB's state may be older than ours.
  Status write_error PREHOC_GUARDED_BY(write_mutex);

  mutable Mutex mutex;
  std::unordered_map<ChunkKey, Entry, ChunkKeyHash> index PREHOC_GUARDED_BY(mutex);
  std::deque<Segment> segments PREHOC_GUARDED_BY(mutex);  // oldest first
  std::deque<Pending> pending PREHOC_GUARDED_BY(mutex);   // in order of writing
  uint64_t segments_bytes PREHOC_GUARDED_BY(mutex) = 0;
  uint64_t pending_bytes PREHOC_GUARDED_BY(mutex) = 0;
  uint64_t peak_bytes PREHOC_GUARDED_BY(mutex) = 0;
  Status listener_error PREHOC_GUARDED_BY(mutex);

  // Statistics only: nothing is ordered by them.
  struct Counters {
    std::atomic<uint64_t> gets{0}, hits{0}, misses{0}, corrupt{0}, puts{0}, put_dropped{0}, evicted{0}, rescued{0};
    std::atomic<uint64_t> read_bytes{0}, written_bytes{0}, verified_bytes{0};
  } counters;
  static void Add(std::atomic<uint64_t>& counter, uint64_t n = 1) { counter.fetch_add(n, std::memory_order_relaxed); }

  uint64_t record_bytes() const { return sizeof(RecordHeader) + options.chunk_bytes; }
  uint64_t record_cost() const { return record_bytes() + kRecordOverhead; }

  Status OpenDb();
  Status LoadIndex();
  rocksdb::Options DbOptions() const;

  // --- from RocksDB's threads ---
  void OnTableFileCreated(const rocksdb::TableFileCreationInfo& info) override {
    if (info.status.ok()) ::chmod(info.file_path.c_str(), 0600);
  }
  void OnFlushBegin(rocksdb::DB*, const rocksdb::FlushJobInfo&) override { PREHOC_TEST_POINT("rocksdb_store.flush"); }
  void OnFlushCompleted(rocksdb::DB*, const rocksdb::FlushJobInfo& info) override;

  // --- writing ---
  Status CheckWritableLocked() PREHOC_REQUIRES(write_mutex);
  Status MakeRoomLocked(uint64_t bytes) PREHOC_REQUIRES(write_mutex);
  Status EvictOldestLocked() PREHOC_REQUIRES(write_mutex);
  // Writes `record` (may be empty: tombstones only) as a new number of `key`, together with what tombstones wait.
  Status WriteLocked(const ChunkKey& key, std::span<const std::byte> header, std::span<const std::byte> payload)
      PREHOC_REQUIRES(write_mutex);
  Status DropLocked(const ChunkKey& key) PREHOC_REQUIRES(write_mutex);
  // Drops the record if it still is the one with this number.
  void DropCorrupt(const ChunkKey& key, uint64_t number);
  std::optional<uint64_t> NumberOf(const ChunkKey& key) const {
    MutexLock lock(mutex);
    const auto found = index.find(key);
    return found == index.end() ? std::nullopt : std::optional(found->second.number);
  }
};

rocksdb::Options RocksDbStore::Impl::DbOptions() const {
  rocksdb::Options db_options;
  db_options.create_if_missing = true;
  db_options.info_log = std::make_shared<SilentLogger>();
  db_options.listeners.clear();
  db_options.statistics = nullptr;
  db_options.stats_dump_period_sec = 0;
  db_options.stats_persist_period_sec = 0;
  db_options.skip_stats_update_on_db_open = true;

  // Every file stays as its flush wrote it, in level 0; we drop the oldest ourselves.
  db_options.compaction_style = rocksdb::kCompactionStyleNone;
  db_options.disable_auto_compactions = true;
  db_options.level0_slowdown_writes_trigger = 1 << 30;
  db_options.level0_stop_writes_trigger = 1 << 30;
  db_options.soft_pending_compaction_bytes_limit = 0;
  db_options.hard_pending_compaction_bytes_limit = 0;
  db_options.max_background_jobs = 2;
  db_options.compression = rocksdb::kNoCompression;  // fp16 KV hardly shrinks without loss

  db_options.write_buffer_size = segment_bytes;
  db_options.max_write_buffer_number = 2;
  db_options.max_write_buffer_size_to_maintain = 0;
  db_options.arena_block_size = std::min<uint64_t>(segment_bytes / 8, kMiB);

  db_options.use_direct_reads = direct_io;
  db_options.use_direct_io_for_flush_and_compaction = direct_io;
  db_options.writable_file_max_buffer_size = 2 * kMiB;
  db_options.max_open_files = 512;
  db_options.max_manifest_file_size = std::clamp<uint64_t>(options.budget / 64, 64 * kKiB, 2 * kMiB);
  db_options.avoid_unnecessary_blocking_io = false;  // a dropped file's bytes are gone when DeleteFile() returns

  rocksdb::BlockBasedTableOptions table;
  table.no_block_cache = true;  // the host tier is the cache
  table.checksum = rocksdb::kXXH3;
  table.block_size = 4 * kKiB;  // smaller than a value: each value is a block of its own
  table.format_version = 5;
  // Numbers keep files apart except where a tombstone widens a range: there the filter saves a block read.
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  db_options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  db_options.table_properties_collector_factories.push_back(std::make_shared<KeyListerFactory>());
  return db_options;
}

Status RocksDbStore::Impl::OpenDb() {
  direct_io = options.direct_io;
  while (true) {
    rocksdb::Options db_options = DbOptions();
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
    if (text.find("lock hold by current process") != std::string::npos) {
      return {StatusCode::kBusy, where + ": is open in this process already"};
    }
    if (text.find("While lock file") != std::string::npos) {
      return {StatusCode::kBusy, where + ": another process holds it (" + options.path +
                                     "/LOCK); stop it, use another directory, or open with read_only"};
    }
    Status ours = FromRocksDb(status, where);
    if (ours.code() == StatusCode::kCorrupt) return {ours.code(), ours.message() + "; delete the directory, it is a cache"};
    return ours;
  }
}

Status RocksDbStore::Impl::LoadIndex() {
  rocksdb::TablePropertiesCollection properties;
  PREHOC_RETURN_IF_ERROR(FromRocksDb(db->GetPropertiesOfAllTables(&properties), where));
  std::vector<rocksdb::LiveFileMetaData> files;
  db->GetLiveFilesMetaData(&files);
  // Flush order; file numbers grow.
  std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) { return a.file_number < b.file_number; });
  std::unordered_set<uint64_t> dead;
  MutexLock lock(mutex);
  for (const rocksdb::LiveFileMetaData& file : files) {
    const auto found = properties.find(file.db_path + file.name);
    if (found == properties.end()) return {StatusCode::kCorrupt, where + ": file " + file.name + " has no properties"};
    auto list = ParseKeyList(*found->second, file.name);
    if (!list.ok()) return list.status().WithContext(where);
    for (const ListedKey& record : list->records) {
      Entry& entry = index[record.key];
      entry.number = std::max(entry.number, record.number);
    }
    dead.insert(list->tombstones.begin(), list->tombstones.end());
    segments.push_back({file.file_number, file.size, file.name, std::move(list->records)});
    segments_bytes += file.size;
  }
  std::erase_if(index, [&](const auto& item) { return dead.contains(item.second.number); });
  peak_bytes = segments_bytes;
  return {};
}

void RocksDbStore::Impl::OnFlushCompleted(rocksdb::DB*, const rocksdb::FlushJobInfo& info) {
  auto list = ParseKeyList(info.table_properties, info.file_path);
  struct stat file {};
  const bool exists = ::stat(info.file_path.c_str(), &file) == 0;
  MutexLock lock(mutex);
  while (!pending.empty() && pending.front().sequence <= info.largest_seqno) {
    pending_bytes -= pending.front().bytes;
    pending.pop_front();
  }
  if (!list.ok() || !exists) {
    listener_error = {StatusCode::kIoError, where + ": flushed file " + info.file_path + " cannot be read back"};
    return;
  }
  const size_t slash = info.file_path.rfind('/');
  segments.push_back({info.file_number, static_cast<uint64_t>(file.st_size), info.file_path.substr(slash),
                      std::move(list->records)});
  segments_bytes += static_cast<uint64_t>(file.st_size);
  peak_bytes = std::max(peak_bytes, segments_bytes + pending_bytes);
}

Status RocksDbStore::Impl::CheckWritableLocked() {
  if (options.read_only) return {StatusCode::kUnsupported, where + ": is open read-only"};
  if (!write_error.ok()) return write_error;
  MutexLock lock(mutex);
  return listener_error;
}

Status RocksDbStore::Impl::MakeRoomLocked(uint64_t bytes) {
  while (true) {
    {
      MutexLock lock(mutex);
      // Each memtable will be a file with its own overhead.
      const uint64_t needed = segments_bytes + pending_bytes + 2 * kFileOverhead + bytes;
      if (needed <= usable) {
        peak_bytes = std::max(peak_bytes, segments_bytes + pending_bytes + bytes);
        return {};
      }
      if (segments.empty()) {
        return {StatusCode::kBusy, where + ": the whole budget waits to be written"};
      }
    }
    PREHOC_RETURN_IF_ERROR(EvictOldestLocked());
  }
}

Status RocksDbStore::Impl::EvictOldestLocked() {
  std::vector<std::pair<ChunkKey, std::string>> rescued;
  std::string name;
  std::vector<ListedKey> wanted;
  {
    MutexLock lock(mutex);
    const Segment& oldest = segments.front();
    name = oldest.name;
    const size_t most = options.second_chance ? oldest.bytes / 2 / record_cost() : 0;
    for (const ListedKey& record : oldest.records) {
      const auto found = index.find(record.key);
      if (found == index.end() || found->second.number != record.number) continue;
      if (found->second.read && wanted.size() < most) wanted.push_back(record);
    }
  }
  // Read before the file goes and written after it, so that the budget holds in between.
  rocksdb::ReadOptions read_options;
  read_options.verify_checksums = true;  // as in DoGet()
  for (const ListedKey& record : wanted) {
    std::string value;
    const DbKey db_key = MakeDbKey(record.number, record.key);
    if (!db->Get(read_options, AsSlice(db_key), &value).ok()) continue;
    // What is damaged dies with its segment.
    if (!ParseRecord(context, record.key, std::as_bytes(std::span(value))).ok()) {
      Add(counters.corrupt);
      continue;
    }
    rescued.emplace_back(record.key, std::move(value));
  }
  {
    MutexLock lock(mutex);
    for (const ListedKey& record : segments.front().records) {
      const auto found = index.find(record.key);
      if (found == index.end() || found->second.number != record.number) continue;
      index.erase(found);
      Add(counters.evicted);
    }
    segments_bytes -= segments.front().bytes;
    segments.pop_front();
  }
  if (const rocksdb::Status status = db->DeleteFile(name); !status.ok()) {
    write_error = FromRocksDb(status, where + ": dropping " + name);
    return write_error;
  }
  for (const auto& [key, value] : rescued) {
    const auto bytes = std::as_bytes(std::span(value));
    // A second chance is a favour: with full memtables it is off.
    if (!WriteLocked(key, bytes.first(sizeof(RecordHeader)), bytes.subspan(sizeof(RecordHeader))).ok()) break;
    Add(counters.rescued);
    counters.evicted.fetch_sub(1, std::memory_order_relaxed);
  }
  return {};
}

Status RocksDbStore::Impl::WriteLocked(const ChunkKey& key, std::span<const std::byte> header,
                                       std::span<const std::byte> payload) {
  const bool has_record = !header.empty();
  if (!has_record && unwritten_tombstones.empty()) return {};
  // This thread is the only writer, so the write gets the next sequence number; it serves as the record's own.
  const uint64_t number = db->GetLatestSequenceNumber() + 1;
  const DbKey db_key = MakeDbKey(number, key);
  rocksdb::WriteBatch batch(header.size() + payload.size() + kDbKeyBytes * (unwritten_tombstones.size() + 1) + 64);
  uint64_t cost = unwritten_tombstones.size() * kTombstoneBytes;
  if (has_record) {
    cost += record_cost();
    const rocksdb::Slice db_key_part = AsSlice(db_key);
    const std::array<rocksdb::Slice, 2> parts = {
        rocksdb::Slice(reinterpret_cast<const char*>(header.data()), header.size()),
        rocksdb::Slice(reinterpret_cast<const char*>(payload.data()), payload.size())};
    batch.Put(rocksdb::SliceParts(&db_key_part, 1), rocksdb::SliceParts(parts.data(), 2)).PermitUncheckedError();
  }
  for (const DbKey& dead : unwritten_tombstones) batch.Delete(AsSlice(dead)).PermitUncheckedError();
  {
    // Before the write: its flush may end before we are back.
    MutexLock lock(mutex);
    pending.push_back({number, cost});
    pending_bytes += cost;
  }
  rocksdb::WriteOptions write_options;
  write_options.disableWAL = true;   // it would write every byte twice; see docs/formats.md
  write_options.no_slowdown = true;  // a dropped cache write is right, a stalled caller is not
  const rocksdb::Status status = db->Write(write_options, &batch);
  if (!status.ok()) {
    MutexLock lock(mutex);
    // A flush that was under way may have taken earlier entries only: ours is the last one, if it is still there.
    if (!pending.empty() && pending.back().sequence == number) {
      pending_bytes -= pending.back().bytes;
      pending.pop_back();
    }
    const Status ours = FromRocksDb(status, where);
    if (ours.code() != StatusCode::kBusy && ours.code() != StatusCode::kOutOfSpace) write_error = ours;
    return ours;
  }
  unwritten_tombstones.clear();
  if (has_record) {
    MutexLock lock(mutex);
    index[key] = {number, false};
  }
  return {};
}

Status RocksDbStore::Impl::DropLocked(const ChunkKey& key) {
  uint64_t number = 0;
  {
    MutexLock lock(mutex);
    const auto found = index.find(key);
    if (found == index.end()) return {};
    number = found->second.number;
    index.erase(found);
  }
  if (options.read_only) return {};
  unwritten_tombstones.push_back(MakeDbKey(number, key));
  const Status status = WriteLocked({}, {}, {});
  // Gone from the index in any case; the tombstone, which only matters after a restart, goes with the next write.
  return status.code() == StatusCode::kBusy ? Status() : status;
}

void RocksDbStore::Impl::DropCorrupt(const ChunkKey& key, uint64_t number) {
  Add(counters.corrupt);
  MutexLock write_lock(write_mutex);
  if (NumberOf(key) == number) DropLocked(key).IgnoreError();  // the caller returns kCorrupt already
}

RocksDbStore::RocksDbStore(size_t chunk_bytes, std::unique_ptr<Impl> impl)
    : ChunkStore(chunk_bytes), impl_(std::move(impl)) {}

Result<std::unique_ptr<RocksDbStore>> RocksDbStore::Open(const Options& options) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  impl->where = "store " + options.path;
  auto context = RecordContext::Create(options.identity);
  if (!context.ok()) return context.status().WithContext(impl->where);
  impl->context = std::move(*context);
  const uint64_t largest = options.budget > 32 * kGiB ? 64 * kMiB : 32 * kMiB;
  impl->segment_bytes = options.segment_bytes != 0 ? options.segment_bytes
                                                   : std::clamp<uint64_t>(options.budget / 32, 256 * kKiB, largest);
  const uint64_t manifests = 2 * std::clamp<uint64_t>(options.budget / 64, 64 * kKiB, 2 * kMiB);
  impl->usable = options.budget - manifests - 128 * kKiB;  // OPTIONS, CURRENT, IDENTITY, LOCK, the note
  const StoreNote note{kStoreVersion, options.identity, options.chunk_bytes};
  PREHOC_RETURN_IF_ERROR(
      PrepareStoreDirectory(options.path, note, options.create_if_missing, options.read_only));
  PREHOC_RETURN_IF_ERROR(impl->OpenDb());
  std::unique_ptr<RocksDbStore> store(new RocksDbStore(options.chunk_bytes, std::move(impl)));
  PREHOC_RETURN_IF_ERROR(store->impl_->LoadIndex());
  if (!options.read_only) {
    RestrictFiles(options.path);
    MutexLock lock(store->impl_->write_mutex);
    // The budget may be smaller than it was.
    PREHOC_RETURN_IF_ERROR(store->impl_->MakeRoomLocked(0));
  }
  return store;
}

RocksDbStore::~RocksDbStore() {
  if (impl_->db == nullptr) return;
  if (!impl_->options.read_only) DoFlush().IgnoreError();
  impl_->db->Close().PermitUncheckedError();  // before the listener, which is Impl, dies
  impl_->db.reset();
}

Status RocksDbStore::DoGet(const ChunkKey& key, std::span<std::byte> out) {
  Impl& impl = *impl_;
  Impl::Add(impl.counters.gets);
  uint64_t number = 0;
  {
    MutexLock lock(impl.mutex);
    const auto found = impl.index.find(key);
    if (found == impl.index.end()) {
      Impl::Add(impl.counters.misses);
      return {StatusCode::kNotFound, impl.where + ": no chunk " + key.ToString()};
    }
    found->second.read = true;
    number = found->second.number;
  }
  rocksdb::ReadOptions read_options;
  // Not left to our own checksum: RocksDB asserts what it finds in a block, and the packaged library is built with
  // assertions, so a damaged length in an unchecked block ends the process.
  read_options.verify_checksums = true;
  read_options.fill_cache = false;
  rocksdb::PinnableSlice value;
  const DbKey db_key = MakeDbKey(number, key);
  const rocksdb::Status status =
      impl.db->Get(read_options, impl.db->DefaultColumnFamily(), AsSlice(db_key), &value);
  if (status.IsNotFound() || status.IsCorruption()) {
    if (impl.NumberOf(key) != number) {
      Impl::Add(impl.counters.misses);
      return {StatusCode::kNotFound, impl.where + ": chunk " + key.ToString() + " was dropped while it was read"};
    }
    impl.DropCorrupt(key, number);
    return {StatusCode::kCorrupt, impl.where + ": chunk " + key.ToString() + ": " + status.ToString()};
  }
  if (!status.ok()) return FromRocksDb(status, impl.where + ": chunk " + key.ToString());
  const auto payload = ParseRecord(impl.context, key, std::as_bytes(std::span(value.data(), value.size())),
                                   impl.options.verify ? VerifyPayload::kYes : VerifyPayload::kNo);
  if (!payload.ok() || payload->size() != out.size()) {
    impl.DropCorrupt(key, number);
    if (!payload.ok()) return payload.status().WithContext(impl.where);
    return {StatusCode::kCorrupt, impl.where + ": chunk " + key.ToString() + ": payload of " +
                                      std::to_string(payload->size()) + " bytes, expected " +
                                      std::to_string(out.size())};
  }
  std::memcpy(out.data(), payload->data(), out.size());
  Impl::Add(impl.counters.hits);
  Impl::Add(impl.counters.read_bytes, out.size());
  if (impl.options.verify) Impl::Add(impl.counters.verified_bytes, out.size());
  return {};
}

Status RocksDbStore::DoPut(const ChunkKey& key, std::span<const std::byte> data) {
  Impl& impl = *impl_;
  if (impl.options.read_only) return {StatusCode::kUnsupported, impl.where + ": is open read-only"};
  if (impl.NumberOf(key)) return {};
  const RecordHeader header = EncodeHeader(impl.context, key, data);  // outside the lock: it reads all bytes
  MutexLock write_lock(impl.write_mutex);
  if (impl.NumberOf(key)) return {};
  const auto put = [&]() -> Status {
    PREHOC_RETURN_IF_ERROR(impl.CheckWritableLocked());
    struct statvfs file_system {};
    if (::statvfs(impl.options.path.c_str(), &file_system) == 0) {
      const uint64_t free = uint64_t{file_system.f_bavail} * file_system.f_frsize;
      if (free < impl.options.min_free_bytes) {
        return {StatusCode::kOutOfSpace, impl.where + ": the disk has " + FormatBytes(static_cast<double>(free)) +
                                             " left, " +
                                             FormatBytes(static_cast<double>(impl.options.min_free_bytes)) +
                                             " are to stay free (min_free_bytes)"};
      }
    }
    PREHOC_RETURN_IF_ERROR(impl.MakeRoomLocked(impl.record_cost()));
    return impl.WriteLocked(key, std::as_bytes(std::span(&header, 1)), data);
  };
  Status status = put();
  if (!status.ok()) {
    Impl::Add(impl.counters.put_dropped);
    return status;
  }
  Impl::Add(impl.counters.puts);
  Impl::Add(impl.counters.written_bytes, data.size());
  return {};
}

bool RocksDbStore::DoContains(const ChunkKey& key) const { return impl_->NumberOf(key).has_value(); }

Status RocksDbStore::DoDelete(const ChunkKey& key) {
  if (impl_->options.read_only) return {StatusCode::kUnsupported, impl_->where + ": is open read-only"};
  MutexLock write_lock(impl_->write_mutex);
  return impl_->DropLocked(key);
}

Status RocksDbStore::DoFlush() {
  Impl& impl = *impl_;
  if (impl.options.read_only) return {};
  MutexLock write_lock(impl.write_mutex);
  PREHOC_RETURN_IF_ERROR(impl.CheckWritableLocked());
  rocksdb::FlushOptions flush_options;
  flush_options.wait = true;
  flush_options.allow_write_stall = true;  // writers are behind write_mutex anyway
  PREHOC_RETURN_IF_ERROR(FromRocksDb(impl.db->Flush(flush_options), impl.where));
  // Tombstones that found the memtables full fit now.
  if (impl.unwritten_tombstones.empty()) return {};
  PREHOC_RETURN_IF_ERROR(impl.WriteLocked({}, {}, {}));
  return FromRocksDb(impl.db->Flush(flush_options), impl.where);
}

uint64_t RocksDbStore::DoResidentBytes() const {
  MutexLock lock(impl_->mutex);
  return impl_->index.size() * impl_->record_bytes();
}

uint64_t RocksDbStore::DoBudget() const { return impl_->options.budget; }

uint64_t RocksDbStore::segment_count() const {
  MutexLock lock(impl_->mutex);
  return impl_->segments.size();
}

uint64_t RocksDbStore::disk_bytes() const {
  MutexLock lock(impl_->mutex);
  return impl_->segments_bytes + impl_->pending_bytes;
}

void RocksDbStore::DoVisitCounters(const CounterVisitor& visit) const {
  const Impl& impl = *impl_;
  uint64_t resident = 0, peak = 0, segments = 0;
  {
    MutexLock lock(impl.mutex);
    resident = impl.index.size() * impl.record_bytes();
    peak = impl.peak_bytes;
    segments = impl.segments.size();
  }
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
  show("store.resident_bytes", resident);
  show("store.peak_bytes", peak);
  show("store.budget_bytes", impl.options.budget);
  show("store.segments", segments);
  show("store.direct_io", impl.direct_io ? 1 : 0);
}

Status RocksDbStore::CheckInvariants() const {
  const Impl& impl = *impl_;
  MutexLock lock(impl.mutex);
  const auto bad = [&](const std::string& what) { return Status(StatusCode::kCorrupt, impl.where + ": " + what); };
  uint64_t segments_bytes = 0, pending_bytes = 0;
  for (const Impl::Segment& segment : impl.segments) segments_bytes += segment.bytes;
  for (const Impl::Pending& pending : impl.pending) pending_bytes += pending.bytes;
  if (segments_bytes != impl.segments_bytes) return bad("bytes of segments are miscounted");
  if (pending_bytes != impl.pending_bytes) return bad("bytes in memtables are miscounted");
  if (!std::is_sorted(impl.segments.begin(), impl.segments.end(),
                      [](const auto& a, const auto& b) { return a.file_number < b.file_number; })) {
    return bad("segments are out of order");
  }
  if (!impl.options.read_only && segments_bytes + pending_bytes > impl.options.budget) return bad("over the budget");
  return {};
}

}  // namespace prehoc
