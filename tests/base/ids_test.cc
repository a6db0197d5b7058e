#include "base/ids.h"

#include <gtest/gtest.h>

#include <map>
#include <type_traits>
#include <unordered_set>

namespace prehoc {
namespace {

// What must not compile is in tests/compile_fail/; what can be said as a trait is said here.
static_assert(!std::is_convertible_v<int, LayerId>, "an id is built explicitly");
static_assert(!std::is_convertible_v<LayerId, int>, "an id is not a number");
static_assert(!std::is_constructible_v<KvHeadId, LayerId>, "ids do not mix");
static_assert(!std::is_assignable_v<KvHeadId&, LayerId>, "ids do not mix");
static_assert(std::is_trivially_copyable_v<SlotId> && sizeof(SlotId) == sizeof(int32_t));

TEST(IdsTest, AreInvalidUntilGivenAValue) {
  EXPECT_FALSE(LayerId().valid());
  EXPECT_TRUE(LayerId(0).valid());
  EXPECT_EQ(LayerId(12).value(), 12);
  EXPECT_FALSE(LayerId(-1).valid());
}

TEST(IdsTest, CompareAndHashLikeTheirValues) {
  EXPECT_EQ(SlotId(3), SlotId(3));
  EXPECT_NE(SlotId(3), SlotId(4));
  EXPECT_LT(SlotId(3), SlotId(4));
  const std::map<BlockId, int> ordered = {{BlockId(2), 20}, {BlockId(1), 10}};
  EXPECT_EQ(ordered.begin()->second, 10);
  std::unordered_set<BlockId> set = {BlockId(1), BlockId(2), BlockId(1)};
  EXPECT_EQ(set.size(), 2u);
  EXPECT_TRUE(set.contains(BlockId(2)));
}

}  // namespace
}  // namespace prehoc
