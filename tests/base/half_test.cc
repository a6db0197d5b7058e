#include "base/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

bool IsNan(Half h) { return (h & 0x7c00) == 0x7c00 && (h & 0x3ff) != 0; }

// From the definition: (-1)^s 2^(e-15) 1.m, subnormals 2^-14 0.m, in double, which holds each exactly.
double NaiveHalfValue(Half h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return h & 0x8000 ? -value : value;
}

// Nearest even by search: the two neighbours among all finite halves and, beyond them, 2^16 standing for infinity.
Half NaiveFloatToHalf(float f) {
  const Half sign = std::signbit(f) ? 0x8000 : 0;
  const double x = std::fabs(static_cast<double>(f));
  const auto value = [](int h) { return h == 0x7c00 ? 65536.0 : NaiveHalfValue(static_cast<Half>(h)); };
  int lo = 0, hi = 0x7c00;  // value(lo) <= x
  if (x >= 65536.0) return static_cast<Half>(sign | 0x7c00);
  while (hi - lo > 1) {
    const int mid = (lo + hi) / 2;
    (value(mid) <= x ? lo : hi) = mid;
  }
  const double below = x - value(lo), above = value(hi) - x;
  const int nearest = below < above || (below == above && lo % 2 == 0) ? lo : hi;
  return static_cast<Half>(sign | nearest);
}

TEST(HalfTest, EveryValueIsWhatTheDefinitionSays) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half h = static_cast<Half>(bits);
    const float f = HalfToFloat(h);
    if (IsNan(h)) {
      ASSERT_TRUE(std::isnan(f)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(f), NaiveHalfValue(h)) << bits;
      ASSERT_EQ(std::signbit(f), (h & 0x8000) != 0) << bits;
    }
  }
}

TEST(HalfTest, EveryValueComesBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half h = static_cast<Half>(bits);
    if (IsNan(h)) {
      ASSERT_TRUE(IsNan(FloatToHalf(HalfToFloat(h)))) << bits;
    } else {
      ASSERT_EQ(FloatToHalf(HalfToFloat(h)), h) << bits;
    }
  }
}

TEST(HalfTest, RoundsToNearestEvenAroundEveryValue) {
  for (int bits = 0; bits < 0x7c00; ++bits) {
    const float value = HalfToFloat(static_cast<Half>(bits));
    const double next = bits + 1 == 0x7c00 ? 65536.0 : HalfToFloat(static_cast<Half>(bits + 1));
    const float middle = static_cast<float>((static_cast<double>(value) + next) / 2);  // exact: one bit more
    for (const float f : {value, std::nextafter(value, INFINITY), std::nextafter(middle, 0.0f), middle,
                          std::nextafter(middle, INFINITY)}) {
      ASSERT_EQ(FloatToHalf(f), NaiveFloatToHalf(f)) << f;
      ASSERT_EQ(FloatToHalf(-f), NaiveFloatToHalf(-f)) << -f;
    }
  }
}

TEST(HalfTest, RoundsRandomFloatsLikeTheSearch) {
  SeededRng rng;
  for (int i = 0; i < 300'000; ++i) {
    const float f = std::bit_cast<float>(static_cast<uint32_t>(rng.Next()));
    if (std::isnan(f)) continue;
    ASSERT_EQ(FloatToHalf(f), NaiveFloatToHalf(f)) << f;
  }
  for (int i = 0; i < 300'000; ++i) {  // where halves are
    const float f = static_cast<float>(std::ldexp(rng.Uniform(-1, 1), static_cast<int>(rng.Int(-26, 17))));
    ASSERT_EQ(FloatToHalf(f), NaiveFloatToHalf(f)) << f;
  }
}

TEST(HalfTest, EdgesOfTheRange) {
  EXPECT_EQ(FloatToHalf(0.0f), 0x0000);
  EXPECT_EQ(FloatToHalf(-0.0f), 0x8000);
  EXPECT_EQ(FloatToHalf(65504.0f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65519.996f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xfc00);
  EXPECT_EQ(FloatToHalf(INFINITY), 0x7c00);
  EXPECT_EQ(FloatToHalf(0x1p-24f), 0x0001);
  EXPECT_EQ(FloatToHalf(0x1p-25f), 0x0000);  // half way to zero, which is even
  EXPECT_EQ(FloatToHalf(std::nextafter(0x1p-25f, 1.0f)), 0x0001);
  EXPECT_EQ(FloatToHalf(std::numeric_limits<float>::denorm_min()), 0x0000);
  EXPECT_TRUE(IsNan(FloatToHalf(NAN)));
  EXPECT_TRUE(IsNan(FloatToHalf(std::bit_cast<float>(0x7f800001u)))) << "a NaN whose high bits are zero";
}

TEST(HalfTest, UpIsTheSmallestHalfThatIsNotBelow) {
  SeededRng rng;
  for (int i = 0; i < 200'000; ++i) {
    const float f = static_cast<float>(std::ldexp(rng.Uniform(), static_cast<int>(rng.Int(-26, 16))));
    const Half up = FloatToHalfUp(f);
    ASSERT_GE(HalfToFloat(up), f);
    if (up > 0) {
      ASSERT_LT(HalfToFloat(static_cast<Half>(up - 1)), f) << f;
    }
  }
  EXPECT_EQ(FloatToHalfUp(65505.0f), 0x7c00);
  EXPECT_EQ(FloatToHalfUp(0.0f), 0x0000);
}

TEST(BFloat16Test, ConvertsAndRoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float f = BFloat16ToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(f)) {
      ASSERT_TRUE(std::isnan(BFloat16ToFloat(FloatToBFloat16(f))));
    } else {
      ASSERT_EQ(FloatToBFloat16(f), bits);
    }
  }
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // half way, even below
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x3f818000u)), 0x3f82);  // half way, even above
  EXPECT_EQ(FloatToBFloat16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(FloatToBFloat16(std::numeric_limits<float>::max()), 0x7f80);
}

}  // namespace
}  // namespace prehoc
