#include "integrations/cli/fidelity_calibrate.h"

#include <algorithm>
#include <limits>
#include <random>
#include <set>
#include <utility>

#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/options.h"
#include "integrations/cli/progress.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;
using Head = std::pair<int32_t, int32_t>;  // layer, query head

constexpr int64_t kPilotUnits = 2;   // not part of the sample: they only say which heads can be protected at all
constexpr int64_t kMostSteps = 16;   // the audited step is drawn from the first so many of a request's answer
constexpr int64_t kSplits = 20;
constexpr char kDefaultGrid[] = "budget=1/2|1/4|1/8|1/16|1/32";

// The largest dropped mass of every head over the steps of interest.
class LossObserver : public AuditObserver {
 public:
  explicit LossObserver(int64_t first_step) : first_step_(first_step) {}
  void OnUnit(const AuditedUnit& unit) override {
    if (unit.step < first_step_) return;
    for (int32_t h = 0; h < unit.heads; ++h) {
      // A layer that attends to everything drops nothing.
      const double dropped = unit.dropped.empty() ? 0 : unit.dropped[static_cast<size_t>(h)];
      double& most = losses_[{unit.layer, unit.first_head + h}];
      most = dropped <= most ? most : dropped;  // NaN counts
    }
  }
  const std::map<Head, double>& losses() const { return losses_; }

 private:
  const int64_t first_step_;
  std::map<Head, double> losses_;
};

class Calibrator {
 public:
  Calibrator(const LabTask& task, int64_t context)
      : task_(task), claim_(*task.options.calibrate), context_(context), random_(task.options.seed) {}

  Result<CalibrationSize> Plan() {
    PREHOC_RETURN_IF_ERROR(MakeGrid());
    PREHOC_RETURN_IF_ERROR(CountUnits());
    return CalibrationSize{units_ + kPilotUnits, static_cast<int64_t>(runs_.size())};
  }

  Result<std::optional<CalibrationRun>> Run() {
    PREHOC_RETURN_IF_ERROR(Plan().status());
    PREHOC_ASSIGN_OR_RETURN(const bool piloted, Pilot());
    if (!piloted) return std::optional<CalibrationRun>();
    PREHOC_ASSIGN_OR_RETURN(const bool gathered, Gather());
    if (!gathered) return std::optional<CalibrationRun>();
    return Conclude();
  }

 private:
  Status MakeGrid() {
    const std::string text = task_.options.calibrate_knob.empty() ? kDefaultGrid : task_.options.calibrate_knob;
    auto sweeps = ParseSweeps(text);
    if (!sweeps.ok()) return UsageError("--calibrate-knob: " + sweeps.status().message());
    if (sweeps->size() != 1) return UsageError("--calibrate-knob \"" + text + "\": give one knob");
    grid_ = std::move(sweeps->front());
    FidelityOptions plan = task_.options;
    plan.selectors = {task_.options.selectors.back()};
    plan.budgets.resize(1);
    plan.sweeps.clear();
    PREHOC_ASSIGN_OR_RETURN(const std::vector<FidelityRun> base, PlanRuns(plan));
    if (base.size() != 2) return UsageError("--calibrate: the last of --selectors is dense, which has nothing to calibrate; name another last");
    for (const std::string& value : grid_.values) {
      FidelityRun run = base.back();
      const Status set = run.selector.Set(grid_.knob, value);
      if (!set.ok()) return UsageError("--calibrate-knob: " + set.message());
      if (!UsesKnob(run.selector, grid_.knob)) return UsageError("--calibrate-knob: the selector " + std::string(SelectorKindName(run.selector.kind)) + " does not use " + grid_.knob);
      PREHOC_RETURN_IF_ERROR(run.selector.Validate().WithContext("--calibrate-knob"));
      double& theta = run.selector.tc.theta;
      if (grid_.knob == "tc.theta" && theta == TwoClockOptions::kAuto) {
        return UsageError("--calibrate-knob tc.theta=auto: stands for a number that differs from tier to tier; give numbers");
      }
      // What is measured is promised wherever rows are, and here all are in host memory.
      if (theta == TwoClockOptions::kAuto) theta = TwoClockOptions::ThetaOfMemory(run.selector.budget.MiddleK(context_));
      runs_.push_back(std::move(run));
    }
    return {};
  }

  Status CountUnits() {
    const int64_t needed = UnitsNeeded(claim_);
    units_ = task_.options.calibrate_units > 0 ? task_.options.calibrate_units : needed + needed / 2;
    if (units_ < needed) {
      return UsageError("--calibrate-units " + FormatCount(units_) + ": this claim takes at least " + FormatCount(needed) +
                        " even if none violates; give more, a larger alpha or less confidence");
    }
    const int64_t room = static_cast<int64_t>(task_.document.size()) / context_;
    if (units_ + kPilotUnits <= room) return {};
    return UsageError("--calibrate: " + FormatCount(units_ + kPilotUnits) + " windows of " + FormatCount(context_) +
                      " tokens are needed that do not overlap, and the document has room for " + FormatCount(room) +
                      "; give a longer document, a smaller --context or a claim that takes fewer units");
  }

  std::span<const int32_t> Window(int64_t index) const {
    return task_.document.subspan(static_cast<size_t>(index * context_), static_cast<size_t>(context_));
  }

  // One request at one value: `steps` tokens of its own; audited from `first_step` on. nullopt after an interruption.
  Result<std::optional<std::map<Head, double>>> Request(const FidelityRun& run, int64_t window, int64_t steps, int64_t first_step) {
    LossObserver observer(first_step);
    std::vector<int32_t> prompt(static_cast<size_t>(context_));
    const reference::TokenizerSpec& spec = task_.loaded.tokenizer->spec();
    const size_t bos = spec.add_bos && spec.bos_id >= 0 ? 1 : 0;
    if (bos > 0) prompt[0] = spec.bos_id;
    std::copy_n(Window(window).begin(), prompt.size() - bos, prompt.begin() + static_cast<std::ptrdiff_t>(bos));
    SessionOptions options = LabSession(task_, run, context_, steps + 1);
    options.audit_every = std::max<int64_t>(1, first_step - 1);  // audits fall on 1, 1 + every, ...
    if (first_step != steps) options.audit_every = 1;
    options.observer = &observer;
    PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(task_.loaded.model, options));
    PREHOC_RETURN_IF_ERROR(session->Open(prompt));
    GenerateRequest request;
    request.prompt = prompt;
    request.restored = session->sequence().restored();
    request.piece_tokens = session->piece_tokens();
    request.max_new_tokens = steps + 1;  // the first decision is prefill's
    request.vocab = task_.loaded.model->config.vocab;
    GenerateHooks hooks;
    hooks.stop_requested = [] { return InterruptGuard::Requested(); };
    PREHOC_ASSIGN_OR_RETURN(const Generated generated, Generate(request, session->forward(), hooks, task_.clock));
    if (generated.stop == StopReason::kInterrupted) return std::optional<std::map<Head, double>>();
    PREHOC_RETURN_IF_ERROR(session->Flush());
    return std::optional(observer.losses());
  }

  // Heads that exceed delta_max even at the safest value cannot be protected by this knob.
  Result<bool> Pilot() {
    for (int64_t i = 0; i < kPilotUnits; ++i) {
      PREHOC_ASSIGN_OR_RETURN(const auto losses, Request(runs_.front(), units_ + i, kMostSteps, 1));
      if (!losses) return false;
      for (const auto& [head, loss] : *losses) {
        heads_.insert(head);
        if (!(loss <= claim_.delta_max)) unprotected_.insert(head);
      }
    }
    task_.err << "prehoc: " << heads_.size() - unprotected_.size() << " of " << heads_.size() << " heads stay within " << FormatNumber(claim_.delta_max)
              << " at " << grid_.knob << "=" << grid_.values.front() << " on two requests apart, and are protected" << std::endl;
    if (unprotected_.size() < heads_.size()) return true;
    return UsageError("--calibrate: no head keeps its dropped mass within " + FormatNumber(claim_.delta_max) + " at " + grid_.knob + "=" +
                      grid_.values.front() + ", so there is nothing to protect; begin --calibrate-knob further out, or claim less");
  }

  Result<bool> Gather() {
    ProgressBar bar(task_.err, task_.environment.stderr_terminal, "calibration", task_.clock);
    const auto points = static_cast<int64_t>(runs_.size());
    losses_.assign(static_cast<size_t>(units_ * points), 0);
    for (int64_t unit = 0; unit < units_; ++unit) {
      const auto step = static_cast<int64_t>(1 + random_() % static_cast<uint64_t>(kMostSteps));
      for (int64_t point = 0; point < points; ++point) {
        bar.Update(unit * points + point, units_ * points, "requests");
        PREHOC_ASSIGN_OR_RETURN(const auto losses, Request(runs_[static_cast<size_t>(point)], unit, step, step));
        if (!losses) return false;
        double worst = 0;
        for (const auto& [head, loss] : *losses) {
          if (!unprotected_.contains(head)) worst = loss <= worst ? worst : loss;
        }
        losses_[static_cast<size_t>(unit * points + point)] = worst;
      }
    }
    return true;
  }

  Result<std::optional<CalibrationRun>> Conclude() {
    const LossTable table{.units = units_, .grid = static_cast<int64_t>(runs_.size()), .losses = losses_};
    PREHOC_ASSIGN_OR_RETURN(const Calibration calibration, prehoc::Calibrate(table, claim_));
    // As many to calibrate on as the claim takes with none to spare is all that a split can leave out little of.
    const int64_t split = std::max(UnitsNeeded(claim_), units_ * 2 / 3);
    HeldOut held_out;
    if (split < units_) {
      PREHOC_ASSIGN_OR_RETURN(held_out, CheckHeldOut(table, claim_, split, kSplits, task_.options.seed));
    }
    CalibrationRun result;
    result.refusal = calibration.refusal;
    ordered_json curve = ordered_json::array();
    for (size_t i = 0; i < calibration.points.size(); ++i) {
      const GridPoint& point = calibration.points[i];
      curve.push_back({{"value", grid_.values[i]}, {"violations", point.violations}, {"units", point.units}, {"upper_limit", JsonNumber(point.upper_limit)}});
    }
    const bool chosen = calibration.chosen >= 0;
    const std::string value = chosen ? grid_.values[static_cast<size_t>(calibration.chosen)] : "";
    std::vector<std::string> unprotected;
    for (const auto& [layer, head] : unprotected_) unprotected.push_back(std::to_string(layer) + "." + std::to_string(head));
    result.json = {{"selector", SelectorKindName(runs_.front().selector.kind)}, {"knob", grid_.knob},
                   {"value", chosen ? ordered_json(value) : ordered_json(nullptr)}, {"delta_max", claim_.delta_max}, {"alpha", claim_.alpha},
                   {"confidence", claim_.method == CalibrationMethod::kRcps ? ordered_json(claim_.confidence) : ordered_json(nullptr)},
                   {"method", CalibrationMethodName(claim_.method)}, {"units", units_},
                   {"violations_held_out", held_out.splits > held_out.refused ? JsonNumber(held_out.mean_share) : ordered_json(nullptr)},
                   {"splits", held_out.splits}, {"splits_refused", held_out.refused}, {"splits_over_alpha", held_out.splits_over_alpha},
                   {"worst_held_out", held_out.splits > held_out.refused ? JsonNumber(held_out.worst_share) : ordered_json(nullptr)},
                   {"guarantee", chosen ? claim_.Guarantee() : "none: " + calibration.refusal.message()}, {"curve", curve},
                   {"heads", heads_.size()}, {"unprotected", unprotected}};
    if (!chosen) return std::optional<CalibrationRun>(std::move(result));
    CalibrationFile file;
    file.model_fingerprint = task_.loaded.fingerprint;
    file.model_name = task_.loaded.name;
    file.selector = runs_[static_cast<size_t>(calibration.chosen)].selector;
    file.codes = runs_.front().codes;
    file.knob = grid_.knob;
    file.value = ValueOf(file.selector);
    file.claim = claim_;
    const GridPoint& point = calibration.points[static_cast<size_t>(calibration.chosen)];
    file.units = point.units;
    file.violations = point.violations;
    file.upper_limit = point.upper_limit;
    file.unprotected = unprotected;
    file.least_prompt_tokens = file.most_prompt_tokens = context_;
    result.file = std::move(file);
    return std::optional<CalibrationRun>(std::move(result));
  }

  // As the selector prints it.
  std::string ValueOf(const SelectorOptions& selector) const {
    for (const std::string& line : selector.Describe()) {
      if (line.starts_with(grid_.knob + "=")) return line.substr(grid_.knob.size() + 1);
    }
    return "";
  }

  const LabTask& task_;
  const CalibrationClaim claim_;
  const int64_t context_;
  std::mt19937_64 random_;
  Sweep grid_;
  std::vector<FidelityRun> runs_;  // one per value
  int64_t units_ = 0;
  std::set<Head> heads_, unprotected_;
  std::vector<double> losses_;     // [units, grid]
};

}  // namespace

Result<CalibrationSize> PlanCalibration(const LabTask& task, int64_t context) { return Calibrator(task, context).Plan(); }

Result<std::optional<CalibrationRun>> Calibrate(const LabTask& task, int64_t context) { return Calibrator(task, context).Run(); }

}  // namespace prehoc::cli
