// What a reused choice can have lost at most, without reading a dropped key (docs/selectors/cis.md). With dq = q - q_a,
// the query's move since the choice was made, no logit of a dropped key grew by more than (c . dq + rad |dq|) /
// sqrt(d), because every key lies within rad of c. Pure functions: the caller holds the numbers.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace prehoc {

// A ball that holds every key of one (layer, KV head). Any centre is valid; the mean of the prompt makes it small.
class KeyBall {
 public:
  KeyBall() = default;
  // Centre: mean of `keys` [count, head_dim]; radius: the farthest of them. No keys: centre 0, radius 0.
  KeyBall(std::span<const float> keys, int32_t head_dim);

  // Widens the ball to hold `key` [head_dim]; the centre stays. A key that is not finite makes the radius infinite.
  void Add(std::span<const float> key);

  std::span<const float> center() const { return center_; }  // [head_dim]
  float radius() const { return radius_; }                   // never below the true distance

 private:
  std::vector<float> center_;
  float radius_ = 0;
};

// U_D: the most that the log-sum-exp of the dropped positions can be under query `q`, when it was `lse_dropped` (over
// the dropped positions and those that may leave the local window since) under `anchor`. All [head_dim], after RoPE.
// Includes 1e-3 for the rounding of fp32 logits. -inf if nothing was dropped; +inf if an input is not finite.
double DroppedLseBound(double lse_dropped, const KeyBall& ball, std::span<const float> anchor, std::span<const float> q);

// The same over a partition of the dropped positions, each part with its own ball: tighter. Parts pair up by index.
double DroppedLseBound(std::span<const double> lse_dropped, std::span<const KeyBall> balls,
                       std::span<const float> anchor, std::span<const float> q);

// Bound on the dropped mass, given the log-sum-exp over what the step attended: 1 / (1 + exp(lse_kept - u_dropped)).
// 1 if an input is NaN, a kept logit is infinite or nothing was kept; 0 if nothing was dropped.
double DroppedMassBound(double lse_kept, double u_dropped);

}  // namespace prehoc
