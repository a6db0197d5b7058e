#include "tests/kernels/choose_model.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double Z(const ChooseTask& task, int32_t h, int32_t i) { return task.z[h * task.z_stride + i]; }

double ScoreOf(const ChooseTask& task, const std::vector<double>& lse_all, int32_t i) {
  std::vector<double> s;
  for (size_t h = 0; h < lse_all.size(); ++h) {
    const double z = Z(task, static_cast<int32_t>(h), i);
    s.push_back(task.rule == GroupRule::kMaxLogit || z == -kInfinity ? z : z - lse_all[h]);
  }
  if (task.rule == GroupRule::kMeanWeight) return NaiveLse(s) - std::log(static_cast<double>(s.size()));
  return *std::max_element(s.begin(), s.end());
}

double Gap(double a, double b) {
  return a == b || std::isinf(a) || std::isinf(b) ? kInfinity : std::abs(a - b) / (1 + std::abs(a) + std::abs(b));
}
}  // namespace

double MassOf(const ChooseTask& task, int32_t h, const std::vector<int32_t>& chosen, bool kept, double sign) {
  std::vector<double> x;
  for (int32_t i = 0; i < task.n; ++i) {
    const bool in_sight = i < task.sinks || i >= task.lo;
    const bool is_kept = i < task.sinks || i >= task.hi || std::binary_search(chosen.begin(), chosen.end(), i);
    if (!in_sight || is_kept != kept) continue;
    const double err = task.err == nullptr || sign == 0 ? 0 : static_cast<double>(task.err[h * task.z_stride + i]);
    x.push_back(std::isinf(err) ? sign * err : Z(task, h, i) + sign * err);
  }
  return NaiveLse(x);
}

double DroppedBound(const ChooseTask& task, int32_t h, const std::vector<int32_t>& chosen) {
  const double u = MassOf(task, h, chosen, false, 1), l = MassOf(task, h, chosen, true, -1);
  return u == -kInfinity ? 0 : u == kInfinity ? 1 : 1 / (1 + std::exp(l - u));
}

ChooseModel RunChooseModel(const ChooseTask& task, int32_t group) {
  ChooseModel model{.score = std::vector<double>(static_cast<size_t>(task.n), 0), .margin = kInfinity};
  for (int32_t h = 0; h < group; ++h) {
    std::vector<double> z;
    for (int32_t i = 0; i < task.n; ++i) {
      if (i < task.sinks || i >= task.lo) z.push_back(Z(task, h, i));
    }
    model.lse_all.push_back(NaiveLse(z));
  }

  std::vector<int32_t> ranked;
  for (int32_t i = task.lo; i < task.hi; ++i) {
    const double s = ScoreOf(task, model.lse_all, i);
    model.score[static_cast<size_t>(i)] = s;
    const bool resident = task.resident != nullptr && ((task.resident[i / 64] >> (i % 64)) & 1) != 0;
    if (task.resident == nullptr || resident || s > static_cast<double>(task.log_theta)) ranked.push_back(i);
    if (task.resident != nullptr && !resident) model.margin = std::min(model.margin, Gap(s, task.log_theta));
  }
  const auto score = [&](int32_t i) { return model.score[static_cast<size_t>(i)]; };
  std::stable_sort(ranked.begin(), ranked.end(), [&](int32_t a, int32_t b) { return score(a) > score(b); });
  for (size_t i = 1; i < ranked.size(); ++i) {
    model.margin = std::min(model.margin, Gap(score(ranked[i - 1]), score(ranked[i])));
  }

  std::set<int32_t> kept;
  const auto add = [&](int64_t i) {
    const bool full = task.exact_budget && static_cast<int64_t>(kept.size()) >= task.k;
    if (i >= task.lo && i < task.hi && !full) kept.insert(static_cast<int32_t>(i));
  };
  for (size_t rank = 1; rank <= ranked.size(); ++rank) {
    if (!task.exact_budget && static_cast<int64_t>(rank) > task.k) break;
    const int64_t p = ranked[rank - 1];
    add(p);
    for (int64_t j = 1; static_cast<int64_t>(rank) <= task.dilate_m && j <= task.dilate_r; ++j) add(p - j), add(p + j);
  }
  const auto as_list = [&] { return std::vector<int32_t>(kept.begin(), kept.end()); };
  if (task.target_drop >= 0) {
    const auto enough = [&] {
      bool all = true;
      for (int32_t h = 0; h < group; ++h) {
        const double dropped = DroppedBound(task, h, as_list());
        const bool vanishing = dropped < kVanishing && task.target_drop < kVanishing;
        model.margin = std::min(model.margin, vanishing ? 0 : Gap(dropped, task.target_drop));
        all = all && dropped <= static_cast<double>(task.target_drop);
      }
      return all;
    };
    model.met = enough();
    for (const int32_t p : ranked) {
      if (model.met || static_cast<int64_t>(kept.size()) >= task.cap) break;
      if (!kept.insert(p).second) continue;
      model.met = enough();
    }
  }
  model.chosen = as_list();
  return model;
}

}  // namespace prehoc
