// A calibration file: any text.
#include "integrations/cli/calibration_file.h"
#include "tests/fuzz/fuzz_target.h"

using namespace prehoc;
using namespace prehoc::cli;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = ParseCalibration(fuzz::TextOf(data, size), "input");
  fuzz::CheckStatus(file.status());
  if (!file.ok()) {
    PREHOC_CHECK(file.status().code() == StatusCode::kCorrupt || file.status().code() == StatusCode::kUnsupported);
    return 0;
  }
  // What passes is written and read again as the same, and can be applied.
  const std::string text = FormatCalibration(*file);
  const auto again = ParseCalibration(text, "again");
  PREHOC_CHECK(again.ok() && FormatCalibration(*again) == text);
  AnswerOptions options;
  PREHOC_CHECK(ApplyCalibration(*file, &options).ok() && options.selector.Validate().ok());
  options.pinned = {{"--budget", "budget", "1/7"}, {"--codes", "codes", "8/16"}};
  fuzz::CheckStatus(ApplyCalibration(*file, &options));
  fuzz::CheckStatus(CheckCalibratedModel(*file, "input", std::string(64, '0'), "--model m"));
  PREHOC_CHECK(OutsideBand(*file, file->least_prompt_tokens).empty() && !OutsideBand(*file, 0).empty());
  return 0;
}
