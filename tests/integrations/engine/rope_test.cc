// RoPE where the golden models do not reach: what depends on length, GGUF's factors, far positions.
#include "integrations/reference/engine/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "integrations/reference/model.h"

namespace prehoc::reference {
namespace {

ModelConfig Config(RopeScaling::Type type) {
  ModelConfig c;
  c.head_dim = 8;
  c.max_positions = 4096;
  c.rope_scaling.type = type;
  c.rope_scaling.factor = 4;
  c.rope_scaling.original_max_positions = 1024;
  c.rope_scaling.short_factor = {1, 1, 1, 1};
  c.rope_scaling.long_factor = {1, 2, 3, 4};
  return c;
}

TEST(RopeTest, OnlyDynamicAndLongRopeDependOnLength) {
  using Type = RopeScaling::Type;
  for (const Type type : {Type::kNone, Type::kLinear, Type::kYarn, Type::kLlama3}) {
    const ModelConfig c = Config(type);
    EXPECT_EQ(RopeVariantOf(c, 5000), 0);
    EXPECT_EQ(MakeRopeFrequencies(c, 10).inverse, MakeRopeFrequencies(c, 5000).inverse);
  }
  for (const Type type : {Type::kDynamic, Type::kLongRope}) {
    const ModelConfig c = Config(type);
    EXPECT_EQ(RopeVariantOf(c, 1024), 0);
    EXPECT_NE(RopeVariantOf(c, 1025), 0);
    EXPECT_EQ(MakeRopeFrequencies(c, 10).inverse, MakeRopeFrequencies(c, 1024).inverse);
    EXPECT_NE(MakeRopeFrequencies(c, 10).inverse, MakeRopeFrequencies(c, 1025).inverse);
  }
  EXPECT_EQ(RopeVariantOf(Config(Type::kLongRope), 2000), RopeVariantOf(Config(Type::kLongRope), 3000));
  EXPECT_NE(RopeVariantOf(Config(Type::kDynamic), 2000), RopeVariantOf(Config(Type::kDynamic), 3000));
}

TEST(RopeTest, DynamicStretchesTheSlowestPairByTheFactorAtTwiceTheLength) {
  // Base grows by (f * 2 - (f - 1))^(d / (d - 2)): the slowest of d / 2 pairs, base^((d - 2) / d), by f + 1 = 5.
  const ModelConfig c = Config(RopeScaling::Type::kDynamic);
  const auto at = MakeRopeFrequencies(c, 2048).inverse, plain = MakeRopeFrequencies(c, 0).inverse;
  EXPECT_NEAR(plain.back() / at.back(), 5, 1e-5);
  EXPECT_EQ(plain.front(), at.front());
}

TEST(RopeTest, FrequencyFactorsDivide) {
  ModelConfig c = Config(RopeScaling::Type::kNone);
  const auto plain = MakeRopeFrequencies(c, 0).inverse;
  c.rope_freq_factors = {1, 2, 4, 8};
  const auto divided = MakeRopeFrequencies(c, 0).inverse;
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(divided[i], plain[i] / c.rope_freq_factors[i]);
}

TEST(RopeTest, TablesFollowTheLength) {
  const ModelConfig c = Config(RopeScaling::Type::kDynamic);
  RopeTables tables(c, 4);
  const auto rotated = [&](int64_t length) {
    std::vector<float> head = {1, 0, 0, 0, 0, 0, 0, 1};
    tables.Prepare(1000, 4, length);
    tables.Rotate(3, head.data());
    return head;
  };
  const auto before = rotated(1024);
  EXPECT_NE(rotated(3000), before);
  EXPECT_EQ(rotated(1024), before) << "back within the original length";
}

// Rotation keeps lengths and depends on distance alone, in both layouts and far out.
TEST(RopeTest, ProductsDependOnDistanceOnly) {
  for (const RopeLayout layout : {RopeLayout::kHalf, RopeLayout::kInterleaved}) {
    ModelConfig c = Config(RopeScaling::Type::kNone);
    c.rope_layout = layout;
    RopeTables tables(c, 32);
    const auto product = [&](int64_t first) {
      std::vector<float> q = {1, 2, 3, 4, 5, 6, 7, 8}, k = {8, -7, 6, -5, 4, -3, 2, -1};
      tables.Prepare(first, 32, first + 32);
      tables.Rotate(31, q.data());
      tables.Rotate(0, k.data());
      double dot = 0, norm = 0;
      for (size_t i = 0; i < 8; ++i) dot += static_cast<double>(q[i] * k[i]), norm += static_cast<double>(q[i] * q[i]);
      EXPECT_NEAR(norm, 204, 1e-3);
      return dot;
    };
    EXPECT_NEAR(product(0), product(2000), 5e-2);
    EXPECT_GT(std::abs(product(0) - (8 - 14 + 18 - 20 + 20 - 18 + 14 - 8)), 0.2) << "the rotation does something";
  }
}

}  // namespace
}  // namespace prehoc::reference
