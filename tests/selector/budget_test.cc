// Budgets: parsing, printing, and what is left for the middle.
#include "tests/selector/selector_test_util.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

Budget Parsed(std::string_view text) {
  auto budget = Budget::Parse(text);
  EXPECT_OK(budget) << text;
  return budget.ok() ? *budget : Budget{};
}

TEST(Budget, DefaultIsASixteenthWithTheSplitOfHShare) {
  const Budget budget;
  EXPECT_EQ(budget.sinks, 8);
  EXPECT_EQ(budget.local, 32);
  EXPECT_EQ(budget.ToString(), "1/16");
}

TEST(Budget, PublishedSplits) {
  EXPECT_EQ(Parsed("128").MiddleK(1 << 20), 88);
  EXPECT_EQ(Parsed("512").MiddleK(1 << 20), 472);
}

TEST(Budget, ParsesAndPrints) {
  for (const char* text : {"1/16", "1/3", "0.15", "512", "1", "mass(0.95,cap=1/8)", "mass(0.5,cap=1024)", "mass(1,cap=1/2)"}) {
    EXPECT_EQ(Parsed(text).ToString(), text);
  }
  EXPECT_EQ(Parsed("0.1").ToString(), "1/10");
  EXPECT_EQ(Parsed("mass(0.95)").ToString(), "mass(0.95,cap=1/8)");
  EXPECT_EQ(Parsed("3/4").fraction, 0.75);
  EXPECT_EQ(Parsed("512").tokens, 512);
  EXPECT_EQ(Parsed("2e-1").fraction, 0.2);
}

TEST(Budget, RefusesAndSaysWhatIsAccepted) {
  for (const char* text : {"", "0", "-3", "1.5", "1/0", "0/4", "5/4", "1/1", "x", "1/x", "12 ", " 12", "+12", "0x10", "nan", "inf",
                           "1/inf", "99999999999", "mass", "mass()", "mass(0)", "mass(1.1)", "mass(-1)", "mass(0.9", "mass(0.9)x",
                           "mass(0.9,)", "mass(0.9,1/8)", "mass(0.9,cap=)", "mass(0.9,cap=0)", "mass(0.9,cap=2.5)",
                           "mass(0.9,cap=1/8,cap=1/4)", "mass(nan)"}) {
    EXPECT_STATUS(StatusCode::kInvalid, "such as 1/16", Budget::Parse(text)) << text;
  }
  EXPECT_LT(Budget::Parse(std::string(100'000, '9')).status().message().size(), 400u);
}

TEST(Budget, MiddleIsWhatSinksAndLocalLeave) {
  Budget budget = Parsed("1/16");
  EXPECT_EQ(budget.MiddleK(1600), 100 - 40);
  EXPECT_EQ(budget.MiddleK(1615), 100 - 40);  // floor
  EXPECT_EQ(budget.MiddleK(640), 0);
  EXPECT_EQ(budget.MiddleK(10), 0);
  EXPECT_EQ(budget.MiddleCap(1600), budget.MiddleK(1600));
  budget = Parsed("40");
  EXPECT_EQ(budget.MiddleK(5000), 0);
  EXPECT_EQ(Parsed("2147483647").MiddleK(1), 2147483647 - 40);
}

// 0.29 * 100 is 28.999999999999996 in doubles; it must come out as 29 all the same.
TEST(Budget, DecimalSharesOfRoundNumbers) {
  for (int32_t hundredths = 1; hundredths < 100; ++hundredths) {
    Budget budget = Parsed((hundredths < 10 ? "0.0" : "0.") + std::to_string(hundredths));
    budget.sinks = budget.local = 0;
    for (int64_t n = 100; n < 3'000'000; n += 100 * 997) ASSERT_EQ(budget.MiddleK(n), n / 100 * hundredths) << n;
  }
}

TEST(Budget, MassHasNoLeastAndACap) {
  const Budget budget = Parsed("mass(0.9,cap=1/8)");
  EXPECT_EQ(budget.MiddleK(1600), 0);
  EXPECT_EQ(budget.MiddleCap(1600), 200 - 40);
  EXPECT_EQ(Parsed("mass(0.9,cap=100)").MiddleCap(1 << 20), 60);
  EXPECT_EQ(Parsed("mass(0.9)").MiddleCap(100), 0);
}

TEST(Budget, WhatIsPrintedReadsBackTheSame) {
  SeededRng rng;
  for (int i = 0; i < 2000; ++i) {
    Budget budget;
    if (rng.Chance(0.5)) budget.tokens = static_cast<int32_t>(rng.Int(1, 1 << 30));
    if (budget.tokens == 0) budget.fraction = rng.Chance(0.5) ? 1.0 / static_cast<double>(rng.Int(2, 5000)) : rng.Uniform(1e-9, 1);
    if (rng.Chance(0.5)) {
      budget = {};
      budget.mass = rng.Uniform(1e-6, 1);
      budget.cap_fraction = rng.Uniform(1e-6, 1);
      if (rng.Chance(0.5)) budget.cap_tokens = static_cast<int32_t>(rng.Int(1, 1 << 30));
    }
    const Budget read = Parsed(budget.ToString());
    EXPECT_EQ(read.ToString(), budget.ToString());
    for (const int64_t n : {1, 100, 4096, 1'000'003}) {
      ASSERT_EQ(read.MiddleK(n), budget.MiddleK(n)) << budget.ToString();
      ASSERT_EQ(read.MiddleCap(n), budget.MiddleCap(n)) << budget.ToString();
    }
  }
}

}  // namespace
}  // namespace prehoc
