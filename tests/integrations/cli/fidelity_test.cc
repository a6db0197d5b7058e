// `prehoc fidelity` from end to end on a small model: figures that must hold whatever the model, resuming, refusals.
#include "integrations/cli/fidelity.h"

#include <gtest/gtest.h>

#include <csignal>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <streambuf>

#include "base/units.h"
#include "integrations/cli/calibration_file.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/fidelity_lab.h"
#include "integrations/cli/fidelity_notes.h"
#include "integrations/cli/fidelity_table.h"
#include "integrations/cli/fidelity_tasks.h"
#include "integrations/cli/load.h"
#include "tests/integrations/cli/cli_test_util.h"
#include "tests/integrations/cli/tiny_model.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

std::string Verses(int count) {
  std::string text;
  for (int i = 1; i <= count; ++i) {
    text += "Ge4:" + std::to_string(i) + " And Cain talked with Abel his brother, and it came to pass " + std::to_string(i * i) + " times.\n";
  }
  return text;
}

struct Outcome {
  int exit_code = -1;
  std::string out, err;
  ordered_json json;
  const ordered_json& run(const std::string& label) const {
    for (const ordered_json& run : json["runs"]) {
      if (run["label"] == label) return run;
    }
    static const ordered_json none;
    ADD_FAILURE() << "no run " << label;
    return none;
  }
};

// Raises SIGINT, or does something else, when `trigger` has been written.
class InterruptingBuffer : public std::stringbuf {
 public:
  explicit InterruptingBuffer(std::string trigger, std::function<void()> then = [] { std::raise(SIGINT); })
      : trigger_(std::move(trigger)), then_(std::move(then)) {}

 private:
  std::streamsize xsputn(const char* data, std::streamsize count) override {
    const std::streamsize written = std::stringbuf::xsputn(data, count);
    if (!raised_ && str().find(trigger_) != std::string::npos) raised_ = true, then_();
    return written;
  }
  const std::string trigger_;
  const std::function<void()> then_;
  bool raised_ = false;
};

class FidelityTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    models_ = new TempDir;
    WriteTinyModel(models_->path() + "/one", 1);
    WriteTinyModel(models_->path() + "/other", 2);
  }
  static void TearDownTestSuite() { delete std::exchange(models_, nullptr); }

  void SetUp() override {
    WriteFile(path("verses.txt"), Verses(120));
    options_.model = models_->path() + "/one";
    options_.document = path("verses.txt");
    options_.context = 1000;
    options_.steps = 12;
    options_.budgets = {"128"};
    options_.json = path("run.json");
    options_.html = path("run.html");
    options_.store_budget = 64 * kMiB;
    options_.threads = 2;
  }
  std::string path(const std::string& name) const { return dir_.path() + "/" + name; }

  Outcome Run(std::ostream* err = nullptr) {
    std::ostringstream out, own_err;
    Outcome outcome;
    outcome.exit_code = RunFidelity(options_, EnvironmentIn(dir_), out, err ? *err : own_err, SteadyClock::Get());
    outcome.out = out.str();
    outcome.err = own_err.str();
    if (std::ifstream file(options_.json); file) outcome.json = ordered_json::parse(file, nullptr, false);
    return outcome;
  }
  void ExpectRefused(int exit_code, const std::vector<std::string>& says) {
    const Outcome outcome = Run();
    EXPECT_EQ(outcome.exit_code, exit_code) << outcome.err;
    for (const std::string& text : says) EXPECT_NE(outcome.err.find(text), std::string::npos) << outcome.err;
  }

  TempDir dir_;
  FidelityOptions options_;

 private:
  static TempDir* models_;
};
TempDir* FidelityTest::models_ = nullptr;

TEST_F(FidelityTest, FiguresThatHoldWhateverTheModel) {
  options_.tasks = {FidelityTask::kNeedle, FidelityTask::kExtract};
  options_.generate = 8;
  options_.context = 1800;
  options_.set = {{"cis.tau", "0.3"}};  // random queries are never as near as those of a model
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  EXPECT_EQ(outcome.json["complete"], true);
  ASSERT_EQ(outcome.json["runs"].size(), 5u);
  const ordered_json& dense = outcome.run("dense");
  EXPECT_EQ(dense["role"], "reference");
  EXPECT_EQ(dense["model"]["kl"]["max"], 0);
  EXPECT_EQ(dense["model"]["top1_agreement"], 1);
  EXPECT_TRUE(dense["heads"].is_null());
  EXPECT_TRUE(dense["generation"]["first_divergence"].is_null());
  EXPECT_EQ(dense["generation"]["agreement"], 1);
  for (const std::string label : {"window 128", "oracle 128", "cis 128", "tc 128"}) {
    const ordered_json& run = outcome.run(label);
    EXPECT_EQ(run["model"]["steps"], 12) << label;
    EXPECT_GT(run["model"]["kl"]["mean"], 0) << label;
    EXPECT_EQ(run["heads"]["audited_steps"], 12) << label;
    EXPECT_EQ(run["heads"]["dropped"]["count"], 12 * 2 * 4) << label;
    EXPECT_EQ(run["cost"]["steps"], 12) << label;
    EXPECT_EQ(run["tasks"][0]["of"], 8) << label;
    EXPECT_EQ(run["tasks"][1]["of"], 16) << label;
    EXPECT_EQ(run["residency"]["step"].size(), 12u) << label;
  }
  const ordered_json& oracle = outcome.run("oracle 128");
  EXPECT_EQ(oracle["role"], "ceiling");
  EXPECT_EQ(oracle["cost"]["rho"], 1);
  EXPECT_NEAR(oracle["heads"]["excess"]["p99"], 0, 1e-4);
  EXPECT_EQ(oracle["heads"]["recall"]["mean"], 1);
  EXPECT_NEAR(oracle["cost"]["saved"]["bytes"], 0, 0.01);
  EXPECT_EQ(oracle["cost"]["saved"]["time"], 0);
  EXPECT_GT(oracle["cost"]["bytes_per_step"]["from_host"], 0);  // the device holds a part, although all would fit
  EXPECT_LE(oracle["heads"]["dropped"]["mean"], outcome.run("window 128")["heads"]["dropped"]["mean"]);
  EXPECT_GT(outcome.run("cis 128")["cost"]["saved"]["events"], 0);
  EXPECT_GT(outcome.run("tc 128")["heads"]["points"].size(), 0u);
  EXPECT_EQ(outcome.json["query_cosine"]["distance"], ordered_json({1, 2, 4, 8}));
  EXPECT_NE(outcome.out.find("oracle 128 (ceiling)"), std::string::npos) << outcome.out;
  EXPECT_NE(outcome.out.find("needle of 8"), std::string::npos) << outcome.out;
  EXPECT_TRUE(std::filesystem::exists(options_.html));
}

TEST_F(FidelityTest, ABudgetOfEverythingIsDense) {
  options_.selectors = {SelectorKind::kOracle, SelectorKind::kTwoClock};
  options_.budgets = {"2000"};
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  for (const char* label : {"oracle 2000", "tc 2000"}) EXPECT_LT(outcome.run(label)["model"]["kl"]["max"], 1e-6) << label;
}

TEST_F(FidelityTest, TheSameCommandGoesOnWhereItWasInterrupted) {
  InterruptingBuffer buffer("] oracle 128: ");
  std::ostream err(&buffer);
  const Outcome first = Run(&err);
  EXPECT_EQ(first.exit_code, kExitInterrupted);
  EXPECT_EQ(first.json["complete"], false);
  ASSERT_EQ(first.json["runs"].size(), 3u);  // dense, window, oracle
  const Outcome second = Run();
  ASSERT_EQ(second.exit_code, kExitOk) << second.err;
  EXPECT_NE(second.err.find("3 of 5 runs"), std::string::npos) << second.err;
  EXPECT_EQ(second.json["complete"], true);
  ASSERT_EQ(second.json["runs"].size(), 5u);
  for (int i : {1, 2}) EXPECT_EQ(second.json["runs"][i]["seconds"], first.json["runs"][i]["seconds"]) << "was run again";
  EXPECT_FALSE(second.json["runs"][4]["cost"]["saved"]["time"].is_null());
  // The figures are those of an uninterrupted run.
  options_.json = path("whole.json");
  const Outcome whole = Run();
  EXPECT_EQ(whole.run("tc 128")["model"]["kl_by_step"], second.run("tc 128")["model"]["kl_by_step"]);
  EXPECT_EQ(whole.run("tc 128")["heads"]["dropped_map"], second.run("tc 128")["heads"]["dropped_map"]);
}

// A new start runs the reference again, and writes the file after it: killed there, it must still hold what it held.
TEST_F(FidelityTest, TheFileNeverHoldsLessThanBefore) {
  options_.selectors = {SelectorKind::kDense, SelectorKind::kTwoClock};
  ASSERT_EQ(Run().exit_code, kExitOk);
  options_.selectors = {SelectorKind::kDense, SelectorKind::kWindow, SelectorKind::kTwoClock};
  std::vector<std::string> meanwhile;
  InterruptingBuffer buffer("] window 128: ", [&] {  // the file as it was written after the reference
    std::ifstream file(options_.json);
    const ordered_json json = ordered_json::parse(file);
    for (const ordered_json& run : json["runs"]) meanwhile.push_back(run["label"]);
  });
  std::ostream err(&buffer);
  ASSERT_EQ(Run(&err).exit_code, kExitOk);
  EXPECT_EQ(meanwhile, (std::vector<std::string>{"dense", "tc 128"}));
}

TEST_F(FidelityTest, AFileOfAnotherMeasurementIsNotWrittenOver) {
  options_.selectors = {SelectorKind::kDense};
  const Outcome first = Run();
  ASSERT_EQ(first.exit_code, kExitOk) << first.err;
  const std::string fingerprint = first.json["model"]["fingerprint"];
  options_.steps = 13;
  ExpectRefused(kExitRuntime, {"--json", "text.steps 12", "has 13"});
  options_.steps = 12;
  options_.model = options_.model.substr(0, options_.model.rfind('/')) + "/other";
  ExpectRefused(kExitRuntime, {"--json", fingerprint, "model.fingerprint"});
  WriteFile(options_.json, "my notes");
  ExpectRefused(kExitRuntime, {"no fidelity run"});
}

TEST_F(FidelityTest, WhatCannotBeIsRefusedWithWhatWouldDo) {
  options_.context = 100000;
  ExpectRefused(kExitUsage, {"--context 100,000", "give at most"});
  options_.context = 1000;
  options_.steps = 900;
  ExpectRefused(kExitUsage, {"--steps 900", "500"});
  options_.steps = 12;
  options_.tasks = {FidelityTask::kMultiKey};
  ExpectRefused(kExitUsage, {"--tasks multikey", "--context"});
  options_.tasks.clear();
  options_.max_minutes = 1e-4;
  options_.sweeps = {{"cis.tau", {"0.5", "0.6"}}};
  ExpectRefused(kExitUsage, {"--max-minutes", "--sweep"});
}

TEST_F(FidelityTest, ACalibrationNamesItsEvidenceAndReadsBack) {
  WriteFile(path("verses.txt"), Verses(700));
  options_.context = 512;
  options_.selectors = {SelectorKind::kDense, SelectorKind::kTwoClock};
  options_.calibrate = *CalibrationClaim::Parse("max_dropped_mass<=0.5 alpha=0.3 confidence=0.8");
  options_.calibrate_knob = "budget=500|64|48";  // all but the window's rows at first
  options_.calibration = path("calibration.json");
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  const ordered_json& calibration = outcome.json["calibration"];
  const int64_t needed = UnitsNeeded(*options_.calibrate);
  EXPECT_EQ(calibration["units"], needed + needed / 2);
  ASSERT_EQ(calibration["curve"].size(), 3u);
  EXPECT_EQ(calibration["curve"][0]["violations"], 0);
  EXPECT_EQ(calibration["splits"], 20);
  const auto file = ReadCalibration(options_.calibration);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->value, calibration["value"]);
  EXPECT_EQ(file->model_fingerprint, outcome.json["model"]["fingerprint"]);
  EXPECT_EQ(file->most_prompt_tokens, 512);
  EXPECT_LE(file->upper_limit, 0.3);
  EXPECT_EQ(file->selector.tc.theta, TwoClockOptions::ThetaOfMemory(file->selector.budget.MiddleK(512))) << "what was measured, wherever rows are when it is used";
}

TEST_F(FidelityTest, HeadsThatCannotBeProtectedDoNotCount) {
  WriteFile(path("verses.txt"), Verses(700));
  options_.context = 512;
  options_.selectors = {SelectorKind::kDense, SelectorKind::kTwoClock};
  options_.calibrate = *CalibrationClaim::Parse("max_dropped_mass<=0.12 alpha=0.3 confidence=0.8");
  options_.calibrate_knob = "budget=48";
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  const ordered_json& calibration = outcome.json["calibration"];
  const size_t unprotected = calibration["unprotected"].size();
  EXPECT_GT(unprotected, 4u);  // they would violate in nearly every request
  EXPECT_LT(unprotected, 8u);
  EXPECT_LT(calibration["curve"][0]["violations"], 3);
  options_.json = path("none.json");
  options_.calibrate = *CalibrationClaim::Parse("max_dropped_mass<=0.001 alpha=0.3 confidence=0.8");
  ExpectRefused(kExitUsage, {"--calibrate", "nothing to protect"});
}

// From sessions of its own: KL(dense, run), not the other way round, of the same tokens.
TEST_F(FidelityTest, KlIsOfDenseAgainstTheRun) {
  options_.selectors = {SelectorKind::kWindow};
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  const Environment environment = EnvironmentIn(dir_);
  std::ostringstream err;
  const auto loaded = Load(options_.model, {options_.model, ""}, environment, err, SteadyClock::Get());
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const std::vector<int32_t> tokens = *loaded->tokenizer->Encode(Verses(120), {.add_special = false, .parse_special = false});
  const std::span<const int32_t> prompt = std::span(tokens).first(static_cast<size_t>(options_.context - options_.steps));
  const LabTask task{options_, environment, *loaded, tokens, "", nullptr, err, SteadyClock::Get()};
  std::vector<std::vector<float>> log_p[2];
  const std::vector<FidelityRun> runs = *PlanRuns(options_);
  for (size_t r = 0; r < 2; ++r) {
    const auto session = Session::Create(loaded->model, LabSession(task, runs[r], static_cast<int64_t>(prompt.size()), options_.steps + 1));
    ASSERT_TRUE(session.ok()) << session.status();
    ASSERT_OK((*session)->Open(prompt));
    GenerateRequest request;
    request.prompt = prompt;
    request.max_new_tokens = options_.steps + 1;
    request.vocab = loaded->model->config.vocab;
    request.forced = std::span(tokens).subspan(prompt.size(), static_cast<size_t>(options_.steps + 1));
    GenerateHooks hooks;
    hooks.on_logits = [&](std::span<const float> logits) { log_p[r].push_back(LogSoftmax(logits)); };
    ASSERT_TRUE(Generate(request, (*session)->forward(), hooks, SteadyClock::Get()).ok());
  }
  const ordered_json& by_step = outcome.run("window 128")["model"]["kl_by_step"];
  ASSERT_EQ(by_step.size(), static_cast<size_t>(options_.steps));
  for (size_t i = 0; i < by_step.size(); ++i) {
    const double kl = KlDivergence(log_p[0][i + 1], log_p[1][i + 1]);
    EXPECT_NEAR(by_step[i].get<double>(), kl, 1e-4 * kl + 1e-9);
  }
}

TEST_F(FidelityTest, ACalibrationWithoutEnoughUnitsSaysHowManyItTakes) {
  options_.selectors = {SelectorKind::kDense, SelectorKind::kTwoClock};
  options_.calibrate = *CalibrationClaim::Parse("max_dropped_mass<=0.05 alpha=0.1");
  options_.calibrate_units = 10;
  ExpectRefused(kExitUsage, {"--calibrate-units 10", "at least 22"});
  options_.calibrate_units = 0;
  ExpectRefused(kExitUsage, {"35 windows", "the document has room for"});
  options_.calibrate_knob = "cis.tau=0.9|0.5";
  ExpectRefused(kExitUsage, {"--calibrate-knob", "does not use cis.tau"});
}

TEST_F(FidelityTest, TaskValuesLieWhereTheItemsSay) {
  const Environment environment = EnvironmentIn(dir_);
  std::ostringstream err;
  const auto loaded = Load(options_.model, {options_.model, ""}, environment, err, SteadyClock::Get());
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const std::vector<int32_t> document = *loaded->tokenizer->Encode(Verses(400), {.add_special = false, .parse_special = false});
  const auto text = [&](std::span<const int32_t> tokens) { return loaded->tokenizer->Decode(tokens, false); };
  for (const auto task : {FidelityTask::kNeedle, FidelityTask::kMultiKey, FidelityTask::kMultiValue, FidelityTask::kExtract}) {
    const auto built = BuildTask(*loaded->tokenizer, {task, 0, 1, document, 4000});
    ASSERT_TRUE(built.ok()) << built.status();
    EXPECT_EQ(built->prompt.size(), 4000u);
    const std::string prompt = text(built->prompt);
    for (const TaskContext::Item& item : built->items) {
      const auto value = std::span(built->stream).subspan(static_cast<size_t>(item.begin), static_cast<size_t>(item.end - item.begin));
      std::string shown = text(value);
      shown.erase(0, shown.find_first_not_of(' '));
      const size_t at = prompt.find(" " + shown);
      EXPECT_NE(at, std::string::npos) << FidelityTaskName(task) << ": " << shown;
      EXPECT_NEAR(static_cast<double>(at) / static_cast<double>(prompt.size()), item.depth, 0.1);
    }
    const auto again = BuildTask(*loaded->tokenizer, {task, 0, 1, document, 4000});
    EXPECT_EQ(again->prompt, built->prompt);
    EXPECT_NE(BuildTask(*loaded->tokenizer, {task, 1, 1, document, 4000})->stream, built->stream);
    EXPECT_NE(BuildTask(*loaded->tokenizer, {task, 0, 2, document, 4000})->stream, built->stream);
  }
}

TEST(FidelityTableTest, MarksTheBestBetweenFloorAndCeilingAndShowsWhatIsMissing) {
  const auto run = [](const char* label, const char* role, double kl) {
    return ordered_json{{"label", label}, {"role", role}, {"budget", "1/16"}, {"model", {{"kl", {{"mean", kl}}}}}};
  };
  ordered_json document = {{"model", {{"name", "m"}}}, {"text", {{"path", "d"}, {"context", 100}, {"steps", 5}}}, {"notes", ordered_json::array()},
                           {"runs", {run("dense", "reference", 0), run("oracle", "ceiling", 0.01), run("a", "", 0.03), run("b", "", 0.02), run("c", "", 0)}}};
  document["runs"][4]["model"] = nullptr;
  const std::string table = FormatFidelityTable(document);
  EXPECT_NE(table.find("0.0200*"), std::string::npos) << table;
  EXPECT_EQ(table.find("0.0100*"), std::string::npos) << table;
  EXPECT_EQ(table.find("0.0300*"), std::string::npos) << table;
  EXPECT_NE(FidelityNotes(document)[0]["text"].get<std::string>().find("b has the least KL"), std::string::npos);
}

}  // namespace
}  // namespace prehoc::cli
