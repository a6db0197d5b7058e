#include "integrations/cli/log.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

namespace prehoc::cli {
namespace {

TEST(LogTest, ALineIsAnObjectWithItsFields) {
  ManualClock clock(1'000'000'000);
  std::ostringstream out;
  Log log(out, LogLevel::kInfo, clock);
  clock.Advance(500'000'000);
  log.Info("prompt done", {{"tokens", int64_t{6036}}, {"share", 0.25}, {"path", std::string_view("a \"b\"\n\xff")}});
  const auto line = nlohmann::json::parse(out.str());
  EXPECT_EQ(line["seconds"], 0.5);
  EXPECT_EQ(line["level"], "info");
  EXPECT_EQ(line["event"], "prompt done");
  EXPECT_EQ(line["tokens"], 6036);
  EXPECT_EQ(line["share"], 0.25);
  EXPECT_EQ(line["path"], "a \"b\"\n\xef\xbf\xbd");  // what is no UTF-8 is replaced
  EXPECT_EQ(out.str().find('\n'), out.str().size() - 1);
}

TEST(LogTest, ALevelHidesWhatIsLessUrgent) {
  ManualClock clock;
  for (const auto& [level, lines] : {std::pair{LogLevel::kOff, 0}, {LogLevel::kError, 1}, {LogLevel::kWarning, 2}, {LogLevel::kInfo, 3}, {LogLevel::kDebug, 4}}) {
    std::ostringstream out;
    Log log(out, level, clock);
    log.Debug("d", {});
    log.Info("i", {});
    log.Warning("w", {});
    log.Error("e", {});
    const std::string text = out.str();
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), lines);
  }
}

TEST(LogTest, LevelsHaveNames) {
  EXPECT_EQ(ParseLogLevel("warning").value(), LogLevel::kWarning);
  EXPECT_EQ(ParseLogLevel("verbose").status().message(), "--log \"verbose\": give off, error, warning, info or debug");
}

}  // namespace
}  // namespace prehoc::cli
