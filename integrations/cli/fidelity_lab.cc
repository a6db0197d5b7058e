#include "integrations/cli/fidelity_lab.h"

#include <algorithm>
#include <cmath>
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

constexpr int64_t kDefaultFidelityContext = 8192;
constexpr int64_t kGenerationAudits = 32;  // at most so many of a generation's steps are audited

// Without a budget a method reads what it likes, and is no rival of those that have one.
const char* RoleOf(const FidelityRun& run) {
  if (run.selector.kind != SelectorKind::kDense && run.budget.empty()) return "unbudgeted";
  switch (run.selector.kind) {
    case SelectorKind::kDense: return run.is_reference() ? "reference" : "";
    case SelectorKind::kOracle: return "ceiling";
    case SelectorKind::kWindow: return "floor";
    default: return "";
  }
}

// Shares of the attended rows of one step by where they were found, and what is resident after it.
class ResidencyByStep {
 public:
  void Add(const Sequence& sequence) {
    const SequenceReport& r = sequence.Report();
    const int64_t device = r.rows_device - last_.rows_device, host = r.rows_host - last_.rows_host, disk = r.rows_disk - last_.rows_disk;
    const double all = static_cast<double>(std::max<int64_t>(1, device + host + disk));
    json_["step"].push_back(r.decode_steps);
    json_["device_share"].push_back(JsonNumber(static_cast<double>(device) / all));
    json_["host_share"].push_back(JsonNumber(static_cast<double>(host) / all));
    json_["disk_share"].push_back(JsonNumber(static_cast<double>(disk) / all));
    json_["resident_rows"].push_back(sequence.CountResidency().device_rows);
    last_ = {device + last_.rows_device, host + last_.rows_host, disk + last_.rows_disk};
  }
  ordered_json ToJson() const { return json_; }

 private:
  struct Rows {
    int64_t rows_device = 0, rows_host = 0, rows_disk = 0;
  } last_;
  ordered_json json_ = {{"step", ordered_json::array()}, {"device_share", ordered_json::array()}, {"host_share", ordered_json::array()},
                        {"disk_share", ordered_json::array()}, {"resident_rows", ordered_json::array()}};
};

Distribution DecodeKl(const std::vector<double>& kl) {
  Distribution values;
  for (size_t i = 1; i < kl.size(); ++i) values.Add(kl[i]);
  return values;
}

}  // namespace

FidelityLab::FidelityLab(const LabTask& task) : task_(task), geometry_(GeometryOf(task.loaded.model->config)) {}

Status FidelityLab::Prepare() {
  const FidelityOptions& o = task_.options;
  const reference::Tokenizer& tokenizer = *task_.loaded.tokenizer;
  std::vector<int32_t> all;
  if (tokenizer.spec().add_bos && tokenizer.spec().bos_id >= 0) all.push_back(tokenizer.spec().bos_id);
  all.insert(all.end(), task_.document.begin(), task_.document.end());
  const int64_t positions = task_.loaded.positions();
  const auto available = static_cast<int64_t>(all.size()) - 1;  // the last step's token needs one after it
  context_ = o.context > 0 ? o.context : std::min({kDefaultFidelityContext, available, positions});
  const std::string flag = "--context " + FormatCount(context_);
  if (context_ > available) {
    return UsageError(flag + ": the document has " + FormatCount(available + 1) + " tokens; give at most " + FormatCount(available));
  }
  if (context_ > positions) {
    return UsageError(flag + ": the model takes " + FormatCount(positions) + " positions; give at most that, or a model for longer contexts such as --model smollm2-128k");
  }
  if (o.steps > context_ / 2) {
    return UsageError("--steps " + FormatCount(o.steps) + ": at most half of the context of " + FormatCount(context_) + " tokens; give at most " + FormatCount(context_ / 2));
  }
  if (context_ + o.generate > positions) {
    return UsageError("--generate " + FormatCount(o.generate) + ": with " + flag + " the model has room for " + FormatCount(positions - context_) + " tokens; give less of one of them");
  }
  const auto prompt = static_cast<std::ptrdiff_t>(context_ - o.steps);
  text_.prompt.assign(all.begin(), all.begin() + prompt);
  text_.forced.assign(all.begin() + prompt, all.begin() + prompt + o.steps + 1);
  for (const FidelityTask task : o.tasks) {
    for (int64_t set = 0; set < o.task_sets; ++set) {
      PREHOC_ASSIGN_OR_RETURN(TaskContext made, BuildTask(tokenizer, {task, set, o.seed, task_.document, context_}));
      const auto total = static_cast<int64_t>(made.prompt.size() + made.stream.size());
      if (total > positions) {
        return UsageError("--tasks " + std::string(FidelityTaskName(task)) + ": context, questions and answers take " + FormatCount(total) +
                          " positions and the model has " + FormatCount(positions) + "; give --context " + FormatCount(context_ - (total - positions)) + " or less");
      }
      sets_.push_back({task, set, std::move(made)});
    }
  }
  return {};
}

SessionOptions LabSession(const LabTask& task, const FidelityRun& run, int64_t prompt_tokens, int64_t new_tokens) {
  SessionOptions session;
  session.selector = run.selector;
  if (run.selector.tc.dense_below == TwoClockOptions::kAuto) session.selector.tc.dense_below = 0;  // the method is what is measured
  session.codes = run.codes;
  session.rows = run.rows;
  session.max_tokens = prompt_tokens + new_tokens;
  session.prompt_tokens = prompt_tokens;
  const uint64_t kv = GeometryOf(task.loaded.model->config).token_bytes() * static_cast<uint64_t>(session.max_tokens);
  // Budgets are not what is measured here.
  session.device_budget = 3 * kv + 256 * kMiB;
  session.host_budget = (task.options.cuda ? 2 : 1) * kv + kv / 4 + 64 * kMiB;  // whole steps on a device hold the blocks, at most half of the tier
  session.device_slots = DeviceSlots(run.selector, task.options.device_factor, session.max_tokens);
  session.store = task.store;
  if (run.rows != RowFormat::kF16 && !task.store.empty()) session.store.append("-").append(RowFormatName(run.rows));  // a store has rows of one format
  session.store_budget = task.options.store_budget;
  session.persist_decode = false;
  session.audit_every = 0;
  session.kernels = task.kernels;
  session.cuda = task.options.cuda;
  session.prompt_precision = task.options.prompt_precision;
  session.threads = task.options.threads;
  return session;
}

SessionOptions FidelityLab::OptionsFor(const FidelityRun& run, const Pass& pass) const {
  SessionOptions session = LabSession(task_, run, static_cast<int64_t>(pass.prompt.size()),
                                      std::max<int64_t>(static_cast<int64_t>(pass.forced.size()), pass.new_tokens));
  session.audit_every = pass.audit_every;
  session.observer = pass.observer;
  return session;
}

Result<std::optional<FidelityLab::Passed>> FidelityLab::RunPass(const FidelityRun& run, const Pass& pass, const std::string& label) {
  const bool is_reference = run.is_reference();
  PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(task_.loaded.model, OptionsFor(run, pass)));
  threads_ = session->threads();
  PREHOC_RETURN_IF_ERROR(session->Open(pass.prompt));
  const auto prompt = static_cast<int64_t>(pass.prompt.size());
  const int64_t decisions = pass.forced.empty() ? pass.new_tokens : static_cast<int64_t>(pass.forced.size());
  ProgressBar bar(task_.err, task_.environment.stderr_terminal, label, task_.clock);
  Reference& reference = references_[pass.id];
  if (is_reference) reference = {};
  Passed passed;
  ResidencyByStep residency;
  GenerateRequest request;
  request.prompt = pass.prompt;
  request.restored = session->sequence().restored();
  request.piece_tokens = session->piece_tokens();
  request.max_new_tokens = decisions;
  request.vocab = task_.loaded.model->config.vocab;
  request.forced = pass.forced;
  GenerateHooks hooks;
  hooks.on_prefill = [&](int64_t done) { bar.Update(done, prompt + decisions, "tokens"); };
  hooks.stop_requested = [] { return InterruptGuard::Requested(); };
  hooks.on_logits = [&](std::span<const float> logits) {
    const size_t i = passed.decisions.size();
    passed.decisions.push_back(MostLikely(logits));
    std::vector<float> log_p = LogSoftmax(logits);
    if (!pass.forced.empty()) {
      passed.nll.push_back(-static_cast<double>(log_p[static_cast<size_t>(pass.forced[i])]));
      if (!is_reference && i < reference.log_p.size()) passed.kl.push_back(KlDivergence(reference.log_p[i], log_p));
      if (is_reference) {
        passed.kl.push_back(0);
        reference.log_p.push_back(std::move(log_p));
      }
    }
    if (i > 0) residency.Add(session->sequence());
    bar.Update(prompt + static_cast<int64_t>(i), prompt + decisions, "tokens");
  };
  PREHOC_ASSIGN_OR_RETURN(const Generated generated, Generate(request, session->forward(), hooks, task_.clock));
  if (generated.stop == StopReason::kInterrupted) return std::optional<Passed>();
  if (is_reference) reference.decisions = passed.decisions;
  passed.report = session->sequence().Report();
  passed.steps = generated.decode_steps;
  passed.decode_seconds = generated.decode_seconds;
  passed.residency = residency.ToJson();
  bar.Clear();
  // The prompt's chunks are for the runs to come; without them they are computed again.
  const Status flushed = session->Flush();
  if (!flushed.ok()) task_.err << "prehoc: warning: " << flushed.message() << std::endl;
  return std::optional<Passed>(std::move(passed));
}

Result<std::optional<ordered_json>> FidelityLab::Run(const FidelityRun& run, size_t number, size_t count) {
  const int64_t start = task_.clock.NowNanos();
  const std::string label = "[" + std::to_string(number) + "/" + std::to_string(count) + "] " + run.label;
  PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Selector> selector, Selector::Create(run.selector));
  ordered_json json;
  json["label"] = run.label;
  json["selector"] = SelectorKindName(run.selector.kind);
  json["budget"] = run.budget;
  json["codes"] = selector->NeedsCodes() ? CodesToString(run.codes) : "none";
  json["rows"] = RowFormatName(run.rows);
  json["knobs"] = run.selector.Describe();
  json["swept"] = run.swept ? ordered_json{{"knob", run.swept->first}, {"value", run.swept->second}} : ordered_json(nullptr);
  json["role"] = RoleOf(run);
  PREHOC_ASSIGN_OR_RETURN(const bool text, RunText(run, label, &json));
  if (!text) return std::optional<ordered_json>();
  PREHOC_ASSIGN_OR_RETURN(const bool tasks, RunTasks(run, label, &json));
  if (!tasks) return std::optional<ordered_json>();
  PREHOC_ASSIGN_OR_RETURN(const bool generation, RunGeneration(run, label, &json));
  if (!generation) return std::optional<ordered_json>();
  json["seconds"] = task_.clock.SecondsSince(start);
  return std::optional<ordered_json>(std::move(json));
}

Result<bool> FidelityLab::RunText(const FidelityRun& run, const std::string& label, ordered_json* json) {
  const bool dense = run.selector.kind == SelectorKind::kDense;
  FidelityObserver heads(geometry_, run.selector.Kept().local);
  QueryObserver queries(geometry_);
  AuditObserver* observer = dense ? static_cast<AuditObserver*>(&queries) : &heads;
  PREHOC_ASSIGN_OR_RETURN(const std::optional<Passed> passed,
                          RunPass(run, {"text", text_.prompt, text_.forced, 0, dense ? 1 : task_.options.audit_every, observer}, label + ", text"));
  if (!passed) return false;
  if (run.is_reference()) query_cosine_ = queries.ToJson();
  (*json)["model"] = ModelFigures(*passed, text_.forced);
  (*json)["heads"] = heads.Heads();
  (*json)["cost"] = CostFigures(*passed);
  (*json)["residency"] = passed->residency;
  return true;
}

ordered_json FidelityLab::ModelFigures(const Passed& passed, std::span<const int32_t> forced) const {
  const std::vector<int32_t>& dense = references_.at("text").decisions;
  double nll = 0;
  int64_t same = 0;
  const auto steps = static_cast<int64_t>(forced.size()) - 1;  // the first decision is prefill's
  for (size_t i = 1; i < forced.size(); ++i) {
    nll += passed.nll[i];
    same += passed.decisions[i] == dense[i];
  }
  ordered_json by_step = ordered_json::array();
  for (size_t i = 1; i < passed.kl.size(); ++i) by_step.push_back(JsonNumber(passed.kl[i]));
  return {{"steps", steps}, {"perplexity", JsonNumber(std::exp(nll / static_cast<double>(steps)))}, {"kl", DecodeKl(passed.kl).ToJson()},
          {"top1_agreement", static_cast<double>(same) / static_cast<double>(steps)}, {"kl_by_step", by_step}};
}

ordered_json FidelityLab::CostFigures(const Passed& passed) const {
  const SequenceReport& r = passed.report;
  const auto steps = static_cast<double>(std::max<int64_t>(1, passed.steps));
  const auto per_step = [&](int64_t total) { return static_cast<double>(total) / steps; };
  ordered_json cost;
  const bool selects = r.triples > 0;  // else everything in sight is attended to
  cost["rho"] = selects ? JsonNumber(r.rho()) : ordered_json(nullptr);
  cost["triples"] = r.triples;
  cost["retrievals"] = r.retrievals;
  const double rows = per_step(r.bytes_attended) / static_cast<double>(geometry_.row_bytes());
  cost["mean_attended"] = JsonNumber(selects ? r.mean_attended() : rows / geometry_.layers / geometry_.kv_heads);
  cost["steps"] = passed.steps;
  cost["bytes_per_step"] = {{"gate", per_step(r.bytes_gate)}, {"codes", per_step(r.bytes_codes)}, {"keys", per_step(r.bytes_exact_keys)},
                            {"scored", per_step(r.bytes_scored())}, {"attended", per_step(r.bytes_attended)},
                            {"from_host", per_step(r.bytes_from_host)}, {"from_disk", per_step(r.bytes_from_disk)}};
  cost["rows"] = {{"device", r.rows_device}, {"host", r.rows_host}, {"disk", r.rows_disk}, {"in_step", r.rows_in_step}, {"behind", r.rows_behind}};
  const StepTimes& t = r.times;
  cost["seconds_per_step"] = {{"append", t.append / steps}, {"gate", t.gate / steps}, {"score", t.score / steps}, {"choose", t.choose / steps},
                              {"plan", t.plan / steps}, {"fetch", t.fetch / steps}, {"attend", t.attend / steps},
                              {"slow_clock", t.slow_clock / steps}, {"total", t.Total() / steps},
                              {"engine", std::max(0.0, passed.decode_seconds - t.Total() - t.audit) / steps}};
  // Against selecting at every step with exact keys: one retrieval per triple, n keys each.
  const double keys = (static_cast<double>(prompt_tokens()) + (steps + 1) / 2) * static_cast<double>(geometry_.row_bytes()) / 2 *
                      static_cast<double>(r.triples) / steps;
  cost["saved"] = selects ? ordered_json{{"events", 1 - r.rho()},
                                         {"bytes", JsonNumber(1 - per_step(r.bytes_scored()) / keys)},
                                         {"time", nullptr}}  // known beside the oracle's run
                          : ordered_json(nullptr);
  return cost;
}

Result<bool> FidelityLab::RunTasks(const FidelityRun& run, const std::string& label, ordered_json* json) {
  ordered_json tasks = ordered_json::array();
  for (const FidelityTask task : task_.options.tasks) {
    int64_t found_in_all = 0;
    Distribution kl_of_all;
    ordered_json items = ordered_json::array();
    for (const TaskSet& set : sets_) {
      if (set.task != task) continue;
      const TaskContext& context = set.context;
      PREHOC_ASSIGN_OR_RETURN(const std::optional<Passed> passed,
                              RunPass(run, {set.id(), context.prompt, context.stream, 0, 0, nullptr}, label + ", " + set.id()));
      if (!passed) return false;
      for (size_t i = 1; i < passed->kl.size(); ++i) kl_of_all.Add(passed->kl[i]);
      for (const TaskContext::Item& item : context.items) {
        bool found = true;
        double kl = 0;
        for (auto i = static_cast<size_t>(item.begin); i < static_cast<size_t>(item.end); ++i) {
          found = found && passed->decisions[i] == context.stream[i];
          kl += passed->kl[i];
        }
        found_in_all += found;
        const auto text = [&](const std::vector<int32_t>& tokens) {
          return task_.loaded.tokenizer->Decode(std::span(tokens).subspan(static_cast<size_t>(item.begin), static_cast<size_t>(item.end - item.begin)), false);
        };
        items.push_back({{"set", set.set}, {"depth", item.depth}, {"kind", item.kind}, {"found", found},
                         {"kl", JsonNumber(kl / static_cast<double>(item.end - item.begin))}, {"value", text(context.stream)},
                         {"said", text(passed->decisions)}});
      }
    }
    const size_t of = items.size();
    tasks.push_back({{"name", FidelityTaskName(task)}, {"score", found_in_all}, {"of", of}, {"kl_mean", JsonNumber(kl_of_all.mean())}, {"items", items}});
  }
  (*json)["tasks"] = tasks;
  return true;
}

Result<bool> FidelityLab::RunGeneration(const FidelityRun& run, const std::string& label, ordered_json* json) {
  (*json)["generation"] = nullptr;
  const int64_t tokens = task_.options.generate;
  if (tokens == 0) return true;
  FidelityObserver heads(geometry_, run.selector.Kept().local);
  const int64_t audit_every = std::max<int64_t>(1, tokens / kGenerationAudits);
  PREHOC_ASSIGN_OR_RETURN(const std::optional<Passed> passed,
                          RunPass(run, {"generation", text_.prompt, {}, tokens, audit_every, &heads}, label + ", generation"));
  if (!passed) return false;
  const std::vector<int32_t>& dense = references_.at("generation").decisions;
  int64_t same = 0;
  ordered_json first = nullptr;
  for (size_t i = 0; i < passed->decisions.size(); ++i) {
    const bool equal = passed->decisions[i] == dense[i];
    same += equal;
    if (!equal && first.is_null()) first = i;
  }
  (*json)["generation"] = {{"tokens", passed->decisions.size()}, {"first_divergence", first},
                           {"agreement", static_cast<double>(same) / static_cast<double>(passed->decisions.size())},
                           {"steps", heads.steps()}, {"dropped_by_step", heads.dropped_by_step()}};
  return true;
}

Result<FidelityLab::Estimate> FidelityLab::EstimateSeconds(const std::vector<FidelityRun>& runs) {
  constexpr int64_t kPilotTokens = 512, kPilotSteps = 4;
  constexpr double kBytesPerSecond = 5e9;  // of rows read by attention, a careful figure for two cores
  FidelityRun dense;
  dense.selector.kind = SelectorKind::kDense;
  const int64_t prompt = std::min<int64_t>(kPilotTokens, prompt_tokens());
  Pass pilot{"pilot", std::span(text_.prompt).first(static_cast<size_t>(prompt)), {}, kPilotSteps, 0, nullptr};
  SessionOptions options = OptionsFor(dense, pilot);
  options.store.clear();
  PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Create(task_.loaded.model, options));
  PREHOC_RETURN_IF_ERROR(session->Open(pilot.prompt));
  GenerateRequest request;
  request.prompt = pilot.prompt;
  request.piece_tokens = session->piece_tokens();
  request.max_new_tokens = kPilotSteps;
  request.vocab = task_.loaded.model->config.vocab;
  PREHOC_ASSIGN_OR_RETURN(const Generated generated, Generate(request, session->forward(), {}, task_.clock));

  // Attention of a prompt grows with its square; the rest with its length. Four FLOP per position and channel against two per weight.
  const auto n = static_cast<double>(context_);
  const double weights = static_cast<double>(task_.loaded.model->weight_bytes) * 2;  // about two weights a byte; only a share
  const double attention = 2.0 * n * geometry_.layers * geometry_.heads * geometry_.head_dim;
  const double prefill = generated.prefill_seconds / static_cast<double>(prompt) * n * (1 + attention / weights);
  const double step = generated.decode_seconds / static_cast<double>(kPilotSteps - 1) + n * static_cast<double>(geometry_.token_bytes()) / kBytesPerSecond;
  const double audit = 4 * n * static_cast<double>(geometry_.token_bytes()) / kBytesPerSecond;
  double streams = 0;
  for (const TaskSet& set : sets_) streams += static_cast<double>(set.context.stream.size());
  const auto steps = static_cast<double>(task_.options.steps);
  const double restore = n * static_cast<double>(geometry_.token_bytes()) / 1e9 * static_cast<double>(1 + sets_.size());
  Estimate estimate;
  estimate.per_run = restore + steps * (step + audit / static_cast<double>(task_.options.audit_every)) +
                     (streams + static_cast<double>(task_.options.generate)) * step;
  estimate.prompt = prefill;
  estimate.step = step;
  estimate.prefill = prefill * static_cast<double>(1 + sets_.size());
  estimate.seconds = estimate.prefill + estimate.per_run * static_cast<double>(runs.size());
  return estimate;
}

}  // namespace prehoc::cli
