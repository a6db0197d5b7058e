// Values and what people ask of them.
#pragma once
#include <nlohmann/json.hpp>
#include <vector>

namespace prehoc::cli {

// A finite number to six digits, or null.
nlohmann::ordered_json JsonNumber(double value);

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
