// What a record looks like on disk and on the wire: a fixed header, then the payload. See docs/formats.md.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "base/result.h"
#include "transfer/chunk_store.h"

namespace prehoc {

// A change of any field, of the checksum or of what the payload means takes a new number.
inline constexpr uint32_t kRecordFormatVersion = 2;
inline constexpr uint32_t kRecordMagic = 0x43524850;  // "PHRC" in the file

static_assert(std::endian::native == std::endian::little, "records are little-endian and copied as they lie");

struct RecordHeader {
  uint32_t magic = kRecordMagic;
  uint16_t version = kRecordFormatVersion;
  uint8_t dtype = 0;     // RowFormat
  uint8_t branch = 0;    // ChunkOrigin::branch
  uint64_t layout = 0;   // XXH3-64 of StoreIdentity::layout
  std::array<uint8_t, 32> model{};  // model fingerprint
  std::array<uint8_t, 32> chain{};  // ChunkKey::chain: binds tenant, model, layout and all tokens
  int32_t layer = 0;
  int32_t chunk = 0;                 // ChunkOrigin::chunk
  uint64_t payload_bytes = 0;        // what follows the header
  uint64_t parent = 0, tenant = 0;   // ChunkOrigin
  std::array<uint64_t, 2> checksum{};  // XXH3-128 of the payload, seeded with XXH3-64 of all bytes before this field
};
static_assert(sizeof(RecordHeader) == 128);
static_assert(offsetof(RecordHeader, checksum) == 112);
static_assert(std::is_trivially_copyable_v<RecordHeader>);
static_assert(std::has_unique_object_representations_v<RecordHeader>, "padding would be hashed");

// What all records of one store share; computed once.
struct RecordContext {
  uint8_t dtype = 0;
  uint64_t layout = 0;
  std::array<uint8_t, 32> model{};
  std::string layout_name;  // for messages

  // kInvalid for an unknown dtype or format version, naming both.
  static Result<RecordContext> Create(const StoreIdentity& identity);
};

// The header that makes `payload` a record of `key`. Reads the payload once.
RecordHeader EncodeHeader(const RecordContext& context, const ChunkKey& key, std::span<const std::byte> payload,
                          const ChunkOrigin& origin = {});
ChunkOrigin OriginOf(const RecordHeader& header);
ChunkSeal SealOf(const RecordHeader& header);  // what its payload is compared with

enum class VerifyPayload : bool { kNo = false, kYes = true };

// The payload within `record` [header, payload], if it is an unharmed record of `key` in this context.
// Returns kCorrupt, with the value found and the one expected, for anything else: another magic, version, dtype,
// layout, model, key or length, an impossible origin, or a checksum that does not hold. Any bytes are safe to pass.
// Cost: one pass over the payload (none with kNo, which checks the header's fields only).
Result<std::span<const std::byte>> ParseRecord(const RecordContext& context, const ChunkKey& key,
                                               std::span<const std::byte> record,
                                               VerifyPayload verify = VerifyPayload::kYes);

// As ParseRecord(), for a header [sizeof(RecordHeader)] and a payload that lie apart.
Status CheckRecord(const RecordContext& context, const ChunkKey& key, std::span<const std::byte> header_bytes,
                   std::span<const std::byte> payload, VerifyPayload verify = VerifyPayload::kYes);

// What CheckRecord() says of the header alone, for a payload of `payload_bytes`.
Status CheckHeader(const RecordContext& context, const ChunkKey& key, const RecordHeader& header, uint64_t payload_bytes);

// XXH3, with the widest vectors the CPU has.
uint64_t Hash64(std::span<const std::byte> bytes, uint64_t seed = 0);
std::array<uint64_t, 2> Hash128(std::span<const std::byte> bytes, uint64_t seed = 0);

}  // namespace prehoc
