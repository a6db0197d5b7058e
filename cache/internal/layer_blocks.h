// The host blocks of one layer that a step looks into.
#pragma once
#include <span>
#include <utility>
#include <vector>

#include "base/geometry.h"
#include "base/half.h"
#include "cache/host_tier.h"

namespace prehoc {

// Pins a block when its rows are first asked for, and keeps it until this dies. For one thread.
class LayerBlocks {
 public:
  LayerBlocks(HostTier* tier, const KvGeometry& geometry, std::span<const BlockRef> blocks, BlockUse use)
      : tier_(tier), geometry_(geometry), blocks_(blocks), use_(use), pins_(blocks.size()) {}

  // The rows of one head in `chunk` [chunk_tokens, 2, head_dim]. Codes of HostTier::Pin(), naming the chunk.
  Result<const Half*> Rows(size_t chunk, int32_t kv_head) {
    if (!pins_[chunk]) {
      auto pin = tier_->Pin(blocks_[chunk], use_);
      if (!pin.ok()) return pin.status().WithContext("chunk " + std::to_string(chunk));
      pins_[chunk] = std::move(pin).value();
      loaded_ += pins_[chunk].loaded();
    }
    return reinterpret_cast<const Half*>(pins_[chunk].bytes().data() +
                                         static_cast<size_t>(kv_head) * geometry_.head_block_bytes());
  }
  Result<const Half*> Row(int64_t position, int32_t kv_head) {
    const auto tokens = static_cast<int64_t>(geometry_.chunk_tokens);
    PREHOC_ASSIGN_OR_RETURN(const Half* rows, Rows(static_cast<size_t>(position / tokens), kv_head));
    return rows + position % tokens * geometry_.head_dim * 2;
  }
  bool FromStore(int64_t position) const {
    return pins_[static_cast<size_t>(position / geometry_.chunk_tokens)].loaded();
  }
  int64_t loaded() const { return loaded_; }  // blocks that came from the store

 private:
  HostTier* tier_;
  const KvGeometry& geometry_;
  std::span<const BlockRef> blocks_;
  BlockUse use_;
  std::vector<BlockPin> pins_;
  int64_t loaded_ = 0;
};

}  // namespace prehoc
