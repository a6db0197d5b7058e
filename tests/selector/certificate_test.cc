// The certificate against the truth: a bound below it, in any of 100,000 random and adversarial cases, is a bug.
#include "selector/certificate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "selector/reference.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

double LogSumExp(std::span<const double> values, const std::vector<bool>& of, bool want) {
  double most = -kInf, sum = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (of[i] == want) most = std::max(most, values[i]);
  }
  if (most == -kInf) return most;
  for (size_t i = 0; i < values.size(); ++i) {
    if (of[i] == want) sum += std::exp(values[i] - most);
  }
  return most + std::log(sum);
}

struct Case {
  int32_t dim = 0;
  std::vector<float> keys, anchor, q;
  std::vector<bool> kept;  // [keys]
};

// Scales from tiny to huge; now and then keys far from the origin, all on one ray, or equal; now and then a query that
// runs straight at the farthest dropped key, which is where the bound is tight.
Case RandomCase(Rng* rng) {
  Case c;
  c.dim = static_cast<int32_t>(rng->Int(1, 8));
  const auto dim = static_cast<size_t>(c.dim);
  const auto count = static_cast<size_t>(rng->Int(1, 12));
  const double scale = std::pow(10, rng->Uniform(-3, 2));
  c.keys = rng->Normals(count * dim, scale);
  const std::vector<float> offset = rng->Normals(dim, rng->Chance(0.3) ? 30 * scale : 0);
  const bool ray = rng->Chance(0.2), equal = rng->Chance(0.05);
  for (size_t i = 0; i < count; ++i) {
    const float along = static_cast<float>(rng->Normal());
    for (size_t d = 0; d < dim; ++d) {
      float& key = c.keys[i * dim + d];
      if (ray) key = along * c.keys[d];
      if (equal) key = c.keys[d];
      key += offset[d];
    }
  }
  c.anchor = rng->Normals(dim, std::pow(10, rng->Uniform(-2, 1)));
  c.q = c.anchor;
  const double step = std::pow(10, rng->Uniform(-3, 1.5));
  const bool at_key = rng->Chance(0.4);
  const size_t target = static_cast<size_t>(rng->Int(0, static_cast<int64_t>(count) - 1));
  const KeyBall ball(c.keys, c.dim);
  for (size_t d = 0; d < dim; ++d) {
    const double direction = at_key ? c.keys[target * dim + d] - ball.center()[d] : rng->Normal();
    c.q[d] += static_cast<float>(step * direction / (at_key ? scale : 1));
  }
  for (size_t i = 0; i < count; ++i) c.kept.push_back(rng->Chance(0.5));
  if (at_key) c.kept[target] = false;
  return c;
}

TEST(Certificate, IsNeverBelowTheTruth) {
  SeededRng rng;
  int64_t informative = 0;
  double tightest = kInf;
  for (int i = 0; i < 120'000; ++i) {
    const Case c = RandomCase(&rng);
    const KeyBall ball(c.keys, c.dim);
    const auto before = ReferenceLogits(c.anchor, c.keys, c.dim), now = ReferenceLogits(c.q, c.keys, c.dim);
    const double dropped_now = LogSumExp(now, c.kept, false), kept_now = LogSumExp(now, c.kept, true);
    const double bound = DroppedLseBound(LogSumExp(before, c.kept, false), ball, c.anchor, c.q);
    ASSERT_GE(bound, dropped_now) << "case " << i;

    const double truth = dropped_now == -kInf ? 0 : 1 / (1 + std::exp(kept_now - dropped_now));
    const double mass = DroppedMassBound(kept_now, bound);
    ASSERT_GE(mass, truth) << "case " << i;
    ASSERT_LE(mass, 1);
    informative += mass < 0.9 && truth > 0;
    if (dropped_now > -kInf) tightest = std::min(tightest, bound - dropped_now);

    // A partition by position, each part with its own ball, is no less true.
    std::vector<double> parts;
    std::vector<KeyBall> balls;
    const size_t dim = static_cast<size_t>(c.dim), count = c.kept.size(), half = count / 2;
    for (const auto& [begin, end] : {std::pair{size_t{0}, half}, std::pair{half, count}}) {
      std::vector<bool> outside(c.kept);
      for (size_t j = 0; j < count; ++j) outside[j] = c.kept[j] || j < begin || j >= end;
      parts.push_back(LogSumExp(before, outside, false));
      balls.emplace_back(std::span(c.keys).subspan(begin * dim, (end - begin) * dim), c.dim);
    }
    ASSERT_GE(DroppedLseBound(parts, balls, c.anchor, c.q), dropped_now) << "case " << i;
  }
  // Else the test would pass with a bound of 1 everywhere.
  EXPECT_GT(informative, 10'000);
  EXPECT_LT(tightest, 2e-3);
}

// Anchor steps (dq = 0) give back what was known, but for the slack of 1e-3.
TEST(Certificate, AtTheAnchorItIsTheDroppedMass) {
  const KeyBall ball(std::vector<float>{3, 4, -3, -4}, 2);
  const std::vector<float> q = {1, 2};
  EXPECT_DOUBLE_EQ(DroppedLseBound(1.5, ball, q, q), 1.501);
  EXPECT_NEAR(DroppedMassBound(std::log(3.0), std::log(1.0)), 0.25, 1e-12);
}

// Keys 2 away from the centre (1, 1) on both sides; dq = (0.5, 0); d = 2: growth (0.5 + 2 * 0.5) / sqrt(2).
TEST(Certificate, ByHand) {
  const KeyBall ball(std::vector<float>{3, 1, -1, 1}, 2);
  EXPECT_EQ(std::vector<float>(ball.center().begin(), ball.center().end()), (std::vector<float>{1, 1}));
  EXPECT_NEAR(ball.radius(), 2, 1e-6);
  EXPECT_GE(ball.radius(), 2);
  const std::vector<float> anchor = {0, 1}, q = {0.5, 1};
  EXPECT_NEAR(DroppedLseBound(0, ball, anchor, q), 1.5 / std::sqrt(2.0) + 1e-3, 1e-6);
}

// Two clusters, each with its own small ball: nobody is near the centre of the one large ball.
TEST(Certificate, PartsAreTighterThanTheWhole) {
  const std::vector<float> left = {-100, 0, -100, 1}, right = {100, 0, 100, 1};
  std::vector<float> all(left);
  all.insert(all.end(), right.begin(), right.end());
  const std::vector<float> anchor = {0, 1}, q = {0.1f, 1};
  const std::vector<double> lse = {0, 0};
  const std::vector<KeyBall> balls = {KeyBall(left, 2), KeyBall(right, 2)};
  const double parts = DroppedLseBound(lse, balls, anchor, q);
  EXPECT_NEAR(parts, 10 / std::sqrt(2.0), 0.1);  // what the right cluster gains
  EXPECT_LT(parts, DroppedLseBound(std::log(2.0), KeyBall(all, 2), anchor, q));
}

TEST(Certificate, NothingDroppedNothingKept) {
  const KeyBall ball(std::vector<float>{1, 2}, 2);
  const std::vector<float> q = {1, 1};
  EXPECT_EQ(DroppedLseBound(-kInf, ball, q, q), -kInf);
  EXPECT_EQ(DroppedLseBound(std::vector<double>{-kInf, -kInf}, std::vector<KeyBall>{ball, ball}, q, q), -kInf);
  EXPECT_EQ(DroppedLseBound(std::vector<double>{}, std::vector<KeyBall>{}, q, q), -kInf);
  EXPECT_EQ(DroppedMassBound(3, -kInf), 0);
  EXPECT_EQ(DroppedMassBound(-kInf, 3), 1);
  EXPECT_EQ(DroppedMassBound(-kInf, -kInf), 0);
}

TEST(Certificate, WhatIsNotFiniteProvesNothing) {
  const KeyBall ball(std::vector<float>{1, 2}, 2);
  const std::vector<float> q = {1, 1};
  for (const float bad : {kNan, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(DroppedLseBound(0, ball, q, std::vector<float>{bad, 1}), kInf) << bad;
    EXPECT_EQ(DroppedLseBound(0, ball, std::vector<float>{bad, 1}, q), kInf) << bad;
    KeyBall spoilt = ball;
    spoilt.Add(std::vector<float>{bad, 1});
    EXPECT_EQ(spoilt.radius(), std::numeric_limits<float>::infinity());
    EXPECT_EQ(DroppedLseBound(0, spoilt, q, std::vector<float>{2, 1}), kInf) << bad;
    EXPECT_EQ(DroppedLseBound(0, spoilt, q, q), kInf) << bad;
    EXPECT_EQ(DroppedLseBound(0, KeyBall(std::vector<float>{bad, 1, 2, 3}, 2), q, std::vector<float>{2, 1}), kInf) << bad;
  }
  EXPECT_EQ(DroppedLseBound(kNan, ball, q, q), kInf);
  EXPECT_EQ(DroppedMassBound(kNan, 1), 1);
  EXPECT_EQ(DroppedMassBound(1, kNan), 1);
  EXPECT_EQ(DroppedMassBound(1, kInf), 1);
  EXPECT_EQ(DroppedMassBound(kInf, 1), 1);
}

TEST(KeyBall, HoldsEveryKeyItWasGiven) {
  SeededRng rng;
  for (int i = 0; i < 2000; ++i) {
    const auto dim = static_cast<size_t>(rng.Int(1, 130));
    const double scale = std::pow(10, rng.Uniform(-20, 15));
    std::vector<float> keys = rng.Normals(dim * static_cast<size_t>(rng.Int(0, 6)), scale);
    KeyBall ball(keys, static_cast<int32_t>(dim));
    const std::vector<float> center(ball.center().begin(), ball.center().end());
    for (int added = 0; added < 3; ++added) {
      const float before = ball.radius();
      const std::vector<float> key = rng.Normals(dim, scale * 3);
      ball.Add(key);
      keys.insert(keys.end(), key.begin(), key.end());
      ASSERT_GE(ball.radius(), before);
    }
    ASSERT_TRUE(std::equal(center.begin(), center.end(), ball.center().begin()));  // the anchor's c . dq stays valid
    long double farthest = 0;
    for (size_t k = 0; k < keys.size(); k += dim) {
      long double square = 0;
      for (size_t d = 0; d < dim; ++d) {
        const long double difference = static_cast<long double>(keys[k + d]) - center[d];
        square += difference * difference;
      }
      farthest = std::max(farthest, std::sqrt(square));
    }
    ASSERT_GE(static_cast<long double>(ball.radius()), farthest);
    ASSERT_LE(static_cast<long double>(ball.radius()), farthest * 1.000001L);
  }
}

TEST(KeyBall, OfNothing) {
  KeyBall ball(std::span<const float>(), 3);
  EXPECT_EQ(ball.radius(), 0);
  EXPECT_EQ(std::vector<float>(ball.center().begin(), ball.center().end()), (std::vector<float>{0, 0, 0}));
  ball.Add(std::vector<float>{0, 3, 4});
  EXPECT_NEAR(ball.radius(), 5, 1e-5);
  const KeyBall one(std::vector<float>{7, 8}, 2);
  EXPECT_EQ(one.radius(), 0);
}

}  // namespace
}  // namespace prehoc
