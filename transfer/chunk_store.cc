#include "transfer/chunk_store.h"

#include <cstdio>

namespace prehoc {
namespace {
Status WrongSize(const char* what, const ChunkKey& key, size_t size, size_t expected) {
  return {StatusCode::kInvalid, "chunk " + key.ToString() + ": " + what + " has " + std::to_string(size) +
                                    " bytes, chunk_bytes is " + std::to_string(expected)};
}
}  // namespace

std::string ChunkKey::ToString() const {
  std::string text;
  char pair[4];
  for (size_t i = 0; i < 8; ++i) {
    std::snprintf(pair, sizeof pair, "%02x", chain[i]);
    text += pair;
  }
  return text + "/" + std::to_string(layer);
}

Status ChunkStore::Get(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) {
  if (out.size() != chunk_bytes_) return WrongSize("out", key, out.size(), chunk_bytes_);
  ChunkSeal unwanted;
  return DoGet(key, out, seal != nullptr ? seal : &unwanted);
}

Status ChunkStore::Put(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  if (data.size() != chunk_bytes_) return WrongSize("data", key, data.size(), chunk_bytes_);
  return DoPut(key, data, origin);
}

Status ChunkStore::Replace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  if (data.size() != chunk_bytes_) return WrongSize("data", key, data.size(), chunk_bytes_);
  return DoReplace(key, data, origin);
}

}  // namespace prehoc
