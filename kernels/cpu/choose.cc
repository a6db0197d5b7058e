// choose and top_k. The passes over all positions are vector code; what handles the few chosen ones is here.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/drivers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/split.h"
#include "kernels/cpu/top_keys.h"
#include "kernels/validate.h"

namespace prehoc::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Exponentials below 2^-126 of the largest are flushed to 0. A sum above this is not changed by them.
constexpr double kSafeSum = 1e-20;

// Exponentials exp(x + sign * plus - top) of one head, and where they come from.
struct HeadSums {
  float top = 0;
  double sinks = 0, middle = 0, local = 0;
  double all() const { return sinks + middle + local; }
};

// Set of middle positions, as bits.
class Bits {
 public:
  void Reset(int32_t lo, int32_t hi) {
    lo_ = lo;
    hi_ = hi;
    words_.assign(static_cast<size_t>((hi - lo + 63) / 64), 0);
  }
  // True if it was not in the set; positions outside of the middle never are.
  bool Add(int64_t p) {
    if (p < lo_ || p >= hi_) return false;
    uint64_t& word = words_[static_cast<size_t>((p - lo_) / 64)];
    const uint64_t bit = uint64_t{1} << ((p - lo_) % 64);
    if ((word & bit) != 0) return false;
    word |= bit;
    return true;
  }
  int32_t List(int32_t* out) const {
    int32_t count = 0;
    for (size_t w = 0; w < words_.size(); ++w) {
      for (uint64_t word = words_[w]; word != 0; word &= word - 1) {
        out[count++] = lo_ + static_cast<int32_t>(w * 64) + std::countr_zero(word);
      }
    }
    return count;
  }

 private:
  int64_t lo_ = 0, hi_ = 0;
  std::vector<uint64_t> words_;
};

// What a thread keeps between tasks.
struct Room {
  Scratch<float> exps, upper, lower, row;
  Scratch<int32_t> keys;
  TopKeys top;
  TopKeys marked;
  Bits bits;
  std::vector<double> suffix;
};

class Choice {
 public:
  Choice(const VectorOps& ops, const ChooseTask& task, int64_t group, Room& room)
      : ops_(ops), task_(task), group_(group), middle_(task.hi - task.lo), room_(room) {}

  // False: a logit or an error is not finite, or masses were flushed that could decide: the reference should decide all of
  // it. Then only `pooled` and lse_all may have been written, and writing them again gives the same.
  bool Run() {
    if (!SumAll() || !SumBounds()) return false;
    RankMiddle();
    KeepFirst();
    bool met = true;
    if (task_.target_drop >= 0 && !Widen(met)) return false;
    *task_.count = count_;
    WriteOutside();
    if (task_.met != nullptr) *task_.met = met ? 1 : 0;
    return true;
  }

 private:
  const float* Row(const float* rows, int64_t h) const { return rows + h * task_.z_stride; }
  const float* Err(int64_t h) const { return task_.err != nullptr ? Row(task_.err, h) : nullptr; }
  static const float* At(const float* row, int64_t i) { return row != nullptr ? row + i : nullptr; }
  bool needs_bounds() const { return task_.target_drop >= 0 || task_.lse_out_bound != nullptr; }

  // Sums of exp(z + sign * err) over all that is in sight; the terms of the middle go to `exps` [middle].
  bool SumHead(const float* z, const float* err, float sign, float* exps, HeadSums& sums) const {
    const int64_t after = task_.n - task_.lo;
    const float* plus = sign > 0 ? err : nullptr;  // with - err the top of z serves as well
    sums.top = std::max(ops_.max_of(z, plus, task_.sinks), ops_.max_of(z + task_.lo, At(plus, task_.lo), after));
    if (!std::isfinite(sums.top)) return false;
    sums.sinks = ops_.exp_sum(z, err, sign, sums.top, task_.sinks, nullptr);
    sums.middle = ops_.exp_sum(z + task_.lo, At(err, task_.lo), sign, sums.top, middle_, exps);
    sums.local = ops_.exp_sum(z + task_.hi, At(err, task_.hi), sign, sums.top, task_.n - task_.hi, nullptr);
    return std::isfinite(sums.all());
  }

  bool SumAll() {
    exps_ = room_.exps.Get(static_cast<size_t>(group_ * middle_));
    for (int64_t h = 0; h < group_; ++h) {
      HeadSums sums;
      if (!SumHead(Row(task_.z, h), nullptr, 0, exps_ + h * middle_, sums)) return false;
      lse_[h] = static_cast<float>(sums.top + std::log(sums.all()));
      tops_[h] = sums.top;
    }
    return true;
  }

  // exp(z + err), and with a target exp(z - err) too.
  bool SumBounds() {
    if (!needs_bounds()) return true;
    upper_ = exps_;
    lower_ = exps_;
    std::copy(tops_, tops_ + group_, upper_tops_);
    if (task_.err == nullptr && task_.target_drop < 0) return true;
    upper_ = room_.upper.Get(static_cast<size_t>(group_ * middle_));
    for (int64_t h = 0; h < group_; ++h) {
      HeadSums sums;
      if (!SumHead(Row(task_.z, h), Err(h), 1, upper_ + h * middle_, sums)) return false;
      upper_tops_[h] = sums.top;
    }
    if (task_.target_drop < 0) return true;
    lower_ = room_.lower.Get(static_cast<size_t>(group_ * middle_));
    for (int64_t h = 0; h < group_; ++h) {
      HeadSums sums;
      if (!SumHead(Row(task_.z, h), Err(h), -1, lower_ + h * middle_, sums)) return false;
      always_kept_[h] = sums.sinks + sums.local;
      lower_tops_[h] = sums.top;
    }
    return true;
  }

  void RankMiddle() {
    for (int64_t h = 0; h < group_; ++h) task_.lse_all[h] = lse_[h];
    keys_ = room_.keys.Get(static_cast<size_t>(middle_) + 16);
    ops_.score_keys({.z = task_.z + task_.lo, .z_stride = task_.z_stride, .count = middle_, .lse = lse_,
                     .group = static_cast<int32_t>(group_), .rule = task_.rule, .resident = task_.resident,
                     .first_bit = task_.lo, .log_theta = task_.log_theta,
                     .pooled = task_.pooled != nullptr ? task_.pooled + task_.lo : nullptr,
                     .pool_reset = task_.pool_reset, .keys = keys_});
    first_ = room_.top.Select(ops_, keys_, padded(), task_.k, task_.lo);
  }
  int64_t padded() const { return (int64_t{middle_} + 15) / 16 * 16; }

  void KeepFirst() {
    if (task_.dilate_m == 0 || task_.dilate_r == 0) {
      std::copy_n(first_.where, first_.count, task_.chosen);
      count_ = static_cast<int32_t>(first_.count);
      return;
    }
    room_.bits.Reset(task_.lo, task_.hi);
    if (task_.exact_budget) {
      WalkRanks();
    } else {
      for (int64_t i = 0; i < first_.count; ++i) room_.bits.Add(first_.where[i]);
      const KeptKeys best = Best(std::min<int64_t>(task_.dilate_m, first_.count));
      for (int64_t i = 0; i < best.count; ++i) AddNeighbours(best.where[i], INT32_MAX);
    }
    count_ = room_.bits.List(task_.chosen);
  }

  // The m best of the first k.
  KeptKeys Best(int64_t m) {
    const int64_t n = (first_.count + 15) / 16 * 16;
    std::fill(first_.key + first_.count, first_.key + n, kNoCandidate);
    const KeptKeys best = room_.marked.Select(ops_, first_.key, n, m, 0);
    for (int64_t i = 0; i < best.count; ++i) best.where[i] = first_.where[best.where[i]];
    return best;
  }

  // Nearest first, the left one before the right one; stops when `limit` positions are kept.
  void AddNeighbours(int64_t p, int32_t limit) {
    const int64_t reach = std::min<int64_t>(task_.dilate_r, middle_);
    for (int64_t j = 1; j <= reach; ++j) {
      if (count_ < limit && room_.bits.Add(p - j)) ++count_;
      if (count_ < limit && room_.bits.Add(p + j)) ++count_;
    }
  }

  // CIS*: rank after rank until exactly k are kept. k ranks always suffice.
  void WalkRanks() {
    room_.top.Sort(first_);
    const auto limit = static_cast<int32_t>(std::min<int64_t>(task_.k, middle_));
    for (int64_t rank = 0; rank < first_.count && count_ < limit; ++rank) {
      if (room_.bits.Add(first_.where[rank])) ++count_;
      if (rank < task_.dilate_m) AddNeighbours(first_.where[rank], limit);
    }
  }

  // On down the ranks until every head is within target_drop, or cap are kept; `met` says which. False: undecided.
  bool Widen(bool& met) {
    for (int32_t i = 0; i < count_; ++i) keys_[task_.chosen[i] - task_.lo] = kNoCandidate;
    const int64_t most = std::max<int64_t>(0, int64_t{task_.cap} - count_);
    KeptKeys rest = room_.top.Select(ops_, keys_, padded(), most, task_.lo);
    room_.top.Sort(rest);
    int64_t needed = 0;
    for (int64_t h = 0; h < group_; ++h) {
      const int64_t of_head = RanksNeeded(h, rest, met);
      if (of_head == kUndecided) return false;
      needed = std::max(needed, of_head);
    }
    std::copy_n(rest.where, needed, task_.chosen + count_);
    count_ += static_cast<int32_t>(needed);
    std::sort(task_.chosen, task_.chosen + count_);
    return true;
  }

  // How many of `rest` head h needs, or kUndecided; clears `met` if all are not enough.
  int64_t RanksNeeded(int64_t h, const KeptKeys& rest, bool& met) {
    float* upper = upper_ + h * middle_;
    const float* lower = lower_ + h * middle_;
    double inside = always_kept_[h];
    for (int32_t i = 0; i < count_; ++i) {
      const int32_t at = task_.chosen[i] - task_.lo;
      inside += lower[at];
      upper[at] = 0;
    }
    // suffix[r]: what is outside once rest[0, r) is kept too. Sums of what is there, nothing is subtracted.
    room_.suffix.resize(static_cast<size_t>(rest.count) + 1);
    double* outside = room_.suffix.data();
    outside[rest.count] = SumWithout(upper, rest);
    for (int64_t r = rest.count; r-- > 0;) outside[r] = outside[r + 1] + upper[rest.where[r] - task_.lo];
    // dropped = U / (U + L) <= t, as U (1 - t) <= L t; U and L are in units of exp(their top), and flushed terms may
    // have kept up to `flushed` from each of them. Where that decides, the reference does.
    const double target = static_cast<double>(task_.target_drop);
    const double unit = std::exp(static_cast<double>(upper_tops_[h]) - lower_tops_[h]) * (1 - target);
    const double flushed = 2e-38 * task_.n;
    for (int64_t r = 0; r <= rest.count; ++r) {
      if (r == middle_ - count_ || (outside[r] + flushed) * unit <= inside * target) return r;
      if (!(outside[r] * unit > (inside + flushed) * target)) return kUndecided;
      if (r < rest.count) inside += lower[rest.where[r] - task_.lo];
    }
    met = false;
    return rest.count;
  }

  double SumWithout(const float* x, const KeptKeys& without) {
    float* copy = room_.row.Get(static_cast<size_t>(middle_));
    std::copy_n(x, middle_, copy);
    for (int64_t i = 0; i < without.count; ++i) copy[without.where[i] - task_.lo] = 0;
    return ops_.sum_of(copy, middle_);
  }

  void WriteOutside() {
    for (int64_t h = 0; h < group_; ++h) {
      task_.lse_out[h] = Outside(Row(task_.z, h), nullptr, exps_ + h * middle_, tops_[h]);
    }
    for (int64_t h = 0; task_.lse_out_bound != nullptr && h < group_; ++h) {
      task_.lse_out_bound[h] = Outside(Row(task_.z, h), Err(h), upper_ + h * middle_, upper_tops_[h]);
    }
  }

  // LSE of what is not kept, summed directly: taken as a difference it would be noise where little is left.
  float Outside(const float* z, const float* err, float* exps, float top) {
    if (count_ == middle_) return -kInfinity;
    for (int32_t i = 0; i < count_; ++i) exps[task_.chosen[i] - task_.lo] = 0;
    const double sum = ops_.sum_of(exps, middle_);
    if (sum > kSafeSum) return static_cast<float>(top + std::log(sum));
    return OutsideFromItsOwnTop(z, err);
  }

  float OutsideFromItsOwnTop(const float* z, const float* err) {
    float* row = room_.row.Get(static_cast<size_t>(middle_));
    for (int32_t i = 0; i < middle_; ++i) row[i] = z[task_.lo + i] + (err != nullptr ? err[task_.lo + i] : 0);
    for (int32_t i = 0; i < count_; ++i) row[task_.chosen[i] - task_.lo] = -kInfinity;
    const float top = ops_.max_of(row, nullptr, middle_);
    if (top == -kInfinity) return top;
    return static_cast<float>(top + std::log(ops_.exp_sum(row, nullptr, 0, top, middle_, nullptr)));
  }

  static constexpr int64_t kUndecided = -1;
  static constexpr int64_t kMaxGroup = 256;
  const VectorOps& ops_;
  const ChooseTask& task_;
  const int64_t group_;
  const int32_t middle_;
  Room& room_;
  float *exps_ = nullptr, *upper_ = nullptr, *lower_ = nullptr;  // [group, middle]
  float lse_[kMaxGroup], tops_[kMaxGroup], upper_tops_[kMaxGroup], lower_tops_[kMaxGroup];
  double always_kept_[kMaxGroup];
  int32_t* keys_ = nullptr;  // [middle, padded]
  KeptKeys first_;           // the k best
  int32_t count_ = 0;        // chosen so far
};

}  // namespace

Status Choose(const VectorOps& ops, const ChooseParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  int64_t positions = 0;
  for (const ChooseTask& task : params.tasks) positions += task.n;
  ForParts(launch, positions >= 2048, static_cast<int64_t>(params.tasks.size()), [&](int64_t i) {
    static thread_local Room room;
    const ChooseTask& task = params.tasks[static_cast<size_t>(i)];
    if (Choice(ops, task, params.group, room).Run()) return;
    // Validated above, so this cannot fail.
    ReferenceKernels().choose({.tasks = {&task, 1}, .group = params.group}, Launch{}).IgnoreError();
  });
  return {};
}

Status TopK(const VectorOps& ops, const TopKParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  int64_t positions = 0;
  for (const TopKTask& task : params.tasks) positions += task.hi - task.lo;
  ForParts(launch, positions >= 4096, static_cast<int64_t>(params.tasks.size()), [&](int64_t i) {
    static thread_local Room room;
    const TopKTask& task = params.tasks[static_cast<size_t>(i)];
    const int32_t n = task.hi - task.lo;
    *task.count = 0;
    if (task.k == 0 || n == 0) return;
    int32_t* keys = room.keys.Get(static_cast<size_t>(n) + 16);
    ops.float_keys(task.score + task.lo, n, keys);
    const KeptKeys top = room.top.Select(ops, keys, (int64_t{n} + 15) / 16 * 16, task.k, task.lo);
    std::copy_n(top.where, top.count, task.chosen);
    *task.count = static_cast<int32_t>(top.count);
  });
  return {};
}

}  // namespace prehoc::cpu
