#include "transfer/record_format.h"

#include <cstdio>
#include <cstring>
#include <optional>
#include <string>

#include "base/geometry.h"

// The packaged library's plain entry points are SSE2 only; the dispatching ones pick AVX2 or AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

namespace prehoc {
namespace {

std::string Hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string HexPrefix(const std::array<uint8_t, 32>& bytes) {
  std::string text;
  char pair[4];
  for (size_t i = 0; i < 8; ++i) {
    std::snprintf(pair, sizeof pair, "%02x", bytes[i]);
    text += pair;
  }
  return text;
}

Status Mismatch(const ChunkKey& key, const char* field, const std::string& found, const std::string& expected) {
  return {StatusCode::kCorrupt,
          "record " + key.ToString() + ": " + field + " is " + found + ", expected " + expected};
}

std::span<const std::byte> BytesBeforeChecksum(const RecordHeader& header) {
  return {reinterpret_cast<const std::byte*>(&header), offsetof(RecordHeader, checksum)};
}

std::array<uint64_t, 2> Checksum(const RecordHeader& header, std::span<const std::byte> payload) {
  return Hash128(payload, SealOf(header).seed);
}

// The packaged functions return with the upper halves of vector registers in use. Code without AVX that follows, trigonometry say, would
// then wait for them at each instruction, on CPUs of Intel, until somebody clears them.
#if defined(__x86_64__)
__attribute__((target("avx"))) void ClearUpperHalves() { _mm256_zeroupper(); }
#endif
template <class Hash>
Hash Clean(Hash hash) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx")) ClearUpperHalves();
#endif
  return hash;
}

}  // namespace

uint64_t Hash64(std::span<const std::byte> bytes, uint64_t seed) {
  return Clean(XXH3_64bits_withSeed(bytes.data(), bytes.size(), seed));
}

std::array<uint64_t, 2> Hash128(std::span<const std::byte> bytes, uint64_t seed) {
  const XXH128_hash_t hash = Clean(XXH3_128bits_withSeed(bytes.data(), bytes.size(), seed));
  return {hash.low64, hash.high64};
}

Result<RecordContext> RecordContext::Create(const StoreIdentity& identity) {
  if (identity.format_version != kRecordFormatVersion) {
    return {StatusCode::kInvalid, "record format version " + std::to_string(identity.format_version) +
                                      " was asked for, this build knows " + std::to_string(kRecordFormatVersion)};
  }
  const std::optional<RowFormat> rows = FindRowFormat(identity.dtype);
  if (!rows) {
    return {StatusCode::kInvalid, "record dtype '" + identity.dtype + "' was asked for, this build knows 'f16', 'int8' and 'e4m3'"};
  }
  RecordContext context;
  context.dtype = static_cast<uint8_t>(*rows);
  context.layout = Hash64(std::as_bytes(std::span(identity.layout)));
  context.model = identity.model;
  context.layout_name = identity.layout;
  return context;
}

RecordHeader EncodeHeader(const RecordContext& context, const ChunkKey& key, std::span<const std::byte> payload,
                          const ChunkOrigin& origin) {
  RecordHeader header;
  header.dtype = context.dtype;
  header.layout = context.layout;
  header.model = context.model;
  header.chain = key.chain;
  header.layer = key.layer;
  header.payload_bytes = payload.size();
  header.branch = origin.branch ? 1 : 0;
  header.chunk = origin.chunk;
  header.parent = origin.parent;
  header.tenant = origin.tenant;
  header.checksum = Checksum(header, payload);
  return header;
}

ChunkOrigin OriginOf(const RecordHeader& header) {
  return {.tenant = header.tenant, .parent = header.parent, .chunk = header.chunk, .branch = header.branch != 0};
}

ChunkSeal SealOf(const RecordHeader& header) { return {.seed = Hash64(BytesBeforeChecksum(header)), .hash = header.checksum}; }

Result<std::span<const std::byte>> ParseRecord(const RecordContext& context, const ChunkKey& key,
                                               std::span<const std::byte> record, VerifyPayload verify) {
  if (record.size() < sizeof(RecordHeader)) {
    return Mismatch(key, "length", std::to_string(record.size()), std::to_string(sizeof(RecordHeader)) + " or more");
  }
  const std::span<const std::byte> payload = record.subspan(sizeof(RecordHeader));
  PREHOC_RETURN_IF_ERROR(CheckRecord(context, key, record.first(sizeof(RecordHeader)), payload, verify));
  return payload;
}

Status CheckRecord(const RecordContext& context, const ChunkKey& key, std::span<const std::byte> header_bytes,
                   std::span<const std::byte> payload, VerifyPayload verify) {
  if (header_bytes.size() != sizeof(RecordHeader)) {
    return Mismatch(key, "header length", std::to_string(header_bytes.size()), std::to_string(sizeof(RecordHeader)));
  }
  RecordHeader header;
  std::memcpy(&header, header_bytes.data(), sizeof header);
  PREHOC_RETURN_IF_ERROR(CheckHeader(context, key, header, payload.size()));
  if (verify == VerifyPayload::kYes) {
    const std::array<uint64_t, 2> found = Checksum(header, payload);
    if (found != header.checksum) return Mismatch(key, "checksum", Hex(found[0]), Hex(header.checksum[0]));
  }
  return {};
}

Status CheckHeader(const RecordContext& context, const ChunkKey& key, const RecordHeader& header, uint64_t payload_bytes) {
  if (header.magic != kRecordMagic) return Mismatch(key, "magic", Hex(header.magic), Hex(kRecordMagic));
  if (header.version != kRecordFormatVersion) {
    return Mismatch(key, "format version", std::to_string(header.version), std::to_string(kRecordFormatVersion));
  }
  if (header.dtype != context.dtype) {
    return Mismatch(key, "dtype", std::to_string(header.dtype), std::to_string(context.dtype));
  }
  if (header.layout != context.layout) {
    return Mismatch(key, "layout", Hex(header.layout), Hex(context.layout) + " (" + context.layout_name + ")");
  }
  if (header.model != context.model) {
    return Mismatch(key, "model", HexPrefix(header.model), HexPrefix(context.model));
  }
  if (header.chain != key.chain || header.layer != key.layer) {
    return Mismatch(key, "key", ChunkKey{header.chain, header.layer}.ToString(), key.ToString());
  }
  if (header.payload_bytes != payload_bytes) {
    return Mismatch(key, "payload length", std::to_string(payload_bytes), std::to_string(header.payload_bytes));
  }
  if (header.branch > 1) return Mismatch(key, "branch", std::to_string(header.branch), "0 or 1");
  if (header.chunk < 0) return Mismatch(key, "chunk number", std::to_string(header.chunk), "0 or more");
  return {};
}

}  // namespace prehoc
