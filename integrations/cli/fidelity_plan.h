// What `prehoc fidelity` is asked for, and the runs that follow from it: one per selector, budget and swept value.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/precision.h"
#include "base/result.h"
#include "kernels/function_table.h"
#include "selector/calibration.h"
#include "selector/options.h"

namespace prehoc::cli {

enum class FidelityTask : uint8_t { kNeedle, kMultiKey, kMultiValue, kExtract };
std::string_view FidelityTaskName(FidelityTask task);  // "needle", "multikey", "multivalue", "extract"

// One knob and the values it takes in turn, the others at their defaults. "codes" counts as a knob, and so does "rows", of every selector.
struct Sweep {
  std::string knob;
  std::vector<std::string> values;
  friend bool operator==(const Sweep&, const Sweep&) = default;
};

struct FidelityOptions {
  std::string command;         // the line as typed, for the record
  std::string model = "smollm2-135m", lora, document;
  int64_t context = 0;         // tokens; 0 = 8192, or what document and model have
  int64_t steps = 128;         // of the context, fed one by one
  std::vector<SelectorKind> selectors = {SelectorKind::kDense, SelectorKind::kWindow, SelectorKind::kOracle, SelectorKind::kCis,
                                         SelectorKind::kTwoClock};
  std::vector<std::string> budgets = {"1/16"};
  std::vector<Sweep> sweeps;
  std::vector<std::pair<std::string, std::string>> set;  // for every selector that uses the knob
  CodeFormat codes;
  std::vector<FidelityTask> tasks;
  int64_t task_sets = 1;       // contexts per task
  int64_t generate = 0;        // tokens of closed-loop generation
  std::optional<CalibrationClaim> calibrate;
  std::string calibrate_knob;  // with its grid, as in --sweep; empty = the budget of the first chosen selector
  int64_t calibrate_units = 0; // 0 = as many as the claim takes
  std::string calibration;     // file that is written
  int64_t audit_every = 1;     // steps
  double device_factor = 4;    // rows kept on the device per (layer, KV head) = factor * k
  std::string store;           // directory; empty = one per model in the cache directory
  uint64_t store_budget = uint64_t{16} << 30;  // [bytes]
  double max_minutes = 60;
  uint64_t seed = 1;
  int threads = 0;
  std::string kernels, json, html;
  bool cuda = false;  // --device cuda
  PromptPrecision prompt_precision = PromptPrecision::kSplit;
};

struct FidelityRun {
  std::string label;           // unique: "tc 1/16", "cis 1/16 cis.tau=0.7"
  SelectorOptions selector;
  CodeFormat codes;
  RowFormat rows = RowFormat::kF16;
  std::string budget;          // as asked for; empty for dense
  std::optional<std::pair<std::string, std::string>> swept;
  bool is_reference() const { return selector.kind == SelectorKind::kDense && rows == RowFormat::kF16; }
};

// Dense first, whether it was asked for or not; then as listed, budgets inside selectors, swept values after the run
// with the defaults. A value that a run has already makes no second one. kInvalid: a knob, value or budget that is not
// accepted, or a knob that no listed selector uses; the message begins with the flag.
Result<std::vector<FidelityRun>> PlanRuns(const FidelityOptions& options);

// "dense,tc". kInvalid with the nearest valid names; the list must not be empty or name something twice.
Result<std::vector<SelectorKind>> ParseSelectorList(std::string_view text);
Result<std::vector<FidelityTask>> ParseTaskList(std::string_view text);
// "1/32,1/16", "mass(0.95,cap=1/8)": commas inside parentheses do not separate.
Result<std::vector<std::string>> ParseBudgetList(std::string_view text);
// "cis.tau=0.5:0.9:0.1,tc.refresh=16|64": FROM:TO:STEP with both ends, or values apart. At most 1000 values a knob.
Result<std::vector<Sweep>> ParseSweeps(std::string_view text);

// Rows per (layer, KV head) that a run may keep on the device: factor times what it may choose at n visible positions.
int64_t DeviceSlots(const SelectorOptions& selector, double factor, int64_t n);

}  // namespace prehoc::cli
