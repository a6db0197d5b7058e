#include "integrations/cli/figures.h"

namespace prehoc::cli {

double RunFigures::first_token_seconds() const {
  return generated.decisions.empty() ? 0 : open_seconds + generated.prefill_seconds;
}

double RunFigures::prefill_rate() const {
  if (generated.prefill_tokens == 0 || generated.prefill_seconds <= 0) return 0;
  return static_cast<double>(generated.prefill_tokens) / generated.prefill_seconds;
}

double RunFigures::decode_rate() const {
  const double seconds = generated.decode_seconds - report.times.audit;
  return generated.decode_steps > 0 && seconds > 0 ? static_cast<double>(generated.decode_steps) / seconds : 0;
}

double RunFigures::per_step(int64_t total) const {
  return report.decode_steps > 0 ? static_cast<double>(total) / static_cast<double>(report.decode_steps) : 0;
}

std::optional<double> RunFigures::counter(const std::string& name) const {
  const auto found = counters.find(name);
  if (found == counters.end()) return std::nullopt;
  return found->second;
}

}  // namespace prehoc::cli
