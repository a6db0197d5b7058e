#include "integrations/cli/answer.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/units.h"
#include "integrations/cli/compare.h"
#include "integrations/cli/document.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/figures.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/json.h"
#include "integrations/cli/machine.h"
#include "integrations/cli/named_models.h"
#include "integrations/cli/output_file.h"
#include "integrations/cli/progress.h"
#include "integrations/cli/prompt.h"
#include "integrations/cli/session.h"
#include "integrations/cli/table.h"
#include "integrations/cli/token_printer.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::cli {
namespace {

constexpr size_t kRecordBytes = size_t{64} << 20;  // of log probabilities, for the comparison

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
    PREHOC_ASSIGN_OR_RETURN(const ModelPaths paths, ResolveModel(options_, environment_));
    PREHOC_ASSIGN_OR_RETURN(const Document document, ReadDocument(options_.document, environment_));
    if (!options_.json.empty()) {
      PREHOC_ASSIGN_OR_RETURN(json_, OpenJson());
    }
    PREHOC_RETURN_IF_ERROR(Load(paths));
    PREHOC_RETURN_IF_ERROR(MakePrompt(document));
    PREHOC_RETURN_IF_ERROR(RunSelected());
    if (options_.compare_dense && !InterruptGuard::Requested()) PREHOC_RETURN_IF_ERROR(RunDense());
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

  SessionOptions SelectedSession() const {
    SessionOptions session;
    session.selector = options_.selector;
    session.codes = options_.codes;
    session.device_budget = options_.device_budget;
    session.host_budget = options_.host_budget;
    session.store = options_.store;
    session.store_budget = options_.store_budget;
    session.tenant = options_.tenant;
    session.audit_every = options_.audit_every;
    session.max_tokens = figures_.prompt_tokens + options_.max_new_tokens;
    session.prompt_tokens = figures_.prompt_tokens;
    session.kernels = kernels_;
    session.threads = options_.threads;
    return session;
  }

  // Everything resident on the device, nothing shared with the other run: an independent check.
  Result<SessionOptions> DenseSession() const {
    SessionOptions session = SelectedSession();
    session.selector = {};
    session.selector.kind = SelectorKind::kDense;
    const uint64_t kv = figures_.geometry.token_bytes() * static_cast<uint64_t>(session.max_tokens);
    session.device_budget = session.host_budget = kv + kv / 4 + 64 * kMiB;
    session.store.clear();
    session.store_budget = 0;
    session.audit_every = 0;
    const uint64_t needed = session.device_budget + session.host_budget;
    if (environment_.memory_bytes == 0 || needed <= environment_.memory_bytes) return session;
    return UsageError("--compare dense: needs " + FormatBytes(static_cast<double>(needed)) + " of memory for " +
                      FormatCount(session.max_tokens) + " tokens, and this machine has " +
                      FormatBytes(static_cast<double>(environment_.memory_bytes)) + "; give a smaller --context");
  }

  GenerateHooks Hooks(ProgressBar* bar) const {
    GenerateHooks hooks;
    hooks.on_prefill = [this, bar](int64_t done) { bar->Update(done, figures_.prompt_tokens, "tokens"); };
    hooks.stop_requested = [] { return InterruptGuard::Requested(); };
    hooks.is_end = [this](int32_t token) { return tokenizer_->IsEndOfGeneration(token); };
    return hooks;
  }

  GenerateRequest Request(const Session& session, std::span<const int32_t> forced) const {
    GenerateRequest request;
    request.prompt = prompt_.tokens;
    request.restored = session.sequence().restored();
    request.piece_tokens = kPieceTokens;
    request.max_new_tokens = options_.max_new_tokens;
    request.vocab = model_->config.vocab;
    request.forced = forced;
    return request;
  }

  // Opens the sequence and runs it to its end; fills all of `run`.
  Status Generate(Session& session, const SessionOptions& options, std::span<const int32_t> forced, GenerateHooks hooks,
                  ProgressBar* bar, RunFigures* run) {
    const int64_t start = clock_.NowNanos();
    PREHOC_RETURN_IF_ERROR(session.Open(prompt_.tokens));
    run->open_seconds = clock_.SecondsSince(start);
    if (hooks.on_prefill) bar->Update(session.sequence().restored(), figures_.prompt_tokens, "tokens");
    PREHOC_ASSIGN_OR_RETURN(run->generated, cli::Generate(Request(session, forced), session.forward(), hooks, clock_));
    run->selector = std::string(SelectorKindName(options.selector.kind));
    run->knobs = options.selector.Describe();
    run->codes = CodesToString(options.codes);
    run->kernels = std::string(session.kernels_name());
    run->device_budget = options.device_budget;
    run->host_budget = options.host_budget;
    run->store_budget = options.store.empty() ? 0 : options.store_budget;
    return {};
  }

  void Measure(Session& session, RunFigures* run) {
    run->report = session.sequence().Report();
    run->residency = session.sequence().CountResidency();
    run->counters = session.Counters();
  }

  Status RunSelected() {
    const SessionOptions session_options = SelectedSession();
    PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(model_, session_options));
    figures_.threads = session->threads();
    ProgressBar bar(err_, environment_.stderr_terminal, "prefill", clock_);
    TokenPrinter printer(out_, environment_.stdout_terminal);
    GenerateHooks hooks = Hooks(&bar);
    hooks.on_token = [&](int32_t token) {
      bar.Clear();
      return printer.Print(tokenizer_->TokenBytes(token));
    };
    if (options_.compare_dense) hooks.on_logits = [&](std::span<const float> logits) { selected_logits_.Add(logits); };
    const Status status = Generate(*session, session_options, {}, std::move(hooks), &bar, &figures_.selected);
    bar.Clear();
    PREHOC_RETURN_IF_ERROR(status);
    PREHOC_RETURN_IF_ERROR(printer.Finish());
    figures_.answer = printer.text();
    // Also after an interruption: what is whole is stored.
    const Status flushed = session->Flush();
    if (!flushed.ok()) err_ << "prehoc: warning: " << flushed.message() << "; the answer does not depend on it" << std::endl;
    Measure(*session, &figures_.selected);
    figures_.peak_resident_bytes = PeakResidentBytes();
    return {};
  }

  // Dense attention over the tokens that the other run decided for, and its own answer where it decides otherwise.
  Status RunDense() {
    if (figures_.selected.generated.decisions.empty()) return {};
    PREHOC_ASSIGN_OR_RETURN(const SessionOptions session_options, DenseSession());
    PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(model_, session_options));
    ProgressBar bar(err_, environment_.stderr_terminal, "prefill, dense", clock_);
    const std::vector<int32_t>& decided = figures_.selected.generated.decisions;
    Agreement agreement;
    size_t step = 0;
    GenerateHooks hooks = Hooks(&bar);
    hooks.on_logits = [&](std::span<const float> logits) {
      if (step < selected_logits_.steps()) agreement.kl.push_back(KlDivergence(LogSoftmax(logits), selected_logits_.step(step)));
      ++step;
    };
    RunFigures run;
    PREHOC_RETURN_IF_ERROR(Generate(*session, session_options, decided, std::move(hooks), &bar, &run));
    Measure(*session, &run);
    if (run.generated.stop == StopReason::kInterrupted) return {};  // half a comparison would mislead
    const std::vector<int32_t>& dense = run.generated.decisions;
    agreement.decisions = static_cast<int64_t>(decided.size());
    for (size_t i = 0; i < decided.size(); ++i) agreement.same_tokens += decided[i] == dense[i];
    agreement.same_answer = dense == decided;
    figures_.dense_answer = figures_.answer;
    if (!agreement.same_answer) PREHOC_RETURN_IF_ERROR(DecodeDensely(*session, session_options));
    figures_.dense = std::move(run);
    figures_.agreement = std::move(agreement);
    return {};
  }

  // On its own tokens; the prompt is still in the host tier.
  Status DecodeDensely(Session& session, const SessionOptions& session_options) {
    RunFigures run;
    ProgressBar bar(err_, environment_.stderr_terminal, "dense answer", clock_);
    PREHOC_RETURN_IF_ERROR(Generate(session, session_options, {}, Hooks(&bar), &bar, &run));
    Utf8Stream text(environment_.stdout_terminal);
    figures_.dense_answer.clear();
    for (int64_t i = 0; i < run.generated.answer_tokens; ++i) {
      figures_.dense_answer += text.Feed(tokenizer_->TokenBytes(run.generated.decisions[static_cast<size_t>(i)]));
    }
    figures_.dense_answer += text.Finish();
    return {};
  }

  const AnswerOptions& options_;
  const Environment& environment_;
  std::ostream& out_;
  std::ostream& err_;
  const Clock& clock_;
  const KernelTable* kernels_ = nullptr;
  std::optional<std::unique_ptr<OutputFile>> json_;
  std::shared_ptr<const reference::Model> model_;
  std::unique_ptr<reference::Tokenizer> tokenizer_;
  Prompt prompt_;
  LogitsRecord selected_logits_{kRecordBytes};
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
