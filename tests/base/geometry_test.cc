#include "base/geometry.h"

#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

KvGeometry Default() { return {.layers = 30, .heads = 9, .kv_heads = 3, .head_dim = 64}; }

TEST(GeometryTest, CountsBytes) {
  const KvGeometry g = Default();
  EXPECT_OK(g.Validate());
  EXPECT_EQ(g.group(), 3);
  EXPECT_EQ(g.row_bytes(), 256u);
  EXPECT_EQ(g.page_bytes(), 4096u);
  EXPECT_EQ(g.head_block_bytes(), 65536u);
  EXPECT_EQ(g.block_bytes(), 196608u);
  EXPECT_EQ(g.token_bytes(), 23040u);
  EXPECT_EQ(g.LayoutName(), "rows-kv/l30/h3/d64/p16/c256");
}

TEST(GeometryTest, RefusesWhatMakesNoSenseNamingTheField) {
  const auto expect_bad = [](KvGeometry g, const char* text) {
    EXPECT_STATUS(StatusCode::kInvalid, text, g.Validate());
  };
  KvGeometry g = Default();
  g.layers = 0, expect_bad(g, "layers=0");
  g.layers = 5000, expect_bad(g, "layers=5000");
  g = Default(), g.kv_heads = 0, expect_bad(g, "kv_heads=0");
  g = Default(), g.heads = 10, expect_bad(g, "heads=10 is not a multiple");
  g = Default(), g.heads = 0, expect_bad(g, "heads=0");
  g = Default(), g.heads = 65 * 3, expect_bad(g, "more than 64");
  for (const int32_t dim : {0, 8, 65, 272, -64}) g = Default(), g.head_dim = dim, expect_bad(g, "head_dim=");
  g = Default(), g.page_tokens = 0, expect_bad(g, "page_tokens=0");
  g = Default(), g.chunk_tokens = 250, expect_bad(g, "chunk_tokens=250");
  g = Default(), g.chunk_tokens = 8, expect_bad(g, "chunk_tokens=8");
}

}  // namespace
}  // namespace prehoc
