#include "integrations/cli/answer.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "integrations/cli/calibration_file.h"
#include "integrations/cli/document.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/figures.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/json.h"
#include "integrations/cli/load.h"
#include "integrations/cli/log.h"
#include "integrations/cli/machine.h"
#include "integrations/cli/metrics.h"
#include "integrations/cli/named_models.h"
#include "integrations/cli/output_file.h"
#include "integrations/cli/prompt.h"
#include "integrations/cli/gpu_speed.h"
#include "integrations/cli/runs.h"
#include "integrations/cli/session.h"
#include "integrations/cli/table.h"
#include "integrations/cli/trace_log.h"

namespace prehoc::cli {
namespace {

class AnswerJob {
 public:
  AnswerJob(const AnswerOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock)
      : options_(options), environment_(environment), out_(out), err_(err), clock_(clock), log_(err, options.log, clock) {}

  // An interruption is no error. The trace is of most use where something failed.
  Status Run() {
    const Status status = RunUntraced();
    if (!status.ok()) log_.Error("failed", {{"code", std::string_view(StatusCodeName(status.code()))}, {"message", std::string_view(status.message())}});
    if (!trace_file_) return status;
    const Status written = (*trace_file_)->Commit(trace_->Json());
    return status.ok() ? written : status;
  }

 private:
  // In this order: what is cheap to refuse first.
  Status RunUntraced() {
    if (!options_.cuda) options_.cuda = GpuIsThere();
    PREHOC_RETURN_IF_ERROR(CheckAnswerOptions(options_, environment_.memory_bytes));
    PREHOC_RETURN_IF_ERROR(SetKernels());
    PREHOC_RETURN_IF_ERROR(ReadPromise());
    ModelPaths paths{options_.model, ""};
    if (options_.random_weights.empty()) {
      PREHOC_ASSIGN_OR_RETURN(paths, ResolveModel(options_.model, options_.lora, environment_));
    }
    PREHOC_ASSIGN_OR_RETURN(const Document document, ReadDocument(options_.document, environment_));
    if (!options_.json.empty()) {
      PREHOC_ASSIGN_OR_RETURN(json_, OpenFile("--json", options_.json));
    }
    if (!options_.metrics.empty()) {
      PREHOC_ASSIGN_OR_RETURN(metrics_, MetricsFile::Create(options_.metrics, &clock_));
    }
    if (!options_.trace.empty()) {
      PREHOC_ASSIGN_OR_RETURN(trace_file_, OpenFile("--trace", options_.trace));
      trace_.emplace(&clock_);
    }
    PREHOC_RETURN_IF_ERROR(LoadModel(paths));
    PREHOC_RETURN_IF_ERROR(CheckPromisedModel());
    PREHOC_RETURN_IF_ERROR(MakePrompt(document));
    DescribePromise();
    const RunTask task = {options_, environment_, loaded_.model, *loaded_.tokenizer, prompt_, kernels_, out_, err_, clock_, log_,
                          trace_ ? &*trace_ : nullptr, metrics_ ? &*metrics_ : nullptr};
    PREHOC_RETURN_IF_ERROR(RunAll(task, &figures_));
    out_ << "\n" << FormatFigures(figures_) << std::flush;
    return json_ ? (*json_)->Commit(FormatJson(figures_)) : Status();
  }

  static Result<std::unique_ptr<OutputFile>> OpenFile(const char* flag, const std::string& path) {
    PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create(flag, path));
    return std::make_unique<OutputFile>(std::move(file));
  }

  Status SetKernels() {
    PREHOC_ASSIGN_OR_RETURN(kernels_, ChooseKernels(options_.kernels));
    return {};
  }

  // The calibration's selector, knobs and codes take the place of the defaults.
  Status ReadPromise() {
    if (options_.calibration.empty()) return {};
    auto file = ReadCalibration(options_.calibration);
    if (!file.ok()) return RuntimeError(file.status(), "");
    calibration_ = std::move(file).value();
    return ApplyCalibration(*calibration_, &options_);
  }

  Status CheckPromisedModel() const {
    if (!calibration_) return {};
    return CheckCalibratedModel(*calibration_, options_.calibration, figures_.fingerprint, "--model " + options_.model);
  }

  void DescribePromise() {
    if (!calibration_) return;
    figures_.calibration = calibration_->claim.Guarantee();
    const size_t outside_heads = calibration_->unprotected.size();
    if (outside_heads > 0) figures_.calibration += "; " + FormatCount(static_cast<int64_t>(outside_heads)) + " heads are not protected";
    const std::string outside = OutsideBand(*calibration_, figures_.prompt_tokens);
    if (outside.empty()) return;
    err_ << "prehoc: warning: --calibration " << options_.calibration << ": " << outside << std::endl;
    figures_.calibration = "none: " + outside;
  }

  Status LoadModel(const ModelPaths& paths) {
    const bool random = !options_.random_weights.empty();
    PREHOC_ASSIGN_OR_RETURN(loaded_, random ? MakeRandom(options_.model, options_.random_weights, environment_, err_, clock_)
                                            : Load(options_.model, paths, environment_, err_, clock_, options_.positions));
    figures_.model_name = options_.model;
    figures_.model_path = paths.path;
    figures_.lora = paths.lora;
    figures_.architecture = loaded_.model->config.architecture;
    figures_.fingerprint = loaded_.fingerprint;
    figures_.geometry = GeometryOf(loaded_.model->config, options_.rows);
    figures_.weight_bytes = loaded_.model->weight_bytes;
    figures_.cpu = CpuName();
    figures_.load_seconds = loaded_.seconds;
    log_.Info("model loaded", {{"model", std::string_view(options_.model)}, {"architecture", std::string_view(figures_.architecture)},
                               {"bytes", static_cast<int64_t>(figures_.weight_bytes)}, {"took_seconds", loaded_.seconds}});
    return {};
  }

  Status MakePrompt(const Document& document) {
    PromptRequest request;
    request.document = document.text;
    request.document_name = document.path;
    request.question = options_.question;
    request.context = options_.context;
    request.default_context = kDefaultContext;
    request.max_new_tokens = options_.max_new_tokens;
    request.max_positions = loaded_.positions();
    PREHOC_ASSIGN_OR_RETURN(prompt_, BuildPrompt(*loaded_.tokenizer, request));
    figures_.document_path = document.path;
    figures_.document_tokens = prompt_.document_tokens;
    figures_.context = prompt_.context;
    figures_.prompt_tokens = static_cast<int64_t>(prompt_.tokens.size());
    figures_.question = options_.question;
    figures_.store = options_.store;
    return {};
  }

  AnswerOptions options_;
  std::optional<CalibrationFile> calibration_;
  const Environment& environment_;
  std::ostream& out_;
  std::ostream& err_;
  const Clock& clock_;
  const KernelTable* kernels_ = nullptr;
  Log log_;
  std::optional<std::unique_ptr<OutputFile>> json_, trace_file_;
  std::optional<TraceLog> trace_;  // outlives all that runs in the sessions
  std::optional<MetricsFile> metrics_;
  LoadedModel loaded_;
  Prompt prompt_;
  AnswerFigures figures_;
};

}  // namespace

int RunAnswer(const AnswerOptions& options, const Environment& environment, std::ostream& out, std::ostream& err,
              const Clock& clock) {
  const InterruptGuard guard;
  const Status status = AnswerJob(options, environment, out, err, clock).Run();
  if (!status.ok()) {
    err << "prehoc: error: " << status.message() << std::endl;
    return ExitCodeOf(status);
  }
  return InterruptGuard::Requested() ? InterruptGuard::ExitCode() : kExitOk;
}

}  // namespace prehoc::cli
