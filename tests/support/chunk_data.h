// Keys and bytes for tests of chunk stores: the n-th key, and bytes that belong to it alone.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/rng.h"
#include "transfer/chunk_store.h"

namespace prehoc {

inline ChunkKey TestKey(int n, int32_t layer = 0) {
  Rng rng(static_cast<uint64_t>(n) + 1);
  ChunkKey key;
  key.layer = layer;
  for (uint8_t& byte : key.chain) byte = static_cast<uint8_t>(rng.Next());
  return key;
}

// Never zero, so that memory that was not filled shows.
inline std::vector<std::byte> TestChunk(int n, size_t bytes) {
  Rng rng(static_cast<uint64_t>(n) * 2 + 1);
  std::vector<std::byte> chunk(bytes);
  for (std::byte& byte : chunk) byte = static_cast<std::byte>(rng.Next() | 1);
  return chunk;
}

// -1 if it is not shown.
inline double CounterOf(const ChunkStore& store, std::string_view name) {
  double found = -1;
  store.VisitCounters([&](std::string_view shown, double value) {
    if (shown == name) found = value;
  });
  return found;
}

inline StoreIdentity TestIdentity() {
  StoreIdentity identity;
  for (size_t i = 0; i < identity.model.size(); ++i) identity.model[i] = static_cast<uint8_t>(i * 7 + 1);
  identity.model_name = "test-model";
  identity.layout = "rows-kv/l2/h2/d16/p16/c64";
  return identity;
}

}  // namespace prehoc
