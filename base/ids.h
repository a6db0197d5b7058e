// Ids are types: a layer where a head was meant does not compile. Explicit to build, invalid by default.
#pragma once
#include <compare>
#include <cstdint>
#include <functional>

namespace prehoc {

template <class Tag, class Int = int32_t>
class Id {
 public:
  using Value = Int;
  constexpr Id() = default;
  constexpr explicit Id(Int value) : value_(value) {}
  constexpr Int value() const { return value_; }
  constexpr bool valid() const { return value_ >= 0; }
  friend constexpr auto operator<=>(Id, Id) = default;

 private:
  Int value_ = -1;
};

using LayerId = Id<struct LayerTag>;      // 0-based
using KvHeadId = Id<struct KvHeadTag>;    // 0-based
using SlotId = Id<struct SlotTag>;        // row slot of one (layer, KV head) in the device arena
using BlockId = Id<struct BlockTag>;      // block of the host arena
using ChunkIndex = Id<struct ChunkTag>;   // position / chunk_tokens within a sequence
using Position = int64_t;                 // token position, 0-based; arithmetic is its purpose

}  // namespace prehoc

template <class Tag, class Int>
struct std::hash<prehoc::Id<Tag, Int>> {
  size_t operator()(prehoc::Id<Tag, Int> id) const { return std::hash<Int>{}(id.value()); }
};
