#include "integrations/cli/fidelity_plan.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "integrations/cli/exit_code.h"
#include "integrations/cli/nearest.h"
#include "integrations/cli/options.h"
#include "selector/selector.h"

namespace prehoc::cli {
namespace {

constexpr std::array<std::pair<std::string_view, FidelityTask>, 4> kTasks = {{
    {"needle", FidelityTask::kNeedle},
    {"multikey", FidelityTask::kMultiKey},
    {"multivalue", FidelityTask::kMultiValue},
    {"extract", FidelityTask::kExtract},
}};

// At commas that no parenthesis holds.
std::vector<std::string> SplitList(std::string_view text) {
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    depth += c == '(' ? 1 : c == ')' ? -1 : 0;
    if (c == ',' && depth <= 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::optional<double> Number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

// Steps of 0.1 from 0.5 shall read 0.6 and not 0.6 plus rounding.
std::string Print(double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::general, 6).ptr;
  return {buffer, end};
}

Result<std::vector<std::string>> ParseValues(const std::string& part, std::string_view text) {
  constexpr int64_t kMost = 1000;
  std::vector<std::string> values(1);
  for (const char c : text) {
    if (c == '|' || c == ':') values.emplace_back();
    else values.back() += c;
  }
  const bool range = text.find(':') != std::string_view::npos;
  const auto bad = [&](const char* why) {
    return UsageError("--sweep \"" + part + "\": " + why + "; give KNOB=FROM:TO:STEP or KNOB=VALUE|VALUE");
  };
  if (std::any_of(values.begin(), values.end(), [](const std::string& v) { return v.empty(); })) return bad("a value is empty");
  if (!range) return values;
  if (text.find('|') != std::string_view::npos || values.size() != 3) return bad("a range has three numbers");
  const auto from = Number(values[0]), to = Number(values[1]), step = Number(values[2]);
  if (!from || !to || !step) return bad("a range has three numbers");
  if (*step == 0 || (*to - *from) / *step < 0) return bad("the step does not lead from the first value to the last");
  const auto count = static_cast<int64_t>(std::min((*to - *from) / *step + 1e-9, 1e9)) + 1;
  if (count > kMost) return bad("that is over 1000 values");
  values.clear();
  for (int64_t i = 0; i < count; ++i) values.push_back(Print(*from + static_cast<double>(i) * *step));
  return values;
}

// Names or nothing: each once.
template <class T, class Parse>
Result<std::vector<T>> ParseNames(const char* flag, std::string_view text, const Parse& parse) {
  std::vector<T> all;
  for (const std::string& name : SplitList(text)) {
    const Result<T> value = parse(name);
    if (!value.ok()) return UsageError(std::string(flag) + ": " + value.status().message());
    if (std::find(all.begin(), all.end(), *value) != all.end()) return UsageError(std::string(flag) + ": " + name + " is named twice");
    all.push_back(*value);
  }
  return all;
}

Result<FidelityTask> ParseTask(std::string_view name) {
  std::vector<std::string> names;
  for (const auto& [known, task] : kTasks) {
    if (known == name) return task;
    names.emplace_back(known);
  }
  return {StatusCode::kInvalid, "\"" + std::string(name) + "\" is no task; did you mean " + std::string(Nearest(name, names)) +
                                    "? There are needle, multikey, multivalue and extract"};
}

bool UsesCodes(const SelectorOptions& options) {
  const auto selector = Selector::Create(options);
  return selector.ok() && (*selector)->NeedsCodes();
}
bool UsesSwept(const SelectorOptions& options, const std::string& knob) {
  return knob == "rows" || (knob == "codes" ? UsesCodes(options) : UsesKnob(options, knob));
}

class Planner {
 public:
  explicit Planner(const FidelityOptions& options) : options_(options), set_used_(options.set.size()), swept_(options.sweeps.size()) {}

  Result<std::vector<FidelityRun>> Plan() {
    FidelityRun dense;
    dense.label = "dense";
    dense.selector.kind = SelectorKind::kDense;
    dense.codes = options_.codes;
    runs_.push_back(dense);
    PREHOC_RETURN_IF_ERROR(AddSweepsOf(dense));
    for (const SelectorKind kind : options_.selectors) {
      if (kind == SelectorKind::kDense) continue;
      SelectorOptions selector;
      selector.kind = kind;
      if (!UsesKnob(selector, "budget")) {
        PREHOC_RETURN_IF_ERROR(AddWithSweeps(kind, ""));
        continue;
      }
      for (const std::string& budget : options_.budgets) PREHOC_RETURN_IF_ERROR(AddWithSweeps(kind, budget));
    }
    PREHOC_RETURN_IF_ERROR(CheckUsed());
    return std::move(runs_);
  }

 private:
  // One selector at one budget: as it is, then with each swept value.
  Status AddWithSweeps(SelectorKind kind, const std::string& budget) {
    FidelityRun run;
    run.selector.kind = kind;
    run.codes = options_.codes;
    run.budget = budget;
    run.label = std::string(SelectorKindName(kind)) + (budget.empty() ? "" : " " + budget);
    if (!budget.empty()) {
      const Status set = run.selector.Set("budget", budget);
      if (!set.ok()) return UsageError("--budgets: " + set.message());
    }
    for (size_t i = 0; i < options_.set.size(); ++i) {
      const auto& [knob, value] = options_.set[i];
      const Status set = run.selector.Set(knob, value);
      if (!set.ok()) return UsageError("--set: " + set.message());
      set_used_[i] = set_used_[i] || UsesKnob(run.selector, knob);
    }
    PREHOC_RETURN_IF_ERROR(Add(run));
    return AddSweepsOf(run);
  }

  Status AddSweepsOf(const FidelityRun& run) {
    for (size_t i = 0; i < options_.sweeps.size(); ++i) {
      const Sweep& sweep = options_.sweeps[i];
      if (!UsesSwept(run.selector, sweep.knob)) continue;
      swept_[i] = true;
      for (const std::string& value : sweep.values) PREHOC_RETURN_IF_ERROR(AddSwept(run, sweep.knob, value));
    }
    return {};
  }

  Status AddSwept(FidelityRun run, const std::string& knob, const std::string& value) {
    if (knob == "codes") {
      const Result<CodeFormat> codes = ParseCodes(value);
      if (!codes.ok()) return UsageError("--sweep codes: " + codes.status().message());
      run.codes = *codes;
    } else if (knob == "rows") {
      PREHOC_ASSIGN_OR_RETURN(run.rows, ParseRows("--sweep rows", value));
    } else {
      const Status set = run.selector.Set(knob, value);
      if (!set.ok()) return UsageError("--sweep: " + set.message());
    }
    run.swept = {knob, value};
    run.label += " " + knob + "=" + value;
    return Add(run);
  }

  Status Add(const FidelityRun& run) {
    const Status valid = run.selector.Validate();
    if (!valid.ok()) return UsageError(run.label + ": " + valid.message());
    const auto same = [&](const FidelityRun& other) {
      return other.selector.kind == run.selector.kind && other.selector.Describe() == run.selector.Describe() &&
             CodesToString(other.codes) == CodesToString(run.codes) && other.rows == run.rows;
    };
    if (std::none_of(runs_.begin(), runs_.end(), same)) runs_.push_back(run);
    return {};
  }

  Status CheckUsed() const {
    SelectorOptions scratch;
    for (size_t i = 0; i < options_.set.size(); ++i) {
      if (set_used_[i]) continue;
      // A knob that does not exist is told from one that is not used.
      const Status known = scratch.Set(options_.set[i].first, options_.set[i].second);
      return UsageError("--set: " + (known.ok() ? "no selector of --selectors uses " + options_.set[i].first : known.message()));
    }
    for (size_t i = 0; i < options_.sweeps.size(); ++i) {
      if (swept_[i]) continue;
      const std::string& knob = options_.sweeps[i].knob;
      const Status known = knob == "codes" || knob == "rows" ? Status() : scratch.Set(knob, options_.sweeps[i].values.front());
      return UsageError("--sweep: " + (known.ok() ? "no selector of --selectors uses " + knob : known.message()));
    }
    return {};
  }

  const FidelityOptions& options_;
  std::vector<FidelityRun> runs_;
  std::vector<bool> set_used_, swept_;
};

}  // namespace

std::string_view FidelityTaskName(FidelityTask task) {
  for (const auto& [name, known] : kTasks) {
    if (known == task) return name;
  }
  return "unknown";
}

Result<std::vector<FidelityRun>> PlanRuns(const FidelityOptions& options) { return Planner(options).Plan(); }

Result<std::vector<SelectorKind>> ParseSelectorList(std::string_view text) {
  return ParseNames<SelectorKind>("--selectors", text, [](const std::string& name) { return ParseSelectorKind(name); });
}

Result<std::vector<FidelityTask>> ParseTaskList(std::string_view text) {
  if (text == "none") return std::vector<FidelityTask>();
  return ParseNames<FidelityTask>("--tasks", text, [](const std::string& name) { return ParseTask(name); });
}

Result<std::vector<std::string>> ParseBudgetList(std::string_view text) {
  return ParseNames<std::string>("--budgets", text, [](const std::string& name) -> Result<std::string> {
    PREHOC_RETURN_IF_ERROR(Budget::Parse(name).status());
    return name;
  });
}

Result<std::vector<Sweep>> ParseSweeps(std::string_view text) {
  std::vector<Sweep> sweeps;
  for (const std::string& part : SplitList(text)) {
    const size_t equals = part.find('=');
    if (equals == 0 || equals == std::string::npos) {
      return UsageError("--sweep \"" + part + "\": give KNOB=FROM:TO:STEP or KNOB=VALUE|VALUE, such as cis.tau=0.5:0.9:0.1");
    }
    Sweep sweep{part.substr(0, equals), {}};
    PREHOC_ASSIGN_OR_RETURN(sweep.values, ParseValues(part, std::string_view(part).substr(equals + 1)));
    sweeps.push_back(std::move(sweep));
  }
  return sweeps;
}

int64_t DeviceSlots(const SelectorOptions& selector, double factor, int64_t n) {
  const Budget& budget = selector.budget;
  const int32_t k = budget.mass > 0 ? budget.MiddleCap(n) : budget.MiddleK(n);
  return static_cast<int64_t>(std::ceil(factor * k));
}

}  // namespace prehoc::cli
