#include "cache/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

std::map<std::string, double> CountersOf(const SequenceReport& report) {
  std::map<std::string, double> counters;
  report.VisitCounters([&](std::string_view name, double value) {
    EXPECT_TRUE(counters.emplace(name, value).second) << name << " is shown twice";
  });
  return counters;
}

// The model: the smallest value that at least the share q does not exceed.
double ExactQuantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<size_t>(std::ceil(q * static_cast<double>(values.size())));
  return values[std::max<size_t>(rank, 1) - 1];
}

TEST(UnitSketchTest, IsZeroWhenEmpty) {
  const UnitSketch sketch;
  EXPECT_EQ(sketch.count(), 0);
  EXPECT_EQ(sketch.mean(), 0);
  EXPECT_EQ(sketch.min(), 0);
  EXPECT_EQ(sketch.max(), 0);
  for (const double q : {0.0, 0.5, 1.0}) EXPECT_EQ(sketch.Quantile(q), 0);
}

TEST(UnitSketchTest, QuantilesAreWithinTwoPercentOfTheExactOnes) {
  SeededRng rng;
  for (const double decades : {0.01, 1.0, 4.0, 9.9}) {
    UnitSketch sketch;
    std::vector<double> values;
    double sum = 0;
    for (int i = 0; i < 3000; ++i) {
      values.push_back(std::pow(10, -decades * rng.Uniform()));
      sketch.Add(values.back());
      sum += values.back();
    }
    for (const double q : {1e-9, 0.001, 0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999}) {
      const double exact = ExactQuantile(values, q);
      EXPECT_NEAR(sketch.Quantile(q), exact, 0.02 * exact) << "q " << q << ", " << decades << " decades";
    }
    EXPECT_EQ(sketch.Quantile(0), *std::min_element(values.begin(), values.end()));
    EXPECT_EQ(sketch.Quantile(1), *std::max_element(values.begin(), values.end()));
    EXPECT_EQ(sketch.min(), sketch.Quantile(0));
    EXPECT_EQ(sketch.max(), sketch.Quantile(1));
    EXPECT_DOUBLE_EQ(sketch.mean(), sum / 3000);
  }
}

TEST(UnitSketchTest, OneValueIsEveryQuantile) {
  for (const double value : {1.0, 0.37, 1e-9, 3e-11, 0.0}) {
    UnitSketch sketch;
    sketch.Add(value);
    for (const double q : {0.0, 0.3, 1.0}) EXPECT_EQ(sketch.Quantile(q), value) << value << " " << q;
  }
}

TEST(UnitSketchTest, TheEdgesOfTheBinsAreInside) {
  for (int i = 0; i < 1165; ++i) {
    for (const double nudge : {1 - 1e-12, 1.0, 1 + 1e-12}) {
      UnitSketch sketch;
      const double value = std::min(1.0, std::pow(1.02, -i) * nudge);
      sketch.Add(0);
      sketch.Add(value);
      sketch.Add(1);
      EXPECT_NEAR(sketch.Quantile(0.5), value, value < 1e-10 ? 1e-10 : 0.02 * value) << "bin " << i;
    }
  }
}

TEST(UnitSketchTest, ValuesOutsideAreMovedToTheEndsAndNanIsTheWorst) {
  UnitSketch sketch;
  sketch.Add(-0.25);
  EXPECT_EQ(sketch.max(), 0);
  sketch.Add(1.5);
  EXPECT_EQ(sketch.max(), 1);
  EXPECT_EQ(sketch.mean(), 0.5);
  UnitSketch unknown;
  unknown.Add(std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(unknown.count(), 1);
  EXPECT_EQ(unknown.mean(), 1);
  EXPECT_EQ(unknown.min(), 1);
  UnitSketch infinite;
  infinite.Add(std::numeric_limits<double>::infinity());
  infinite.Add(-std::numeric_limits<double>::infinity());
  EXPECT_EQ(infinite.max(), 1);
  EXPECT_EQ(infinite.min(), 0);
  EXPECT_EQ(infinite.mean(), 0.5);
}

TEST(UnitSketchTest, QuantilesOutsideAreTheExtremes) {
  UnitSketch sketch;
  sketch.Add(0.1);
  sketch.Add(0.9);
  EXPECT_EQ(sketch.Quantile(-1), 0.1);
  EXPECT_EQ(sketch.Quantile(2), 0.9);
}

TEST(UnitSketchTest, MergedIsAsIfAddedToOne) {
  SeededRng rng;
  UnitSketch one, left, right;
  for (int i = 0; i < 1000; ++i) {
    const double value = rng.Uniform() * rng.Uniform();
    one.Add(value);
    (rng.Chance(0.3) ? left : right).Add(value);
  }
  left.Merge(right);
  left.Merge(UnitSketch());
  EXPECT_EQ(left.count(), one.count());
  EXPECT_NEAR(left.mean(), one.mean(), 1e-12);
  EXPECT_EQ(left.min(), one.min());
  EXPECT_EQ(left.max(), one.max());
  for (double q = 0; q <= 1; q += 0.01) EXPECT_EQ(left.Quantile(q), one.Quantile(q)) << q;
  UnitSketch empty;
  empty.Merge(one);
  EXPECT_EQ(empty.min(), one.min());
}

TEST(SequenceReportTest, RatiosAreZeroWithoutSteps) {
  const SequenceReport report;
  EXPECT_EQ(report.rho(), 0);
  EXPECT_EQ(report.mean_attended(), 0);
  for (const auto& [name, value] : CountersOf(report)) EXPECT_EQ(value, 0) << name;
}

TEST(SequenceReportTest, ShowsWhatItHolds) {
  SequenceReport report;
  report.triples = 8;
  report.retrievals = 2;
  report.attended = 1000;
  report.bytes_gate = 1;
  report.bytes_codes = 10;
  report.bytes_exact_keys = 100;
  report.dropped_audited.Add(0.25);
  report.times.gate = 0.5;
  report.times.attend = 1.5;
  report.times.audit = 100;
  report.times.prefill = 30;
  const auto counters = CountersOf(report);
  EXPECT_EQ(counters.at("sequence.rho"), 0.25);
  EXPECT_EQ(counters.at("sequence.mean_attended"), 125);
  EXPECT_EQ(counters.at("sequence.bytes_scored"), 111);
  EXPECT_EQ(counters.at("sequence.dropped_audited.p99"), 0.25);
  EXPECT_EQ(counters.at("sequence.dropped_audited.count"), 1);
  EXPECT_EQ(counters.at("sequence.seconds.gate"), 0.5);
  EXPECT_EQ(counters.at("sequence.seconds.total"), 2) << "audits and prefill are not part of a step";
  for (const auto& [name, value] : counters) EXPECT_EQ(name.rfind("sequence.", 0), 0u) << name;
}

TEST(SequenceReportTest, MergeAddsEveryCount) {
  SequenceReport report;
  report.prompt_tokens = 1, report.restored_tokens = 2, report.decode_steps = 3, report.triples = 4;
  report.dense_triples = 5, report.retrievals = 6, report.inherited = 7, report.first_selections = 8;
  report.widened_dense = 9, report.attended = 10, report.bytes_gate = 11, report.bytes_codes = 12;
  report.bytes_exact_keys = 13, report.bytes_attended = 14, report.bytes_from_host = 15, report.bytes_from_disk = 16;
  report.rows_device = 17, report.rows_host = 18, report.rows_disk = 19, report.rows_in_step = 20;
  report.triples_in_step = 21, report.rows_behind = 22, report.failed_fetches = 23, report.refreshes = 24;
  report.bound_violations = 25, report.audited_steps = 26, report.prefill_bytes_from_disk = 27;
  report.prefill_frozen_rows = 28, report.prefill_cut_keys = 29, report.corrupt_chunks = 30;
  report.missing_chunks = 31, report.recomputed_chunks = 32;
  report.statistical_checked = 33, report.statistical_violations = 34;
  report.times = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  report.dropped_bound.Add(0.5);
  const auto before = CountersOf(report);
  SequenceReport twice = report;
  twice.Merge(report);
  const auto after = CountersOf(twice);
  int counts = 0;
  for (const auto& [name, value] : before) {
    const bool ratio = name == "sequence.rho" || name == "sequence.mean_attended" ||
                       (name.find("dropped_bound.") != std::string::npos && name.find(".count") == std::string::npos);
    EXPECT_EQ(after.at(name), ratio ? value : 2 * value) << name;
    counts += !ratio && value != 0;
  }
  EXPECT_EQ(counts, 34 + 1 + 10 + 1 + 1);  // counts, bytes_scored, times, their total, one sketch's count
}

TEST(SequenceReportTest, MergeWeighsTheAgeOfEstimatesByTheirNumber) {
  SequenceReport young, old, none;
  young.estimate_age_mean = 1;
  for (int i = 0; i < 3; ++i) young.dropped_estimated.Add(0.1);
  old.estimate_age_mean = 9;
  old.dropped_estimated.Add(0.1);
  young.Merge(old);
  EXPECT_DOUBLE_EQ(young.estimate_age_mean, 3);
  young.Merge(none);
  EXPECT_DOUBLE_EQ(young.estimate_age_mean, 3);
  none.Merge(young);
  EXPECT_DOUBLE_EQ(none.estimate_age_mean, 3);
}

}  // namespace
}  // namespace prehoc
