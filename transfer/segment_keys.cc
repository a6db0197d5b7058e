#include "transfer/segment_keys.h"

#include <cstring>

#include "base/check.h"

namespace prehoc {

SegmentKey MakeSegmentKey(uint64_t number, const ChunkKey& key) {
  SegmentKey bytes;
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(number >> (56 - 8 * i));
  std::memcpy(bytes.data() + 8, key.chain.data(), 32);
  std::memcpy(bytes.data() + 40, &key.layer, 4);
  return bytes;
}

void AppendListedKey(ListedKind kind, std::string_view segment_key, uint64_t block_offset, std::string* list) {
  PREHOC_CHECK(segment_key.size() == kSegmentKeyBytes);
  *list += static_cast<char>(kind);
  *list += segment_key;
  for (size_t i = 0; i < 8; ++i) *list += static_cast<char>(block_offset >> (8 * i));
}

Result<SegmentKeys> ParseSegmentKeys(std::string_view list, uint64_t entries) {
  if (list.size() % kListedKeyBytes != 0 || list.size() / kListedKeyBytes != entries) {
    return {StatusCode::kCorrupt, "the list of keys has " + std::to_string(list.size()) + " bytes, expected " +
                                      std::to_string(kListedKeyBytes) + " for each of " + std::to_string(entries) +
                                      " entries"};
  }
  SegmentKeys keys;
  for (; !list.empty(); list.remove_prefix(kListedKeyBytes)) {
    ListedRecord record;
    const auto byte = [&](size_t i) { return uint64_t{static_cast<uint8_t>(list[i])}; };
    for (size_t i = 0; i < 8; ++i) record.number = (record.number << 8) | byte(1 + i);
    std::memcpy(record.key.chain.data(), list.data() + 9, 32);
    std::memcpy(&record.key.layer, list.data() + 41, 4);
    for (size_t i = 0; i < 8; ++i) record.block_offset |= byte(1 + kSegmentKeyBytes + i) << (8 * i);
    switch (byte(0)) {
      case static_cast<uint8_t>(ListedKind::kRecord): keys.records.push_back(record); break;
      case static_cast<uint8_t>(ListedKind::kTombstone): keys.tombstones.push_back(record.number); break;
      default:
        return {StatusCode::kCorrupt, "the list of keys has an entry of kind " + std::to_string(byte(0))};
    }
  }
  return keys;
}

}  // namespace prehoc
