#include "integrations/cli/fidelity_observer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace prehoc::cli {
namespace {
using nlohmann::ordered_json;

KvGeometry Geometry() {
  KvGeometry geometry;
  geometry.layers = 1;
  geometry.heads = 2;
  geometry.kv_heads = 1;
  geometry.head_dim = 2;
  return geometry;
}

// Eight positions, one sink, a window of two; head 0 has all weights in front of it, head 1 looks at everything alike.
struct Unit {
  std::vector<float> logits, lse, estimate = {0.2f, 0.3f}, bound = {-1, 0.9f};
  std::vector<int32_t> attended = {0, 2, 3, 6, 7};
  std::vector<double> dropped, error = {0.5, 0.25};
  AuditedUnit view;

  Unit() {
    const double weights[2][8] = {{0.1, 0.05, 0.05, 0.4, 0.2, 0.05, 0.05, 0.1}, {0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.125}};
    for (const auto& head : weights) {
      double out = 0;
      for (int i = 0; i < 8; ++i) {
        logits.push_back(static_cast<float>(std::log(head[i]) + 3));
        if (i == 1 || i == 4 || i == 5) out += head[i];
      }
      lse.push_back(3);
      dropped.push_back(out);
    }
    view.heads = 2;
    view.n = 8;
    view.sinks = 1;
    view.cut_begin = view.cut_end = 1;
    view.left = 6;
    view.logits = logits;
    view.lse = lse;
    view.attended = attended;
    view.dropped = dropped;
    view.estimate = estimate;
    view.bound = bound;
    view.output_error = error;
    view.scanned = true;
  }
};

TEST(FidelityObserverTest, ComparesWithAFreshChoiceOfTheSameSize) {
  FidelityObserver observer(Geometry(), 2);
  const Unit unit;
  observer.OnUnit(unit.view);
  const ordered_json heads = observer.Heads();
  // Two of the middle [1, 6): by the larger weight of the group they are 3 (0.4) and 4 (0.2). Attended: 2 and 3.
  EXPECT_EQ(heads["recall"]["mean"], 0.5);
  EXPECT_NEAR(heads["dropped_map"][0][0], 0.3, 1e-9);
  EXPECT_NEAR(heads["excess_map"][0][0], 0.3 - 0.15, 1e-6);
  EXPECT_NEAR(heads["excess_map"][0][1], 0, 1e-6);
  EXPECT_EQ(heads["dropped"]["worst"]["head"], 1);
  EXPECT_NEAR(heads["estimate_ratio"]["max"], 0.8, 1e-6);
  EXPECT_EQ(heads["bound_ratio"]["count"], 1);
  EXPECT_EQ(heads["bound_violations"], 0);
  EXPECT_EQ(heads["rho_map"][0][0], 1);
  EXPECT_EQ(heads["output_error_by_layer"][0], 0.375);
}

TEST(FidelityObserverTest, AWindowLongerThanTheBudgetsHasBeenChosen) {
  FidelityObserver observer(Geometry(), 2);
  Unit unit;
  unit.attended = {0, 4, 5, 6, 7};
  unit.view.attended = unit.attended;
  unit.view.left = 4;
  observer.OnUnit(unit.view);
  EXPECT_EQ(observer.Heads()["recall"]["mean"], 0.5);  // 3 and 4 would have been better than 4 and 5
}

TEST(FidelityObserverTest, ABoundBelowTheTruthIsCounted) {
  FidelityObserver observer(Geometry(), 2);
  Unit unit;
  unit.bound = {0.29f, 0.9f};
  unit.view.bound = unit.bound;
  observer.OnUnit(unit.view);
  EXPECT_EQ(observer.Heads()["bound_violations"], 1);
  EXPECT_EQ(observer.Heads()["statistical_ratio"], nullptr);
  EXPECT_EQ(observer.Heads()["statistical_checked"], 0);
  // A statistical bound may lie below the truth now and then: counted apart.
  const float nothing[] = {-1, -1};
  unit.view.bound = nothing;
  unit.view.bound_statistical = unit.bound;
  observer.OnUnit(unit.view);
  EXPECT_EQ(observer.Heads()["bound_violations"], 1);
  EXPECT_EQ(observer.Heads()["statistical_checked"], 2);
  EXPECT_EQ(observer.Heads()["statistical_violations"], 1);
  EXPECT_EQ(observer.Heads()["statistical_ratio"]["count"], 2);
}

TEST(FidelityObserverTest, PositionsOutOfSightAreNoChoice) {
  FidelityObserver observer(Geometry(), 2);
  Unit unit;
  // [1, 4) is cut: five positions are in sight, of which 4 and 5 are the middle.
  unit.view.cut_end = 4;
  std::vector<float> logits;
  for (const int h : {0, 1}) {
    for (const int i : {0, 4, 5, 6, 7}) logits.push_back(unit.logits[static_cast<size_t>(8 * h + i)]);
  }
  unit.attended = {0, 5, 6, 7};
  unit.view.logits = logits;
  unit.view.attended = unit.attended;
  observer.OnUnit(unit.view);
  EXPECT_EQ(observer.Heads()["recall"]["mean"], 0);  // 4 outweighs 5
}

TEST(FidelityObserverTest, WithoutAuditsThereIsNothingToSay) {
  EXPECT_TRUE(FidelityObserver(Geometry(), 2).Heads().is_null());
}

TEST(QueryObserverTest, CosinesAreTakenOverTheDistance) {
  QueryObserver observer(Geometry());
  for (int step = 0; step < 10; ++step) {
    const auto angle = static_cast<float>(step * std::numbers::pi / 6);
    const float q[] = {std::cos(angle), std::sin(angle), 1, 0};
    AuditedUnit unit;
    unit.step = step;
    unit.heads = 2;
    unit.q = q;
    observer.OnUnit(unit);
  }
  const ordered_json json = observer.ToJson();
  EXPECT_EQ(json["distance"], ordered_json({1, 2, 4, 8}));
  EXPECT_NEAR(json["post_rope"][1]["p50"], 0.5, 1e-6);  // two steps: 60 degrees, for one of two heads
  EXPECT_NEAR(json["post_rope"][1]["max"], 1, 1e-6);
  EXPECT_TRUE(json["pre_rope"][0].is_null());
}

TEST(DistributionTest, QuantilesAreValues) {
  Distribution values;
  EXPECT_TRUE(values.ToJson().is_null());
  for (int i = 100; i >= 1; --i) values.Add(i);
  EXPECT_EQ(values.Quantile(0.5), 50);
  EXPECT_EQ(values.Quantile(0.99), 99);
  EXPECT_EQ(values.Quantile(1), 100);
  EXPECT_EQ(values.Quantile(0), 1);
  EXPECT_EQ(values.mean(), 50.5);
}

}  // namespace
}  // namespace prehoc::cli
