#include "integrations/cli/answer.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "integrations/cli/calibration_file.h"
#include "integrations/cli/document.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/figures.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/json.h"
#include "integrations/cli/machine.h"
#include "integrations/cli/named_models.h"
#include "integrations/cli/output_file.h"
#include "integrations/cli/progress.h"
#include "integrations/cli/prompt.h"
#include "integrations/cli/runs.h"
#include "integrations/cli/session.h"
#include "integrations/cli/table.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::cli {
namespace {

std::string Hex(std::span<const uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// Positions that the model was made for. Beyond a sliding window the engine offers nothing.
int64_t Positions(const reference::ModelConfig& config) {
  return config.sliding_window > 0 ? std::min(config.sliding_window, config.max_positions) : config.max_positions;
}

class AnswerJob {
 public:
  AnswerJob(const AnswerOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock)
      : options_(options), environment_(environment), out_(out), err_(err), clock_(clock) {}

  // In this order: what is cheap to refuse first. An interruption is no error.
  Status Run() {
    PREHOC_RETURN_IF_ERROR(CheckAnswerOptions(options_, environment_.memory_bytes));
    PREHOC_RETURN_IF_ERROR(ChooseKernels());
    PREHOC_RETURN_IF_ERROR(ReadPromise());
    PREHOC_ASSIGN_OR_RETURN(const ModelPaths paths, ResolveModel(options_, environment_));
    PREHOC_ASSIGN_OR_RETURN(const Document document, ReadDocument(options_.document, environment_));
    if (!options_.json.empty()) {
      PREHOC_ASSIGN_OR_RETURN(json_, OpenJson());
    }
    PREHOC_RETURN_IF_ERROR(Load(paths));
    PREHOC_RETURN_IF_ERROR(CheckPromisedModel());
    PREHOC_RETURN_IF_ERROR(MakePrompt(document));
    DescribePromise();
    PREHOC_RETURN_IF_ERROR(RunAll({options_, environment_, model_, *tokenizer_, prompt_, kernels_, out_, err_, clock_}, &figures_));
    out_ << "\n" << FormatFigures(figures_) << std::flush;
    return json_ ? (*json_)->Commit(FormatJson(figures_)) : Status();
  }

 private:
  Result<std::unique_ptr<OutputFile>> OpenJson() {
    PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--json", options_.json));
    return std::make_unique<OutputFile>(std::move(file));
  }

  Status ChooseKernels() {
    if (options_.kernels.empty()) return {};
    kernels_ = FindKernels(options_.kernels);
    if (kernels_) return {};
    return UsageError("--kernels " + options_.kernels + ": this CPU cannot run them; leave the flag out for " +
                      std::string(BestCpuKernels().name));
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
    const std::string outside = OutsideBand(*calibration_, figures_.prompt_tokens);
    if (outside.empty()) return;
    err_ << "prehoc: warning: --calibration " << options_.calibration << ": " << outside << std::endl;
    figures_.calibration = "none: " + outside;
  }

  Status Load(const ModelPaths& paths) {
    const int64_t start = clock_.NowNanos();
    ProgressBar bar(err_, environment_.stderr_terminal, "loading the model", clock_);
    reference::LoadOptions load{paths.path, paths.lora, [&](double share) { bar.Update(static_cast<int64_t>(share * 100), 100, "percent"); }};
    auto model = reference::LoadModel(load);
    if (!model.ok()) return RuntimeError(model.status(), "--model " + options_.model);
    model_ = std::move(model).value();
    auto tokenizer = reference::Tokenizer::Create(model_->tokenizer);
    if (!tokenizer.ok()) return RuntimeError(tokenizer.status(), "--model " + options_.model + ": tokenizer");
    tokenizer_ = std::move(tokenizer).value();
    DescribeModel(paths);
    figures_.load_seconds = clock_.SecondsSince(start);
    return {};
  }

  void DescribeModel(const ModelPaths& paths) {
    figures_.model_name = options_.model;
    figures_.model_path = paths.path;
    figures_.lora = paths.lora;
    figures_.architecture = model_->config.architecture;
    figures_.fingerprint = Hex(model_->fingerprint);
    figures_.geometry = GeometryOf(model_->config);
    figures_.weight_bytes = model_->weight_bytes;
    figures_.cpu = CpuName();
  }

  Status MakePrompt(const Document& document) {
    PromptRequest request;
    request.document = document.text;
    request.document_name = document.path;
    request.question = options_.question;
    request.context = options_.context;
    request.default_context = kDefaultContext;
    request.max_new_tokens = options_.max_new_tokens;
    request.max_positions = Positions(model_->config);
    PREHOC_ASSIGN_OR_RETURN(prompt_, BuildPrompt(*tokenizer_, request));
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
  std::optional<std::unique_ptr<OutputFile>> json_;
  std::shared_ptr<const reference::Model> model_;
  std::unique_ptr<reference::Tokenizer> tokenizer_;
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
