// Keys of records in RocksDB, and the list of them that each segment carries. See docs/formats.md.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "transfer/chunk_store.h"

namespace prehoc {

// The record's number, big-endian, so that segments of different age never overlap; then the chunk's key, so that a
// segment's keys can be listed. Numbers grow; a number is used for one record only.
inline constexpr size_t kSegmentKeyBytes = 8 + 32 + 4;
using SegmentKey = std::array<char, kSegmentKeyBytes>;
SegmentKey MakeSegmentKey(uint64_t number, const ChunkKey& key);

struct ListedRecord {
  uint64_t number = 0;
  ChunkKey key;
  uint64_t block_offset = 0;  // where RocksDB's block with the record begins in the file: a hint, see RecordOffset()
};

struct SegmentKeys {
  std::vector<ListedRecord> records;
  std::vector<uint64_t> tombstones;  // numbers of records that are gone
};

inline constexpr char kSegmentKeysProperty[] = "prehoc.keys";
enum class ListedKind : uint8_t { kRecord = 0, kTombstone = 1 };

// Appends one entry: its kind, the key, the offset (little-endian).
void AppendListedKey(ListedKind kind, std::string_view segment_key, uint64_t block_offset, std::string* list);
inline constexpr size_t kListedKeyBytes = 1 + kSegmentKeyBytes + 8;

// Takes a list of `entries` entries apart. Returns kCorrupt if it has another length or an unknown kind. Any bytes are
// safe to pass.
Result<SegmentKeys> ParseSegmentKeys(std::string_view list, uint64_t entries);

// Where a record of `record_bytes` begins, if its block is laid out as RocksDB's format 5 does for a single entry. Only a
// hint: whoever reads there compares key and checksum, and asks RocksDB if they do not hold.
constexpr uint64_t RecordOffset(uint64_t block_offset, uint64_t record_bytes) {
  uint64_t length_bytes = 1;  // varint
  for (uint64_t rest = record_bytes; rest >= 128; rest /= 128) ++length_bytes;
  // Bytes shared with the key before (0), bytes of this key, bytes of the value; the key with RocksDB's own 8 bytes.
  return block_offset + 1 + 1 + length_bytes + kSegmentKeyBytes + 8;
}

}  // namespace prehoc
