#include "integrations/cli/distribution.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>

namespace prehoc::cli {

nlohmann::ordered_json JsonNumber(double value) {
  if (!std::isfinite(value)) return nullptr;
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return std::strtod(text, nullptr);
}

std::optional<double> NumberAt(const nlohmann::ordered_json& json, std::span<const char* const> path) {
  const nlohmann::ordered_json* at = &json;
  for (const char* name : path) {
    if (!at->is_object() || !at->contains(name)) return std::nullopt;
    at = &(*at)[name];
  }
  return at->is_number() ? std::optional<double>(at->get<double>()) : std::nullopt;
}

double Distribution::mean() const {
  if (values_.empty()) return 0;
  return std::accumulate(values_.begin(), values_.end(), 0.0) / static_cast<double>(values_.size());
}

double Distribution::Quantile(double q) const {
  if (values_.empty()) return 0;
  std::vector<double> sorted = values_;
  const auto rank = static_cast<size_t>(std::ceil(std::clamp(q, 0.0, 1.0) * static_cast<double>(sorted.size())));
  const auto at = sorted.begin() + static_cast<std::ptrdiff_t>(rank > 0 ? rank - 1 : 0);
  std::nth_element(sorted.begin(), at, sorted.end());
  return *at;
}

nlohmann::ordered_json Distribution::ToJson() const {
  if (values_.empty()) return nullptr;
  return {{"count", count()}, {"mean", JsonNumber(mean())}, {"p50", JsonNumber(Quantile(0.5))}, {"p90", JsonNumber(Quantile(0.9))},
          {"p99", JsonNumber(Quantile(0.99))}, {"max", JsonNumber(Quantile(1))}};
}

}  // namespace prehoc::cli
