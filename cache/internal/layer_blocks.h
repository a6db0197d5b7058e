// The host blocks of one layer that a step looks into.
#pragma once
#include <span>
#include <utility>
#include <vector>

#include "base/geometry.h"
#include "base/half.h"
#include "cache/host_tier.h"
#include "kernels/row_codec.h"

namespace prehoc {

// Pins a block when its rows are first asked for, and keeps it until this dies. For one thread.
class LayerBlocks {
 public:
  LayerBlocks(HostTier* tier, const KvGeometry& geometry, std::span<const BlockRef> blocks, BlockUse use)
      : tier_(tier), geometry_(geometry), blocks_(blocks), use_(use), pins_(blocks.size()) {}

  // The rows of one head in `chunk` [chunk_tokens], of the geometry's format. Codes of HostTier::Pin(), naming the chunk.
  Result<const std::byte*> Rows(size_t chunk, int32_t kv_head) {
    if (!pins_[chunk]) {
      auto pin = tier_->Pin(blocks_[chunk], use_);
      if (!pin.ok()) return pin.status().WithContext("chunk " + std::to_string(chunk));
      pins_[chunk] = std::move(pin).value();
      loaded_ += pins_[chunk].loaded();
    }
    return pins_[chunk].bytes().data() + static_cast<size_t>(kv_head) * geometry_.head_block_bytes();
  }
  Result<const std::byte*> Row(int64_t position, int32_t kv_head) {
    const auto tokens = static_cast<int64_t>(geometry_.chunk_tokens);
    PREHOC_ASSIGN_OR_RETURN(const std::byte* rows, Rows(static_cast<size_t>(position / tokens), kv_head));
    return rows + static_cast<size_t>(position % tokens) * geometry_.stored_row_bytes();
  }
  // The fp16 row of a position [2, head_dim], for host code; until the next call.
  Result<const Half*> WideRow(int64_t position, int32_t kv_head) {
    PREHOC_ASSIGN_OR_RETURN(const std::byte* row, Row(position, kv_head));
    if (geometry_.rows == RowFormat::kF16) return reinterpret_cast<const Half*>(row);
    wide_.resize(static_cast<size_t>(geometry_.head_dim) * 2);
    WidenRow(row, geometry_.rows, geometry_.head_dim, wide_.data());
    return wide_.data();
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
  std::vector<Half> wide_;
};

}  // namespace prehoc
