// The shape of a model's KV cache, shared by every module.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/row_format.h"
#include "base/status.h"

namespace prehoc {

struct KvGeometry {
  int32_t layers = 0;
  int32_t heads = 0;     // query heads
  int32_t kv_heads = 0;  // divides heads; KV head j serves query heads j*group() ..
  int32_t head_dim = 0;  // multiple of 16, at most 256
  RowFormat rows = RowFormat::kF16;  // in host memory and in the store; on the device they are fp16
  int32_t page_tokens = 16;    // rows of one (layer, KV head) that lie together
  int32_t chunk_tokens = 256;  // tokens of one layer that are persisted together; multiple of page_tokens

  int32_t group() const { return heads / kv_heads; }
  // A row: K then V of one token of one (layer, KV head), on the device; and in host memory and in the store.
  size_t row_bytes() const { return RowBytes(RowFormat::kF16, head_dim); }
  size_t stored_row_bytes() const { return RowBytes(rows, head_dim); }
  size_t page_bytes() const { return stored_row_bytes() * static_cast<size_t>(page_tokens); }
  // A block: one chunk of one layer, head after head; within a head row after row.
  size_t head_block_bytes() const { return stored_row_bytes() * static_cast<size_t>(chunk_tokens); }
  size_t block_bytes() const { return head_block_bytes() * static_cast<size_t>(kv_heads); }
  size_t token_bytes() const { return stored_row_bytes() * static_cast<size_t>(kv_heads) * static_cast<size_t>(layers); }
  // kInvalid, naming the field and its value.
  Status Validate() const;
  // "rows-kv/l30/h3/d64/p16/c256": part of every persisted key.
  std::string LayoutName() const;
};

}  // namespace prehoc
