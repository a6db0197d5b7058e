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
  uint64_t block_offset = 0;  // where RocksDB's block with the record begins in the file: a hint, see below
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

// Where the value of a block with one entry begins, by RocksDB's format 5: bytes shared with the key before (0), bytes
// of this key, bytes of the value as a varint, the key with RocksDB's own 8 bytes. Only a hint: whoever reads there
// compares key and checksum, and asks RocksDB if they do not hold.
constexpr uint64_t ValueOffsetInBlock(uint64_t value_bytes) {
  uint64_t length_bytes = 1;
  for (uint64_t rest = value_bytes; rest >= 128; rest /= 128) ++length_bytes;
  return 1 + 1 + length_bytes + kSegmentKeyBytes + 8;
}

// The value: `pad` zero bytes, then a record. Blocks of large records begin on a page, and the padding makes their
// payload begin on the next one, so that it is read straight to where it is wanted.
struct ValueShape {
  static constexpr uint64_t kPage = 4096;
  uint64_t pad = 0;
  bool aligned = false;
  uint64_t record_bytes = 0;  // header and payload

  static constexpr ValueShape For(uint64_t header_bytes, uint64_t payload_bytes) {
    ValueShape shape{0, false, header_bytes + payload_bytes};
    if (payload_bytes < 16 * kPage || payload_bytes % kPage != 0) return shape;  // padding would cost too much
    for (uint64_t pad = kPage - header_bytes; pad > 0; --pad) {
      const uint64_t payload_offset = ValueOffsetInBlock(pad + shape.record_bytes) + pad + header_bytes;
      if (payload_offset == kPage) return {pad, true, shape.record_bytes};
    }
    return shape;
  }
  constexpr uint64_t value_bytes() const { return pad + record_bytes; }
  constexpr uint64_t RecordOffset(uint64_t block_offset) const {
    return block_offset + ValueOffsetInBlock(value_bytes()) + pad;
  }
};

}  // namespace prehoc
