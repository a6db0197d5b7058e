#include "integrations/cli/progress.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <sstream>

namespace prehoc::cli {
namespace {

TEST(ProgressBarTest, SaysNothingWhereThereIsNoTerminal) {
  ManualClock clock;
  std::ostringstream out;
  {
    ProgressBar bar(out, false, "prefill", clock);
    bar.Update(1, 10, "tokens");
    bar.Update(10, 10, "tokens");
  }
  EXPECT_EQ(out.str(), "");
}

TEST(ProgressBarTest, ShowsShareSpeedAndTimeLeftAndGoesAway) {
  ManualClock clock;
  std::ostringstream out;
  ProgressBar bar(out, true, "prefill", clock);
  bar.Update(1000, 6000, "tokens");  // restored before: no speed of ours
  clock.Advance(10'000'000'000);
  bar.Update(3000, 6000, "tokens");
  EXPECT_NE(out.str().find("prefill [###############...............] 3,000 of 6,000 tokens, 200/s, 15.0 s left"),
            std::string::npos) << out.str();
  bar.Clear();
  EXPECT_TRUE(out.str().ends_with("\r\x1b[K"));
}

TEST(ProgressBarTest, DrawsAtMostTenTimesASecond) {
  ManualClock clock;
  std::ostringstream out;
  ProgressBar bar(out, true, "prefill", clock);
  for (int i = 0; i < 1000; ++i) {
    bar.Update(i, 1000, "tokens");
    clock.Advance(1'000'000);
  }
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '['), 2 * 10);  // one of the bar, one of the escape sequence
}

}  // namespace
}  // namespace prehoc::cli
