#include "integrations/cli/fidelity_flags.h"

#include <algorithm>
#include <optional>

#include "integrations/cli/options.h"

namespace prehoc::cli {
namespace {

// Leaves `out` alone if the flag was not given.
Status ReadReal(const Flags& flags, const char* flag, const std::string& text, double least, double most, double* out) {
  if (!flags.Given(flag)) return {};
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value >= least && value <= most)) {
    return Bad(flag, text, "a number from " + std::to_string(static_cast<int64_t>(least)) + " to " + std::to_string(static_cast<int64_t>(most)));
  }
  *out = value;
  return {};
}

Status ReadTexts(const Flags& flags, const RawFidelity& raw, FidelityOptions* o) {
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--model", raw.model, &o->model));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--lora", raw.lora, &o->lora));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--document", raw.document, &o->document));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--store", raw.store, &o->store));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--json", raw.json, &o->json));
  PREHOC_RETURN_IF_ERROR(ReadText(flags, "--html", raw.html, &o->html));
  return ReadText(flags, "--calibration", raw.calibration, &o->calibration);
}

Status ReadNumbers(const Flags& flags, const RawFidelity& raw, FidelityOptions* o) {
  constexpr int64_t kMostTokens = int64_t{1} << 30;
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--context", raw.context, 16, kMostTokens, &o->context));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--steps", raw.steps, 1, 100'000, &o->steps));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--task-sets", raw.task_sets, 1, 1000, &o->task_sets));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--generate", raw.generate, 0, 100'000, &o->generate));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--calibrate-units", raw.calibrate_units, 1, 1'000'000, &o->calibrate_units));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int64_t>(flags, "--audit-every", raw.audit_every, 1, kMostTokens, &o->audit_every));
  PREHOC_RETURN_IF_ERROR(ReadWhole<uint64_t>(flags, "--seed", raw.seed, 0, uint64_t{1} << 53, &o->seed));
  PREHOC_RETURN_IF_ERROR(ReadWhole<int>(flags, "--threads", raw.threads, 1, 1024, &o->threads));
  PREHOC_RETURN_IF_ERROR(ReadReal(flags, "--device-factor", raw.device_factor, 1, 1000, &o->device_factor));
  PREHOC_RETURN_IF_ERROR(ReadReal(flags, "--max-minutes", raw.max_minutes, 1, 100'000, &o->max_minutes));
  return ReadBytes(flags, "--store-budget", raw.store_budget, uint64_t{16} << 20, &o->store_budget);
}

Status ReadLists(const Flags& flags, const RawFidelity& raw, FidelityOptions* o) {
  if (flags.Given("--selectors")) {
    PREHOC_ASSIGN_OR_RETURN(o->selectors, ParseSelectorList(raw.selectors));
  }
  if (flags.Given("--budgets")) {
    PREHOC_ASSIGN_OR_RETURN(o->budgets, ParseBudgetList(raw.budgets));
  }
  if (flags.Given("--tasks")) {
    PREHOC_ASSIGN_OR_RETURN(o->tasks, ParseTaskList(raw.tasks));
  }
  if (flags.Given("--codes")) {
    PREHOC_ASSIGN_OR_RETURN(o->codes, ParseCodes(raw.codes));
  }
  for (const std::string& text : raw.sweep) {
    PREHOC_ASSIGN_OR_RETURN(const std::vector<Sweep> more, ParseSweeps(text));
    o->sweeps.insert(o->sweeps.end(), more.begin(), more.end());
  }
  for (const std::string& assignment : raw.set) {
    const size_t equals = assignment.find('=');
    if (equals == std::string::npos) return Bad("--set", assignment, "KNOB=VALUE, such as tc.tau=0.7");
    o->set.emplace_back(assignment.substr(0, equals), assignment.substr(equals + 1));
    if (o->set.back().first == "selector" || o->set.back().first == "budget") {
      return UsageError("--set " + o->set.back().first + ": give --selectors or --budgets");
    }
  }
  return {};
}

Status ReadCalibrate(const Flags& flags, const RawFidelity& raw, FidelityOptions* o) {
  if (flags.Given("--calibrate")) {
    const Result<CalibrationClaim> claim = CalibrationClaim::Parse(raw.calibrate);
    if (!claim.ok()) return UsageError("--calibrate: " + claim.status().message());
    o->calibrate = *claim;
  }
  for (const char* flag : {"--calibrate-knob", "--calibrate-units", "--calibration"}) {
    if (flags.Given(flag) && !o->calibrate) return UsageError(std::string(flag) + ": there is nothing to calibrate; say what with --calibrate");
  }
  return ReadText(flags, "--calibrate-knob", raw.calibrate_knob, &o->calibrate_knob);
}

}  // namespace

void AddFidelityFlags(CLI::App& app, RawFidelity& raw) {
  const char* what = "What is measured";
  AddText(app, "--model", raw.model, "NAME|FILE|DIR", "smollm2-135m (default), smollm2-128k, a .gguf file or a Hugging Face directory", what);
  AddText(app, "--lora", raw.lora, "DIR", "PEFT adapter, merged when the model is loaded", what);
  AddText(app, "--document", raw.document, "FILE", "UTF-8 text; default: the King James text", what);
  AddText(app, "--context", raw.context, "N", "tokens of the document, from its start; default 8192 or all of it", what);
  AddText(app, "--steps", raw.steps, "N", "of them, the last ones, fed one by one and audited; default 128", what);
  AddText(app, "--tasks", raw.tasks, "LIST", "facts hidden in the document and asked for: needle, multikey, multivalue, extract", what);
  AddText(app, "--task-sets", raw.task_sets, "N", "contexts per task; default 1", what);
  AddText(app, "--generate", raw.generate, "N", "tokens of closed-loop generation; default 0", what);

  const char* method = "How positions are chosen";
  AddText(app, "--selectors", raw.selectors, "LIST", "default dense,window,oracle,cis,tc; dense is always run, as the reference", method);
  AddText(app, "--budgets", raw.budgets, "LIST", "positions per KV head and step; default 1/16", method);
  app.add_option("--sweep", raw.sweep, "one knob at several values, such as cis.tau=0.5:0.9:0.1, codes=2/16|4/64 or rows=int8|e4m3; may be repeated")
      ->type_name("KNOB=VALUES")->group(method)->allow_extra_args(false);
  app.add_option("--set", raw.set, "any knob, for every selector that uses it; may be repeated")
      ->type_name("KNOB=VALUE")->group(method)->allow_extra_args(false);
  AddText(app, "--codes", raw.codes, "BITS/TOKENS", "index codes, as for answer; default 4/64", method);
  AddText(app, "--device-factor", raw.device_factor, "C", "rows kept on the device per KV head: C times the budget; default 4", method);

  const char* calibrate = "Calibration";
  AddText(app, "--calibrate", raw.calibrate, "CLAIM", "for example \"max_dropped_mass<=0.05 alpha=0.1\"", calibrate);
  AddText(app, "--calibrate-knob", raw.calibrate_knob, "KNOB=VALUES", "from the safest value on; default: the budget", calibrate);
  AddText(app, "--calibrate-units", raw.calibrate_units, "N", "requests that are run; default: as many as the claim takes, and half as many again", calibrate);
  AddText(app, "--calibration", raw.calibration, "FILE", "what answer --calibration reads; written if the claim can be made", calibrate);

  const char* run = "How it runs";
  AddText(app, "--audit-every", raw.audit_every, "N", "steps between audits with exact scores; default 1", run);
  AddText(app, "--store", raw.store, "DIR", "keeps prompts between runs; default: one per model in the cache directory", run);
  AddText(app, "--store-budget", raw.store_budget, "SIZE", "default 16GiB", run);
  AddText(app, "--max-minutes", raw.max_minutes, "N", "refuses to start what is expected to take longer; default 60", run);
  AddText(app, "--seed", raw.seed, "N", "of everything drawn at random; default 1", run);
  AddText(app, "--threads", raw.threads, "N", "default: one per CPU", run);
  AddText(app, "--device", raw.device, "NAME", "cpu or cuda; default: cpu, which has every method and bound", run);
  AddText(app, "--prompt-precision", raw.prompt_precision, "NAME", "of a prompt's products with --device cuda: fp32 (default), or half, which rounds activations to 16 bits, as serving engines do, and takes half the time", run);
  AddText(app, "--kernels", raw.kernels, "NAME", "reference, avx2 or avx512; default: the fastest that runs here", run);
  AddText(app, "--json", raw.json, "FILE", "all figures; what it already holds of the same command is not run again", run);
  AddText(app, "--html", raw.html, "FILE", "one page with plots; needs no network", run);
}

Result<FidelityOptions> ReadFidelity(const Flags& flags, const RawFidelity& raw) {
  FidelityOptions options;
  PREHOC_RETURN_IF_ERROR(ReadTexts(flags, raw, &options));
  PREHOC_RETURN_IF_ERROR(ReadNumbers(flags, raw, &options));
  PREHOC_RETURN_IF_ERROR(ReadLists(flags, raw, &options));
  PREHOC_RETURN_IF_ERROR(ReadCalibrate(flags, raw, &options));
  PREHOC_RETURN_IF_ERROR(ReadDevice(flags, raw.device, raw.kernels, &options.cuda));
  PREHOC_RETURN_IF_ERROR(ReadPromptPrecision(flags, raw.prompt_precision, &options.prompt_precision));
  if (flags.Given("--kernels")) {
    PREHOC_RETURN_IF_ERROR(CheckKernelsName(raw.kernels));
    options.kernels = raw.kernels;
  }
  PREHOC_RETURN_IF_ERROR(PlanRuns(options).status());
  return options;
}

}  // namespace prehoc::cli
