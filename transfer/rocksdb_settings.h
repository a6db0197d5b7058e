// How our disk store uses RocksDB: its options, what a flush leaves in each file, its errors in our words.
#pragma once
#include <rocksdb/options.h>
#include <rocksdb/status.h>
#include <rocksdb/table_properties.h>

#include <cstdint>
#include <string>

#include "base/status.h"
#include "transfer/segment_keys.h"

namespace prehoc {

struct RocksDbSettings {
  uint64_t segment_bytes = 0;   // of a memtable, and so of a file
  uint64_t manifest_bytes = 0;  // when RocksDB begins a new MANIFEST
  bool direct_io = true;
  bool align_blocks = false;    // each record's block begins on a page; for records of many pages
};

// Every file stays as its flush wrote it, in level 0, one record a block, its keys listed in its properties.
rocksdb::Options MakeRocksDbOptions(const RocksDbSettings& settings);

// The list that the options above make a flush write. kCorrupt if there is none, or not for all entries.
Result<SegmentKeys> ReadSegmentKeys(const rocksdb::TableProperties& properties, const std::string& file);

// kNotFound, kCorrupt, kBusy (it would have to stall), kOutOfSpace, else kIoError; `context: ` before its words.
Status FromRocksDb(const rocksdb::Status& status, const std::string& context);

}  // namespace prehoc
