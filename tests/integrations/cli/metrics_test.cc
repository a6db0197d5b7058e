#include "integrations/cli/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <regex>
#include <sstream>

#include "tests/integrations/cli/cli_test_util.h"
#include "tests/integrations/cli/prometheus_text.h"
#include "tests/support/status_matchers.h"

namespace prehoc::cli {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(MetricsTest, WhatIsWrittenIsWhatIsRead) {
  const auto metrics = ParsePrometheusText(PrometheusText({{"host.hits", 12}, {"host.used_bytes", 3.5e9}, {"sequence.rho", 0.893}}));
  ASSERT_EQ(metrics.error, "");
  EXPECT_EQ(metrics.values.size(), 4u);  // and the version
  EXPECT_EQ(metrics.values.at("prehoc_host_hits_total").type, "counter");
  EXPECT_EQ(metrics.values.at("prehoc_host_hits_total").value, 12);
  EXPECT_EQ(metrics.values.at("prehoc_host_used_bytes").type, "gauge");
  EXPECT_EQ(metrics.values.at("prehoc_host_used_bytes").value, 3.5e9);
  EXPECT_EQ(metrics.values.at("prehoc_sequence_rho").value, 0.893);
}

TEST(MetricsTest, ValuesKeepEveryBit) {
  for (const double value : {0.1, 1.0 / 3, 123456789012345678.0, 5e-324, -0.0}) {
    const auto metrics = ParsePrometheusText(PrometheusText({{"x", value}}));
    EXPECT_EQ(metrics.values.at("prehoc_x_total").value, value);
  }
}

TEST(MetricsTest, WhatIsNoNumberIsLeftOut) {
  const auto metrics = ParsePrometheusText(PrometheusText({{"a", std::nan("")}, {"b", std::numeric_limits<double>::infinity()}, {"c", 1}}));
  ASSERT_EQ(metrics.error, "");
  EXPECT_EQ(metrics.values.size(), 2u);
}

TEST(MetricsTest, TheParserOfThisTestRefuses) {
  EXPECT_NE(ParsePrometheusText("prehoc_x 1\n").error, "");                              // no type
  EXPECT_NE(ParsePrometheusText("# TYPE x counter\nx one\n").error, "");                 // no number
  EXPECT_NE(ParsePrometheusText("# TYPE x.y counter\nx.y 1\n").error, "");               // no name
  EXPECT_NE(ParsePrometheusText("# TYPE x counter\nx 1\nx 2\n").error, "");              // twice
  EXPECT_NE(ParsePrometheusText("# TYPE x counter\nx 1").error, "");                     // cut off
  EXPECT_EQ(ParsePrometheusText("# TYPE x counter\nx 1\n").error, "");
}

TEST(MetricsTest, AFileIsWrittenAtMostOnceASecondAndAtTheEnd) {
  const TempDir dir;
  ManualClock clock(5'000'000'000);
  auto file = MetricsFile::Create(dir.path() + "/metrics.prom", &clock);
  ASSERT_OK(file.status());
  EXPECT_FALSE(std::filesystem::exists(dir.path() + "/metrics.prom"));  // nothing is known yet
  int asked = 0;
  const auto source = [&] { return std::map<std::string, double>{{"asked", ++asked}}; };
  const auto shown = [&] { return ParsePrometheusText(ReadAll(dir.path() + "/metrics.prom")).values.at("prehoc_asked_total").value; };
  file->Refresh(source);
  EXPECT_EQ(shown(), 1);
  clock.Advance(999'999'999);
  file->Refresh(source);
  EXPECT_EQ(shown(), 1);
  clock.Advance(1);
  file->Refresh(source);
  EXPECT_EQ(shown(), 2);
  ASSERT_OK(file->Write(source));
  EXPECT_EQ(shown(), 3);
  // Nothing else stays in the directory.
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir.path())) files += entry.is_regular_file();
  EXPECT_EQ(files, 1);
}

TEST(MetricsTest, APlaceThatCannotBeWrittenToIsRefusedAtOnce) {
  const TempDir dir;
  ManualClock clock;
  const auto file = MetricsFile::Create(dir.path() + "/none/metrics.prom", &clock);
  EXPECT_EQ(file.status().code(), StatusCode::kIoError);
  EXPECT_NE(file.status().message().find("--metrics"), std::string::npos);
}

}  // namespace
}  // namespace prehoc::cli
