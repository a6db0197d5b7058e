// One run of the laboratory: a selector through the whole pipeline over text, tasks and its own words, beside dense attention on the
// same tokens.
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "integrations/cli/compare.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/fidelity_observer.h"
#include "integrations/cli/fidelity_plan.h"
#include "integrations/cli/fidelity_tasks.h"
#include "integrations/cli/load.h"
#include "integrations/cli/session.h"

namespace prehoc::cli {

// Everything outlives the laboratory.
struct LabTask {
  const FidelityOptions& options;
  const Environment& environment;
  const LoadedModel& loaded;
  std::span<const int32_t> document;  // tokens, without BOS
  std::string store;                  // directory
  const KernelTable* kernels;         // null = the fastest
  std::ostream& err;                  // progress
  const Clock& clock;
};

// A session for laboratory runs: the device holds what --device-factor allows, the host everything, prompts go to the store, and
// what is generated does not. Neither audits nor observes yet.
SessionOptions LabSession(const LabTask& task, const FidelityRun& run, int64_t prompt_tokens, int64_t new_tokens);

class FidelityLab {
 public:
  explicit FidelityLab(const LabTask& task);

  // Decides on the context and makes the prompts. kInvalid: the document or the model is too short for what is asked.
  Status Prepare();
  int64_t context() const { return context_; }
  int64_t prompt_tokens() const { return static_cast<int64_t>(text_.prompt.size()); }
  int threads() const { return threads_; }

  // Expected seconds of `runs`, from a small prefill and a few steps run now. `parts` says where they go.
  struct Estimate {
    double seconds = 0, per_run = 0, prefill = 0, prompt = 0, step = 0;  // prompt: one of them
  };
  Result<Estimate> EstimateSeconds(const std::vector<FidelityRun>& runs);

  // The run as an object of the schema's `runs`; nullopt after an interruption. The first run must be dense: the others
  // are compared with it. `number` of `count` is for people.
  Result<std::optional<nlohmann::ordered_json>> Run(const FidelityRun& run, size_t number, size_t count);
  // From the dense run; null before it.
  const nlohmann::ordered_json& query_cosine() const { return query_cosine_; }

 private:
  struct Pass {              // tokens through one sequence
    std::string id;          // what the reference is kept under
    std::span<const int32_t> prompt, forced;  // forced: empty = its own decisions
    int64_t new_tokens = 0;  // without `forced`
    int64_t audit_every = 0;
    AuditObserver* observer = nullptr;
  };
  struct Passed {
    std::vector<int32_t> decisions;  // the first follows from prefill alone
    std::vector<double> kl;          // by decision; empty without a reference
    std::vector<double> nll;         // of the forced tokens
    SequenceReport report;
    int64_t steps = 0;
    double decode_seconds = 0;
    nlohmann::ordered_json residency;
  };
  struct Reference {
    std::vector<std::vector<float>> log_p;  // by decision
    std::vector<int32_t> decisions;
  };
  struct TaskSet {
    FidelityTask task;
    int64_t set = 0;
    TaskContext context;
    std::string id() const { return std::string(FidelityTaskName(task)) + "/" + std::to_string(set); }
  };

  SessionOptions OptionsFor(const FidelityRun& run, const Pass& pass) const;
  // nullopt after an interruption.
  Result<std::optional<Passed>> RunPass(const FidelityRun& run, const Pass& pass, const std::string& label);
  Result<bool> RunText(const FidelityRun& run, const std::string& label, nlohmann::ordered_json* json);
  Result<bool> RunTasks(const FidelityRun& run, const std::string& label, nlohmann::ordered_json* json);
  Result<bool> RunGeneration(const FidelityRun& run, const std::string& label, nlohmann::ordered_json* json);
  nlohmann::ordered_json ModelFigures(const Passed& passed, std::span<const int32_t> forced) const;
  nlohmann::ordered_json CostFigures(const Passed& passed) const;

  const LabTask task_;
  const KvGeometry geometry_;
  int64_t context_ = 0;
  int threads_ = 0;
  struct {
    std::vector<int32_t> prompt, forced;
  } text_;
  std::vector<TaskSet> sets_;
  std::map<std::string, Reference> references_;
  nlohmann::ordered_json query_cosine_;
};

}  // namespace prehoc::cli
