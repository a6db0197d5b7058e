// The file "prehoc.calibration/1" (docs/formats.md): a knob's calibrated value, what was promised with it, and for
// whom.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "integrations/cli/options.h"
#include "integrations/cli/output_file.h"
#include "selector/calibration.h"

namespace prehoc::cli {

inline constexpr char kCalibrationSchema[] = "prehoc.calibration/1";
inline constexpr size_t kMaxCalibrationBytes = size_t{1} << 20;

// Losses are violations (0/1), so that a reader can work the limit out again.
struct CalibrationFile {
  std::string model_fingerprint, model_name;  // 64 hex digits, lower case; for messages
  std::string text_path, text_sha256;         // what was calibrated on; for people
  SelectorOptions selector;                   // with all its knobs
  CodeFormat codes;
  std::string knob, value;                    // the calibrated one; part of `selector`
  CalibrationClaim claim;
  int64_t units = 0, violations = 0;
  double upper_limit = 1;                     // of the risk, at most claim.alpha
  std::vector<std::string> unprotected;       // heads that the claim leaves out, "LAYER.HEAD"; all others are protected
  int64_t least_prompt_tokens = 0, most_prompt_tokens = 0;  // the band of prompt lengths, both included
};

std::string FormatCalibration(const CalibrationFile& file);

// Reads what FormatCalibration() writes; `name` begins the message. kUnsupported: another schema. kCorrupt: no JSON
// object, over 1 MiB, a field that is missing, unknown, of another type or out of range (names it, and what was
// found), numbers that do not bear the promise out, or a sentence that says something else.
Result<CalibrationFile> ParseCalibration(std::string_view text, const std::string& name);

// As ParseCalibration(); also kNotFound, kIoError, kUnsupported (a directory). Messages begin with "--calibration
// PATH".
Result<CalibrationFile> ReadCalibration(const std::string& path);

// Refuses (kCorrupt) what ReadCalibration() would refuse; nothing is written then.
Status WriteCalibration(const CalibrationFile& file, OutputFile* out);

// Takes selector, knobs and codes from `file`. kInvalid if a flag of options->pinned says something else: names the
// flag and the file with both values.
Status ApplyCalibration(const CalibrationFile& file, AnswerOptions* options);

// kUnsupported, with both fingerprints, if `file` was made for another model. `flag` names this one: "--model NAME".
Status CheckCalibratedModel(const CalibrationFile& file, const std::string& path, const std::string& fingerprint,
                            const std::string& flag);

// Why the promise does not cover a prompt of this length; empty if it does.
std::string OutsideBand(const CalibrationFile& file, int64_t prompt_tokens);

}  // namespace prehoc::cli
