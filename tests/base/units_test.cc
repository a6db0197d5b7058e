#include "base/units.h"

#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

TEST(UnitsTest, ParsesWhatPeopleWrite) {
  const struct {
    const char* text;
    uint64_t bytes;
  } cases[] = {{"0", 0},
               {"4096", 4096},
               {"4096B", 4096},
               {"1KB", 1000},
               {"1KiB", 1024},
               {"1K", 1024},
               {"64MiB", 64 * kMiB},
               {"64 MiB", 64 * kMiB},
               {"64mib", 64 * kMiB},
               {"1.5GB", 1'500'000'000},
               {"1.5GiB", kGiB + kGiB / 2},
               {"2T", 2048 * kGiB},
               {"2TB", 2'000'000'000'000},
               {"0.5k", 512},
               {"1e3", 1000}};
  for (const auto& c : cases) {
    auto parsed = ParseBytes(c.text);
    ASSERT_OK(parsed) << c.text;
    EXPECT_EQ(*parsed, c.bytes) << c.text;
  }
}

TEST(UnitsTest, RefusesEverythingElseAndSaysHowToWriteIt) {
  for (const char* text : {"", "MiB", "abc", "1XB", "1KiBs", "1 2", "--1", "0x10", "1PB", "1.5.2GB", "nan", "inf"}) {
    EXPECT_STATUS(StatusCode::kInvalid, "such as 64MiB", ParseBytes(text)) << text;
    EXPECT_STATUS(StatusCode::kInvalid, "'" + std::string(text) + "'", ParseBytes(text));
  }
  EXPECT_STATUS(StatusCode::kInvalid, "negative", ParseBytes("-1"));
  EXPECT_STATUS(StatusCode::kInvalid, "negative", ParseBytes("-5GiB"));
  EXPECT_STATUS(StatusCode::kInvalid, "too large", ParseBytes("1e30"));
  EXPECT_STATUS(StatusCode::kInvalid, "too large", ParseBytes("99999999TiB"));
}

TEST(UnitsTest, FormatsForTables) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.0 KiB");
  EXPECT_EQ(FormatBytes(138.2 * static_cast<double>(kMiB)), "138.2 MiB");
  EXPECT_EQ(FormatBytes(3.0 * static_cast<double>(kGiB)), "3.0 GiB");
  EXPECT_EQ(FormatBytes(5000.0 * 1024 * static_cast<double>(kGiB)), "5000.0 TiB");
  EXPECT_EQ(FormatBytes(-2048), "-2.0 KiB");
}

TEST(UnitsTest, FormattedSizesParseBackToWhatTheySay) {
  SeededRng rng;
  for (int i = 0; i < 1000; ++i) {
    const double bytes = std::exp(rng.Uniform(0, 30));
    auto parsed = ParseBytes(FormatBytes(bytes));
    ASSERT_OK(parsed);
    ASSERT_NEAR(static_cast<double>(*parsed), bytes, 1 + 0.06 * bytes);  // one digit behind the point
  }
}

TEST(UnitsTest, Rounds) {
  EXPECT_EQ(RoundUp(0, 8), 0u);
  EXPECT_EQ(RoundUp(1, 8), 8u);
  EXPECT_EQ(RoundUp(8, 8), 8u);
  EXPECT_EQ(RoundUp(9, 8), 16u);
  EXPECT_EQ(CeilDiv(0, 3), 0);
  EXPECT_EQ(CeilDiv(7, 3), 3);
  EXPECT_EQ(CeilDiv(6, 3), 2);
}

}  // namespace
}  // namespace prehoc
