// What selection did to every head, beside the exact truth: collected from the audits of one run.
#pragma once
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/geometry.h"
#include "cache/kv_cache.h"
#include "integrations/cli/distribution.h"

namespace prehoc::cli {

// Means over the audits of a [rows, columns] map.
class MeanMap {
 public:
  MeanMap(int32_t rows, int32_t columns) : columns_(columns), sums_(static_cast<size_t>(rows) * static_cast<size_t>(columns)), counts_(sums_.size()) {}
  void Add(int32_t row, int32_t column, double value);
  nlohmann::ordered_json ToJson() const;  // rows of columns; null where nothing was added
  // {row, column, mean} of the largest mean (smallest if not `largest`); null when empty.
  nlohmann::ordered_json Worst(bool largest) const;

 private:
  const int32_t columns_;
  std::vector<double> sums_;
  std::vector<int64_t> counts_;
};

class FidelityObserver : public AuditObserver {
 public:
  // `local`: positions of the window that a fresh choice keeps at any rate; Budget::local.
  FidelityObserver(const KvGeometry& geometry, int32_t local);
  void OnUnit(const AuditedUnit& unit) override;

  // The run's `heads` (docs/fidelity.md).
  nlohmann::ordered_json Heads() const;
  // By step: the mean dropped mass; parallel to steps().
  std::vector<int64_t> steps() const;
  std::vector<double> dropped_by_step() const;
  double mean_dropped() const { return dropped_.mean(); }

 private:
  // Of one step in one unit: what a fresh choice of the same size would have kept.
  struct Fresh {
    double recall = 1;              // of its members, those that were attended
    std::vector<double> dropped;    // [heads]
  };
  Fresh ChooseAfresh(const AuditedUnit& unit);

  const KvGeometry geometry_;
  const int32_t local_;
  Distribution dropped_, excess_, recall_, output_error_, estimate_ratio_, bound_ratio_, statistical_ratio_;
  MeanMap dropped_map_, excess_map_, recall_map_, rho_map_, error_by_layer_;
  std::map<int64_t, Distribution> by_step_;
  int64_t statistical_checked_ = 0, statistical_violations_ = 0;
  int64_t bound_violations_ = 0, units_ = 0, points_seen_ = 0;
  nlohmann::ordered_json points_ = nlohmann::ordered_json::array();
  std::vector<float> weights_, sorted_;  // scratch
};

// Cosines of a query head with itself `distance` steps earlier, from the dense run: how long a choice could last.
class QueryObserver : public AuditObserver {
 public:
  explicit QueryObserver(const KvGeometry& geometry) : geometry_(geometry) {}
  void OnUnit(const AuditedUnit& unit) override;
  nlohmann::ordered_json ToJson() const;  // `query_cosine`

 private:
  static constexpr int64_t kDistances[] = {1, 2, 4, 8, 16, 32, 64};
  struct History {
    std::vector<std::vector<float>> post, pre;  // by step, the last ones; [heads * head_dim]
  };
  void Compare(std::vector<std::vector<float>>& history, const float* q, int64_t heads, std::map<int64_t, Distribution>* found);

  const KvGeometry geometry_;
  std::map<std::pair<int32_t, int32_t>, History> histories_;  // by layer and first head
  std::map<int64_t, Distribution> post_, pre_;
};

}  // namespace prehoc::cli
