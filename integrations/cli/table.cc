#include "integrations/cli/table.h"

#include <fmt/format.h>

#include <functional>
#include <iterator>

#include "base/units.h"
#include "integrations/cli/format.h"
#include "integrations/cli/text_table.h"

namespace prehoc::cli {
namespace {
using Cell = std::function<std::string(const RunFigures&)>;

std::string Bytes(double bytes) { return FormatBytes(bytes); }
std::string OrDash(double value, std::string text) { return value > 0 ? text : "-"; }
std::string Share(int64_t part, int64_t whole) {
  return whole > 0 ? FormatShare(static_cast<double>(part) / static_cast<double>(whole)) : "-";
}

bool IsDense(const RunFigures& run) { return run.report.triples == 0; }

std::string Rho(const RunFigures& run) {
  return IsDense(run) ? "-" : FormatNumber(run.report.rho());
}

std::string MeanAttended(const RunFigures& run) {
  if (!IsDense(run)) return FormatNumber(run.report.mean_attended());
  return run.report.dense_triples > 0 ? "all" : "-";
}

std::string Heading(const AnswerFigures& f) {
  std::string text = fmt::format("model     {} ({}, {} layers, {} query and {} KV heads of {}), weights {}\n", f.model_name,
                                 f.architecture, f.geometry.layers, f.geometry.heads, f.geometry.kv_heads,
                                 f.geometry.head_dim, Bytes(static_cast<double>(f.weight_bytes)));
  text += fmt::format("document  {}, {} of {} tokens; KV of the prompt {}\n", f.document_path, FormatCount(f.context),
                      FormatCount(f.document_tokens),
                      Bytes(static_cast<double>(f.geometry.token_bytes()) * static_cast<double>(f.prompt_tokens)));
  const int64_t restored = f.selected.report.restored_tokens;
  text += fmt::format("prompt    {} tokens: ", FormatCount(f.prompt_tokens));
  if (restored > 0) {
    text += fmt::format("{} restored from {}, ", FormatCount(restored), f.store.empty() ? "memory" : f.store);
  }
  text += fmt::format("{} computed\n", FormatCount(f.selected.generated.prefill_tokens));
  text += fmt::format("machine   {}, {} threads, {} kernels\n", f.cpu, f.threads, f.selected.kernels);
  text += fmt::format("answer    {} tokens{}\n", FormatCount(f.selected.generated.answer_tokens),
                      f.selected.generated.stop == StopReason::kLimit         ? ", cut at --max-new-tokens"
                      : f.selected.generated.stop == StopReason::kInterrupted ? ", interrupted"
                                                                              : "");
  if (!f.calibration.empty()) text += fmt::format("promise   {}\n", f.calibration);
  return text;
}

std::string Runs(const AnswerFigures& f) {
  std::vector<std::string> header = {"", f.selected.selector};
  if (f.dense) header.push_back("dense");
  TextTable table(std::move(header));
  const auto add = [&](const char* name, const Cell& cell) {
    std::vector<std::string> row = {name, cell(f.selected)};
    if (f.dense) row.push_back(cell(*f.dense));
    table.Add(std::move(row));
  };
  add("time to first token", [](const RunFigures& r) { return OrDash(r.first_token_seconds(), FormatSeconds(r.first_token_seconds())); });
  add("prefill, tokens/s", [](const RunFigures& r) { return OrDash(r.prefill_rate(), FormatRate(r.prefill_rate())); });
  add("decode, tokens/s", [](const RunFigures& r) { return OrDash(r.decode_rate(), FormatRate(r.decode_rate())); });
  add("retrieval fraction rho", Rho);
  add("mean attended positions", MeanAttended);
  add("scored a token", [](const RunFigures& r) { return Bytes(r.per_step(r.report.bytes_scored())); });
  add("attended a token", [](const RunFigures& r) { return Bytes(r.per_step(r.report.bytes_attended)); });
  add("fetched a token, from host", [](const RunFigures& r) { return Bytes(r.per_step(r.report.bytes_from_host)); });
  add("fetched a token, from disk", [](const RunFigures& r) { return Bytes(r.per_step(r.report.bytes_from_disk)); });
  return table.ToString();
}

// Where the attended rows were found, and that no tier held more than it may.
std::string Tiers(const AnswerFigures& f) {
  const RunFigures& run = f.selected;
  const SequenceReport& r = run.report;
  const int64_t rows = r.rows_device + r.rows_host + r.rows_disk;
  const auto bytes = [&](const char* name) {
    const std::optional<double> value = run.counter(name);
    return value ? Bytes(*value) : std::string("-");
  };
  TextTable table({"tier", "budget", "peak", "rows found there", "share", "holds of this sequence"});
  table.Add({"device", Bytes(static_cast<double>(run.device_budget)), bytes("device.peak_bytes"), FormatCount(r.rows_device),
             Share(r.rows_device, rows), FormatCount(run.residency.device_rows) + " rows"});
  table.Add({"host", Bytes(static_cast<double>(run.host_budget)), bytes("host.peak_bytes"), FormatCount(r.rows_host),
             Share(r.rows_host, rows), FormatCount(run.residency.host_blocks) + " blocks"});
  if (run.store_budget > 0) {
    table.Add({"disk", Bytes(static_cast<double>(run.store_budget)), bytes("store.peak_bytes"), FormatCount(r.rows_disk),
               Share(r.rows_disk, rows), FormatCount(run.residency.disk_only_blocks) + " blocks, here only"});
  }
  return table.ToString();
}

std::string DroppedMass(const SequenceReport& report) {
  TextTable table({"dropped mass", "mean", "p50", "p99", "max", "heads x steps"});
  const auto add = [&](const char* name, const UnitSketch& sketch) {
    if (sketch.count() == 0) return;
    table.Add({name, FormatShare(sketch.mean()), FormatShare(sketch.Quantile(0.5)), FormatShare(sketch.Quantile(0.99)),
               FormatShare(sketch.max()), FormatCount(sketch.count())});
  };
  if (report.dropped_estimated.count() == 0 && report.dropped_audited.count() == 0) return "";
  add("estimated", report.dropped_estimated);
  add("proven bound", report.dropped_bound);
  add("statistical bound", report.dropped_bound_statistical);
  add("audited (exact)", report.dropped_audited);
  add("output error, audited", report.output_error);
  return "\n" + table.ToString();
}

std::string Integrity(const SequenceReport& r) {
  if (r.corrupt_chunks == 0 && r.missing_chunks == 0 && r.recomputed_chunks == 0) return "";
  return fmt::format("\nstored KV: {} damaged and {} missing pieces found; {} recomputed, the answer does not depend on it\n",
                     FormatCount(r.corrupt_chunks), FormatCount(r.missing_chunks), FormatCount(r.recomputed_chunks));
}

std::string Comparison(const AnswerFigures& f) {
  if (!f.agreement) return "";
  const Agreement& a = *f.agreement;
  std::string text = fmt::format("\nagainst dense: {} of {} tokens the same, KL {} mean, {} max over {} steps\n",
                                 FormatCount(a.same_tokens), FormatCount(a.decisions), FormatNumber(a.kl_mean()),
                                 FormatNumber(a.kl_max()), FormatCount(static_cast<int64_t>(a.kl.size())));
  text += a.same_answer ? "dense decoding gives the same answer\n" : "dense decoding answers: " + f.dense_answer + "\n";
  return text;
}

}  // namespace

std::string FormatFigures(const AnswerFigures& figures) {
  return Heading(figures) + "\n" + Runs(figures) + "\n" + Tiers(figures) + DroppedMass(figures.selected.report) +
         Integrity(figures.selected.report) + Comparison(figures);
}

}  // namespace prehoc::cli
