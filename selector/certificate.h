// What a reused choice can have lost at most, without reading a dropped key (docs/selectors/cis.md). With dq = q - q_a,
// the query's move since the choice was made, no logit of a dropped key grew by more than (c . dq + rad |dq|) /
// sqrt(d), because every key lies within rad of c. Pure functions: the caller holds the numbers.
#pragma once
#include <cstdint>
#include <limits>
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

// Bound on the log-sum-exp of logits that are known from dithered codes, at a confidence that is chosen. With true logits
// z_i = y_i + e_i, where over the dither P(e_i > l sqrt(v_i)) <= exp(-l^2 / 2) (ScanTask::variance):
//
//   LSE(z) <= log SUM exp(y_i + l sqrt(v_i)),   l = sqrt(2 ln(chosen_from / (1 - confidence)))
//
// chosen_from = 1, for positions that were fixed without looking at the codes: LSE is convex, so LSE(y + b) - LSE(z) >=
// SUM p_i (b_i - e_i) with p = softmax(z), which the dither does not touch. With b_i = l sqrt(v_i) that is negative only if
// a convex combination of e_i / sqrt(v_i) exceeds l; by Jensen and Chernoff, for any dependence between positions:
// P <= exp(-l^2 / 2). (Own derivation, from Gibbs' variational principle and the Cramer-Chernoff method: Boucheron, Lugosi,
// Massart, "Concentration inequalities", 2013, chapters 4 and 2.)
// chosen_from = m, for positions picked with the help of these codes: Bonferroni over the m one-sided errors (two for a
// position that is also bounded from below) makes all of them hold at once, and so every set, and the choice itself.
//
// Blocks of codes have dithers of their own, so their errors average out over a set that many blocks share. With sd = sqrt(v)
// the same for all positions of a block c, S_c = SUM exp(y_i) over its positions, S the sum of all S_c, and
// l = sqrt(2 ln(2 chosen_from / (1 - confidence))):
//
//   LSE(z) <= log S + W(l sqrt(Q) / S),   Q = SUM_c (sd_c S_c exp(l sd_c))^2,   W(x) exp(W(x)) = x
//
// Again LSE(y) >= LSE(z) - SUM p_i e_i, and now that sum is sub-Gaussian with variance SUM_c (SUM p_i sd_i)^2, taken over the i
// of block c: Q(z) / exp(2 LSE(z)), with Q(z) = SUM_c (SUM sd_i exp(z_i))^2. log Q(z) / 2 is convex in z with a gradient that
// sums to one, so Q(z) <= Q with the probability of the paragraph above; each statement may fail half of the time. What remains,
// u - l sqrt(Q) exp(-u) <= log S for u = LSE(z), is solved by W (Lambert's function). Never far above the bound by positions
// (a single block gives just that one, at the halved level), and a small part of it over many blocks. (Own derivation.)
//
// The set is often the choice of these very codes, and what they leave out is what they have underrated. Whatever the choice, if
// it could have been any part of the positions "near" it (those left out, and those that were chosen though they look no
// better), SUM_D exp(z_i) - exp(y_i) <= SUM_near exp(z_i) (e_i)_+, whose mean is at most half of T = SUM_near sd_i exp(z_i),
// because 1 - exp(-e) <= (e)_+ and E (e_i)_+ <= sd_i / 2. Where `lse_near` is given T / 2 is added, by the estimates. It is what a
// choice can gain on average; its scatter is left to the rest of the bound, which is why no level is promised for chosen sets.
struct DitheredBlock {
  double lse = 0;      // log S_c, -inf for no positions; what is not random in the errors (ScanTask::bias) included
  double lse_near = -std::numeric_limits<double>::infinity();  // as lse, of all positions near the choice; -inf for a fixed set
  float variance = 0;  // ScanTask::variance of the block; 0 for exact logits
  float proven = 0;    // |e_i| is at most this in any case; +inf if not known
};

class StatisticalLseBound {
 public:
  // Requires 0.5 <= confidence < 1 (the tail is claimed for l >= 1 only) and chosen_from >= 1.
  explicit StatisticalLseBound(double confidence, int64_t chosen_from = 1);
  double factor() const { return factor_; }  // l
  // l sqrt(variance), rounded up: what to add to an estimated logit. +inf if the variance is not known (NaN, +inf).
  float Error(float variance) const;
  // The bound itself, in fp64. `proven`: bounds of |e_i| that hold in any case, or empty; the smaller one counts. -inf for no
  // positions; +inf if a logit or its error is not known.
  double operator()(std::span<const float> z, std::span<const float> variance, std::span<const float> proven = {}) const;
  // The bound over blocks, or the proven one over them if that is smaller. For positions picked with the help of these codes
  // chosen_from counts the sets that might have been picked. -inf for no positions; +inf if a number is not known.
  double OverBlocks(std::span<const DitheredBlock> blocks) const;

 private:
  double factor_;
  double factor_of_two_;  // l of two statements at half the level each
};

// Bound on the dropped mass, given the log-sum-exp over what the step attended: 1 / (1 + exp(lse_kept - u_dropped)).
// 1 if an input is NaN, a kept logit is infinite or nothing was kept; 0 if nothing was dropped.
double DroppedMassBound(double lse_kept, double u_dropped);

}  // namespace prehoc
