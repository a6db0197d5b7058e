#include "integrations/cli/fidelity_table.h"

#include <fmt/format.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "integrations/cli/distribution.h"
#include "integrations/cli/format.h"
#include "integrations/cli/text_table.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

struct Column {
  std::string name;
  bool more_is_better = false, marked = true;
  std::function<std::optional<double>(const ordered_json&)> value;
  std::function<std::string(double)> format;
};

std::string Small(double x) { return x == 0 ? "0" : std::abs(x) < 0.001 ? fmt::format("{:.1e}", x) : fmt::format("{:.4f}", x); }
std::string Percent(double x) { return fmt::format("{:.1f}", 100 * x); }
std::string Megabytes(double x) { return fmt::format("{:.2f}", x / 1e6); }
std::string Milliseconds(double x) { return fmt::format("{:.2f}", 1e3 * x); }

std::optional<double> Choosing(const ordered_json& run) {
  const auto gate = NumberAt(run, {"cost", "seconds_per_step", "gate"}), score = NumberAt(run, {"cost", "seconds_per_step", "score"}),
             choose = NumberAt(run, {"cost", "seconds_per_step", "choose"});
  return gate && score && choose ? std::optional<double>(*gate + *score + *choose) : std::nullopt;
}

std::vector<Column> Columns(const ordered_json& document) {
  const auto at = [](std::initializer_list<const char*> path) {
    return [names = std::vector<const char*>(path)](const ordered_json& run) { return NumberAt(run, names); };
  };
  std::vector<Column> columns = {
      {"KL mean", false, true, at({"model", "kl", "mean"}), Small},
      {"KL p99", false, true, at({"model", "kl", "p99"}), Small},
      {"same top-1 %", true, true, at({"model", "top1_agreement"}), Percent},
      {"perplexity", false, false, at({"model", "perplexity"}), [](double x) { return fmt::format("{:.3f}", x); }},
      {"dropped %", false, true, at({"heads", "dropped", "mean"}), [](double x) { return fmt::format("{:.2f}", 100 * x); }},
      {"excess %", false, true, at({"heads", "excess", "mean"}), [](double x) { return fmt::format("{:.2f}", 100 * x); }},
      {"attended", false, false, at({"cost", "mean_attended"}), [](double x) { return fmt::format("{:.0f}", x); }},
      {"rho", false, true, at({"cost", "rho"}), [](double x) { return fmt::format("{:.3f}", x); }},
      {"scored MB", false, true, at({"cost", "bytes_per_step", "scored"}), Megabytes},
      {"fetched MB", false, true, at({"cost", "bytes_per_step", "from_host"}), Megabytes},
      {"choose ms", false, true, Choosing, Milliseconds},
      {"attention ms", false, true, at({"cost", "seconds_per_step", "total"}), Milliseconds},
  };
  // One column a task, named as the first run names them.
  if (!document["runs"].empty() && document["runs"][0].contains("tasks")) {
    const ordered_json& tasks = document["runs"][0]["tasks"];
    for (size_t i = 0; i < tasks.size(); ++i) {
      columns.push_back({tasks[i].value("name", "task") + " of " + std::to_string(tasks[i].value("of", 0)), true, true,
                         [i](const ordered_json& run) {
                           if (!run.contains("tasks") || i >= run["tasks"].size()) return std::optional<double>();
                           return NumberAt(run["tasks"][i], {"score"});
                         },
                         [](double x) { return fmt::format("{:.0f}", x); }});
    }
  }
  if (NumberAt(document["runs"].empty() ? ordered_json() : document["runs"][0], {"generation", "tokens"})) {
    columns.push_back({"diverges at", true, true, at({"generation", "first_divergence"}), [](double x) { return fmt::format("{:.0f}", x); }});
  }
  return columns;
}

std::string RoleSuffix(const ordered_json& run) {
  const std::string role = run.value("role", "");
  return role == "ceiling" || role == "floor" ? " (" + role + ")" : "";
}

}  // namespace

std::string FormatFidelityTable(const ordered_json& document) {
  const std::vector<Column> columns = Columns(document);
  std::vector<std::string> header = {"run"};
  for (const Column& column : columns) header.push_back(column.name);
  TextTable table(std::move(header));
  std::vector<std::optional<double>> best(columns.size());
  for (const ordered_json& run : document["runs"]) {
    if (run.value("role", "") != "") continue;
    for (size_t i = 0; i < columns.size(); ++i) {
      const auto value = columns[i].value(run);
      if (!value) continue;
      if (!best[i] || (columns[i].more_is_better ? *value > *best[i] : *value < *best[i])) best[i] = value;
    }
  }
  for (const ordered_json& run : document["runs"]) {
    std::vector<std::string> row = {run.value("label", "?") + RoleSuffix(run)};
    for (size_t i = 0; i < columns.size(); ++i) {
      const auto value = columns[i].value(run);
      const bool is_best = value && columns[i].marked && run.value("role", "") == "" && value == best[i];
      row.push_back(value ? columns[i].format(*value) + (is_best ? "*" : " ") : "- ");
    }
    table.Add(std::move(row));
  }
  const ordered_json& text = document["text"];
  std::string result = fmt::format("{}, {} of {}, last {} steps; bytes and times per step of all layers; * best of the selectors between floor and ceiling\n\n",
                                   document["model"].value("name", "?"), FormatCount(text.value("context", int64_t{0})), text.value("path", "?"),
                                   FormatCount(text.value("steps", int64_t{0})));
  result += table.ToString();
  for (const ordered_json& note : document["notes"]) result += fmt::format("\n{}: {}", note.value("title", ""), note.value("text", ""));
  if (!document["notes"].empty()) result += "\n";
  return result;
}

}  // namespace prehoc::cli
