#include "selector/certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace prehoc {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRounding = 1e-3;  // fp32 logits and log-sum-exps on the caller's side

// log SUM exp of what is added, in one pass; -inf adds nothing, +inf is +inf.
class LogSum {
 public:
  void Add(double x) {
    if (x == -kInfinity) return;
    if (x > most_) sum_ = most_ == -kInfinity ? 0 : sum_ * std::exp(most_ - x), most_ = x;
    sum_ += x == most_ ? 1 : std::exp(x - most_);
  }
  double Value() const { return most_ + std::log(sum_); }  // -inf + -inf if nothing was added

 private:
  double most_ = -kInfinity, sum_ = 0;
};

// The rounding of sums and exponentials, here and in what was handed in.
double Slack(double magnitude, size_t count) { return 1e-12 * (std::abs(magnitude) + static_cast<double>(count)); }

// The root w of w exp(w) = x for x >= 0, not below it by more than 1e-13 of it. From above: with w = ln(1 + x), w exp(w) >= x,
// and Newton's steps on a convex function stay on that side.
double LambertW(double x) {
  if (!(x < kInfinity)) return kInfinity;
  double w = std::log1p(x);
  for (int i = 0; i < 64; ++i) {
    const double e = std::exp(-w);
    const double step = (w - x * e) / (1 + w);
    w -= step;
    if (!(step > 1e-14 * w)) break;
  }
  return w * (1 + 1e-13);
}
}  // namespace

KeyBall::KeyBall(std::span<const float> keys, int32_t head_dim) : center_(static_cast<size_t>(head_dim)) {
  const size_t dim = center_.size();
  PREHOC_CHECK(dim > 0 && keys.size() % dim == 0);
  const size_t count = keys.size() / dim;
  for (size_t c = 0; c < dim; ++c) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sum += keys[i * dim + c];
    center_[c] = count ? static_cast<float>(sum / static_cast<double>(count)) : 0;
  }
  for (size_t i = 0; i < count; ++i) Add(keys.subspan(i * dim, dim));
}

void KeyBall::Add(std::span<const float> key) {
  PREHOC_CHECK(key.size() == center_.size());
  double square = 0;
  for (size_t c = 0; c < key.size(); ++c) {
    const double difference = static_cast<double>(key[c]) - center_[c];
    square += difference * difference;
  }
  const double distance = std::sqrt(square);
  if (!std::isfinite(distance)) {
    radius_ = std::numeric_limits<float>::infinity();
    return;
  }
  // Two steps up: one for the rounding to float, one for that of the sum.
  const float up = std::nextafter(std::nextafter(static_cast<float>(distance), INFINITY), INFINITY);
  radius_ = std::max(radius_, distance > 0 ? up : 0.0f);
}

double DroppedLseBound(double lse_dropped, const KeyBall& ball, std::span<const float> anchor, std::span<const float> q) {
  const std::span<const float> center = ball.center();
  PREHOC_CHECK(anchor.size() == q.size() && q.size() == center.size());
  if (lse_dropped == -kInfinity) return -kInfinity;
  double along = 0;
  double square = 0;
  for (size_t c = 0; c < q.size(); ++c) {
    const double moved = static_cast<double>(q[c]) - anchor[c];
    along += moved * center[c];
    square += moved * moved;
  }
  const double growth = (along + ball.radius() * std::sqrt(square)) / std::sqrt(static_cast<double>(q.size()));
  const double bound = lse_dropped + growth + kRounding;
  return std::isnan(bound) ? kInfinity : bound;
}

double DroppedLseBound(std::span<const double> lse_dropped, std::span<const KeyBall> balls,
                       std::span<const float> anchor, std::span<const float> q) {
  PREHOC_CHECK(lse_dropped.size() == balls.size());
  LogSum all;
  for (size_t b = 0; b < balls.size(); ++b) all.Add(DroppedLseBound(lse_dropped[b], balls[b], anchor, q));
  return all.Value();
}

StatisticalLseBound::StatisticalLseBound(double confidence, int64_t chosen_from)
    : factor_(std::sqrt(2 * std::log(static_cast<double>(chosen_from) / (1 - confidence)))),
      factor_of_two_(std::sqrt(2 * std::log(2 * static_cast<double>(chosen_from) / (1 - confidence)))) {
  PREHOC_CHECK(confidence >= 0.5 && confidence < 1 && chosen_from >= 1);
}

float StatisticalLseBound::Error(float variance) const {
  const double error = factor_ * std::sqrt(static_cast<double>(variance));
  if (!std::isfinite(error)) return INFINITY;
  return std::nextafter(static_cast<float>(error), INFINITY);
}

double StatisticalLseBound::operator()(std::span<const float> z, std::span<const float> variance,
                                       std::span<const float> proven) const {
  PREHOC_CHECK(z.size() == variance.size() && (proven.empty() || proven.size() == z.size()));
  LogSum raised;
  for (size_t i = 0; i < z.size(); ++i) {
    const float error = proven.empty() ? Error(variance[i]) : std::min(Error(variance[i]), proven[i]);
    const double most = static_cast<double>(z[i]) + error;
    if (std::isnan(most) || most == kInfinity) return kInfinity;
    raised.Add(most);
  }
  const double lse = raised.Value();
  if (lse == -kInfinity) return lse;
  return lse + Slack(lse, z.size());
}

double StatisticalLseBound::OverBlocks(std::span<const DitheredBlock> blocks) const {
  LogSum estimated, proven, root_of_q, gained;  // root_of_q: of squares
  for (const DitheredBlock& block : blocks) {
    if (block.lse == -kInfinity && block.lse_near == -kInfinity) continue;
    double raised = block.lse, spread = std::sqrt(static_cast<double>(block.variance));
    if (spread == kInfinity) raised += block.proven, spread = 0;  // only the proven bound is known: it is not left to chance
    if (std::isnan(raised) || raised == kInfinity || std::isnan(spread) || std::isnan(block.proven)) return kInfinity;
    if (std::isnan(block.lse_near) || block.lse_near == kInfinity) return kInfinity;
    estimated.Add(raised);
    proven.Add(block.lse + block.proven);
    root_of_q.Add(2 * (raised + std::min<double>(factor_of_two_ * spread, block.proven) + std::log(spread)));
    gained.Add(block.lse_near + std::log(spread / 2));
  }
  const double lse = estimated.Value();
  if (lse == -kInfinity) return lse;
  LogSum averaged;
  averaged.Add(lse + LambertW(factor_of_two_ * std::exp(root_of_q.Value() / 2 - lse)));
  averaged.Add(gained.Value());
  const double bound = std::min(averaged.Value(), proven.Value());
  return bound + Slack(std::abs(lse) + std::abs(bound), blocks.size());
}

double DroppedMassBound(double lse_kept, double u_dropped) {
  if (std::isnan(u_dropped) || std::isnan(lse_kept) || lse_kept == kInfinity) return 1;
  if (u_dropped == -kInfinity) return 0;
  if (lse_kept == -kInfinity || u_dropped == kInfinity) return 1;
  return 1 / (1 + std::exp(lse_kept - u_dropped));
}

}  // namespace prehoc
