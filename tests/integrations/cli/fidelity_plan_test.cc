#include "integrations/cli/fidelity_plan.h"

#include <gtest/gtest.h>

#include "integrations/cli/options.h"
#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

std::vector<std::string> Labels(const FidelityOptions& options) {
  const auto runs = PlanRuns(options);
  EXPECT_TRUE(runs.ok()) << runs.status();
  std::vector<std::string> labels;
  for (size_t i = 0; runs.ok() && i < runs->size(); ++i) labels.push_back((*runs)[i].label);
  return labels;
}

TEST(FidelityPlanTest, DenseComesFirstThenBudgetsInsideSelectors) {
  FidelityOptions options;
  options.selectors = {SelectorKind::kTwoClock, SelectorKind::kWindow};
  options.budgets = {"1/32", "512"};
  EXPECT_EQ(Labels(options), (std::vector<std::string>{"dense", "tc 1/32", "tc 512", "window 1/32", "window 512"}));
}

TEST(FidelityPlanTest, ASweepMovesOneKnobOfThoseThatUseItAndRepeatsNoRun) {
  FidelityOptions options;
  options.selectors = {SelectorKind::kCis, SelectorKind::kTwoClock};
  options.sweeps = *ParseSweeps("cis.tau=0.7:0.9:0.1,codes=4/64|8/16");
  EXPECT_EQ(Labels(options), (std::vector<std::string>{"dense", "cis 1/16", "cis 1/16 cis.tau=0.7", "cis 1/16 cis.tau=0.9", "tc 1/16",
                                                       "tc 1/16 codes=8/16"}));
  const auto runs = *PlanRuns(options);
  EXPECT_EQ(runs[2].selector.cis.tau, 0.7);
  EXPECT_EQ(runs[5].codes.bits, 8);
  EXPECT_EQ(*runs[2].swept, std::make_pair(std::string("cis.tau"), std::string("0.7")));
}

// Rows are the cache's: every method has them, the dense one too, which is compared with that of fp16 rows.
TEST(FidelityPlanTest, RowsAreSweptForEveryMethod) {
  FidelityOptions options;
  options.selectors = {SelectorKind::kTwoClock};
  options.sweeps = *ParseSweeps("rows=f16|int8");
  EXPECT_EQ(Labels(options), (std::vector<std::string>{"dense", "dense rows=int8", "tc 1/16", "tc 1/16 rows=int8"}));
  const auto runs = *PlanRuns(options);
  EXPECT_TRUE(runs[0].is_reference());
  EXPECT_FALSE(runs[1].is_reference());
  EXPECT_EQ(runs[3].rows, RowFormat::kInt8);
  options.sweeps = *ParseSweeps("rows=fp8");
  EXPECT_STATUS(StatusCode::kInvalid, "f16, int8 or e4m3", PlanRuns(options).status());
}

TEST(FidelityPlanTest, WhatNoRunCanTakeIsRefused) {
  FidelityOptions options;
  options.set = {{"cis.tua", "0.7"}};
  EXPECT_STATUS(StatusCode::kInvalid, "cis.tau", PlanRuns(options).status());
  options.set = {{"sc.factor", "2"}};
  EXPECT_STATUS(StatusCode::kInvalid, "no selector of --selectors uses sc.factor", PlanRuns(options).status());
  options.set = {};
  options.sweeps = {{"psaw.c", {"0.5"}}};
  EXPECT_STATUS(StatusCode::kInvalid, "--sweep", PlanRuns(options).status());
  options.sweeps = {{"codes", {"6/64"}}};
  EXPECT_STATUS(StatusCode::kInvalid, "4/64", PlanRuns(options).status());
  options.sweeps = {};
  options.budgets = {"none"};
  EXPECT_STATUS(StatusCode::kInvalid, "--budgets", PlanRuns(options).status());
}

TEST(FidelityPlanTest, ListsNameTheNearestWhereTheyDoNotKnowAName) {
  EXPECT_STATUS(StatusCode::kInvalid, "oracle", ParseSelectorList("dense,orakle").status());
  EXPECT_STATUS(StatusCode::kInvalid, "twice", ParseSelectorList("tc,tc").status());
  EXPECT_STATUS(StatusCode::kInvalid, "multikey", ParseTaskList("multikeys").status());
  EXPECT_EQ(ParseTaskList("none")->size(), 0u);
  EXPECT_EQ(*ParseBudgetList("1/16,mass(0.95,cap=1/8)"), (std::vector<std::string>{"1/16", "mass(0.95,cap=1/8)"}));
  EXPECT_STATUS(StatusCode::kInvalid, "--budgets", ParseBudgetList("1/16,").status());
}

TEST(FidelityPlanTest, RangesReadAsTheyWereTyped) {
  EXPECT_EQ(ParseSweeps("cis.tau=0.5:0.9:0.1")->front().values, (std::vector<std::string>{"0.5", "0.6", "0.7", "0.8", "0.9"}));
  EXPECT_EQ(ParseSweeps("tc.refresh=64:16:-16")->front().values, (std::vector<std::string>{"64", "48", "32", "16"}));
  EXPECT_EQ(ParseSweeps("budget=mass(0.9,cap=1/8)|1/4")->front().values, (std::vector<std::string>{"mass(0.9,cap=1/8)", "1/4"}));
  for (const char* bad : {"cis.tau", "=1", "cis.tau=", "cis.tau=1:2", "cis.tau=1:2:0", "cis.tau=2:1:0.5", "cis.tau=1|", "cis.tau=0:1:1e-9", "cis.tau=0:x:1",
                          "cis.tau=0:1:inf"}) {
    EXPECT_STATUS(StatusCode::kInvalid, "--sweep", ParseSweeps(bad).status()) << bad;
  }
}

TEST(FidelityPlanTest, TheCommandLineBecomesThePlan) {
  const std::vector<std::string> args = {"fidelity", "--selectors", "cis,tc", "--budgets", "1/32,1/16", "--sweep", "cis.tau=0.7|0.9", "--set", "tc.theta=0",
                                         "--tasks", "needle,extract", "--generate", "64", "--calibrate", "max_dropped_mass<=0.05 alpha=0.1"};
  const auto command = ParseCommandLine(args);
  ASSERT_TRUE(command.ok()) << command.status();
  EXPECT_EQ(command->kind, CommandKind::kFidelity);
  const FidelityOptions& options = command->fidelity;
  EXPECT_EQ(options.tasks, (std::vector<FidelityTask>{FidelityTask::kNeedle, FidelityTask::kExtract}));
  EXPECT_EQ(options.generate, 64);
  EXPECT_EQ(options.calibrate->alpha, 0.1);
  EXPECT_EQ(options.command, "prehoc fidelity --selectors cis,tc --budgets 1/32,1/16 --sweep 'cis.tau=0.7|0.9' --set tc.theta=0 --tasks needle,extract "
                             "--generate 64 --calibrate 'max_dropped_mass<=0.05 alpha=0.1'");
  EXPECT_EQ(PlanRuns(options)->size(), 9u);
}

TEST(FidelityPlanTest, BadFlagsAreNamed) {
  const auto refused = [](std::vector<std::string> args, const char* says) {
    args.insert(args.begin(), "fidelity");
    EXPECT_STATUS(StatusCode::kInvalid, says, ParseCommandLine(args).status());
  };
  refused({"--selectors", "cis", "--set", "tc.tau=1"}, "uses tc.tau");
  refused({"--set", "budget=1/8"}, "--budgets");
  refused({"--steps", "0"}, "--steps");
  refused({"--device-factor", "0.5"}, "--device-factor");
  refused({"--calibrate", "alpha=2"}, "--calibrate");
  refused({"--calibrate-units", "10"}, "--calibrate");
  refused({"--kernels", "neon"}, "avx2");
  refused({"--budget", "1/8"}, "--budgets");
}

}  // namespace
}  // namespace prehoc::cli
