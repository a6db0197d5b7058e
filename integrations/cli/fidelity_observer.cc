#include "integrations/cli/fidelity_observer.h"

#include <algorithm>
#include <cmath>

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

constexpr double kTolerance = 1e-4;      // fp32 rounding of truth and bound, as in the cache's own audit
constexpr double kLeastTruth = 1e-3;     // ratios to less than this say nothing
constexpr int64_t kMostPoints = 1000;    // of the sample that the page plots

ordered_json WithWorst(const Distribution& values, const ordered_json& worst) {
  ordered_json json = values.ToJson();
  if (json.is_object()) json["worst"] = worst;
  return json;
}

double Cosine(const float* a, const float* b, int64_t dim) {
  double dot = 0, aa = 0, bb = 0;
  for (int64_t c = 0; c < dim; ++c) {
    dot += static_cast<double>(a[c]) * b[c];
    aa += static_cast<double>(a[c]) * a[c];
    bb += static_cast<double>(b[c]) * b[c];
  }
  return aa > 0 && bb > 0 ? dot / std::sqrt(aa * bb) : 0;
}

}  // namespace

void MeanMap::Add(int32_t row, int32_t column, double value) {
  const auto at = static_cast<size_t>(row) * static_cast<size_t>(columns_) + static_cast<size_t>(column);
  sums_[at] += value;
  ++counts_[at];
}

ordered_json MeanMap::ToJson() const {
  ordered_json rows = ordered_json::array();
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (i % static_cast<size_t>(columns_) == 0) rows.push_back(ordered_json::array());
    rows.back().push_back(counts_[i] > 0 ? JsonNumber(sums_[i] / static_cast<double>(counts_[i])) : ordered_json(nullptr));
  }
  return rows;
}

ordered_json MeanMap::Worst(bool largest) const {
  ordered_json worst = nullptr;
  double extreme = 0;
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (counts_[i] == 0) continue;
    const double mean = sums_[i] / static_cast<double>(counts_[i]);
    if (!worst.is_null() && (largest ? mean <= extreme : mean >= extreme)) continue;
    extreme = mean;
    worst = {{"layer", i / static_cast<size_t>(columns_)}, {"head", i % static_cast<size_t>(columns_)}, {"mean", JsonNumber(mean)}};
  }
  return worst;
}

FidelityObserver::FidelityObserver(const KvGeometry& geometry, int32_t local)
    : geometry_(geometry), local_(local), dropped_map_(geometry.layers, geometry.heads), excess_map_(geometry.layers, geometry.heads),
      recall_map_(geometry.layers, geometry.heads), rho_map_(geometry.layers, geometry.kv_heads), error_by_layer_(geometry.layers, 1) {}

// The oracle's rule (docs/selectors/oracle.md): the largest weight over the heads that choose together, and as many middle positions
// as were attended.
FidelityObserver::Fresh FidelityObserver::ChooseAfresh(const AuditedUnit& unit) {
  Fresh fresh;
  const auto in_sight = static_cast<int64_t>(unit.lse.empty() ? 0 : unit.logits.size() / unit.lse.size());
  const int32_t gap = unit.cut_end - unit.cut_begin;
  const auto place = [&](int64_t position) { return position < unit.cut_begin ? position : position - gap; };
  // A method that keeps a longer window has chosen it.
  const int32_t left = std::max(unit.left, unit.n - local_);
  const int64_t begin = place(std::max(unit.sinks, unit.cut_end)), end = place(left);
  weights_.assign(static_cast<size_t>(in_sight), -INFINITY);
  for (int32_t h = 0; h < unit.heads; ++h) {
    const float* z = unit.logits.data() + h * in_sight;
    for (int64_t i = begin; i < end; ++i) {
      weights_[static_cast<size_t>(i)] = std::max(weights_[static_cast<size_t>(i)], z[i] - unit.lse[static_cast<size_t>(h)]);
    }
  }
  int64_t middle = 0;
  for (const int32_t position : unit.attended) middle += position >= unit.cut_end && position >= unit.sinks && position < left;
  middle = std::min(middle, end - begin);
  float least = INFINITY;
  if (middle > 0) {
    sorted_.assign(weights_.begin() + begin, weights_.begin() + end);
    const auto last = sorted_.begin() + static_cast<std::ptrdiff_t>(middle - 1);
    std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<>());
    least = *last;
  }
  int64_t kept = 0, hit = 0;
  size_t next = 0;
  fresh.dropped.assign(static_cast<size_t>(unit.heads), 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = i < unit.cut_begin ? i : i + gap;
    while (next < unit.attended.size() && unit.attended[next] < position) ++next;
    if (weights_[static_cast<size_t>(i)] >= least && kept < middle) {
      ++kept;
      hit += next < unit.attended.size() && unit.attended[next] == position;
      continue;
    }
    for (int32_t h = 0; h < unit.heads; ++h) {
      fresh.dropped[static_cast<size_t>(h)] +=
          std::exp(static_cast<double>(unit.logits[static_cast<size_t>(h * in_sight + i)]) - unit.lse[static_cast<size_t>(h)]);
    }
  }
  if (kept > 0) fresh.recall = static_cast<double>(hit) / static_cast<double>(kept);
  return fresh;
}

void FidelityObserver::OnUnit(const AuditedUnit& unit) {
  if (unit.logits.empty()) return;
  rho_map_.Add(unit.layer, unit.kv_head, unit.scanned ? 1 : 0);
  const Fresh fresh = ChooseAfresh(unit);
  for (int32_t h = 0; h < unit.heads; ++h) {
    const auto at = static_cast<size_t>(h);
    const int32_t head = unit.first_head + h;
    const double truth = unit.dropped[at];
    dropped_.Add(truth);
    excess_.Add(truth - fresh.dropped[at]);
    recall_.Add(fresh.recall);
    output_error_.Add(unit.output_error[at]);
    dropped_map_.Add(unit.layer, head, truth);
    excess_map_.Add(unit.layer, head, truth - fresh.dropped[at]);
    recall_map_.Add(unit.layer, head, fresh.recall);
    error_by_layer_.Add(unit.layer, 0, unit.output_error[at]);
    by_step_[unit.step].Add(truth);
    const bool bounded = unit.bound[at] >= 0;
    if (bounded && truth > unit.bound[at] + kTolerance) ++bound_violations_;
    const float statistical = unit.bound_statistical.empty() ? -1 : unit.bound_statistical[at];
    if (statistical >= 0 && truth > 0) {
      ++statistical_checked_;
      statistical_violations_ += truth > statistical + kTolerance;
    }
    if (truth <= kLeastTruth) continue;
    if (unit.scanned && !unit.estimate.empty()) estimate_ratio_.Add(unit.estimate[at] / truth);
    if (bounded) bound_ratio_.Add(unit.bound[at] / truth);
    if (statistical >= 0) statistical_ratio_.Add(statistical / truth);
    // Every so-many-th, with a stride that no number of heads divides.
    if (unit.estimate.empty() || points_seen_++ % 17 != 0 || static_cast<int64_t>(points_.size()) >= kMostPoints) continue;
    points_.push_back(ordered_json::array({JsonNumber(truth), JsonNumber(unit.estimate[at]), bounded ? JsonNumber(unit.bound[at]) : ordered_json(nullptr),
                                           statistical >= 0 ? JsonNumber(statistical) : ordered_json(nullptr), unit.age}));
  }
  ++units_;
}

ordered_json FidelityObserver::Heads() const {
  if (units_ == 0) return nullptr;
  ordered_json json;
  json["dropped"] = WithWorst(dropped_, dropped_map_.Worst(true));
  json["excess"] = WithWorst(excess_, excess_map_.Worst(true));
  json["recall"] = WithWorst(recall_, recall_map_.Worst(false));
  json["output_error"] = output_error_.ToJson();
  json["estimate_ratio"] = estimate_ratio_.ToJson();
  json["bound_ratio"] = bound_ratio_.ToJson();
  json["statistical_ratio"] = statistical_ratio_.ToJson();
  json["bound_violations"] = bound_violations_;
  json["statistical_violations"] = statistical_violations_;
  json["statistical_checked"] = statistical_checked_;
  json["audited_steps"] = by_step_.size();
  json["dropped_map"] = dropped_map_.ToJson();
  json["excess_map"] = excess_map_.ToJson();
  json["recall_map"] = recall_map_.ToJson();
  ordered_json by_layer = ordered_json::array();
  for (const ordered_json& row : error_by_layer_.ToJson()) by_layer.push_back(row.at(0));
  json["output_error_by_layer"] = by_layer;
  json["rho_map"] = rho_map_.ToJson();
  json["steps"] = steps();
  ordered_json by_step = ordered_json::array();
  for (const double value : dropped_by_step()) by_step.push_back(JsonNumber(value));
  json["dropped_by_step"] = by_step;
  json["points"] = points_;
  return json;
}

std::vector<int64_t> FidelityObserver::steps() const {
  std::vector<int64_t> all;
  for (const auto& [step, values] : by_step_) all.push_back(step);
  return all;
}

std::vector<double> FidelityObserver::dropped_by_step() const {
  std::vector<double> all;
  for (const auto& [step, values] : by_step_) all.push_back(values.mean());
  return all;
}

// --- queries ------------------------------------------------------------------------------------------------------

void QueryObserver::Compare(std::vector<std::vector<float>>& history, const float* q, int64_t heads, std::map<int64_t, Distribution>* found) {
  const int64_t dim = geometry_.head_dim;
  for (const int64_t distance : kDistances) {
    if (static_cast<int64_t>(history.size()) < distance) break;
    const std::vector<float>& earlier = history[history.size() - static_cast<size_t>(distance)];
    for (int64_t h = 0; h < heads; ++h) (*found)[distance].Add(Cosine(q + h * dim, earlier.data() + h * dim, dim));
  }
  history.emplace_back(q, q + heads * dim);
  if (static_cast<int64_t>(history.size()) > *std::rbegin(kDistances)) history.erase(history.begin());
}

void QueryObserver::OnUnit(const AuditedUnit& unit) {
  History& history = histories_[{unit.layer, unit.first_head}];
  Compare(history.post, unit.q, unit.heads, &post_);
  if (unit.q_pre_rope) Compare(history.pre, unit.q_pre_rope, unit.heads, &pre_);
}

ordered_json QueryObserver::ToJson() const {
  ordered_json distances = ordered_json::array(), post = ordered_json::array(), pre = ordered_json::array();
  for (const auto& [distance, values] : post_) {
    distances.push_back(distance);
    post.push_back(values.ToJson());
    const auto before = pre_.find(distance);
    pre.push_back(before == pre_.end() ? ordered_json(nullptr) : before->second.ToJson());
  }
  return {{"distance", distances}, {"post_rope", post}, {"pre_rope", pre}};
}

}  // namespace prehoc::cli
