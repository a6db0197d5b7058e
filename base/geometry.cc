#include "base/geometry.h"

namespace prehoc {
namespace {
Status Bad(const char* field, int64_t value, const char* rule) {
  return {StatusCode::kInvalid, std::string("geometry: ") + field + "=" + std::to_string(value) + " " + rule};
}
}  // namespace

Status KvGeometry::Validate() const {
  if (layers < 1 || layers > 4096) return Bad("layers", layers, "is not in 1..4096");
  if (kv_heads < 1 || kv_heads > 1024) return Bad("kv_heads", kv_heads, "is not in 1..1024");
  if (heads < 1 || heads % kv_heads != 0) return Bad("heads", heads, "is not a multiple of kv_heads");
  if (group() > 64) return Bad("heads", heads, "gives groups of more than 64 query heads");
  if (head_dim < 16 || head_dim > 256 || head_dim % 16 != 0) {
    return Bad("head_dim", head_dim, "is not a multiple of 16 in 16..256");
  }
  if (!IsRowFormat(rows)) return Bad("rows", static_cast<int64_t>(rows), "is no format of rows; use 1 (f16), 2 (int8) or 3 (e4m3)");
  if (page_tokens < 1 || page_tokens > 1024) return Bad("page_tokens", page_tokens, "is not in 1..1024");
  if (chunk_tokens < page_tokens || chunk_tokens % page_tokens != 0 || chunk_tokens > 65536) {
    return Bad("chunk_tokens", chunk_tokens, "is not a multiple of page_tokens up to 65536");
  }
  return {};
}

std::string KvGeometry::LayoutName() const {
  return "rows-kv/l" + std::to_string(layers) + "/h" + std::to_string(kv_heads) + "/d" + std::to_string(head_dim) +
         "/p" + std::to_string(page_tokens) + "/c" + std::to_string(chunk_tokens);
}

}  // namespace prehoc
