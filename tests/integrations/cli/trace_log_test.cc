#include "integrations/cli/trace_log.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace prehoc::cli {
namespace {

TEST(TraceLogTest, SpansBecomeCompleteEvents) {
  ManualClock clock(7'000);
  TraceLog log(&clock);
  {
    TraceScope step(&log, "step");
    step.Say("step", 3).Say("position", -1);
    clock.Advance(2'500);
  }
  std::thread([&] { TraceScope read(&log, "store read"); }).join();
  const auto trace = nlohmann::json::parse(log.Json());
  std::vector<nlohmann::json> spans;
  std::map<int, std::string> threads;
  for (const auto& event : trace["traceEvents"]) {
    if (event["ph"] == "X") spans.push_back(event);
    if (event["name"] == "thread_name") threads[event["tid"]] = event["args"]["name"];
  }
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0]["name"], "step");
  EXPECT_EQ(spans[0]["ts"], 0.0);  // since the log began, in microseconds
  EXPECT_EQ(spans[0]["dur"], 2.5);
  EXPECT_EQ(spans[0]["args"], (nlohmann::json{{"step", 3}, {"position", -1}}));
  EXPECT_EQ(threads.at(spans[0]["tid"]), "main");
  EXPECT_EQ(threads.at(spans[1]["tid"]), "worker 1");
  EXPECT_EQ(trace["otherData"]["dropped_spans"], 0);
}

TEST(TraceLogTest, MemoryIsBounded) {
  ManualClock clock;
  TraceLog log(&clock, 10);
  for (int i = 0; i < 25; ++i) TraceScope(&log, "step");
  const auto trace = nlohmann::json::parse(log.Json());
  EXPECT_EQ(trace["otherData"]["dropped_spans"], 15);
  EXPECT_EQ(trace["traceEvents"].size(), 12u);  // with the names of process and thread
}

}  // namespace
}  // namespace prehoc::cli
