#include "integrations/cli/fidelity_notes.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "integrations/cli/distribution.h"

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

struct Seen {
  std::string label, role, budget;
  std::optional<double> kl, rho, attended, scored;
  int64_t found = 0, of = 0, violations = 0;
};

std::vector<Seen> Runs(const ordered_json& document) {
  std::vector<Seen> all;
  for (const ordered_json& run : document["runs"]) {
    Seen seen{run.value("label", ""), run.value("role", ""), run.value("budget", ""), NumberAt(run, {"model", "kl", "mean"}), NumberAt(run, {"cost", "rho"}),
              NumberAt(run, {"cost", "mean_attended"}), NumberAt(run, {"cost", "bytes_per_step", "scored"}), 0, 0, 0};
    for (const ordered_json& task : run.value("tasks", ordered_json::array())) {
      seen.found += task.value("score", int64_t{0});
      seen.of += task.value("of", int64_t{0});
    }
    if (run.contains("heads") && run["heads"].is_object()) {
      seen.violations = run["heads"].value("bound_violations", int64_t{0});
    }
    all.push_back(std::move(seen));
  }
  return all;
}

const Seen* Role(const std::vector<Seen>& runs, const std::string& role, const std::string& budget) {
  for (const Seen& run : runs) {
    if (run.role == role && (role == "reference" || run.budget == budget)) return &run;
  }
  return nullptr;
}

void Quality(const std::vector<Seen>& runs, ordered_json* notes) {
  const Seen* best = nullptr;
  for (const Seen& run : runs) {
    if (run.role.empty() && run.kl && (!best || *run.kl < *best->kl)) best = &run;
  }
  if (!best) return;
  std::string text = fmt::format("{} has the least KL to dense, {:.4f} nats a step", best->label, *best->kl);
  if (const Seen* oracle = Role(runs, "ceiling", best->budget); oracle && oracle->kl && *oracle->kl > 0) {
    text += fmt::format("; {:.1f} times that of the oracle, which reads every key at every step", *best->kl / *oracle->kl);
  }
  if (const Seen* window = Role(runs, "floor", best->budget); window && window->kl) text += fmt::format("; a window alone has {:.3f}", *window->kl);
  notes->push_back({{"title", "Quality"}, {"text", text + "."}});
}

void Facts(const std::vector<Seen>& runs, ordered_json* notes) {
  const Seen* dense = Role(runs, "reference", "");
  if (!dense || dense->of == 0) return;
  std::string lost;
  for (const Seen& run : runs) {
    if (!run.role.empty() || run.found >= dense->found) continue;
    lost += (lost.empty() ? "" : ", ") + fmt::format("{} {}", run.label, dense->found - run.found);
  }
  notes->push_back({{"title", "Facts"}, {"text", fmt::format("Dense attention finds {} of {} facts. {}", dense->found, dense->of,
                                                            lost.empty() ? "No selector between floor and ceiling finds fewer."
                                                                         : "Fewer than dense: " + lost + ".")}});
}

void Gates(const std::vector<Seen>& runs, ordered_json* notes) {
  constexpr double kClaimed = 0.1;  // docs/selectors/cis.md: retrievals that the source says are needed
  std::string above;
  for (const Seen& run : runs) {
    if (run.label.starts_with("cis") && run.rho && *run.rho > kClaimed) above += (above.empty() ? "" : ", ") + fmt::format("{} {:.2f}", run.label, *run.rho);
  }
  if (above.empty()) return;
  notes->push_back({{"title", "Gate"}, {"text", "The cosine gate re-selects more often than the published one in ten: rho of " + above + "."}});
}

void Fairness(const std::vector<Seen>& runs, ordered_json* notes) {
  std::string unequal;
  for (const Seen& run : runs) {
    const Seen* oracle = Role(runs, "ceiling", run.budget);
    if (!run.role.empty() || !oracle || !oracle->attended || !run.attended || *oracle->attended <= 0) continue;
    const double ratio = *run.attended / *oracle->attended;
    if (ratio > 1.05 || ratio < 0.95) unequal += (unequal.empty() ? "" : ", ") + fmt::format("{} {:+.0f} %", run.label, 100 * (ratio - 1));
  }
  if (unequal.empty()) return;
  notes->push_back({{"title", "Unequal budgets"}, {"text", "These runs attended to more or fewer positions than the oracle at the same nominal budget, and "
                                                           "are to be compared with that in mind: " + unequal + "."}});
}

void Violations(const std::vector<Seen>& runs, ordered_json* notes) {
  for (const Seen& run : runs) {
    if (run.violations == 0) continue;
    notes->push_back({{"title", "Broken bound"}, {"text", fmt::format("{}: {} proven bounds lay below the audited truth. This is a bug; please report it.",
                                                                       run.label, run.violations)}});
  }
}

}  // namespace

ordered_json FidelityNotes(const ordered_json& document) {
  ordered_json notes = ordered_json::array();
  const std::vector<Seen> runs = Runs(document);
  Violations(runs, &notes);
  Quality(runs, &notes);
  Facts(runs, &notes);
  Gates(runs, &notes);
  Fairness(runs, &notes);
  return notes;
}

}  // namespace prehoc::cli
