// Gathers the losses of a calibration (docs/calibration.md): requests cut from the document, each run in closed loop at every value of
// the knob, audited at one step.
#pragma once
#include <nlohmann/json.hpp>
#include <optional>

#include "integrations/cli/calibration_file.h"
#include "integrations/cli/fidelity_lab.h"

namespace prehoc::cli {

struct CalibrationRun {
  nlohmann::ordered_json json;          // the schema's `calibration`
  std::optional<CalibrationFile> file;  // if the claim can be made
  Status refusal;                       // else why not
};

struct CalibrationSize {
  int64_t units = 0, points = 0;  // requests, and values of the knob that each is run at
};

// What a calibration will run. kInvalid: fewer units than the claim takes (says how many), a document without room for them, or a
// knob that the selector does not use.
Result<CalibrationSize> PlanCalibration(const LabTask& task, int64_t context);

// The selector is the last of --selectors, at the first of --budgets, its knobs as --set; the grid is --calibrate-knob, from the safest
// value on. Units are windows of the document that do not overlap, `context` tokens each. nullopt after an interruption.
// kInvalid as PlanCalibration(), and where even the safest value protects no head.
Result<std::optional<CalibrationRun>> Calibrate(const LabTask& task, int64_t context);

}  // namespace prehoc::cli
