// How far a selector's knob may be turned so that a stated share of requests stays within a stated dropped mass
// (docs/calibration.md): split conformal and RCPS (arXiv 2101.02703) over a grid of knob values. Knows no files.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "base/status.h"

namespace prehoc {

enum class CalibrationMethod : uint8_t {
  kRcps,       // with confidence over the draw of the calibration units: P(risk <= alpha) >= confidence
  kConformal,  // on average over calibration and test draw: E[loss of the next unit] <= alpha
};
std::string_view CalibrationMethodName(CalibrationMethod method);  // "rcps", "conformal"

// What is to hold: a unit's loss exceeds `delta_max` with probability at most `alpha`.
struct CalibrationClaim {
  double delta_max = 0.05;  // [0, 1)
  double alpha = 0.05;      // (0, 1)
  double confidence = 0.9;  // (0, 1); kRcps only
  CalibrationMethod method = CalibrationMethod::kRcps;

  // "max_dropped_mass<=0.05 alpha=0.1 [confidence=0.9] [method=rcps|conformal]", words in any order. kInvalid, naming
  // the word and what is accepted.
  static Result<CalibrationClaim> Parse(std::string_view text);
  Status Validate() const;           // kInvalid, naming the field and its value
  std::string ToString() const;      // reads back as the same claim
  std::string Guarantee() const;     // the promise as a sentence, for people
  double delta_c() const { return 1 - confidence; }
  friend bool operator==(const CalibrationClaim&, const CalibrationClaim&) = default;
};

enum class LossKind : uint8_t {
  kViolation,  // loss > delta_max counts 1, else 0: Clopper-Pearson, exact
  kGraded,     // losses in [0, 1] as they are (delta_max is not looked at): the betting bound WSR
};

// One unit = one request, one decode step of it drawn at random: units must be independent. The grid goes from the
// most conservative value of the knob to the most aggressive one. A loss that is not finite counts as the worst: a
// unit that no value can make safe, dense fallback included, stays in the sample with an infinite loss.
struct LossTable {
  int64_t units = 0;
  int64_t grid = 0;
  std::span<const double> losses;  // [units, grid]; the caller's, alive during the call
  LossKind kind = LossKind::kViolation;
};

struct GridPoint {
  int64_t units = 0;
  int64_t violations = 0;  // kConformal: units that violate here or at a more conservative point. kGraded: losses > 0
  double mean_loss = 0;    // share of violations, or mean of the graded losses
  double upper_limit = 1;  // of the risk; kConformal: (sum of losses + 1) / (units + 1)
};

struct Calibration {
  int64_t chosen = -1;  // index into the grid, or -1: refused
  Status refusal;       // OK if chosen; else kInvalid, with the number of units that would do or why none does
  std::vector<GridPoint> points;  // [grid], those beyond the first failure too
};

// From the most conservative point on, until the first whose upper limit exceeds alpha; the one before it is chosen.
// One fixed order and the first failure: no correction for the size of the grid, and losses need not be monotone.
// (kConformal makes them so: a unit's loss at a point is its largest up to there.) kInvalid: a claim or table that
// makes no sense, such as a graded loss outside [0, 1]. O(units grid).
Result<Calibration> Calibrate(const LossTable& table, const CalibrationClaim& claim);

// Buckets (a layer group at a length band) are calibrated apart: a promise holds per bucket, from its own units
// alone, and not for all of them at once. kInvalid names the bucket; a bucket that is refused does not touch the
// others.
struct LossBucket {
  std::string name;
  LossTable table;
};
struct BucketCalibration {
  std::string name;
  Calibration calibration;
};
Result<std::vector<BucketCalibration>> CalibrateBuckets(std::span<const LossBucket> buckets,
                                                        const CalibrationClaim& claim);

// Calibrates on `calibration_units` of the units, drawn at random `splits` times, and looks at the rest: the check of
// a promise on data. Held-out shares scatter around the risk, so `splits_over_alpha` may exceed 1 - confidence by
// that much.
struct HeldOut {
  int64_t splits = 0, refused = 0;  // a refused split means dense attention: no loss
  double mean_share = 0;            // mean loss held out, over the splits that chose a point
  double worst_share = 0;
  int64_t splits_over_alpha = 0;
};
Result<HeldOut> CheckHeldOut(const LossTable& table, const CalibrationClaim& claim, int64_t calibration_units,
                             int64_t splits, uint64_t seed);

// --- the numbers behind it --------------------------------------------------------------------------------------

// P(X <= x) for X ~ Binomial(n, p). Requires n >= 0, p in [0, 1]. O(sqrt(n)) terms where they matter.
double BinomialCdf(int64_t x, int64_t n, double p);

// The p with BinomialCdf(x, n, p) = delta_c, rounded up; 1 if x >= n. Requires n >= 1, x >= 0, delta_c in (0, 1).
double ClopperPearsonUpper(int64_t x, int64_t n, double delta_c);

// Upper limit of the mean of i.i.d. losses in [0, 1] by betting (Waudby-Smith and Ramdas), in the order given, which
// must not depend on their values. 1 if there are none.
double WsrUpper(std::span<const double> losses, double delta_c);

// r = ceil((1 - alpha)(n + 1)): the r-th smallest critical knob is the conformal one; r > n means dense.
int64_t ConformalRank(int64_t units, double alpha);

// Fewest units with which `claim` can hold, when the share `violating` of them violates; 0 if no number of them will do
// (or more than 10^8). Exact for violating = 0.
int64_t UnitsNeeded(const CalibrationClaim& claim, double violating = 0);

}  // namespace prehoc
