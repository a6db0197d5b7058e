// choose, in the order of its contract: lse_all, scores, ranks, the walk down the ranks, what is left outside.
// Masses are kept as logarithms, so that huge logits and huge errors neither overflow nor vanish.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "kernels/for_tasks.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// log(exp(a) + exp(b)); NaN and +inf win over everything.
double LogAdd(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return a + b;
  const double most = std::max(a, b), least = std::min(a, b);
  if (std::isinf(most) || least == -kInfinity) return most;
  return most + std::log1p(std::exp(least - most));
}

// Of a set that is known at once: one maximum, one sum.
double LogSumExp(std::span<const double> values) {
  double most = -kInfinity;
  for (const double x : values) {
    if (std::isnan(x)) return x;
    most = std::max(most, x);
  }
  if (std::isinf(most)) return most;
  double sum = 0;
  for (const double x : values) sum += std::exp(x - most);
  return most + std::log(sum);
}

class Choice {
 public:
  Choice(const ChooseTask& task, int32_t group)
      : task_(task), group_(group), kept_(static_cast<size_t>(task.n), false), score_(static_cast<size_t>(task.n)) {}

  void Run() {
    WriteLseAll();
    ScoreMiddle();
    Rank();
    KeepSinksAndLocal();
    KeepFirst();
    const bool met = Widen();
    WriteResults(met);
  }

 private:
  double Z(int64_t h, int64_t i) const { return task_.z[h * task_.z_stride + i]; }
  double Err(int64_t h, int64_t i) const {
    return task_.err == nullptr ? 0 : static_cast<double>(task_.err[h * task_.z_stride + i]);
  }
  // The most and the least that z may be; an error that is not finite means that nothing is known.
  double Most(int64_t h, int64_t i) const { return std::isfinite(Err(h, i)) ? Z(h, i) + Err(h, i) : kInfinity; }
  double Least(int64_t h, int64_t i) const { return std::isfinite(Err(h, i)) ? Z(h, i) - Err(h, i) : -kInfinity; }
  bool InSight(int64_t i) const { return i < task_.sinks || i >= task_.lo; }
  bool Kept(int64_t i) const { return kept_[static_cast<size_t>(i)]; }
  double Score(int64_t i) const { return score_[static_cast<size_t>(i)]; }

  void WriteLseAll() {
    for (int64_t h = 0; h < group_; ++h) {
      std::vector<double> z;
      for (int64_t i = 0; i < task_.n; ++i) {
        if (InSight(i)) z.push_back(Z(h, i));
      }
      lse_all_.push_back(LogSumExp(z));
      task_.lse_all[h] = static_cast<float>(lse_all_.back());
    }
  }

  double HeadScore(int64_t h, int64_t i) const {
    const double z = Z(h, i);
    if (std::isnan(z) || z == -kInfinity) return -kInfinity;
    if (z == kInfinity) return kInfinity;
    if (task_.rule == GroupRule::kMaxLogit) return z;
    const double lse = lse_all_[static_cast<size_t>(h)];
    return std::isnan(lse) ? -kInfinity : z - lse;  // a NaN elsewhere in the head: its weights mean nothing
  }

  double ScoreOf(int64_t i) const {
    std::vector<double> of_heads;
    for (int64_t h = 0; h < group_; ++h) of_heads.push_back(HeadScore(h, i));
    if (task_.rule == GroupRule::kMeanWeight) return LogSumExp(of_heads) - std::log(static_cast<double>(group_));
    return *std::max_element(of_heads.begin(), of_heads.end());
  }

  void ScoreMiddle() {
    for (int64_t i = task_.lo; i < task_.hi; ++i) {
      score_[static_cast<size_t>(i)] = ScoreOf(i);
      if (task_.pooled == nullptr) continue;
      const auto score = static_cast<float>(Score(i));
      task_.pooled[i] = task_.pool_reset ? score : std::max(task_.pooled[i], score);
    }
  }

  bool IsCandidate(int32_t i) const {
    if (task_.resident == nullptr) return true;
    return ((task_.resident[i / 64] >> (i % 64)) & 1) != 0 || Score(i) > static_cast<double>(task_.log_theta);
  }

  void Rank() {
    for (int32_t i = task_.lo; i < task_.hi; ++i) {
      if (IsCandidate(i)) ranked_.push_back(i);
    }
    std::stable_sort(ranked_.begin(), ranked_.end(), [&](int32_t a, int32_t b) { return Score(a) > Score(b); });
  }

  void KeepSinksAndLocal() {
    for (int64_t i = 0; i < task_.n; ++i) {
      kept_[static_cast<size_t>(i)] = i < task_.sinks || i >= task_.hi;
    }
  }

  void Keep(int64_t i) {
    if (i < task_.lo || i >= task_.hi || Kept(i)) return;
    if (task_.exact_budget && kept_count_ >= task_.k) return;
    kept_[static_cast<size_t>(i)] = true;
    ++kept_count_;
  }

  // The first k ranks and their neighbours; with exact_budget as many ranks as it takes.
  void KeepFirst() {
    const auto k = static_cast<size_t>(task_.k), m = static_cast<size_t>(task_.dilate_m);
    for (size_t rank = 0; rank < ranked_.size() && (task_.exact_budget ? kept_count_ < task_.k : rank < k); ++rank) {
      const int64_t p = ranked_[rank];
      Keep(p);
      const int64_t reach = std::min<int64_t>(task_.dilate_r, task_.hi - task_.lo);
      for (int64_t j = 1; rank < m && j <= reach; ++j) {
        Keep(p - j);
        Keep(p + j);
      }
    }
  }

  // On down the ranks until target_drop is reached in every head. True if it was, or if there is no target.
  bool Widen() {
    if (task_.target_drop < 0) return true;
    std::vector<int32_t> rest;  // what may still be kept, best first
    for (const int32_t i : ranked_) {
      if (!Kept(i)) rest.push_back(i);
    }
    const size_t room = static_cast<size_t>(std::max<int64_t>(0, int64_t{task_.cap} - kept_count_));
    const size_t most = std::min(rest.size(), room);
    size_t needed = 0;
    bool met = true;
    for (int64_t h = 0; h < group_; ++h) needed = std::max(needed, RanksNeeded(h, rest, most, &met));
    for (size_t rank = 0; rank < needed; ++rank) {
      kept_[static_cast<size_t>(rest[rank])] = true;
      ++kept_count_;
    }
    return met;
  }

  // U / (U + L) <= target_drop, for the logarithms of U and L: also where exp would lose them.
  bool WithinTarget(double outside, double inside) const {
    if (std::isnan(outside) || std::isnan(inside)) return false;
    if (outside == -kInfinity || task_.target_drop >= 1) return true;
    const double target = task_.target_drop;
    return outside - inside <= std::log(target) - std::log1p(-target);  // NaN of two infinities: false
  }

  // How many of `rest` head h needs, at most `most`; clears *met if that is not enough.
  size_t RanksNeeded(int64_t h, const std::vector<int32_t>& rest, size_t most, bool* met) const {
    // outside[r]: log U once rest[0, r) is kept too.
    std::vector<double> outside(rest.size() + 1), kept, never;
    for (int64_t i = 0; i < task_.n; ++i) {
      if (InSight(i) && Kept(i)) kept.push_back(Least(h, i));
      if (InSight(i) && !Kept(i) && !IsCandidate(static_cast<int32_t>(i))) never.push_back(Most(h, i));
    }
    outside[rest.size()] = LogSumExp(never);
    for (size_t r = rest.size(); r-- > 0;) outside[r] = LogAdd(outside[r + 1], Most(h, rest[r]));
    double inside = LogSumExp(kept);
    for (size_t r = 0; r <= most; ++r) {
      if (WithinTarget(outside[r], inside)) return r;
      if (r < most) inside = LogAdd(inside, Least(h, rest[r]));
    }
    *met = false;
    return most;
  }

  void WriteResults(bool met) {
    int32_t count = 0;
    for (int32_t i = task_.lo; i < task_.hi; ++i) {
      if (Kept(i)) task_.chosen[count++] = i;
    }
    *task_.count = count;
    bool sane = true;
    for (int64_t h = 0; h < group_; ++h) {
      std::vector<double> z, most;
      for (int64_t i = 0; i < task_.n; ++i) {
        if (!InSight(i) || Kept(i)) continue;
        z.push_back(Z(h, i));
        most.push_back(Most(h, i));
      }
      task_.lse_out[h] = static_cast<float>(LogSumExp(z));
      if (task_.lse_out_bound != nullptr) task_.lse_out_bound[h] = static_cast<float>(LogSumExp(most));
      sane = sane && !std::isnan(lse_all_[static_cast<size_t>(h)]);
    }
    if (task_.met != nullptr) *task_.met = met && sane ? 1 : 0;
  }

  const ChooseTask& task_;
  const int64_t group_;
  std::vector<bool> kept_;      // [n]
  std::vector<double> score_;   // [n], of the middle
  std::vector<double> lse_all_; // [group]
  std::vector<int32_t> ranked_; // candidates, best first
  int64_t kept_count_ = 0;      // of the middle
};
}  // namespace

Status Choose(const ChooseParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    Choice(params.tasks[static_cast<size_t>(index)], params.group).Run();
  });
  return {};
}

}  // namespace prehoc::reference
