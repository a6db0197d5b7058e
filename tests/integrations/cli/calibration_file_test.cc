// The calibration file: round trip, every refusal of a foreign one, and flags that agree or contradict.
#include "integrations/cli/calibration_file.h"

#include <gtest/gtest.h>

#include <vector>

#include "integrations/cli/exit_code.h"
#include "tests/integrations/cli/calibration_test_files.h"
#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

// `text` with `from` replaced by `to`; `from` must be there.
std::string With(std::string text, std::string_view from, std::string_view to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

Result<CalibrationFile> Parse(std::string_view text) { return ParseCalibration(text, "--calibration c.json"); }

TEST(CalibrationFileTest, IsReadAsWritten) {
  const std::string text = FormatCalibration(GoodCalibration());
  const auto file = Parse(text);
  ASSERT_OK(file);
  EXPECT_EQ(FormatCalibration(*file), text);
  EXPECT_EQ(file->selector.Describe(), GoodCalibration().selector.Describe());
  EXPECT_EQ(file->codes, (CodeFormat{8, 16, true}));
  EXPECT_EQ(file->claim, CalibrationClaim());
  EXPECT_EQ(file->value, "0.7");
  EXPECT_EQ(file->unprotected, (std::vector<std::string>{"0.3", "12.0"}));
  EXPECT_EQ(file->most_prompt_tokens, 2000);
}

TEST(CalibrationFileTest, ConformalHasNoConfidence) {
  CalibrationFile file = GoodCalibration();
  file.claim.method = CalibrationMethod::kConformal;
  file.upper_limit = 13.0 / 501;
  const std::string text = FormatCalibration(file);
  EXPECT_NE(text.find("\"confidence\": null"), std::string::npos);
  ASSERT_OK(Parse(text));
  EXPECT_STATUS(StatusCode::kCorrupt, "conformal has none", Parse(With(text, "\"confidence\": null", "\"confidence\": 0.9")));
}

TEST(CalibrationFileTest, EveryMissingFieldIsNamed) {
  const std::string text = FormatCalibration(GoodCalibration());
  for (const std::string key : {"model", "text", "selector", "calibrated", "method", "alpha", "confidence", "delta_max", "units",
                                "violations", "upper_limit", "guarantee", "unprotected", "prompt_tokens"}) {
    const std::string renamed = With(text, "\n  \"" + key + "\":", "\n  \"x\":");
    EXPECT_STATUS(StatusCode::kCorrupt, "--calibration c.json: field " + key + " is missing; found ", Parse(renamed));
    EXPECT_STATUS(StatusCode::kCorrupt, "schema", Parse(renamed));
  }
  EXPECT_STATUS(StatusCode::kCorrupt, "field model.fingerprint is missing; found name, print", Parse(With(text, "fingerprint", "print")));
  EXPECT_STATUS(StatusCode::kCorrupt, "field prompt_tokens.to is missing", Parse(With(text, "\"to\"", "\"until\"")));
}

TEST(CalibrationFileTest, WhatIsWrongIsNamedWithWhatWasFound) {
  const std::string text = FormatCalibration(GoodCalibration());
  const auto refused = [&](std::string_view from, std::string_view to, std::string_view says) {
    EXPECT_STATUS(StatusCode::kCorrupt, says, Parse(With(text, from, to)));
  };
  refused("\"units\"", "\"more\": 1, \"units\"", "unknown field more; known: schema");
  refused(std::string(64, 'b'), "bbb", "text.sha256 \"bbb\": expected 64 hex digits");
  refused("\"rcps\"", "\"magic\"", "method \"magic\": expected rcps or conformal");
  refused("\"alpha\": 0.05", "\"alpha\": 2", "alpha=2: accepted");
  refused("\"alpha\": 0.05", "\"alpha\": \"x\"", "alpha");
  refused("\"confidence\": 0.9", "\"confidence\": null", "rcps needs one");
  refused("\"violations\": 12", "\"violations\": 11", "11 violations in 500 units give");
  refused("\"violations\": 12", "\"violations\": 501", "violations");
  refused("\"units\": 500", "\"units\": null", "field units is null");
  refused("\"units\": 500", "\"units\": 1e300", "units");
  refused("\"alpha\": 0.05", "\"alpha\": 0.03", "exceeds alpha 0.0300");
  refused("in at most 0.05", "in none", "guarantee \"with confidence 0.9");
  refused("\"12.0\"", "\"12\"", "unprotected \"12\"");
  refused("\"12.0\"", "\"12.x\"", "LAYER.HEAD");
  refused("\"12.0\"", "\"012.0\"", "LAYER.HEAD");
  refused("\"to\": 2000", "\"to\": 499", "prompt_tokens.to");
  refused("\"codes\": \"8/16+norms\"", "\"codes\": \"9/9\"", "selector.codes \"9/9\"");
  refused("\"name\": \"tc\"", "\"name\": \"tk\"", "no selector \"tk\"");
  refused("\"name\": \"tc\"", "\"name\": \"t\\u001bc\"", "selector.name \"t?c\" holds control characters");
  refused("\"tc.tau=0.7\"", "\"tc.tau\"", "\"tc.tau\": expected NAME=VALUE");
  refused("\"tc.tau=0.7\"", "\"tc.tua=0.7\"", "no knob \"tc.tua\"");
  refused("\"tc.tau=0.7\"", "\"tc.lag=0\"", "expected \"tc.max_age=16\", found \"tc.lag=0\"");
  refused("\"tc.tau=0.7\"", "\"tc.tau=0.7\", \"cis.r=1\"", "found \"cis.r=1\"");
  refused("\"tc.theta=1e-04\"", "\"tc.theta=auto\"", "differs from tier to tier");
  refused("\"value\": \"0.7\"", "\"value\": \"0.8\"", "calibrated \"tc.tau=0.8\": not among selector.knobs");
  refused("\"units\": 500", "\"units\": 500, \"units\": 501", "twice");
}

TEST(CalibrationFileTest, OtherSchemasAndOtherFiles) {
  const std::string text = FormatCalibration(GoodCalibration());
  EXPECT_STATUS(StatusCode::kUnsupported, "schema \"prehoc.calibration/2\"; expected \"prehoc.calibration/1\"",
                Parse(With(text, "calibration/1", "calibration/2")));
  EXPECT_STATUS(StatusCode::kUnsupported, "field schema is missing or no text; found a", Parse(R"({"a": 1})"));
  EXPECT_STATUS(StatusCode::kUnsupported, "schema", Parse(R"({"schema": 1})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "not a JSON object", Parse(text.substr(0, text.size() / 2)));
  EXPECT_STATUS(StatusCode::kCorrupt, "not a JSON object", Parse(""));
  EXPECT_STATUS(StatusCode::kCorrupt, "nests deeper", Parse("{\"a\":" + std::string(100, '[')));
  EXPECT_STATUS(StatusCode::kCorrupt, "more than 1 MiB", Parse(text + std::string(kMaxCalibrationBytes, ' ')));
}

TEST(CalibrationFileTest, IsReadFromAndWrittenToDisk) {
  TempDir dir;
  const std::string path = dir.path() + "/c.json";
  EXPECT_STATUS(StatusCode::kNotFound, "--calibration " + path, ReadCalibration(path));
  EXPECT_STATUS(StatusCode::kUnsupported, "a directory", ReadCalibration(dir.path()));
  auto out = OutputFile::Create("--out", path);
  ASSERT_OK(out);
  CalibrationFile broken = GoodCalibration();
  broken.violations = 100;
  EXPECT_STATUS(StatusCode::kCorrupt, "upper_limit", WriteCalibration(broken, &*out));
  EXPECT_FALSE(std::filesystem::exists(path));
  ASSERT_OK(WriteCalibration(GoodCalibration(), &*out));
  const auto file = ReadCalibration(path);
  ASSERT_OK(file);
  EXPECT_EQ(FormatCalibration(*file), FormatCalibration(GoodCalibration()));
  WriteFile(path, std::string(kMaxCalibrationBytes + 100, ' '));
  EXPECT_STATUS(StatusCode::kCorrupt, "more than 1 MiB", ReadCalibration(path));
}

// --- flags beside it --------------------------------------------------------------------------------------------

Result<AnswerOptions> Applied(std::vector<std::string> args) {
  args.insert(args.begin(), {"answer", "--calibration", "c.json"});
  PREHOC_ASSIGN_OR_RETURN(Command command, ParseCommandLine(args));
  PREHOC_RETURN_IF_ERROR(ApplyCalibration(GoodCalibration(), &command.answer));
  return command.answer;
}

TEST(CalibrationFlagsTest, TheFileDecides) {
  const auto options = Applied({});
  ASSERT_OK(options);
  EXPECT_EQ(options->calibration, "c.json");
  EXPECT_EQ(options->selector.tc.tau, 0.7);
  EXPECT_EQ(options->selector.budget.tokens, 128);
  EXPECT_EQ(options->codes, (CodeFormat{8, 16, true}));
}

TEST(CalibrationFlagsTest, FlagsThatAgreeAreTaken) {
  EXPECT_OK(Applied({"--selector", "tc", "--budget", "128", "--set", "tc.tau=0.70", "--set", "tc.lag=0", "--codes", "8/16+norms",
                     "--max-dropped-mass", "off"}));
}

TEST(CalibrationFlagsTest, FlagsThatContradictAreRefusedWithBothValues) {
  const auto refused = [](std::vector<std::string> args, std::string_view says) {
    EXPECT_STATUS(StatusCode::kInvalid, says, Applied(std::move(args)));
  };
  refused({"--selector", "cis"}, "--selector cis contradicts --calibration c.json, where selector is tc");
  refused({"--budget", "1/32"}, "--budget 1/32 contradicts --calibration c.json, where budget is 128");
  refused({"--set", "tc.tau=0.8"}, "--set tc.tau=0.8 contradicts --calibration c.json, where tc.tau is 0.7");
  refused({"--codes", "4/64"}, "--codes 4/64 contradicts --calibration c.json, where codes is 8/16+norms");
  refused({"--max-dropped-mass", "0.1"}, "where max_dropped_mass is off");
  refused({"--set", "cis.r=1"}, "the selector tc of --calibration c.json does not use cis.r");
}

TEST(CalibrationFlagsTest, WhatNoFileCouldMeanIsRefusedAtOnce) {
  const auto refused = [](std::vector<std::string> args, std::string_view says) {
    args.insert(args.begin(), {"answer", "--calibration", "c.json"});
    EXPECT_STATUS(StatusCode::kInvalid, says, ParseCommandLine(args));
  };
  refused({"--set", "tc.tua=1"}, "--set: no knob");
  refused({"--set", "tc.tau"}, "KNOB=VALUE");
  refused({"--set", "selector=tc"}, "choose it with --selector");
  refused({"--budget", "x"}, "--budget");
  refused({"--codes", "9/9"}, "--codes");
  refused({"--show-knobs"}, "--show-knobs: with --calibration");
}

TEST(CalibrationFlagsTest, AnotherModelIsRefusedWithBothFingerprints) {
  const CalibrationFile file = GoodCalibration();
  EXPECT_OK(CheckCalibratedModel(file, "c.json", file.model_fingerprint, "--model m"));
  const std::string other(64, 'c');
  const Status status = CheckCalibratedModel(file, "c.json", other, "--model m");
  EXPECT_STATUS(StatusCode::kUnsupported, "--calibration c.json: made for model tiny with fingerprint " + file.model_fingerprint, status);
  EXPECT_STATUS(StatusCode::kUnsupported, "--model m has " + other, status);
}

TEST(CalibrationFlagsTest, TheBandHasBothEnds) {
  const CalibrationFile file = GoodCalibration();
  EXPECT_EQ(OutsideBand(file, 500), "");
  EXPECT_EQ(OutsideBand(file, 2000), "");
  EXPECT_EQ(OutsideBand(file, 499), "the prompt has 499 tokens, and prompts of 500 to 2,000 were calibrated: nothing is promised for it");
  EXPECT_NE(OutsideBand(file, 2001), "");
}

}  // namespace
}  // namespace prehoc::cli
