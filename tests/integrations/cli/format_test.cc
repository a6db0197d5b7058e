#include "integrations/cli/format.h"

#include <gtest/gtest.h>

namespace prehoc::cli {
namespace {

TEST(FormatTest, CountsInThrees) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1000), "1,000");
  EXPECT_EQ(FormatCount(1207908), "1,207,908");
  EXPECT_EQ(FormatCount(-999), "-999");
  EXPECT_EQ(FormatCount(-123456), "-123,456");
}

TEST(FormatTest, NumbersKeepThreeDigits) {
  EXPECT_EQ(FormatNumber(0), "0");
  EXPECT_EQ(FormatNumber(13.34), "13.3");
  EXPECT_EQ(FormatNumber(9.996), "10.0");
  EXPECT_EQ(FormatNumber(99.96), "100");
  EXPECT_EQ(FormatNumber(194.4), "194");
  EXPECT_EQ(FormatNumber(999.6), "1,000");
  EXPECT_EQ(FormatNumber(0.05184), "0.0518");
  EXPECT_EQ(FormatNumber(-2.5), "-2.50");
}

TEST(FormatTest, SharesAndSeconds) {
  EXPECT_EQ(FormatShare(0.0518), "5.18 %");
  EXPECT_EQ(FormatShare(1), "100 %");
  EXPECT_EQ(FormatSeconds(0.85), "850 ms");
  EXPECT_EQ(FormatSeconds(0.9999), "1.00 s");
  EXPECT_EQ(FormatSeconds(12.44), "12.4 s");
  EXPECT_EQ(FormatSeconds(200), "3 min 20 s");
}

}  // namespace
}  // namespace prehoc::cli
