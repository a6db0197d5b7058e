// What the tests of selectors share: options by knob, hand-made steps, and random streams of keys and queries.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <initializer_list>
#include <memory>
#include <numbers>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "selector/reference.h"
#include "selector/selector.h"
#include "tests/support/status_matchers.h"

namespace prehoc {

using Positions = std::vector<int32_t>;

// Options of a kind with knobs as "cis.tau=0.7". A knob that is refused fails the test.
inline SelectorOptions Options(std::string_view kind, std::initializer_list<std::string_view> knobs = {}) {
  SelectorOptions options;
  EXPECT_OK(options.Set("selector", kind));
  for (const std::string_view knob : knobs) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1))) << knob;
  }
  EXPECT_OK(options.Validate());
  return options;
}

inline std::unique_ptr<Selector> MakeSelector(const SelectorOptions& options) {
  auto made = Selector::Create(options);
  PREHOC_CHECK(made.ok());
  return std::move(made).value();
}

// Positions [begin, end), and lists joined.
inline Positions Range(int32_t begin, int32_t end) {
  Positions range;
  for (int32_t i = begin; i < end; ++i) range.push_back(i);
  return range;
}
inline Positions Join(std::initializer_list<Positions> lists) {
  Positions all;
  for (const Positions& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

// A layer whose steps are written down in a test: per query head the (unnormalised) attention weight of each visible
// position, and the direction of the query in the plane, in degrees. Steps count from `first_step`.
class HandLayer {
 public:
  explicit HandLayer(const SelectorOptions& options, int32_t kv_heads = 1, int32_t group = 1, bool all_resident = true,
                     int32_t layer = 0, int32_t layers = 1)
      : shape_{.layer = layer, .layers = layers, .kv_heads = kv_heads, .group = group, .head_dim = 2},
        trace_(options, shape_, all_resident) {}

  void SkipTo(int64_t step) { step_ = step; }

  // weights[h][i], degrees[h]; one direction stands for all heads.
  ReferenceDecision Step(const std::vector<std::vector<double>>& weights, const std::vector<double>& degrees,
                         const std::vector<double>& pre_degrees = {}, const std::vector<double>& batch = {}) {
    std::vector<double> z;
    for (const auto& head : weights) {
      for (const double weight : head) z.push_back(std::log(weight));
    }
    const std::vector<float> q = Directions(degrees);
    const std::vector<float> q_pre = pre_degrees.empty() ? std::vector<float>() : Directions(pre_degrees);
    return trace_.Step({.step = step_++,
                        .n = static_cast<int64_t>(weights.front().size()),
                        .z = z,
                        .scores = {},
                        .rows = {},
                        .err = {},
                        .q = q,
                        .q_pre = q_pre,
                        .balls = balls_,
                        .batch = batch});
  }
  void SetBalls(std::vector<KeyBall> balls) { balls_ = std::move(balls); }

 private:
  std::vector<float> Directions(const std::vector<double>& degrees) const {
    std::vector<float> q;
    for (int32_t h = 0; h < shape_.heads(); ++h) {
      const double angle = degrees[degrees.size() == 1 ? 0 : static_cast<size_t>(h)] * std::numbers::pi / 180;
      q.push_back(static_cast<float>(std::cos(angle)));
      q.push_back(static_cast<float>(std::sin(angle)));
    }
    return q;
  }

  const ReferenceShape shape_;
  ReferenceTrace trace_;
  std::vector<KeyBall> balls_;
  int64_t step_ = 0;
};

// A random layer: keys with a few heavy directions, queries that wander and now and then jump. Each Next() is one step,
// with one key more than the last; what it returns is valid until the next one.
class RandomLayer {
 public:
  RandomLayer(Rng* rng, const ReferenceShape& shape, int64_t prompt, double jump = 0.1, double drift = 0.4)
      : rng_(rng), shape_(shape), jump_(jump), drift_(drift), keys_(static_cast<size_t>(shape.kv_heads)) {
    for (auto& keys : keys_) keys = rng_->Normals(static_cast<size_t>(prompt) * dim(), 1.5);
    for (const auto& keys : keys_) balls_.emplace_back(keys, shape_.head_dim);
    q_ = rng_->Normals(static_cast<size_t>(shape.heads()) * dim(), 1.5);
    q_pre_ = q_;
  }

  ReferenceInput Next() {
    if (++step_ > 0) {
      for (size_t j = 0; j < keys_.size(); ++j) {
        const std::vector<float> key = rng_->Normals(dim(), 1.5);
        keys_[j].insert(keys_[j].end(), key.begin(), key.end());
        balls_[j].Add(key);
      }
      Wander(&q_);
      Wander(&q_pre_);
    }
    z_.clear();
    const size_t group_size = static_cast<size_t>(shape_.group) * dim();
    for (size_t j = 0; j < keys_.size(); ++j) {
      const auto z = ReferenceLogits(std::span<const float>(q_).subspan(j * group_size, group_size), keys_[j], shape_.head_dim);
      z_.insert(z_.end(), z.begin(), z.end());
    }
    ReferenceInput input;
    input.step = step_;
    input.n = n();
    input.z = z_;
    input.q = q_;
    input.q_pre = q_pre_;
    input.balls = balls_;
    return input;
  }
  int64_t n() const { return static_cast<int64_t>(keys_.front().size() / dim()); }

 private:
  size_t dim() const { return static_cast<size_t>(shape_.head_dim); }
  void Wander(std::vector<float>* q) {
    for (size_t h = 0; h < q->size() / dim(); ++h) {
      const bool jumps = rng_->Chance(jump_);
      for (size_t c = 0; c < dim(); ++c) {
        float& x = (*q)[h * dim() + c];
        const double noise = 1.5 * rng_->Normal();
        x = static_cast<float>(jumps ? noise : x * std::sqrt(1 - drift_ * drift_) + drift_ * noise);
      }
    }
  }

  Rng* const rng_;
  const ReferenceShape shape_;
  const double jump_, drift_;
  std::vector<std::vector<float>> keys_;  // [kv_heads][n, head_dim]
  std::vector<KeyBall> balls_;
  std::vector<float> q_, q_pre_;
  std::vector<double> z_;
  int64_t step_ = -1;
};

}  // namespace prehoc
