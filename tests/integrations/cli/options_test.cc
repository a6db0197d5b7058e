#include "integrations/cli/options.h"

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {
using Args = std::vector<std::string>;

Result<Command> Parse(Args args) { return ParseCommandLine(args); }

AnswerOptions Answer(Args args) {
  args.insert(args.begin(), "answer");
  const auto command = Parse(args);
  EXPECT_TRUE(command.ok()) << command.status();
  EXPECT_EQ(command.ok() ? command->kind : CommandKind::kPrintText, CommandKind::kAnswer);
  return command.ok() ? command->answer : AnswerOptions{};
}

TEST(OptionsTest, DefaultsAreTheMainJob) {
  const AnswerOptions options = Answer({});
  EXPECT_EQ(options.model, "smollm2-135m");
  EXPECT_EQ(options.question, "Who killed Abel?");
  EXPECT_EQ(options.selector.kind, SelectorKind::kTwoClock);
  EXPECT_EQ(options.selector.tc.tau, 0.9);
  EXPECT_EQ(options.store, "");
  EXPECT_FALSE(options.compare_dense);
}

// Not given: answer looks for a GPU. Named kernels are the CPU's, and a GPU's budget is not taken from the host's memory.
TEST(OptionsTest, DeviceIsLeftOpenOrSaid) {
  EXPECT_EQ(Answer({}).cuda, std::nullopt);
  EXPECT_EQ(Answer({"--device", "cuda"}).cuda, true);
  EXPECT_EQ(Answer({"--device", "cpu"}).cuda, false);
  EXPECT_EQ(Answer({"--kernels", "reference"}).cuda, false);
  for (const char* command : {"answer", "fidelity"}) {
    EXPECT_STATUS(StatusCode::kInvalid, "--device \"tpu\"", Parse({command, "--device", "tpu"}).status());
    EXPECT_STATUS(StatusCode::kInvalid, "--kernels", Parse({command, "--device", "cuda", "--kernels", "reference"}).status());
  }
  EXPECT_TRUE(Parse({"fidelity", "--device", "cuda"})->fidelity.cuda);
  AnswerOptions options = Answer({"--device", "cuda", "--device-budget", "3GiB", "--host-budget", "1GiB"});
  EXPECT_OK(CheckAnswerOptions(options, 2 * kGiB));
  options.cuda = false;
  EXPECT_STATUS(StatusCode::kInvalid, "--device-budget", CheckAnswerOptions(options, 2 * kGiB));
}

TEST(OptionsTest, EveryFlagArrivesWhereItBelongs) {
  const AnswerOptions o = Answer(
      {"--model", "m.gguf", "--lora", "ad", "--document", "d.txt", "--context", "100", "--question", "Why?",
       "--max-new-tokens", "7", "--selector", "cis", "--budget", "1/32", "--max-dropped-mass", "0.05", "--set", "cis.tau=0.5",
       "--set", "budget.local=64", "--codes", "8/16+norms", "--audit-every", "0", "--device-budget", "64MiB", "--host-budget=2GB",
       "--store", "kv", "--store-budget", "1GiB", "--tenant", "t", "--threads", "3", "--kernels", "reference", "--compare", "dense",
       "--json", "out.json", "--positions", "9000", "--rows", "int8"});
  EXPECT_EQ(o.model, "m.gguf");
  EXPECT_EQ(o.positions, 9000);
  EXPECT_EQ(o.lora, "ad");
  EXPECT_EQ(o.document, "d.txt");
  EXPECT_EQ(o.context, 100);
  EXPECT_EQ(o.question, "Why?");
  EXPECT_EQ(o.max_new_tokens, 7);
  EXPECT_EQ(o.selector.kind, SelectorKind::kCis);
  EXPECT_EQ(o.selector.budget.fraction, 1.0 / 32);
  EXPECT_EQ(o.selector.budget.local, 64);
  EXPECT_EQ(o.selector.max_dropped_mass, 0.05);
  EXPECT_EQ(o.selector.cis.tau, 0.5);
  EXPECT_EQ(o.codes, (CodeFormat{8, 16, true}));
  EXPECT_EQ(o.rows, RowFormat::kInt8);
  EXPECT_EQ(o.audit_every, 0);
  EXPECT_EQ(o.device_budget, 64 * kMiB);
  EXPECT_EQ(o.host_budget, 2'000'000'000u);
  EXPECT_EQ(o.store, "kv");
  EXPECT_EQ(o.store_budget, kGiB);
  EXPECT_EQ(o.tenant, "t");
  EXPECT_EQ(o.threads, 3);
  EXPECT_EQ(o.kernels, "reference");
  EXPECT_TRUE(o.compare_dense);
  EXPECT_EQ(o.json, "out.json");
}

TEST(OptionsTest, RandomWeightsStandForAModel) {
  EXPECT_EQ(Answer({"--random-weights", "tiny"}).random_weights, "tiny");
  EXPECT_EQ(Answer({"--random-weights=qwen3-8b"}).model, "random:qwen3-8b");
  EXPECT_STATUS(StatusCode::kInvalid, "--random-weights", Parse({"answer", "--random-weights", "huge"}).status());
  EXPECT_STATUS(StatusCode::kInvalid, "llama-3.1-8b, llama-2-7b, mistral-7b, qwen3-8b or tiny", Parse({"answer", "--random-weights", "huge"}).status());
  for (const char* flag : {"--model", "--lora", "--calibration"}) {
    EXPECT_STATUS(StatusCode::kInvalid, flag, Parse({"answer", "--random-weights", "tiny", flag, "x"}).status());
  }
}

TEST(OptionsTest, ValuesMayLookLikeFlagsAfterAnEqualsSign) {
  EXPECT_EQ(Answer({"--question=--what is this?"}).question, "--what is this?");
  EXPECT_EQ(Answer({"--set", "tc.tau=-1"}).selector.tc.tau, -1);
}

TEST(OptionsTest, DoctorHasItsOwnFlags) {
  const auto command = Parse({"doctor", "--store", "/mnt/kv", "--test-size", "64MiB"});
  ASSERT_OK(command.status());
  EXPECT_EQ(command->kind, CommandKind::kDoctor);
  EXPECT_EQ(command->doctor.store, "/mnt/kv");
  EXPECT_EQ(command->doctor.test_bytes, 64 * kMiB);
}

TEST(OptionsTest, HelpTeachesByExampleAndNamesEveryFlag) {
  for (const Args& args : {Args{"--help"}, Args{"-h"}, Args{"answer", "--help"}, Args{"inspect", "--help"}, Args{"torture", "--help"}, Args{"doctor", "--help"}}) {
    const auto command = Parse(args);
    ASSERT_OK(command.status());
    EXPECT_EQ(command->kind, CommandKind::kPrintText);
    EXPECT_NE(command->text.find("Examples\n  prehoc "), std::string::npos) << command->text;
  }
  const std::string help = Parse({"answer", "--help"})->text;
  for (const char* flag : {"--model", "--lora", "--random-weights", "--positions", "--document", "--context", "--question", "--max-new-tokens", "--selector",
                           "--budget", "--max-dropped-mass", "--set", "--show-knobs", "--codes", "--audit-every",
                           "--device-budget", "--host-budget", "--rows", "--store", "--store-budget", "--tenant", "--threads",
                           "--kernels", "--compare", "--json"}) {
    EXPECT_NE(help.find(flag), std::string::npos) << flag;
  }
}

// Every example of the help text is a command line that is accepted.
TEST(OptionsTest, TheExamplesInTheHelpAreAccepted) {
  int examples = 0;
  for (const Args& args : {Args{"--help"}, Args{"answer", "--help"}, Args{"doctor", "--help"}}) {
    std::istringstream lines(Parse(args)->text);
    for (std::string line; std::getline(lines, line);) {
      if (!line.starts_with("  prehoc ")) continue;
      Args words;
      std::istringstream rest(line.substr(9));
      for (std::string word; rest >> word;) {
        if (word.starts_with('"')) {
          for (std::string more; !word.ends_with('"') && rest >> more;) word += " " + more;
          word = word.substr(1, word.size() - 2);
        }
        words.push_back(word);
      }
      EXPECT_TRUE(Parse(words).ok()) << line << ": " << Parse(words).status();
      ++examples;
    }
  }
  EXPECT_GE(examples, 10);
}

TEST(OptionsTest, VersionAndKnobsAreText) {
  EXPECT_EQ(Parse({"--version"})->text, "prehoc 0.1.0\n");
  const std::string knobs = Parse({"answer", "--selector", "cpe", "--set", "cis.tau=0.6", "--show-knobs"})->text;
  EXPECT_NE(knobs.find("\ncis.tau=0.6\n"), std::string::npos) << knobs;
  EXPECT_NE(knobs.find("\netf.mode=carry\n"), std::string::npos) << knobs;
}

struct BadLine {
  Args args;
  std::vector<std::string> says;  // each must be in the message
};

class BadLineTest : public testing::TestWithParam<BadLine> {};

TEST_P(BadLineTest, IsRefusedInOneLineThatHelps) {
  const auto command = Parse(GetParam().args);
  ASSERT_FALSE(command.ok());
  EXPECT_EQ(ExitCodeOf(command.status()), kExitUsage);
  const std::string& message = command.status().message();
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  for (const std::string& part : GetParam().says) EXPECT_NE(message.find(part), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    All, BadLineTest,
    testing::Values(
        BadLine{{}, {"answer", "doctor", "--help"}},
        BadLine{{"anser"}, {"\"anser\"", "did you mean answer?"}},
        BadLine{{"answer", "--contxt", "5"}, {"--contxt", "did you mean --context?", "prehoc answer --help"}},
        BadLine{{"answer", "--contxt=5"}, {"--contxt", "--context"}},
        BadLine{{"answer", "what is it"}, {"\"what is it\""}},
        BadLine{{"--frobnicate"}, {"--frobnicate"}},
        BadLine{{"answer", "--context"}, {"--context"}},
        BadLine{{"answer", "--context", "5", "--context", "6"}, {"--context"}},
        BadLine{{"answer", "--context", "0"}, {"--context \"0\"", "from 1 to"}},
        BadLine{{"answer", "--context", "-5"}, {"--context \"-5\""}},
        BadLine{{"answer", "--context", "6k"}, {"--context \"6k\""}},
        BadLine{{"answer", "--context", "99999999999999999999"}, {"--context"}},
        BadLine{{"answer", "--context", ""}, {"--context"}},
        BadLine{{"answer", "--max-new-tokens", "0"}, {"--max-new-tokens"}},
        BadLine{{"answer", "--positions", "0"}, {"--positions \"0\"", "from 1 to"}},
        BadLine{{"answer", "--random-weights", "tiny", "--positions", "100"}, {"--random-weights", "--positions"}},
        BadLine{{"answer", "--question", ""}, {"--question is empty"}},
        BadLine{{"answer", "--store", ""}, {"--store is empty"}},
        BadLine{{"answer", "--device-budget", "0"}, {"--device-budget \"0\"", "at least 1"}},
        BadLine{{"answer", "--host-budget", "lots"}, {"--host-budget \"lots\"", "64MiB"}},
        BadLine{{"answer", "--host-budget", "-1GiB"}, {"--host-budget"}},
        BadLine{{"answer", "--store", "d", "--store-budget", "1KiB"}, {"--store-budget", "16"}},
        BadLine{{"answer", "--store-budget", "1GiB"}, {"--store-budget", "--store DIR"}},
        BadLine{{"answer", "--selector", "cs"}, {"--selector", "\"cs\"", "cis"}},
        BadLine{{"answer", "--budget", "0"}, {"--budget", "1/16"}},
        BadLine{{"answer", "--budget", "2/1"}, {"--budget", "mass(0.95)"}},
        BadLine{{"answer", "--selector", "dense", "--budget", "1/8"}, {"--budget", "dense", "does not use"}},
        BadLine{{"answer", "--max-dropped-mass", "2"}, {"--max-dropped-mass", "[0, 1]"}},
        BadLine{{"answer", "--selector", "window", "--max-dropped-mass", "0.1"}, {"--max-dropped-mass", "window"}},
        BadLine{{"answer", "--set", "tc.tau"}, {"--set \"tc.tau\"", "KNOB=VALUE"}},
        BadLine{{"answer", "--set", "tc.tua=1"}, {"--set", "tc.tau"}},
        BadLine{{"answer", "--set", "tc.theta=2"}, {"--set", "tc.theta"}},
        BadLine{{"answer", "--set", "cis.tau=0.5"}, {"--set", "tc does not use cis.tau"}},
        BadLine{{"answer", "--set", "selector=cis"}, {"--selector"}},
        BadLine{{"answer", "--selector", "cis", "--set", "cis.gate=certified", "--set", "budget.local=4"}, {"--selector cis", "budget.local=4"}},
        BadLine{{"answer", "--rows", "int8", "--calibration", "c.json"}, {"--rows int8", "--calibration"}},
        BadLine{{"answer", "--rows", "fp8"}, {"--rows \"fp8\"", "f16, int8 or e4m3"}},
        BadLine{{"answer", "--prompt-precision", "fp16"}, {"--prompt-precision \"fp16\"", "fp32 or half"}},
        BadLine{{"answer", "--codes", "6/64"}, {"--codes \"6/64\"", "4/64"}},
        BadLine{{"answer", "--codes", "4"}, {"--codes"}},
        BadLine{{"answer", "--codes", "4/64+dither+dither"}, {"--codes", "4/64+dither"}},
        BadLine{{"answer", "--set", "bound=statistical"}, {"bound=statistical", "--codes 4/64+dither"}},
        BadLine{{"answer", "--set", "bound=statistic"}, {"none | proven | statistical"}},
        BadLine{{"answer", "--set", "bound.confidense=0.9"}, {"bound.confidence"}},
        BadLine{{"answer", "--audit-every", "-1"}, {"--audit-every"}},
        BadLine{{"answer", "--threads", "0"}, {"--threads"}},
        BadLine{{"answer", "--threads", "1.5"}, {"--threads"}},
        BadLine{{"answer", "--kernels", "sse"}, {"--kernels \"sse\"", "avx2"}},
        BadLine{{"answer", "--compare", "sparse"}, {"--compare", "dense"}},
        BadLine{{"torture", "--seconds", "0"}, {"--seconds", "whole number"}},
        BadLine{{"torture", "--rate", "1"}, {"--rate", "at most 0.9"}},
        BadLine{{"torture", "--rate", "nan"}, {"--rate", "at most 0.9"}},
        BadLine{{"torture", "--round", "-1"}, {"--round", "whole number"}},
        BadLine{{"torture", "--fault", "flip"}, {"--faults", "prehoc torture --help"}},
        BadLine{{"inspect"}, {"--store is missing"}},
        BadLine{{"inspect", "--store", ""}, {"--store is empty"}},
        BadLine{{"inspect", "--store", "x", "--verfy"}, {"--verify", "prehoc inspect --help"}},
        BadLine{{"inspekt"}, {"did you mean inspect?"}},
        BadLine{{"doctor", "--test-size", "12"}, {"--test-size", "at least"}},
        BadLine{{"doctor", "--model", "x"}, {"--model", "prehoc doctor --help"}}));

TEST(OptionsTest, BudgetsMustFitTheMachine) {
  AnswerOptions options;
  options.device_budget = 3 * kGiB;
  options.host_budget = 3 * kGiB;
  EXPECT_OK(CheckAnswerOptions(options, 6 * kGiB));
  EXPECT_OK(CheckAnswerOptions(options, 0));
  EXPECT_STATUS(StatusCode::kInvalid, "together", CheckAnswerOptions(options, 5 * kGiB));
  EXPECT_STATUS(StatusCode::kInvalid, "--device-budget", CheckAnswerOptions(options, 2 * kGiB));
  options.device_budget = kGiB;
  EXPECT_STATUS(StatusCode::kInvalid, "--host-budget", CheckAnswerOptions(options, 2 * kGiB));
}

TEST(OptionsTest, CodesReadBackAsTheyPrint) {
  for (const char* text : {"2/16", "3/64", "5/64", "4/64", "8/16+norms", "4/64+dither", "2/16+norms+dither"}) {
    EXPECT_EQ(CodesToString(*ParseCodes(text)), text);
  }
  EXPECT_EQ(*ParseCodes("4/16+dither+norms"), (CodeFormat{4, 16, true, true}));
}

}  // namespace
}  // namespace prehoc::cli
