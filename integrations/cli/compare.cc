#include "integrations/cli/compare.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace prehoc::cli {

std::vector<float> LogSoftmax(std::span<const float> logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float z : logits) sum += std::exp(static_cast<double>(z) - top);
  const double lse = top + std::log(sum);
  std::vector<float> result(logits.size());
  std::transform(logits.begin(), logits.end(), result.begin(),
                 [lse](float z) { return static_cast<float>(static_cast<double>(z) - lse); });
  return result;
}

double KlDivergence(std::span<const float> log_p, std::span<const float> log_q) {
  double sum = 0;
  for (size_t i = 0; i < log_p.size(); ++i) {
    const double p = std::exp(static_cast<double>(log_p[i]));
    if (p > 0) sum += p * (static_cast<double>(log_p[i]) - static_cast<double>(log_q[i]));
  }
  return std::max(sum, 0.0);  // rounding may leave -1e-9
}

void LogitsRecord::Add(std::span<const float> logits) {
  if (!steps_.empty() && (steps_.size() + 1) * logits.size_bytes() > max_bytes_) return;
  steps_.push_back(LogSoftmax(logits));
}

namespace {
std::span<const double> DecodeSteps(const std::vector<double>& kl) {
  return std::span<const double>(kl).subspan(kl.size() > 1 ? 1 : 0);
}
}  // namespace

double Agreement::kl_mean() const {
  const auto steps = DecodeSteps(kl);
  return steps.empty() ? 0 : std::accumulate(steps.begin(), steps.end(), 0.0) / static_cast<double>(steps.size());
}

double Agreement::kl_max() const {
  const auto steps = DecodeSteps(kl);
  return steps.empty() ? 0 : *std::max_element(steps.begin(), steps.end());
}

}  // namespace prehoc::cli
