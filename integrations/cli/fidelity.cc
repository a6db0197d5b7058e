#include "integrations/cli/fidelity.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/units.h"
#include "integrations/cli/document.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/fidelity_calibrate.h"
#include "integrations/cli/fidelity_lab.h"
#include "integrations/cli/fidelity_notes.h"
#include "integrations/cli/fidelity_report.h"
#include "integrations/cli/fidelity_table.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/load.h"
#include "integrations/cli/machine.h"
#include "integrations/cli/options.h"
#include "integrations/cli/output_file.h"
#include "integrations/cli/version.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

std::string Now() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

Result<std::string> ReadWholeFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return {StatusCode::kNotFound, path};
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// A report is made to be shown: it says which files, and a fingerprint says which bytes; where they lay is nobody's business.
std::string NameOf(const std::string& path) {
  const std::filesystem::path all(path);
  return (all.has_filename() ? all : all.parent_path()).filename().string();
}

class FidelityJob {
 public:
  FidelityJob(const FidelityOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock)
      : options_(options), environment_(environment), out_(out), err_(err), clock_(clock) {}

  // In this order: what is cheap to refuse first. An interruption is no error.
  Status Run() {
    PREHOC_ASSIGN_OR_RETURN(runs_, PlanRuns(options_));
    PREHOC_ASSIGN_OR_RETURN(kernels_, ChooseKernels(options_.kernels));
    PREHOC_ASSIGN_OR_RETURN(const ModelPaths paths, ResolveModel(options_.model, options_.lora, environment_));
    PREHOC_ASSIGN_OR_RETURN(const Document document, ReadDocument(options_.document, environment_));
    PREHOC_RETURN_IF_ERROR(CheckOutputs());
    PREHOC_ASSIGN_OR_RETURN(loaded_, Load(options_.model, paths, environment_, err_, clock_));
    PREHOC_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, loaded_.tokenizer->Encode(document.text, {.add_special = false, .parse_special = false}));
    PREHOC_ASSIGN_OR_RETURN(const std::string store, StoreDirectory());
    const LabTask lab_task{options_, environment_, loaded_, tokens, store, kernels_, err_, clock_};
    FidelityLab lab(lab_task);
    PREHOC_RETURN_IF_ERROR(lab.Prepare());
    Describe(document, static_cast<int64_t>(tokens.size()), lab);
    if (options_.calibrate) {
      PREHOC_ASSIGN_OR_RETURN(calibration_size_, PlanCalibration(lab_task, lab.context()));
    }
    PREHOC_RETURN_IF_ERROR(Resume());
    PREHOC_RETURN_IF_ERROR(RunAll(lab));
    if (options_.calibrate && !interrupted_) PREHOC_RETURN_IF_ERROR(RunCalibration(lab_task, lab.context(), document));
    return Finish();
  }

 private:
  // A place that cannot be written to is known before the work begins.
  Status CheckOutputs() const {
    if (!options_.json.empty()) PREHOC_RETURN_IF_ERROR(OutputFile::Create("--json", options_.json).status());
    if (!options_.html.empty()) PREHOC_RETURN_IF_ERROR(OutputFile::Create("--html", options_.html).status());
    if (!options_.calibration.empty()) PREHOC_RETURN_IF_ERROR(OutputFile::Create("--calibration", options_.calibration).status());
    return {};
  }

  Result<std::string> StoreDirectory() const {
    if (!options_.store.empty()) return options_.store;
    if (environment_.cache_dir.empty()) {
      return {StatusCode::kNotFound, "neither XDG_CACHE_HOME nor HOME is set, so there is no place for the prompts' KV; give --store DIR"};
    }
    const std::string directory = environment_.cache_dir + "/fidelity/" + loaded_.fingerprint.substr(0, 16);
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) return {StatusCode::kIoError, directory + ": " + error.message() + "; give --store DIR"};
    return directory;
  }

  void Describe(const Document& document, int64_t tokens, const FidelityLab& lab) {
    const reference::ModelConfig& config = loaded_.model->config;
    ordered_json& d = document_;
    d["schema"] = kFidelitySchema;
    d["complete"] = false;
    d["version"] = kVersion;
    d["command"] = options_.command;
    d["date"] = Now();
    d["seed"] = options_.seed;
    d["model"] = {{"name", loaded_.name}, {"path", NameOf(loaded_.paths.path)}, {"lora", NameOf(loaded_.paths.lora)}, {"fingerprint", loaded_.fingerprint},
                  {"architecture", config.architecture}, {"layers", config.layers}, {"heads", config.heads}, {"kv_heads", config.kv_heads},
                  {"head_dim", config.head_dim}, {"weight_bytes", loaded_.model->weight_bytes}};
    d["text"] = {{"path", NameOf(document.path)}, {"sha256", Sha256Hex(document.text)}, {"tokens", tokens}, {"context", lab.context()}, {"steps", options_.steps}};
    d["machine"] = {{"cpu", CpuName()}, {"threads", options_.threads}, {"kernels", options_.cuda ? "cuda" : kernels_ ? kernels_->name : BestCpuKernels().name},
                    {"prompt_precision", PromptPrecisionName(options_.prompt_precision)}};
    ordered_json tasks = ordered_json::array();
    for (const FidelityTask task : options_.tasks) tasks.push_back(FidelityTaskName(task));
    d["request"] = {{"tasks", tasks}, {"task_sets", options_.task_sets}, {"generate", options_.generate},
                    {"audit_every", options_.audit_every}, {"device_factor", options_.device_factor}};
    d["query_cosine"] = nullptr;
    d["runs"] = ordered_json::array();
    d["calibration"] = nullptr;
    d["notes"] = ordered_json::array();
  }

  // Takes over what the file already holds of the same measurement; refuses to write over another one.
  Status Resume() {
    if (options_.json.empty()) return {};
    const Result<std::string> text = ReadWholeFile(options_.json);
    if (!text.ok()) return {};  // there is none yet
    const std::string flag = "--json " + options_.json + ": ";
    const ordered_json old = ordered_json::parse(*text, nullptr, false);
    if (!old.is_object() || !old.contains("schema") || old["schema"] != kFidelitySchema || !old.contains("runs") || !old["runs"].is_array()) {
      return RuntimeError({StatusCode::kUnsupported, flag + "the file is there and is no fidelity run; give another name, or remove it"}, "");
    }
    const auto field = [](const ordered_json& d, const char* object, const char* name) {
      return d.contains(object) && d[object].is_object() && d[object].contains(name) ? d[object][name].dump() : std::string("nothing");
    };
    const std::pair<const char*, const char*> must_agree[] = {
        {"model", "fingerprint"}, {"text", "sha256"}, {"text", "context"}, {"text", "steps"}, {"request", "tasks"}, {"request", "task_sets"},
        {"request", "generate"}, {"request", "audit_every"}, {"request", "device_factor"}};
    for (const auto& [object, name] : must_agree) {
      const std::string was = field(old, object, name), is = field(document_, object, name);
      if (was == is) continue;
      return RuntimeError({StatusCode::kUnsupported, flag + "it holds runs with " + object + "." + name + " " + was + ", and this command has " + is +
                                                         "; give another file, or remove it"}, "");
    }
    if (old.value("seed", ordered_json()) != document_["seed"]) {
      return RuntimeError({StatusCode::kUnsupported, flag + "it holds runs of another --seed; give another file, or remove it"}, "");
    }
    if (old.value("version", "") != kVersion) {
      return RuntimeError({StatusCode::kUnsupported, flag + "it was written by version " + old.value("version", "unknown") + " and this is " + kVersion +
                                                         "; give another file, or remove it"}, "");
    }
    kept_ = old["runs"];
    document_["query_cosine"] = old.value("query_cosine", ordered_json());
    document_["calibration"] = old.value("calibration", ordered_json());
    return {};
  }

  // The run of the file that `run` would repeat; null if none.
  const ordered_json* Kept(const FidelityRun& run) const {
    for (const ordered_json& old : kept_) {
      if (!old.is_object() || old.value("label", "") != run.label) continue;
      if (old.value("knobs", ordered_json()) != ordered_json(run.selector.Describe())) continue;
      if (old.value("rows", "f16") != RowFormatName(run.rows)) continue;
      const std::string codes = old.value("codes", "");
      if (codes == "none" || codes == CodesToString(run.codes)) return &old;
    }
    return nullptr;
  }

  Status RunAll(FidelityLab& lab) {
    std::vector<FidelityRun> open;
    for (const FidelityRun& run : runs_) {
      if (!Kept(run)) open.push_back(run);
    }
    if (open.size() < runs_.size()) {
      err_ << "prehoc: " << options_.json << " has " << runs_.size() - open.size() << " of " << runs_.size() << " runs; the others follow" << std::endl;
    }
    if (!open.empty() || options_.calibrate) {
      if (!open.empty() && !open.front().is_reference()) open.insert(open.begin(), runs_.front());  // the reference is not kept in the file
      PREHOC_RETURN_IF_ERROR(CheckTime(lab, open));
    }
    size_t number = 0;
    for (const FidelityRun& run : runs_) {
      const bool due = std::any_of(open.begin(), open.end(), [&](const FidelityRun& other) { return other.label == run.label; });
      if (!due) {
        document_["runs"].push_back(*Kept(run));
        continue;
      }
      const int64_t start = clock_.NowNanos();
      PREHOC_ASSIGN_OR_RETURN(std::optional<ordered_json> done, lab.Run(run, ++number, open.size()));
      if (!done) {
        interrupted_ = true;
        break;
      }
      err_ << "[" << number << "/" << open.size() << "] " << run.label << ": " << FormatSeconds(clock_.SecondsSince(start)) << std::endl;
      document_["runs"].push_back(std::move(*done));
      if (!lab.query_cosine().is_null()) document_["query_cosine"] = lab.query_cosine();
      document_["machine"]["threads"] = lab.threads();
      PREHOC_RETURN_IF_ERROR(Write());
    }
    AddKept(&document_["runs"]);
    return {};
  }

  // What was in the file before this start stays in it, from the first time it is written anew: runs that come later in this
  // command, and those that it did not name.
  void AddKept(ordered_json* runs) const {
    for (const ordered_json& old : kept_) {
      if (!old.is_object()) continue;
      const bool there = std::any_of(runs->begin(), runs->end(), [&](const ordered_json& run) { return run.value("label", "") == old.value("label", ""); });
      if (!there) runs->push_back(old);
    }
  }

  Status CheckTime(FidelityLab& lab, const std::vector<FidelityRun>& open) {
    constexpr double kStepsOfARequest = 10;  // with what opening it costs
    PREHOC_ASSIGN_OR_RETURN(FidelityLab::Estimate estimate, lab.EstimateSeconds(open));
    const auto units = static_cast<double>(calibration_size_.units), points = static_cast<double>(calibration_size_.points);
    const double calibration = units * (estimate.prompt + points * (1 + kStepsOfARequest * estimate.step));
    estimate.seconds += calibration;
    if (units > 0) err_ << "prehoc: the calibration takes about " << FormatSeconds(calibration) << " of it" << std::endl;
    err_ << "prehoc: " << open.size() << " runs of about " << FormatSeconds(estimate.per_run) << ", and up to " << FormatSeconds(estimate.prefill)
         << " for prompts that are not stored yet: about " << FormatSeconds(estimate.seconds) << std::endl;
    if (estimate.seconds <= options_.max_minutes * 60) return {};
    std::string cut = "fewer --budgets or --selectors";
    if (!options_.sweeps.empty()) {
      size_t values = 0;
      for (const Sweep& sweep : options_.sweeps) values += sweep.values.size();
      cut = "the " + std::to_string(values) + " values of --sweep, " + cut;
    }
    if (!options_.tasks.empty()) cut += ", fewer --tasks";
    if (calibration > estimate.seconds / 2) cut = "the context or the values of the calibration, " + cut;
    if (estimate.prefill > estimate.per_run) cut += ", a smaller --context";
    return UsageError("this would take about " + FormatSeconds(estimate.seconds) + ", more than --max-minutes " + FormatNumber(options_.max_minutes) +
                      ": cut " + cut + ", or allow more with --max-minutes " + std::to_string(static_cast<int64_t>(estimate.seconds / 60) + 1));
  }

  Status RunCalibration(const LabTask& task, int64_t context, const Document& document) {
    PREHOC_ASSIGN_OR_RETURN(std::optional<CalibrationRun> run, Calibrate(task, context));
    interrupted_ = !run;
    if (!run) return {};
    document_["calibration"] = run->json;
    if (!run->file) {
      err_ << "prehoc: warning: --calibrate: " << run->refusal.message() << std::endl;
      return {};
    }
    run->file->text_path = NameOf(document.path);
    run->file->text_sha256 = Sha256Hex(document.text);
    if (options_.calibration.empty()) return {};
    PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--calibration", options_.calibration));
    return WriteCalibration(*run->file, &file);
  }

  // Choosing costs, per step, against the oracle at the same budget: exact keys of everything, every step.
  void CompareTimes() {
    const auto choosing = [](const ordered_json& run) {
      const ordered_json& t = run["cost"]["seconds_per_step"];
      return t["gate"].get<double>() + t["score"].get<double>() + t["choose"].get<double>();
    };
    for (ordered_json& run : document_["runs"]) {
      if (run["cost"]["saved"].is_null()) continue;
      for (const ordered_json& oracle : document_["runs"]) {
        if (oracle["role"] != "ceiling" || oracle["budget"] != run["budget"] || choosing(oracle) <= 0) continue;
        run["cost"]["saved"]["time"] = 1 - choosing(run) / choosing(oracle);
        break;
      }
    }
  }

  Status Write() {
    CompareTimes();
    document_["date"] = Now();
    document_["notes"] = FidelityNotes(document_);
    ordered_json whole = document_;
    AddKept(&whole["runs"]);
    const std::string json = whole.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
    if (!options_.json.empty()) {
      PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--json", options_.json));
      PREHOC_RETURN_IF_ERROR(file.Commit(json));
    }
    if (!options_.html.empty()) {
      PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--html", options_.html));
      // On one line: nobody reads it there, and it halves the page.
      PREHOC_RETURN_IF_ERROR(file.Commit(FormatFidelityReport(whole.dump(-1, ' ', false, ordered_json::error_handler_t::replace))));
    }
    return {};
  }

  Status Finish() {
    document_["complete"] = !interrupted_;
    PREHOC_RETURN_IF_ERROR(Write());
    out_ << FormatFidelityTable(document_) << std::flush;
    if (interrupted_) err_ << "prehoc: interrupted; " << (options_.json.empty() ? "without --json a new start begins afresh" : "the same command goes on from here") << std::endl;
    return {};
  }

  const FidelityOptions& options_;
  const Environment& environment_;
  std::ostream& out_;
  std::ostream& err_;
  const Clock& clock_;
  const KernelTable* kernels_ = nullptr;
  LoadedModel loaded_;
  std::vector<FidelityRun> runs_;
  ordered_json document_;
  ordered_json kept_ = ordered_json::array();  // runs of the file that was there
  CalibrationSize calibration_size_;
  bool interrupted_ = false;
};

}  // namespace

int RunFidelity(const FidelityOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock) {
  const InterruptGuard guard;
  const Status status = FidelityJob(options, environment, out, err, clock).Run();
  if (!status.ok()) {
    err << "prehoc: error: " << status.message() << std::endl;
    return ExitCodeOf(status);
  }
  return InterruptGuard::Requested() ? InterruptGuard::ExitCode() : kExitOk;
}

}  // namespace prehoc::cli
