#include "integrations/cli/json.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "integrations/cli/version.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

ordered_json Number(double value) { return std::isfinite(value) ? ordered_json(value) : ordered_json(nullptr); }

ordered_json Sketch(const UnitSketch& sketch) {
  if (sketch.count() == 0) return nullptr;
  return {{"count", sketch.count()}, {"mean", sketch.mean()}, {"p50", sketch.Quantile(0.5)}, {"p99", sketch.Quantile(0.99)}, {"max", sketch.max()}};
}

ordered_json Tier(uint64_t budget, const RunFigures& run, const std::string& peak, int64_t rows, double bytes_per_token) {
  const std::optional<double> peak_bytes = run.counter(peak);
  return {{"budget_bytes", budget}, {"peak_bytes", peak_bytes ? Number(*peak_bytes) : ordered_json(nullptr)},
          {"rows_found", rows}, {"bytes_per_token", bytes_per_token}};
}

ordered_json Tiers(const RunFigures& run) {
  const SequenceReport& r = run.report;
  ordered_json tiers;
  tiers["device"] = Tier(run.device_budget, run, "device.peak_bytes", r.rows_device, run.per_step(r.bytes_attended));
  tiers["device"]["rows_held"] = run.residency.device_rows;
  tiers["host"] = Tier(run.host_budget, run, "host.peak_bytes", r.rows_host, run.per_step(r.bytes_from_host));
  tiers["host"]["blocks_held"] = run.residency.host_blocks;
  tiers["disk"] = nullptr;
  if (run.store_budget == 0) return tiers;
  tiers["disk"] = Tier(run.store_budget, run, "store.peak_bytes", r.rows_disk, run.per_step(r.bytes_from_disk));
  tiers["disk"]["blocks_held_only_here"] = run.residency.disk_only_blocks;
  return tiers;
}

ordered_json Counters(const RunFigures& run) {
  ordered_json all = ordered_json::object();
  for (const auto& [name, value] : run.counters) all[name] = Number(value);
  run.report.VisitCounters([&](std::string_view name, double value) { all[std::string(name)] = Number(value); });
  return all;
}

ordered_json Run(const RunFigures& run) {
  const SequenceReport& r = run.report;
  ordered_json json;
  json["selector"] = {{"name", run.selector}, {"knobs", run.knobs}, {"codes", run.codes}, {"kernels", run.kernels},
                      {"prompt_precision", run.prompt_precision}};
  json["prompt"] = {{"restored_tokens", r.restored_tokens},
                    {"computed_tokens", run.generated.prefill_tokens},
                    {"open_seconds", run.open_seconds},
                    {"prefill_seconds", run.generated.prefill_seconds},
                    {"prefill_tokens_per_second", run.prefill_rate()},
                    {"first_token_seconds", run.generated.decisions.empty() ? ordered_json(nullptr) : ordered_json(run.first_token_seconds())}};
  json["decode"] = {{"steps", run.generated.decode_steps},
                    {"seconds", run.generated.decode_seconds},
                    {"audit_seconds", r.times.audit},
                    {"tokens_per_second", run.decode_rate()}};
  json["selection"] = {{"triples", r.triples},
                       {"dense_triples", r.dense_triples},
                       {"retrievals", r.retrievals},
                       {"rho", Number(r.rho())},
                       {"mean_attended", Number(r.mean_attended())},
                       {"scored_bytes_per_token", run.per_step(r.bytes_scored())},
                       {"attended_bytes_per_token", run.per_step(r.bytes_attended)},
                       {"host_bytes_per_token", run.per_step(r.bytes_from_host)},
                       {"disk_bytes_per_token", run.per_step(r.bytes_from_disk)}};
  json["tiers"] = Tiers(run);
  json["dropped_mass"] = {{"estimated", Sketch(r.dropped_estimated)}, {"bound", Sketch(r.dropped_bound)},
                          {"bound_statistical", Sketch(r.dropped_bound_statistical)}, {"audited", Sketch(r.dropped_audited)},
                          {"bound_violations", r.bound_violations}, {"statistical_checked", r.statistical_checked},
                          {"statistical_violations", r.statistical_violations}, {"audited_steps", r.audited_steps}};
  json["estimate_error"] = Sketch(r.estimate_error);
  json["output_error"] = Sketch(r.output_error);
  json["integrity"] = {{"corrupt_chunks", r.corrupt_chunks}, {"missing_chunks", r.missing_chunks}, {"recomputed_chunks", r.recomputed_chunks}};
  json["counters"] = Counters(run);
  return json;
}

ordered_json Comparison(const AnswerFigures& f) {
  if (!f.agreement) return nullptr;
  ordered_json kl = ordered_json::array();
  for (const double value : f.agreement->kl) kl.push_back(Number(value));
  return {{"same_tokens", f.agreement->same_tokens}, {"decisions", f.agreement->decisions}, {"kl_mean", Number(f.agreement->kl_mean())},
          {"kl_max", Number(f.agreement->kl_max())}, {"kl", kl}, {"same_answer", f.agreement->same_answer}, {"dense_answer", f.dense_answer}};
}

}  // namespace

std::string FormatJson(const AnswerFigures& f) {
  ordered_json json;
  json["schema"] = kAnswerSchema;
  json["version"] = kVersion;
  json["machine"] = {{"cpu", f.cpu}, {"threads", f.threads}};
  json["model"] = {{"name", f.model_name}, {"path", f.model_path}, {"lora", f.lora}, {"architecture", f.architecture},
                   {"fingerprint", f.fingerprint}, {"layout", f.geometry.LayoutName()},
                   {"kv_rows", RowFormatName(f.geometry.rows)}, {"kv_bytes_per_token", f.geometry.token_bytes()}, {"weight_bytes", f.weight_bytes}, {"load_seconds", f.load_seconds}};
  json["document"] = {{"path", f.document_path}, {"tokens", f.document_tokens}, {"context", f.context}};
  json["prompt_tokens"] = f.prompt_tokens;
  json["store"] = f.store.empty() ? ordered_json(nullptr) : ordered_json(f.store);
  json["calibration"] = f.calibration.empty() ? ordered_json(nullptr) : ordered_json(f.calibration);
  json["question"] = f.question;
  json["answer"] = f.answer;
  json["answer_tokens"] = f.selected.generated.answer_tokens;
  json["decisions"] = f.selected.generated.decisions;
  json["stop"] = StopReasonName(f.selected.generated.stop);
  json["peak_resident_bytes"] = f.peak_resident_bytes;
  json["run"] = Run(f.selected);
  json["dense"] = f.dense ? Run(*f.dense) : ordered_json(nullptr);
  json["comparison"] = Comparison(f);
  return json.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace prehoc::cli
