// `prehoc answer` from end to end on a small model: prefix reuse, damage, refusals, interruption.
#include "integrations/cli/answer.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <streambuf>

#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/metrics.h"
#include "tests/integrations/cli/calibration_test_files.h"
#include "tests/integrations/cli/cli_test_util.h"
#include "tests/integrations/cli/prometheus_text.h"
#include "tests/integrations/cli/tiny_model.h"
#include "tests/support/source_paths.h"

namespace prehoc::cli {
namespace {
using nlohmann::json;

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
  json figures;
};

class AnswerTest : public testing::Test {
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
    options_.max_new_tokens = 12;
    options_.store = path("store");
    options_.store_budget = 64 * kMiB;
    options_.json = path("run.json");
    options_.audit_every = 4;
    options_.threads = 2;
    ASSERT_OK(options_.selector.Set("budget", "128"));
  }

  std::string path(const std::string& name) const { return dir_.path() + "/" + name; }

  Outcome Run(const AnswerOptions& options, std::ostream* out = nullptr) {
    std::filesystem::remove(path("run.json"));
    std::ostringstream own_out, err;
    Outcome outcome;
    outcome.exit_code = RunAnswer(options, EnvironmentIn(dir_), out ? *out : own_out, err, SteadyClock::Get());
    outcome.out = own_out.str();
    outcome.err = err.str();
    if (std::ifstream file(path("run.json")); file) outcome.figures = json::parse(file);
    return outcome;
  }
  Outcome Run() { return Run(options_); }

  // One line on stderr with all of `says`; nothing on stdout, no JSON.
  void ExpectRefused(const AnswerOptions& options, int exit_code, std::vector<std::string> says) {
    const Outcome outcome = Run(options);
    EXPECT_EQ(outcome.exit_code, exit_code) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    EXPECT_TRUE(outcome.figures.is_null());
    EXPECT_TRUE(outcome.err.starts_with("prehoc: error: ")) << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    for (const std::string& part : says) EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err;
  }

  static TempDir* models_;
  TempDir dir_;
  AnswerOptions options_;
};
TempDir* AnswerTest::models_ = nullptr;

TEST_F(AnswerTest, RandomWeightsAnswerWithoutAModel) {
  options_.model = "random:tiny";
  options_.random_weights = "tiny";
  options_.cuda = false;
  options_.store.clear();
  const Outcome first = Run(), second = Run();
  ASSERT_EQ(first.exit_code, kExitOk) << first.err;
  EXPECT_EQ(first.figures["model"]["name"], "random:tiny");
  EXPECT_EQ(first.figures["answer"], second.figures["answer"]) << "the same weights in every run";
}

TEST_F(AnswerTest, AnswersAndShowsTheTable) {
  const Outcome first = Run();
  ASSERT_EQ(first.exit_code, kExitOk) << first.err;
  EXPECT_EQ(first.err, "");  // no progress where there is no terminal
  EXPECT_TRUE(first.out.starts_with(first.figures["answer"].get<std::string>() + "\n\nmodel "));
  for (const char* line : {"time to first token", "retrieval fraction rho", "dropped mass", "\ndevice ", "\nhost ", "\ndisk "}) {
    EXPECT_NE(first.out.find(line), std::string::npos) << line << "\n" << first.out;
  }
  const json& run = first.figures["run"];
  EXPECT_EQ(run["prompt"]["restored_tokens"], 0);
  EXPECT_EQ(run["prompt"]["computed_tokens"], first.figures["prompt_tokens"]);
  EXPECT_GT(run["selection"]["triples"], 0);
  EXPECT_GT(run["dropped_mass"]["audited_steps"], 0);
  EXPECT_EQ(run["dropped_mass"]["bound_violations"], 0);
}

TEST_F(AnswerTest, ASecondRunRestoresThePrefixAndAnswersTheSame) {
  const Outcome first = Run(), second = Run();
  ASSERT_EQ(second.exit_code, kExitOk) << second.err;
  const int64_t restored = second.figures["run"]["prompt"]["restored_tokens"];
  EXPECT_GE(restored, 768);  // every whole chunk of 256 of the prompt
  EXPECT_EQ(second.figures["run"]["prompt"]["computed_tokens"].get<int64_t>() + restored, second.figures["prompt_tokens"]);
  EXPECT_EQ(second.figures["decisions"], first.figures["decisions"]);
  EXPECT_NE(second.out.find("restored from " + options_.store), std::string::npos) << second.out;
}

TEST_F(AnswerTest, RowsOf8BitsTakeHalfTheRoomAndComeBackAsTheyWere) {
  options_.compare_dense = true;
  const Outcome f16 = Run();
  for (const RowFormat rows : {RowFormat::kInt8, RowFormat::kE4m3}) {
    options_.rows = rows;
    ExpectRefused(options_, kExitRuntime, {options_.store, "dtype", std::string(RowFormatName(rows))});
    AnswerOptions options = options_;
    options.store = path(std::string(RowFormatName(rows)));
    const Outcome first = Run(options), second = Run(options);
    ASSERT_EQ(second.exit_code, kExitOk) << second.err;
    EXPECT_EQ(first.figures["model"]["kv_rows"], RowFormatName(rows));
    const int64_t bytes = first.figures["model"]["kv_bytes_per_token"], of_f16 = f16.figures["model"]["kv_bytes_per_token"];
    EXPECT_LT(bytes * 100, of_f16 * (rows == RowFormat::kInt8 ? 76 : 51));  // with scales: 48 bytes of 64 at head_dim 16
    EXPECT_GE(second.figures["run"]["prompt"]["restored_tokens"], 768);
    EXPECT_EQ(second.figures["decisions"], first.figures["decisions"]);
    EXPECT_LT(first.figures["comparison"]["kl_mean"], 0.05) << "against dense attention over rows of fp16";
    EXPECT_GT(first.figures["comparison"]["kl_mean"], 0);
  }
}

// Every span lies within the one that its thread began before and has not ended.
void ExpectNested(const std::vector<json>& spans) {
  std::map<int, std::vector<json>> by_thread;
  for (const json& span : spans) by_thread[span["tid"]].push_back(span);
  for (auto& [thread, own] : by_thread) {
    const auto end = [](const json& span) { return span["ts"].get<double>() + span["dur"].get<double>(); };
    std::sort(own.begin(), own.end(), [&](const json& a, const json& b) {
      return a["ts"] != b["ts"] ? a["ts"] < b["ts"] : end(a) > end(b);
    });
    std::vector<double> open;
    for (const json& span : own) {
      while (!open.empty() && open.back() <= span["ts"].get<double>()) open.pop_back();
      EXPECT_LE(end(span), (open.empty() ? 1e300 : open.back()) + 0.002) << span;  // the file is rounded to nanoseconds
      open.push_back(end(span));
    }
  }
}

TEST_F(AnswerTest, TracesTheRunWithoutItsWords) {
  options_.trace = path("run.trace");
  options_.max_new_tokens = 300;  // a chunk fills, and is written
  options_.device_budget = 200 * kKiB;  // rows move
  ASSERT_EQ(Run().exit_code, kExitOk);
  const Outcome second = Run();  // now with reads of the store
  ASSERT_EQ(second.exit_code, kExitOk) << second.err;
  std::ifstream file(options_.trace);
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  const json trace = json::parse(text);
  std::map<std::string, int64_t> count;
  std::vector<json> spans;
  for (const json& event : trace["traceEvents"]) {
    if (event["ph"] != "X") continue;
    spans.push_back(event);
    ++count[event["name"]];
  }
  ExpectNested(spans);
  EXPECT_EQ(trace["otherData"]["dropped_spans"], 0);
  EXPECT_EQ(count["open with prefix"], 1);
  EXPECT_EQ(count["prefill"], 1);  // what was not restored
  const int64_t steps = second.figures["run"]["decode"]["steps"];
  EXPECT_EQ(count["step"], steps);
  EXPECT_EQ(count["slow clock"], steps + 1);
  for (const char* name : {"prefill layer", "append", "gate", "select", "fetch", "attend", "audit", "store read", "store write", "write behind", "flush", "store flush"}) {
    EXPECT_GT(count[name], 0) << name;
  }
  for (const char* word : {"Cain", "Abel", "Who"}) EXPECT_EQ(text.find(word), std::string::npos) << word;
}

TEST_F(AnswerTest, ATraceIsWrittenWhereTheRunFails) {
  options_.trace = path("run.trace");
  options_.device_budget = 1;
  const Outcome outcome = Run();
  EXPECT_EQ(outcome.exit_code, kExitUsage) << outcome.err;
  EXPECT_TRUE(std::filesystem::exists(options_.trace));
}

TEST_F(AnswerTest, WritesEveryCounterForPrometheus) {
  options_.metrics = path("metrics.prom");
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  std::ifstream file(options_.metrics);
  const PrometheusMetrics metrics = ParsePrometheusText({std::istreambuf_iterator<char>(file), {}});
  ASSERT_EQ(metrics.error, "");
  for (const auto& [name, value] : outcome.figures["run"]["counters"].items()) {
    if (value.is_null()) continue;
    std::string metric = "prehoc_" + name + (IsLevel(name) ? "" : "_total");
    std::replace(metric.begin(), metric.end(), '.', '_');
    ASSERT_EQ(metrics.values.count(metric), 1u) << metric;
    EXPECT_EQ(metrics.values.at(metric).value, value.get<double>()) << metric;
  }
}

TEST_F(AnswerTest, LogsWhatHappenedAndNothingThatWasSaid) {
  options_.log = LogLevel::kDebug;
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk);
  std::istringstream lines(outcome.err);
  std::vector<std::string> events;
  double last = 0;
  for (std::string line; std::getline(lines, line);) {
    const json event = json::parse(line);
    EXPECT_GE(event["seconds"], last) << "a field has taken the time's place";
    last = event["seconds"];
    if (events.empty() || events.back() != event["event"]) events.push_back(event["event"]);
  }
  EXPECT_EQ(events, (std::vector<std::string>{"model loaded", "sequence opened", "prompt", "step", "answer done"})) << outcome.err;
  for (const char* word : {"Cain", "Abel", "Who"}) EXPECT_EQ(outcome.err.find(word), std::string::npos) << word;
}

TEST_F(AnswerTest, AnotherQuestionSharesTheDocument) {
  Run();
  AnswerOptions other = options_;
  other.question = "How many times did it come to pass?";
  EXPECT_GE(Run(other).figures["run"]["prompt"]["restored_tokens"], 768);
}

TEST_F(AnswerTest, AnotherTenantSharesNothing) {
  Run();
  AnswerOptions other = options_;
  other.tenant = "somebody else";
  EXPECT_EQ(Run(other).figures["run"]["prompt"]["restored_tokens"], 0);
}

// Flips one byte in every 16 KiB of the store's data files.
int SpoilStore(const std::string& directory) {
  int spoiled = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().string();
    if (!name.ends_with(".sst") && !name.ends_with(".blob")) continue;
    std::fstream file(name, std::ios::in | std::ios::out | std::ios::binary);
    const auto size = static_cast<int64_t>(std::filesystem::file_size(entry.path()));
    // The end of a table is RocksDB's own; damage there is another story (the store refuses to open).
    for (int64_t at = 8 * 1024; at < size * 9 / 10; at += 16 * 1024, ++spoiled) {
      file.seekg(at);
      const int byte = file.get();
      file.seekp(at);
      file.put(static_cast<char>(byte ^ 0x40));
    }
  }
  return spoiled;
}

TEST_F(AnswerTest, DamagedKvIsFoundAndComputedAgainWithTheSameAnswer) {
  const Outcome first = Run();
  ASSERT_GT(SpoilStore(options_.store), 3);
  const Outcome second = Run();
  ASSERT_EQ(second.exit_code, kExitOk) << second.err;
  EXPECT_EQ(second.figures["decisions"], first.figures["decisions"]);
  const json& integrity = second.figures["run"]["integrity"];
  EXPECT_GT(integrity["corrupt_chunks"].get<int>() + integrity["missing_chunks"].get<int>(), 0) << integrity;
  EXPECT_NE(second.out.find("damaged"), std::string::npos) << second.out;
}

TEST_F(AnswerTest, ComparesWithDense) {
  options_.compare_dense = true;
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  const json& comparison = outcome.figures["comparison"];
  EXPECT_EQ(comparison["decisions"], outcome.figures["decisions"].size());
  EXPECT_LE(comparison["same_tokens"], comparison["decisions"]);
  EXPECT_EQ(comparison["kl"].size(), outcome.figures["decisions"].size());
  EXPECT_LT(comparison["kl"][0], 1e-3);  // both prefill densely
  EXPECT_EQ(outcome.figures["dense"]["selection"]["triples"], 0);
  EXPECT_NE(outcome.out.find("against dense: "), std::string::npos);
}

// With a budget of everything, the selection changes nothing.
TEST_F(AnswerTest, ABudgetOfEverythingIsDense) {
  options_.compare_dense = true;
  ASSERT_OK(options_.selector.Set("budget", "4096"));
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  EXPECT_TRUE(outcome.figures["comparison"]["same_answer"]);
  EXPECT_LT(outcome.figures["comparison"]["kl_max"], 1e-4);
}

TEST_F(AnswerTest, EverySelectorAnswers) {
  for (const char* name : {"dense", "window", "oracle", "cis", "psaw", "etf", "cpe", "sc", "tc", "quest", "hshare"}) {
    AnswerOptions options = options_;
    options.selector = {};
    ASSERT_OK(options.selector.Set("selector", name));
    options.context = 400;
    options.store.clear();
    const Outcome outcome = Run(options);
    EXPECT_EQ(outcome.exit_code, kExitOk) << name << ": " << outcome.err;
    EXPECT_EQ(outcome.figures["run"]["selector"]["name"], name);
  }
}

TEST_F(AnswerTest, BadInputIsRefusedInOneLine) {
  AnswerOptions o = options_;
  o.model = path("none.gguf");
  ExpectRefused(o, kExitRuntime, {"--model " + o.model});
  WriteFile(path("bad.gguf"), "GGUF but short");
  o.model = path("bad.gguf");
  ExpectRefused(o, kExitRuntime, {path("bad.gguf")});
  o = options_;
  o.document = path("none.txt");
  ExpectRefused(o, kExitRuntime, {"--document " + o.document});
  o = options_;
  o.context = 100000;
  ExpectRefused(o, kExitUsage, {"--context 100,000", o.document});
  o = options_;
  o.max_new_tokens = 5000;
  ExpectRefused(o, kExitUsage, {"--max-new-tokens"});
  o = options_;
  o.device_budget = 64 * kKiB;
  ExpectRefused(o, kExitUsage, {"--device-budget"});
  o = options_;
  o.host_budget = 64 * kKiB;
  ExpectRefused(o, kExitUsage, {"--host-budget"});
  o = options_;
  o.cuda = false, o.prompt_precision = PromptPrecision::kHalf;
  ExpectRefused(o, kExitUsage, {"--prompt-precision half", "--device cuda"});
  o = options_;
  o.json = path("no/such/run.json");
  ExpectRefused(o, kExitRuntime, {"--json " + o.json});
}

TEST_F(AnswerTest, ACalibrationDecidesAndShowsItsPromise) {
  EXPECT_TRUE(Run().figures["calibration"].is_null());
  CalibrationFile file = GoodCalibration();
  file.model_fingerprint = Run().figures["model"]["fingerprint"];
  options_.calibration = path("c.json");
  WriteFile(options_.calibration, FormatCalibration(file));
  const Outcome outcome = Run();
  ASSERT_EQ(outcome.exit_code, kExitOk) << outcome.err;
  EXPECT_EQ(outcome.err, "");
  EXPECT_EQ(outcome.figures["calibration"], file.claim.Guarantee() + "; 2 heads are not protected");
  EXPECT_NE(outcome.out.find("\npromise   with confidence 0.9"), std::string::npos) << outcome.out;
  EXPECT_EQ(outcome.figures["run"]["selector"]["knobs"], file.selector.Describe());
  EXPECT_EQ(outcome.figures["run"]["selector"]["codes"], "8/16+norms");
  // Outside of the band: it answers, and promises nothing.
  file.least_prompt_tokens = 1500;
  WriteFile(options_.calibration, FormatCalibration(file));
  const Outcome outside = Run();
  ASSERT_EQ(outside.exit_code, kExitOk) << outside.err;
  EXPECT_TRUE(outside.err.starts_with("prehoc: warning: --calibration " + options_.calibration + ": the prompt has ")) << outside.err;
  EXPECT_TRUE(outside.figures["calibration"].get<std::string>().starts_with("none: the prompt has "));
}

TEST_F(AnswerTest, CalibrationsThatCannotBeUsedAreRefused) {
  options_.calibration = path("c.json");
  ExpectRefused(options_, kExitRuntime, {"--calibration " + options_.calibration});
  WriteFile(options_.calibration, "{}");
  ExpectRefused(options_, kExitRuntime, {"--calibration " + options_.calibration, "schema"});
  WriteFile(options_.calibration, FormatCalibration(GoodCalibration()));
  ExpectRefused(options_, kExitRuntime, {GoodCalibration().model_fingerprint, "--model " + options_.model + " has "});
  options_.pinned = {{"--budget", "budget", "1/32"}};
  ExpectRefused(options_, kExitUsage, {"--budget 1/32 contradicts --calibration " + options_.calibration});
}

TEST_F(AnswerTest, StoresThatCannotBeUsedAreRefused) {
  Run();
  AnswerOptions o = options_;
  o.model = models_->path() + "/other";
  ExpectRefused(o, kExitRuntime, {"--store " + o.store, "model"});
  WriteFile(path("file"), "no directory");
  o = options_;
  o.store = path("file");
  ExpectRefused(o, kExitRuntime, {"--store " + o.store});
  WriteFile(path("full/of/something.txt"), "not ours");
  o.store = "/proc/prehoc-store";  // no place to create anything, for root neither
  ExpectRefused(o, kExitRuntime, {"--store " + o.store});
  o.store = path("full");
  ExpectRefused(o, kExitRuntime, {"--store " + o.store});
}

// Neither all of the KV in memory nor a disk tier to take the rest.
TEST_F(AnswerTest, BudgetsThatRunOutSayWhichFlagsHelp) {
  AnswerOptions o = options_;
  o.store.clear();
  o.host_budget = 224 * kKiB;
  ExpectRefused(o, kExitRuntime, {"--host-budget", "--store"});
}

TEST_F(AnswerTest, AStoreThatMayNotBeWrittenIsRefused) {
  if (geteuid() == 0) GTEST_SKIP() << "root may write everywhere";
  Run();
  std::filesystem::permissions(options_.store, std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  ExpectRefused(options_, kExitRuntime, {"--store " + options_.store, "give a directory that can be written to"});
  std::filesystem::permissions(options_.store, std::filesystem::perms::owner_all);
}

// Raises SIGINT when the first byte of the answer is written, and keeps what it is given.
class InterruptingBuffer : public std::streambuf {
 public:
  std::string text;

 private:
  int overflow(int c) override { return Take(static_cast<char>(c)), c; }
  std::streamsize xsputn(const char* data, std::streamsize count) override {
    for (std::streamsize i = 0; i < count; ++i) Take(data[i]);
    return count;
  }
  void Take(char c) {
    if (text.empty()) std::raise(SIGINT);
    text += c;
  }
};

TEST_F(AnswerTest, AnInterruptionStopsAtATokenAndStoresWhatIsWhole) {
  options_.max_new_tokens = 200;
  InterruptingBuffer buffer;
  std::ostream out(&buffer);
  const Outcome outcome = Run(options_, &out);
  EXPECT_EQ(outcome.exit_code, kExitInterrupted) << outcome.err;
  EXPECT_EQ(outcome.figures["stop"], "interrupted");
  EXPECT_LT(outcome.figures["answer_tokens"], 200);
  EXPECT_NE(buffer.text.find("time to first token"), std::string::npos) << buffer.text;
  options_.max_new_tokens = 2;
  EXPECT_GE(Run().figures["run"]["prompt"]["restored_tokens"], 768);
}

TEST_F(AnswerTest, AReaderThatGoesAwayIsAnError) {
  std::ostringstream out;
  out.setstate(std::ios::badbit);
  const Outcome outcome = Run(options_, &out);
  EXPECT_EQ(outcome.exit_code, kExitRuntime);
  EXPECT_NE(outcome.err.find("standard output"), std::string::npos) << outcome.err;
}

// Every key of the file is described in docs/cli.md, counters apart: they go by the names of the modules.
void ExpectDescribed(const json& value, const std::string& docs) {
  if (value.is_array() && !value.empty()) ExpectDescribed(value[0], docs);
  if (!value.is_object()) return;
  for (const auto& [key, inner] : value.items()) {
    EXPECT_NE(docs.find("`" + key + "`"), std::string::npos) << key;
    if (key != "counters") ExpectDescribed(inner, docs);
  }
}

TEST_F(AnswerTest, TheJsonIsAsDocumented) {
  options_.compare_dense = true;
  const Outcome outcome = Run();
  EXPECT_EQ(outcome.figures["schema"], "prehoc.answer/1");
  std::ifstream file(SourcePath("/docs/cli.md"));
  const std::string docs{std::istreambuf_iterator<char>(file), {}};
  ASSERT_FALSE(docs.empty());
  ExpectDescribed(outcome.figures, docs);
  EXPECT_TRUE(outcome.figures["run"]["counters"].contains("sequence.rho"));
}

// The default model and document, where they have been fetched: the answer that the text supports.
TEST(DefaultModelTest, KnowsWhoKilledAbel) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "6,000 tokens take too long under a sanitizer";
#endif
  const char* model = std::getenv("PREHOC_TEST_MODEL");
  const char* document = std::getenv("PREHOC_TEST_DOCUMENT");
  if (!model || !document) GTEST_SKIP() << "PREHOC_TEST_MODEL and PREHOC_TEST_DOCUMENT are not set; scripts/test.sh sets them";
  AnswerOptions options;
  options.model = model;
  options.document = document;
  options.context = kDefaultContext;
  options.max_new_tokens = 16;
  std::ostringstream out, err;
  TempDir dir;
  EXPECT_EQ(RunAnswer(options, EnvironmentIn(dir), out, err, SteadyClock::Get()), kExitOk) << err.str();
  EXPECT_NE(out.str().substr(0, out.str().find("\n\nmodel")).find("Cain"), std::string::npos) << out.str();
}

}  // namespace
}  // namespace prehoc::cli
