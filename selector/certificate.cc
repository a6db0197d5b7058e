#include "selector/certificate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace prehoc {
namespace {
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRounding = 1e-3;  // fp32 logits and log-sum-exps on the caller's side
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
  double most = -kInfinity;
  std::vector<double> parts;
  for (size_t b = 0; b < balls.size(); ++b) {
    parts.push_back(DroppedLseBound(lse_dropped[b], balls[b], anchor, q));
    most = std::max(most, parts.back());
  }
  if (!std::isfinite(most)) return most;
  double sum = 0;
  for (const double part : parts) sum += std::exp(part - most);
  return most + std::log(sum);
}

StatisticalLseBound::StatisticalLseBound(double confidence, int64_t chosen_from)
    : factor_(std::sqrt(2 * std::log(static_cast<double>(chosen_from) / (1 - confidence)))) {
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
  double most = -kInfinity;
  std::vector<double> raised;
  for (size_t i = 0; i < z.size(); ++i) {
    const float error = proven.empty() ? Error(variance[i]) : std::min(Error(variance[i]), proven[i]);
    raised.push_back(static_cast<double>(z[i]) + error);
    if (std::isnan(raised.back()) || raised.back() == kInfinity) return kInfinity;
    most = std::max(most, raised.back());
  }
  if (most == -kInfinity) return most;
  double sum = 0;
  for (const double value : raised) sum += std::exp(value - most);
  // 1e-12 of it: the rounding of sums and exponentials.
  return most + std::log(sum) + 1e-12 * (std::abs(most) + static_cast<double>(z.size()));
}

double DroppedMassBound(double lse_kept, double u_dropped) {
  if (std::isnan(u_dropped) || std::isnan(lse_kept) || lse_kept == kInfinity) return 1;
  if (u_dropped == -kInfinity) return 0;
  if (lse_kept == -kInfinity || u_dropped == kInfinity) return 1;
  return 1 / (1 + std::exp(lse_kept - u_dropped));
}

}  // namespace prehoc
