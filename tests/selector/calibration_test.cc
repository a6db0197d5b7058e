// Calibration: the exact numbers of its bounds, the order in which a grid is walked, refusals, and coverage by
// simulation.
#include "selector/calibration.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

CalibrationClaim Rcps(double alpha, double delta_c) {
  CalibrationClaim claim;
  claim.alpha = alpha;
  claim.confidence = 1 - delta_c;
  return claim;
}

CalibrationClaim Conformal(double alpha) {
  CalibrationClaim claim;
  claim.alpha = alpha;
  claim.method = CalibrationMethod::kConformal;
  return claim;
}

// --- the binomial -----------------------------------------------------------------------------------------------

TEST(BinomialCdfTest, AgreesWithTheSumByHand) {
  for (const int64_t n : {1, 2, 7, 15, 16, 40}) {
    for (const double p : {0.001, 0.05, 0.3, 0.5, 0.9, 0.999}) {
      double sum = 0, choose = 1;
      for (int64_t x = 0; x <= n; ++x) {
        sum += choose * std::pow(p, static_cast<double>(x)) * std::pow(1 - p, static_cast<double>(n - x));
        choose = choose * static_cast<double>(n - x) / static_cast<double>(x + 1);
        EXPECT_NEAR(BinomialCdf(x, n, p), sum, 1e-12) << x << " of " << n << ", p " << p;
      }
    }
  }
}

TEST(BinomialCdfTest, EndsAndLargeCounts) {
  EXPECT_EQ(BinomialCdf(-1, 10, 0.5), 0);
  EXPECT_EQ(BinomialCdf(10, 10, 0.5), 1);
  EXPECT_EQ(BinomialCdf(3, 10, 0), 1);
  EXPECT_EQ(BinomialCdf(3, 10, 1), 0);
  // By symmetry P(X <= n) of 2n + 1 fair coins is a half.
  for (const int64_t n : {10, 1000, 500'000}) EXPECT_NEAR(BinomialCdf(n, 2 * n + 1, 0.5), 0.5, 1e-9) << n;
  EXPECT_NEAR(BinomialCdf(100, 1'000'000, 1e-4), 0.5265622, 1e-3);  // near Poisson(100)
}

TEST(BinomialCdfTest, FallsInPAndGrowsInX) {
  for (int64_t x = 0; x < 200; x += 7) {
    double last = 1;
    for (double p = 0.005; p < 1; p += 0.005) {
      const double now = BinomialCdf(x, 200, p);
      EXPECT_LE(now, last + 1e-13);
      EXPECT_LE(now, BinomialCdf(x + 1, 200, p) + 1e-13);
      last = now;
    }
  }
}

TEST(ClopperPearsonTest, ZeroViolationsHaveAClosedForm) {
  for (const int64_t n : {1, 9, 22, 100, 5000}) {
    for (const double delta : {0.1, 0.05, 0.01}) {
      EXPECT_NEAR(ClopperPearsonUpper(0, n, delta), 1 - std::pow(delta, 1 / static_cast<double>(n)), 1e-12);
    }
  }
  EXPECT_EQ(ClopperPearsonUpper(5, 5, 0.1), 1);
  EXPECT_NEAR(ClopperPearsonUpper(4, 5, 0.1), std::pow(0.9, 1.0 / 5), 1e-12);  // 1 - p^5 = 0.1
}

TEST(ClopperPearsonTest, InvertsTheCdf) {
  for (const int64_t n : {30, 500, 20'000}) {
    for (int64_t x = 0; x < n; x += n / 7) {
      const double p = ClopperPearsonUpper(x, n, 0.1);
      EXPECT_NEAR(BinomialCdf(x, n, p), 0.1, 1e-8) << x << " of " << n;
      EXPECT_GT(p, static_cast<double>(x) / static_cast<double>(n));
    }
  }
}

// --- how many units ---------------------------------------------------------------------------------------------

TEST(UnitsNeededTest, SmallestCountsWithoutViolation) {
  struct Row {
    double alpha;
    int64_t conformal, at_10, at_5, at_1;
  };
  for (const Row& row : {Row{0.10, 9, 22, 29, 44}, Row{0.05, 19, 45, 59, 90}, Row{0.02, 49, 114, 149, 228},
                         Row{0.01, 99, 230, 299, 459}, Row{0.005, 199, 460, 598, 919}}) {
    EXPECT_EQ(UnitsNeeded(Conformal(row.alpha)), row.conformal) << row.alpha;
    EXPECT_EQ(UnitsNeeded(Rcps(row.alpha, 0.1)), row.at_10) << row.alpha;
    EXPECT_EQ(UnitsNeeded(Rcps(row.alpha, 0.05)), row.at_5) << row.alpha;
    EXPECT_EQ(UnitsNeeded(Rcps(row.alpha, 0.01)), row.at_1) << row.alpha;
  }
}

TEST(UnitsNeededTest, NoCountHelpsAgainstAShareThatIsTooLarge) {
  EXPECT_EQ(UnitsNeeded(Rcps(0.05, 0.1), 0.05), 0);
  EXPECT_EQ(UnitsNeeded(Rcps(0.05, 0.1), 0.5), 0);
  EXPECT_GT(UnitsNeeded(Rcps(0.05, 0.1), 0.04), 500);
}

// The most violations that pass; -1 if none may.
int64_t Allowed(int64_t n, double alpha) {
  int64_t x = 0;
  while (ClopperPearsonUpper(x, n, 0.1) <= alpha) ++x;
  return x - 1;
}

TEST(ClopperPearsonTest, ViolationsAllowed) {
  EXPECT_EQ(Allowed(100, 0.05), 1);
  EXPECT_EQ(Allowed(500, 0.05), 18);
  EXPECT_EQ(Allowed(1000, 0.05), 40);
  EXPECT_EQ(Allowed(2000, 0.05), 87);
  EXPECT_EQ(Allowed(5000, 0.05), 229);
  EXPECT_EQ(Allowed(100, 0.01), -1);
  EXPECT_EQ(Allowed(500, 0.01), 1);
  EXPECT_EQ(Allowed(1000, 0.01), 5);
  EXPECT_EQ(Allowed(2000, 0.01), 13);
  EXPECT_EQ(Allowed(5000, 0.01), 40);
}

TEST(ConformalRankTest, IsTheFormula) {
  EXPECT_EQ(ConformalRank(8, 0.1), 9);  // ceil(0.9 * 9) > 8: dense
  EXPECT_EQ(ConformalRank(9, 0.1), 9);
  EXPECT_EQ(ConformalRank(18, 0.05), 19);
  EXPECT_EQ(ConformalRank(19, 0.05), 19);
  EXPECT_EQ(ConformalRank(99, 0.05), 95);
  EXPECT_EQ(ConformalRank(500, 0.05), 476);  // ceil(475.95)
  // floor(alpha (n + 1)) - 1 may violate.
  for (const int64_t n : {19, 20, 39, 100, 999}) EXPECT_EQ(n - ConformalRank(n, 0.05), (n + 1) / 20 - 1) << n;
}

// --- walking a grid ---------------------------------------------------------------------------------------------

// 0/1 losses with so many violations at each point, by the first units.
struct Table {
  std::vector<double> losses;
  LossTable view;
  Table(int64_t units, const std::vector<int64_t>& violations, double loss = 0.9) {
    const auto grid = static_cast<int64_t>(violations.size());
    for (int64_t u = 0; u < units; ++u) {
      for (const int64_t count : violations) losses.push_back(u < count ? loss : 0.01);
    }
    view = {units, grid, losses};
  }
};

Calibration Calibrated(const LossTable& table, const CalibrationClaim& claim) {
  auto result = Calibrate(table, claim);
  EXPECT_OK(result);
  return result.ok() ? std::move(result).value() : Calibration{};
}

TEST(CalibrateTest, TakesTheLastPointBeforeTheFirstFailure) {
  const Table table(500, {0, 5, 18, 19, 2, 0});
  const Calibration result = Calibrated(table.view, Rcps(0.05, 0.1));
  EXPECT_EQ(result.chosen, 2);  // 19 fails; that points behind it pass again does not matter
  EXPECT_OK(result.refusal);
  ASSERT_EQ(result.points.size(), 6u);
  EXPECT_EQ(result.points[3].violations, 19);
  EXPECT_GT(result.points[3].upper_limit, 0.05);
  EXPECT_LE(result.points[4].upper_limit, 0.05);
  EXPECT_EQ(result.points[2].units, 500);
  EXPECT_EQ(result.points[2].mean_loss, 18.0 / 500);
}

TEST(CalibrateTest, AllMayPassAndNoneMay) {
  EXPECT_EQ(Calibrated(Table(500, {0, 1, 2}).view, Rcps(0.05, 0.1)).chosen, 2);
  const Calibration none = Calibrated(Table(500, {19, 0, 0}).view, Rcps(0.05, 0.1));
  EXPECT_EQ(none.chosen, -1);
  EXPECT_STATUS(StatusCode::kInvalid, "19 violations in 500 units", none.refusal);
  EXPECT_STATUS(StatusCode::kInvalid, "with the same share of violations about ", none.refusal);
  EXPECT_STATUS(StatusCode::kInvalid, "more conservative value", Calibrated(Table(500, {250}).view, Rcps(0.05, 0.1)).refusal);
}

TEST(CalibrateTest, TooFewUnitsAreToldHowManyWouldDo) {
  const Calibration few = Calibrated(Table(44, {0}).view, Rcps(0.05, 0.1));
  EXPECT_EQ(few.chosen, -1);
  EXPECT_STATUS(StatusCode::kInvalid, "needs at least 45 units, and more with any violation; 44 given", few.refusal);
  EXPECT_EQ(Calibrated(Table(45, {0}).view, Rcps(0.05, 0.1)).chosen, 0);
  EXPECT_STATUS(StatusCode::kInvalid, "needs at least 19 units", Calibrated(Table(18, {0}).view, Conformal(0.05)).refusal);
  EXPECT_EQ(Calibrated(Table(19, {0}).view, Conformal(0.05)).chosen, 0);
}

TEST(CalibrateTest, ConformalIsTheRankOfTheCriticalKnobs) {
  SeededRng rng;
  for (int round = 0; round < 200; ++round) {
    const int64_t units = rng.Int(5, 120), grid = rng.Int(1, 12);
    const double alpha = rng.Uniform(0.02, 0.4);
    std::vector<double> losses(static_cast<size_t>(units * grid));
    std::vector<int64_t> safe;  // points that a unit stands from the conservative end on
    for (int64_t u = 0; u < units; ++u) {
      int64_t points = 0;
      bool stands = true;
      for (int64_t g = 0; g < grid; ++g) {
        const double loss = losses[static_cast<size_t>(u * grid + g)] = rng.Chance(0.06) ? 0.5 : 0.0;
        stands = stands && loss == 0;
        points += stands;
      }
      safe.push_back(points);
    }
    // The r-th smallest critical knob (a larger knob keeps more) is the r-th largest count of safe points.
    std::sort(safe.begin(), safe.end(), std::greater<>());
    const int64_t rank = ConformalRank(units, alpha);
    const int64_t want = rank > units ? -1 : safe[static_cast<size_t>(rank - 1)] - 1;
    EXPECT_EQ(Calibrated({units, grid, losses}, Conformal(alpha)).chosen, want) << units << " " << grid << " " << alpha;
  }
}

TEST(CalibrateTest, EqualToTheLimitIsNoViolation) {
  const Table ties(100, {100, 100}, 0.05);
  EXPECT_EQ(Calibrated(ties.view, Rcps(0.05, 0.1)).points[1].violations, 0);
  const Table over(100, {100}, std::nextafter(0.05, 1));
  EXPECT_EQ(Calibrated(over.view, Rcps(0.05, 0.1)).points[0].violations, 100);
}

TEST(CalibrateTest, WhatIsNotFiniteCountsAndStays) {
  for (const double bad : {kInf, -kInf, kNan}) {
    const Table table(500, {18, 19}, bad);
    const Calibration result = Calibrated(table.view, Rcps(0.05, 0.1));
    EXPECT_EQ(result.chosen, 0);
    EXPECT_EQ(result.points[1].violations, 19);
    EXPECT_EQ(result.points[1].units, 500);
    LossTable graded = table.view;
    graded.kind = LossKind::kGraded;
    EXPECT_GE(Calibrated(graded, Rcps(0.2, 0.1)).points[0].mean_loss, 18.0 / 500);
  }
}

TEST(CalibrateTest, NonsenseIsRefused) {
  const Table table(10, {0, 0});
  LossTable wrong = table.view;
  wrong.units = 11;
  EXPECT_STATUS(StatusCode::kInvalid, "20 losses for 11 units and 2 grid points", Calibrate(wrong, Rcps(0.1, 0.1)));
  wrong.units = std::numeric_limits<int64_t>::max();
  EXPECT_STATUS(StatusCode::kInvalid, "losses for", Calibrate(wrong, Rcps(0.1, 0.1)));
  EXPECT_STATUS(StatusCode::kInvalid, "no units", Calibrate({}, Rcps(0.1, 0.1)));
  EXPECT_STATUS(StatusCode::kInvalid, "no grid points", Calibrate({1, 0, {}}, Rcps(0.1, 0.1)));
  EXPECT_STATUS(StatusCode::kInvalid, "alpha=0", Calibrate(table.view, Rcps(0, 0.1)));
  EXPECT_STATUS(StatusCode::kInvalid, "alpha=nan", Calibrate(table.view, Rcps(kNan, 0.1)));
  EXPECT_STATUS(StatusCode::kInvalid, "confidence=1", Calibrate(table.view, Rcps(0.1, 0)));
  const std::vector<double> out_of_range = {0.5, 1.5};
  EXPECT_STATUS(StatusCode::kInvalid, "graded loss 1.5", Calibrate({2, 1, out_of_range, LossKind::kGraded}, Rcps(0.1, 0.1)));
}

TEST(CalibrateTest, BucketsStandAlone) {
  const Table many(500, {0, 18}), few(30, {0, 0});
  const std::vector<LossBucket> buckets = {{"layers 0-9, 1k-4k", many.view}, {"layers 10-29, 1k-4k", few.view}};
  const auto results = CalibrateBuckets(buckets, Rcps(0.05, 0.1));
  ASSERT_OK(results);
  EXPECT_EQ((*results)[0].calibration.chosen, 1);
  EXPECT_EQ((*results)[0].calibration.points[0].units, 500);
  EXPECT_EQ((*results)[1].calibration.chosen, -1);
  EXPECT_EQ((*results)[1].calibration.points[0].units, 30);
  const std::vector<LossBucket> bad = {{"short", {3, 1, {}}}};
  EXPECT_STATUS(StatusCode::kInvalid, "bucket short: ", CalibrateBuckets(bad, Rcps(0.05, 0.1)));
}

// --- graded losses ----------------------------------------------------------------------------------------------

TEST(WsrTest, KnownValuesAndEnds) {
  EXPECT_EQ(WsrUpper({}, 0.1), 1);
  const std::vector<double> ones(50, 1.0);
  EXPECT_EQ(WsrUpper(ones, 0.1), 1);
  // One loss of 0: the bet is 1 (sqrt(2 ln 10 / 0.25) > 1), so 1 + mu = 10 is out of reach.
  EXPECT_EQ(WsrUpper(std::vector<double>{0}, 0.1), 1);
  // Zeros with the bet held at 1: (1 + mu)^n = 10.
  EXPECT_NEAR(WsrUpper(std::vector<double>(5, 0.0), 0.1), std::pow(10, 1.0 / 5) - 1, 1e-9);
  const double many = WsrUpper(std::vector<double>(2000, 0.02), 0.1);
  EXPECT_GT(many, 0.02);
  EXPECT_LT(many, 0.03);
}

// Losses that are 0 but for a share of them: the mean is known, and the bound may lie below it in delta_c of the
// rounds.
TEST(WsrTest, CoversTheMean) {
  SeededRng rng;
  constexpr int kRounds = 600;
  int missed = 0;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> losses(200);
    for (double& loss : losses) loss = rng.Chance(0.3) ? rng.Uniform() : 0;
    missed += WsrUpper(losses, 0.1) < 0.15;
  }
  EXPECT_LE(missed, kRounds * 0.1 + 3 * std::sqrt(kRounds * 0.09));
}

// --- coverage ---------------------------------------------------------------------------------------------------

// Independent units whose violation probability grows along the grid; both promises, by simulation. Fixed tails of 3
// standard errors.
struct World {
  std::vector<double> risk;
  std::vector<double> Draw(Rng* rng, int64_t units) const {
    std::vector<double> losses;
    for (int64_t u = 0; u < units; ++u) {
      const double strain = rng->Uniform();  // of this request; violates where it is below the risk
      for (const double r : risk) losses.push_back(strain < r ? 0.5 : 0.0);
    }
    return losses;
  }
};

TEST(CoverageTest, RcpsKeepsItsConfidence) {
  SeededRng rng;
  const World world{{0.0, 0.02, 0.04, 0.0501, 0.06, 0.1}};
  constexpr int kRounds = 1500;
  int broken = 0, useful = 0;
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<double> losses = world.Draw(&rng, 200);
    const Calibration result = Calibrated({200, 6, losses}, Rcps(0.05, 0.1));
    broken += result.chosen >= 0 && world.risk[static_cast<size_t>(result.chosen)] > 0.05;
    useful += result.chosen >= 1;
  }
  EXPECT_LE(broken, kRounds * 0.1 + 3 * std::sqrt(kRounds * 0.09));
  EXPECT_GT(broken, kRounds / 50) << "0.0501 lies just beyond: a bound that never fails there is not tight";
  EXPECT_GT(useful, kRounds / 3);
}

TEST(CoverageTest, ConformalKeepsItsAverage) {
  SeededRng rng;
  World world;
  for (int g = 0; g <= 40; ++g) world.risk.push_back(0.005 * g);
  constexpr int kRounds = 3000;
  double risk = 0;
  for (int round = 0; round < kRounds; ++round) {
    const std::vector<double> losses = world.Draw(&rng, 99);
    const Calibration result = Calibrated({99, 41, losses}, Conformal(0.1));
    if (result.chosen >= 0) risk += world.risk[static_cast<size_t>(result.chosen)];
  }
  EXPECT_LE(risk / kRounds, 0.1 + 3 * 0.03 / std::sqrt(kRounds));
  EXPECT_GT(risk / kRounds, 0.08);
}

TEST(HeldOutTest, SplitsAreSeededAndKeepThePromise) {
  SeededRng rng;
  World world;
  for (int g = 0; g <= 20; ++g) world.risk.push_back(0.005 * g);
  const std::vector<double> losses = world.Draw(&rng, 2000);
  const LossTable table{2000, 21, losses};
  const auto once = CheckHeldOut(table, Rcps(0.05, 0.1), 500, 200, 7);
  const auto again = CheckHeldOut(table, Rcps(0.05, 0.1), 500, 200, 7);
  ASSERT_OK(once);
  EXPECT_EQ(once->mean_share, again->mean_share);
  EXPECT_NE(once->mean_share, CheckHeldOut(table, Rcps(0.05, 0.1), 500, 200, 8)->mean_share);
  EXPECT_EQ(once->refused, 0);
  EXPECT_LT(once->mean_share, 0.05);
  EXPECT_GT(once->mean_share, 0.02);
  EXPECT_GE(once->worst_share, once->mean_share);
  EXPECT_LE(once->splits_over_alpha, 40);  // 20, and the scatter of 1,500 held-out units
}

TEST(HeldOutTest, RefusedSplitsAreCounted) {
  const Table table(100, {50});
  const auto result = CheckHeldOut(table.view, Rcps(0.05, 0.1), 60, 10, 1);
  ASSERT_OK(result);
  EXPECT_EQ(result->refused, 10);
  EXPECT_EQ(result->mean_share, 0);
  EXPECT_STATUS(StatusCode::kInvalid, "leave some held out", CheckHeldOut(table.view, Rcps(0.05, 0.1), 100, 10, 1));
  EXPECT_STATUS(StatusCode::kInvalid, "0 splits", CheckHeldOut(table.view, Rcps(0.05, 0.1), 60, 0, 1));
}

// --- the claim --------------------------------------------------------------------------------------------------

TEST(CalibrationClaimTest, ReadsAndPrints) {
  const auto claim = CalibrationClaim::Parse("max_dropped_mass<=0.05 alpha=0.1");
  ASSERT_OK(claim);
  EXPECT_EQ(*claim, (CalibrationClaim{0.05, 0.1, 0.9, CalibrationMethod::kRcps}));
  const auto all = CalibrationClaim::Parse("  method=rcps confidence=0.95  alpha=0.02 max_dropped_mass<=0 ");
  ASSERT_OK(all);
  EXPECT_EQ(*all, (CalibrationClaim{0, 0.02, 0.95, CalibrationMethod::kRcps}));
  const auto conformal = CalibrationClaim::Parse("max_dropped_mass<=0.1 alpha=0.1 method=conformal");
  ASSERT_OK(conformal);
  EXPECT_EQ(conformal->method, CalibrationMethod::kConformal);
  for (const auto* each : {&claim, &all, &conformal}) EXPECT_EQ(*CalibrationClaim::Parse((*each)->ToString()), **each);
  EXPECT_NE(all->Guarantee().find("confidence 0.95"), std::string::npos);
  EXPECT_EQ(conformal->Guarantee().find("confidence"), std::string::npos);
}

TEST(CalibrationClaimTest, RefusalsNameTheWordAndWhatIsAccepted) {
  const char* accepted = "accepted: max_dropped_mass<=0.05 alpha=0.1 [confidence=0.9] [method=rcps|conformal]";
  const auto refused = [&](const char* text, const char* says) {
    const auto claim = CalibrationClaim::Parse(text);
    EXPECT_STATUS(StatusCode::kInvalid, says, claim);
    EXPECT_STATUS(StatusCode::kInvalid, accepted, claim);
  };
  refused("", "lacks max_dropped_mass<=");
  refused("max_dropped_mass<=0.05", "lacks alpha=");
  refused("alpha=0.1", "lacks max_dropped_mass<=");
  refused("max_dropped_mass<0.05 alpha=0.1", "\"max_dropped_mass<0.05\" is not a part");
  refused("max_dropped_mass<=x alpha=0.1", "\"max_dropped_mass<=x\" has no such value");
  refused("max_dropped_mass<=0.05 alpha=nan", "\"alpha=nan\"");
  refused("max_dropped_mass<=0.05 alpha=0.1 alpha=0.1", "is given twice");
  refused("max_dropped_mass<=0.05 alpha=0.1 method=magic", "\"method=magic\" has no such value");
  refused("max_dropped_mass<=0.05 alpha=0.1 confidence=0.9 method=conformal", "has no confidence");
  EXPECT_STATUS(StatusCode::kInvalid, "alpha=1: accepted: between 0 and 1",
                CalibrationClaim::Parse("max_dropped_mass<=0.05 alpha=1"));
  EXPECT_STATUS(StatusCode::kInvalid, "max_dropped_mass<=1: accepted",
                CalibrationClaim::Parse("max_dropped_mass<=1 alpha=0.1"));
  EXPECT_STATUS(StatusCode::kInvalid, "confidence=1: accepted",
                CalibrationClaim::Parse("max_dropped_mass<=0.05 alpha=0.1 confidence=1"));
}

}  // namespace
}  // namespace prehoc
