// The flags of `prehoc fidelity`.
#pragma once
#include <string>
#include <vector>

#include "base/result.h"
#include "integrations/cli/fidelity_plan.h"
#include "integrations/cli/flag_values.h"

namespace prehoc::cli {

// Values as typed.
struct RawFidelity {
  std::string model, lora, document, context, steps;
  std::string selectors, budgets, codes;
  std::vector<std::string> set, sweep;
  std::string tasks, task_sets, generate, calibrate, calibrate_knob, calibrate_units, calibration;
  std::string audit_every, device_factor, store, store_budget, max_minutes, seed, threads, device, prompt_precision, kernels, json, html;
};

void AddFidelityFlags(CLI::App& app, RawFidelity& raw);

// kInvalid: one line that names the flag, what was wrong and what to do. Plans the runs once, so that a knob or budget
// that no run can take is known here.
Result<FidelityOptions> ReadFidelity(const Flags& flags, const RawFidelity& raw);

}  // namespace prehoc::cli
