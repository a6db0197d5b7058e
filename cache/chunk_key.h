// Keys of persisted chunks: a chain of SHA-256 over everything that decides the bytes. See docs/formats.md.
//
//   root     = SHA-256(part("prehoc chunk key 1"), part(salt), part(model), part(dtype), part(layout), part(method))
//   chain[i] = SHA-256(chain[i - 1] or root, count, tokens of chunk i, part(branch))
//   tenant   = SHA-256(part("prehoc tenant 1"), part(salt)): only its first 8 bytes are used, to tell tenants apart in a listing
//
// part(x) is the length of x [bytes], then x; lengths and counts are 64-bit, tokens 32-bit, all little-endian. Every
// length is hashed before what it measures, so no two inputs run together into the same bytes.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/geometry.h"
#include "base/ids.h"
#include "transfer/chunk_store.h"

namespace prehoc {

using ChainHash = std::array<uint8_t, 32>;

struct ChunkKeyRoot {
  std::string_view tenant_salt;
  std::array<uint8_t, 32> model{};
  std::string_view dtype;
  std::string_view layout;
  std::string_view method;  // Selector::MethodTag(): how prefill changed K and V; empty when dense
};

// Grows chunk by chunk with a sequence. A value: copies continue apart. Costs one SHA-256 of 4 bytes a token.
class ChunkKeyChain {
 public:
  explicit ChunkKeyChain(const ChunkKeyRoot& root);

  // Adds one whole chunk. `branch` is for chunks whose bytes depend on more than the tokens (rows written under sparse
  // attention): it takes part in this hash and so in all that follow. Empty for others.
  void Append(std::span<const int32_t> tokens, std::string_view branch = {});
  int64_t size() const { return static_cast<int64_t>(chain_.size()); }
  ChunkKey Key(ChunkIndex chunk, LayerId layer) const;  // requires chunk < size()
  ChunkOrigin Origin(ChunkIndex chunk) const;           // likewise

 private:
  ChainHash root_;
  uint64_t tenant_ = 0;        // ChunkOrigin::tenant
  int64_t first_branch_ = -1;  // the first chunk that has one, and with it all that follow
  std::vector<ChainHash> chain_;
};

// The hashes of all whole chunks of `tokens`; a tail shorter than `chunk_tokens` (> 0) has no key.
ChunkKeyChain ChainOf(const ChunkKeyRoot& root, std::span<const int32_t> tokens, int32_t chunk_tokens);

}  // namespace prehoc
