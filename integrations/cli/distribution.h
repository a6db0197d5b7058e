// Values and what people ask of them.
#pragma once
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <vector>

namespace prehoc::cli {

// A finite number to six digits, or null.
nlohmann::ordered_json JsonNumber(double value);

// The number at a path of names; nullopt where anything is missing or null.
std::optional<double> NumberAt(const nlohmann::ordered_json& json, std::span<const char* const> path);
inline std::optional<double> NumberAt(const nlohmann::ordered_json& json, std::initializer_list<const char*> path) {
  return NumberAt(json, std::span(path.begin(), path.size()));
}

class Distribution {
 public:
  void Add(double value) { values_.push_back(value); }
  size_t count() const { return values_.size(); }
  double mean() const;  // 0 when empty
  // The smallest value that at least the share q of all does not exceed; 0 when empty.
  double Quantile(double q) const;
  // {count, mean, p50, p90, p99, max}; null when empty.
  nlohmann::ordered_json ToJson() const;

 private:
  std::vector<double> values_;
};

}  // namespace prehoc::cli
