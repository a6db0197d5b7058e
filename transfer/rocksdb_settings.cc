#include "transfer/rocksdb_settings.h"

#include <rocksdb/env.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/table.h>

#include <algorithm>
#include <memory>

#include "base/units.h"

namespace prehoc {
namespace {

std::string_view AsView(const rocksdb::Slice& slice) { return {slice.data(), slice.size()}; }

// Lists a file's keys in its properties, so that the index can be rebuilt without reading values.
class KeyLister final : public rocksdb::TablePropertiesCollector {
 public:
  // `file_size` is what the file has before the block of this key.
  rocksdb::Status AddUserKey(const rocksdb::Slice& key, const rocksdb::Slice&, rocksdb::EntryType type,
                             rocksdb::SequenceNumber, uint64_t file_size) override {
    if (key.size() != kSegmentKeyBytes) return rocksdb::Status::Corruption("a key that is not ours");
    AppendListedKey(type == rocksdb::kEntryPut ? ListedKind::kRecord : ListedKind::kTombstone, AsView(key), file_size,
                    &list_);
    return rocksdb::Status::OK();
  }
  // Called twice: for the file, and for what the flush listener is told.
  rocksdb::Status Finish(rocksdb::UserCollectedProperties* properties) override {
    properties->emplace(kSegmentKeysProperty, list_);
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

// The library never prints and leaves no log files; what matters comes back as a Status.
class SilentLogger final : public rocksdb::Logger {
 public:
  using rocksdb::Logger::Logv;
  void Logv(const char*, va_list) override {}
};

}  // namespace

rocksdb::Options MakeRocksDbOptions(const RocksDbSettings& settings) {
  rocksdb::Options options;
  options.create_if_missing = true;
  options.info_log = std::make_shared<SilentLogger>();
  options.statistics = nullptr;
  options.stats_dump_period_sec = 0;
  options.stats_persist_period_sec = 0;
  options.skip_stats_update_on_db_open = true;

  // No compaction: we drop the oldest files ourselves. So no count of files may slow a write down.
  options.compaction_style = rocksdb::kCompactionStyleNone;
  options.disable_auto_compactions = true;
  options.level0_slowdown_writes_trigger = 1 << 30;
  options.level0_stop_writes_trigger = 1 << 30;
  options.soft_pending_compaction_bytes_limit = 0;
  options.hard_pending_compaction_bytes_limit = 0;
  options.max_background_jobs = 2;  // one flush at a time: files come into being in the order of their numbers
  options.compression = rocksdb::kNoCompression;  // fp16 KV hardly shrinks without loss

  options.write_buffer_size = settings.segment_bytes;
  options.max_write_buffer_number = 2;
  options.max_write_buffer_size_to_maintain = 0;
  options.arena_block_size = std::min<uint64_t>(settings.segment_bytes / 8, kMiB);

  options.use_direct_reads = settings.direct_io;
  options.use_direct_io_for_flush_and_compaction = settings.direct_io;
  options.writable_file_max_buffer_size = 2 * kMiB;
  options.max_open_files = 128;  // records are read through our own descriptors, as a rule
  options.max_manifest_file_size = settings.manifest_bytes;
  options.manifest_preallocation_size = 64 * kKiB;  // of its 4 MiB, as a rule, nothing would be used
  options.avoid_unnecessary_blocking_io = false;  // a file that nobody reads is gone when DeleteFile() returns

  rocksdb::BlockBasedTableOptions table;
  table.no_block_cache = true;  // the host tier is the cache
  table.checksum = rocksdb::kXXH3;
  table.block_size = settings.align_blocks ? 4 * kKiB : 1;  // less than a record: each is a block of its own
  table.block_align = settings.align_blocks;
  table.format_version = 5;
  // Numbers keep files apart except where a tombstone widens a range: there the filter saves a block read.
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(10));
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.table_properties_collector_factories.push_back(std::make_shared<KeyListerFactory>());
  return options;
}

Result<SegmentKeys> ReadSegmentKeys(const rocksdb::TableProperties& properties, const std::string& file) {
  const auto found = properties.user_collected_properties.find(kSegmentKeysProperty);
  if (found == properties.user_collected_properties.end()) {
    return {StatusCode::kCorrupt, "file " + file + " has no list of its keys"};
  }
  auto keys = ParseSegmentKeys(found->second, properties.num_entries);
  if (!keys.ok()) return keys.status().WithContext("file " + file);
  return keys;
}

Status FromRocksDb(const rocksdb::Status& status, const std::string& context) {
  if (status.ok()) return {};
  StatusCode code = StatusCode::kIoError;
  if (status.IsNotFound() || status.IsPathNotFound()) code = StatusCode::kNotFound;
  if (status.IsCorruption()) code = StatusCode::kCorrupt;
  if (status.IsIncomplete() || status.IsBusy() || status.IsTimedOut()) code = StatusCode::kBusy;
  if (status.IsNoSpace() || status.subcode() == rocksdb::Status::kSpaceLimit || status.IsMemoryLimit()) {
    code = StatusCode::kOutOfSpace;
  }
  return {code, context + ": " + status.ToString()};
}

}  // namespace prehoc
