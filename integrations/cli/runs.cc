#include "integrations/cli/runs.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/units.h"
#include "integrations/cli/compare.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/cli/interrupt.h"
#include "integrations/cli/machine.h"
#include "integrations/cli/progress.h"
#include "integrations/cli/session.h"
#include "integrations/cli/token_printer.h"

namespace prehoc::cli {
namespace {

constexpr size_t kRecordBytes = size_t{64} << 20;  // of log probabilities, for the comparison

class Runs {
 public:
  Runs(const RunTask& task, AnswerFigures* figures) : task_(task), figures_(*figures) {}

  Status RunAll() {
    // Known before the first run is paid for.
    if (task_.options.compare_dense) PREHOC_RETURN_IF_ERROR(DenseSession().status());
    PREHOC_RETURN_IF_ERROR(RunSelected());
    return task_.options.compare_dense && !InterruptGuard::Requested() ? RunDense() : Status();
  }

 private:
  SessionOptions SelectedSession() const {
    SessionOptions session;
    session.selector = task_.options.selector;
    session.codes = task_.options.codes;
    session.rows = task_.options.rows;
    session.device_budget = task_.options.device_budget;
    session.host_budget = task_.options.host_budget;
    session.store = task_.options.store;
    session.store_budget = task_.options.store_budget;
    session.store_deadline_ms = task_.options.store_deadline_ms;
    session.tenant = task_.options.tenant;
    session.audit_every = task_.options.audit_every;
    session.max_tokens = figures_.prompt_tokens + task_.options.max_new_tokens;
    session.prompt_tokens = figures_.prompt_tokens;
    session.kernels = task_.kernels;
    session.cuda = task_.options.cuda.value_or(false);
    session.prompt_precision = task_.options.prompt_precision;
    session.threads = task_.options.threads;
    session.tracer = task_.tracer;
    return session;
  }

  // Everything resident on the device, nothing shared with the other run: an independent check.
  Result<SessionOptions> DenseSession() const {
    SessionOptions session = SelectedSession();
    session.selector = {};
    session.selector.kind = SelectorKind::kDense;
    session.rows = RowFormat::kF16;  // what 8 bits cost is part of the comparison
    KvGeometry geometry = figures_.geometry;
    geometry.rows = session.rows;
    const uint64_t kv = geometry.token_bytes() * static_cast<uint64_t>(session.max_tokens);
    session.device_budget = session.host_budget = kv + kv / 4 + 64 * kMiB;
    session.store.clear();
    session.store_budget = 0;
    session.audit_every = 0;
    session.tracer = nullptr;
    const uint64_t needed = session.device_budget + session.host_budget;
    if (task_.environment.memory_bytes == 0 || needed <= task_.environment.memory_bytes) return session;
    return UsageError("--compare dense: needs " + FormatBytes(static_cast<double>(needed)) + " of memory for " +
                      FormatCount(session.max_tokens) + " tokens, and this machine has " +
                      FormatBytes(static_cast<double>(task_.environment.memory_bytes)) + "; give a smaller --context");
  }

  GenerateHooks Hooks(ProgressBar* bar) const {
    GenerateHooks hooks;
    hooks.on_prefill = [this, bar](int64_t done) { bar->Update(done, figures_.prompt_tokens, "tokens"); };
    hooks.stop_requested = [] { return InterruptGuard::Requested(); };
    hooks.is_end = [this](int32_t token) { return task_.tokenizer.IsEndOfGeneration(token); };
    return hooks;
  }

  GenerateRequest Request(const Session& session, std::span<const int32_t> forced) const {
    GenerateRequest request;
    request.prompt = task_.prompt.tokens;
    request.restored = session.sequence().restored();
    request.piece_tokens = session.piece_tokens();
    request.max_new_tokens = task_.options.max_new_tokens;
    request.vocab = task_.model->config.vocab;
    request.forced = forced;
    return request;
  }

  // Opens the sequence and runs it to its end; fills all of `run`.
  Status Generate(Session& session, const SessionOptions& options, std::span<const int32_t> forced, GenerateHooks hooks,
                  ProgressBar* bar, RunFigures* run) {
    const int64_t start = task_.clock.NowNanos();
    PREHOC_RETURN_IF_ERROR(session.Open(task_.prompt.tokens));
    run->open_seconds = task_.clock.SecondsSince(start);
    task_.log.Info("sequence opened", {{"prompt_tokens", figures_.prompt_tokens}, {"restored_tokens", session.sequence().restored()},
                                       {"took_seconds", run->open_seconds}, {"selector", SelectorKindName(options.selector.kind)}});
    if (hooks.on_prefill) bar->Update(session.sequence().restored(), figures_.prompt_tokens, "tokens");
    PREHOC_ASSIGN_OR_RETURN(run->generated, cli::Generate(Request(session, forced), session.forward(), hooks, task_.clock));
    run->selector = std::string(SelectorKindName(options.selector.kind));
    run->knobs = options.selector.Describe();
    run->codes = CodesToString(options.codes);
    run->kernels = std::string(session.kernels_name());
    run->prompt_precision = std::string(PromptPrecisionName(options.prompt_precision));
    run->device_budget = options.device_budget;
    run->host_budget = options.host_budget;
    run->store_budget = options.store.empty() ? 0 : options.store_budget;
    return {};
  }

  static std::map<std::string, double> CountersOf(const Session& session) {
    std::map<std::string, double> counters = session.Counters();
    session.sequence().Report().VisitCounters([&](std::string_view name, double value) { counters[std::string(name)] = value; });
    return counters;
  }

  Status WriteMetrics(const Session& session) {
    return task_.metrics == nullptr || !session.is_open() ? Status() : task_.metrics->Write([&] { return CountersOf(session); });
  }

  void LogRun(const Session& session) {
    const RunFigures& run = figures_.selected;
    task_.log.Info("answer done", {{"tokens", run.generated.answer_tokens}, {"decode_steps", run.generated.decode_steps},
                                   {"decode_seconds", run.generated.decode_seconds}, {"rho", run.report.rho()},
                                   {"stop", std::string_view(StopReasonName(run.generated.stop))}});
    // What went wrong and was mended on the way.
    const std::map<std::string, double> counters = session.Counters();
    for (const char* name : {"host.corrupt", "host.late", "host.lost", "store.corrupt", "health.opened", "health.failures", "write_behind.failed"}) {
      const auto found = counters.find(name);
      if (found != counters.end() && found->second > 0) task_.log.Warning("mended", {{"counter", std::string_view(name)}, {"count", found->second}});
    }
  }

  void Measure(Session& session, RunFigures* run) {
    run->report = session.sequence().Report();
    run->residency = session.sequence().CountResidency();
    run->counters = session.Counters();
  }

  Status RunSelected() {
    const SessionOptions session_options = SelectedSession();
    PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(task_.model, session_options));
    figures_.threads = session->threads();
    ProgressBar bar(task_.err, task_.environment.stderr_terminal, "prefill", task_.clock);
    TokenPrinter printer(task_.out, task_.environment.stdout_terminal);
    GenerateHooks hooks = Hooks(&bar);
    const auto refresh = [&] {
      if (task_.metrics) task_.metrics->Refresh([&] { return CountersOf(*session); });
    };
    hooks.on_prefill = [&, shown = hooks.on_prefill](int64_t done) {
      shown(done);
      task_.log.Debug("prompt", {{"done", done}, {"of", figures_.prompt_tokens}});
      refresh();
    };
    hooks.on_token = [&](int32_t token) {
      bar.Clear();
      task_.log.Debug("step", {{"length", session->sequence().length()}});
      refresh();
      return printer.Print(task_.tokenizer.TokenBytes(token));
    };
    if (task_.options.compare_dense) hooks.on_logits = [&](std::span<const float> logits) { selected_logits_.Add(logits); };
    const Status status = Generate(*session, session_options, {}, std::move(hooks), &bar, &figures_.selected);
    bar.Clear();
    if (!status.ok()) {
      WriteMetrics(*session).IgnoreError();  // the run's own error is the one to tell
      return status;
    }
    PREHOC_RETURN_IF_ERROR(printer.Finish());
    figures_.answer = printer.text();
    // Also after an interruption: what is whole is stored.
    const Status flushed = session->Flush();
    if (!flushed.ok()) {
      task_.err << "prehoc: warning: " << flushed.message() << "; the answer does not depend on it" << std::endl;
      task_.log.Warning("flush failed", {{"message", std::string_view(flushed.message())}});
    }
    Measure(*session, &figures_.selected);
    figures_.peak_resident_bytes = PeakResidentBytes();
    LogRun(*session);
    return WriteMetrics(*session);
  }

  // Dense attention over the tokens that the other run decided for, and its own answer where it decides otherwise.
  Status RunDense() {
    if (figures_.selected.generated.decisions.empty()) return {};
    PREHOC_ASSIGN_OR_RETURN(const SessionOptions session_options, DenseSession());
    PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(task_.model, session_options));
    ProgressBar bar(task_.err, task_.environment.stderr_terminal, "prefill, dense", task_.clock);
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
    ProgressBar bar(task_.err, task_.environment.stderr_terminal, "dense answer", task_.clock);
    PREHOC_RETURN_IF_ERROR(Generate(session, session_options, {}, Hooks(&bar), &bar, &run));
    Utf8Stream text(task_.environment.stdout_terminal);
    figures_.dense_answer.clear();
    for (int64_t i = 0; i < run.generated.answer_tokens; ++i) {
      figures_.dense_answer += text.Feed(task_.tokenizer.TokenBytes(run.generated.decisions[static_cast<size_t>(i)]));
    }
    figures_.dense_answer += text.Finish();
    return {};
  }

  const RunTask& task_;
  AnswerFigures& figures_;
  LogitsRecord selected_logits_{kRecordBytes};
};

}  // namespace

Status RunAll(const RunTask& task, AnswerFigures* figures) { return Runs(task, figures).RunAll(); }

}  // namespace prehoc::cli
