// A calibration that holds, for the tests of the reader and of `prehoc answer --calibration`.
#pragma once
#include <string>

#include "integrations/cli/calibration_file.h"

namespace prehoc::cli {

inline CalibrationFile GoodCalibration() {
  CalibrationFile file;
  file.model_fingerprint = std::string(60, 'a') + "0123";
  file.model_name = "tiny";
  file.text_path = "verses.txt";
  file.text_sha256 = std::string(64, 'b');
  PREHOC_CHECK(file.selector.Set("budget", "128").ok() && file.selector.Set("tc.tau", "0.7").ok() && file.selector.Set("tc.theta", "0.0001").ok());
  file.codes = {8, 16, true};
  file.knob = "tc.tau";
  file.value = "0.7";
  file.units = 500;
  file.violations = 12;
  file.upper_limit = ClopperPearsonUpper(12, 500, file.claim.delta_c());
  file.unprotected = {"0.3", "12.0"};
  file.least_prompt_tokens = 500;
  file.most_prompt_tokens = 2000;
  return file;
}

}  // namespace prehoc::cli
