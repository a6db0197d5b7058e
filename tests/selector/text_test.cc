// Numbers and names in knobs.
#include "selector/text.h"

#include <gtest/gtest.h>

namespace prehoc::selector_internal {
namespace {

TEST(Text, NumbersAreWhole) {
  EXPECT_EQ(ParseNumber<int32_t>("12"), 12);
  EXPECT_EQ(ParseNumber<double>("1e-3"), 1e-3);
  for (const char* text : {"", " 1", "1 ", "+1", "1x", "nan", "inf", "-inf", "1e999"}) {
    EXPECT_FALSE(ParseNumber<double>(text)) << text;
  }
  EXPECT_FALSE(ParseNumber<int32_t>("2147483648"));
  EXPECT_FALSE(ParseNumber<int32_t>("1.0"));
}

TEST(Text, Fractions) {
  EXPECT_EQ(ParseFraction("1/4"), 0.25);
  EXPECT_EQ(ParseFraction("0.25"), 0.25);
  for (const char* text : {"1/0", "/4", "1/", "1/4/2", "1//4", "1e300/1e-300"}) EXPECT_FALSE(ParseFraction(text)) << text;
  EXPECT_EQ(PrintFraction(1.0 / 3), "1/3");
  EXPECT_EQ(PrintFraction(0.3), "0.3");
  EXPECT_EQ(PrintFraction(0), "0");
  EXPECT_EQ(PrintFraction(-1), "-1");
  EXPECT_EQ(PrintNumber(0.1), "0.1");
}

TEST(Text, EditDistance) {
  EXPECT_EQ(EditDistance("", ""), 0u);
  EXPECT_EQ(EditDistance("abc", ""), 3u);
  EXPECT_EQ(EditDistance("", "abc"), 3u);
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3u);
  EXPECT_EQ(EditDistance("oracle", "orcale"), 2u);
}

TEST(Text, NearestGivesThree) {
  const std::vector<std::string> names = {"cis.tau", "tc.tau", "cis.r", "budget"};
  EXPECT_EQ(Nearest("cis.tao", names), "cis.tau, cis.r, tc.tau");  // 1, 3 and 4 edits
  EXPECT_EQ(Nearest("tau", names), "cis.tau, tc.tau, cis.r");
  EXPECT_EQ(Nearest("x", std::vector<std::string>{"one"}), "one");
  EXPECT_EQ(Nearest("x", std::vector<std::string>{}), "");
}

TEST(Text, QuotesAreShort) {
  EXPECT_EQ(Quote("abc"), "\"abc\"");
  EXPECT_EQ(Quote(std::string(100, 'x')).size(), 65u);
}

}  // namespace
}  // namespace prehoc::selector_internal
