// The limits that every selector must reach exactly (evaluation plan of the methods, sanity limits), over random
// layers.
#include <algorithm>
#include <numeric>

#include "tests/selector/selector_test_util.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {
constexpr ReferenceShape kShape{.layer = 2, .layers = 4, .kv_heads = 2, .group = 3, .head_dim = 16};
constexpr int64_t kPrompt = 80;
const auto kBudget = {std::string_view("budget=24"), std::string_view("budget.sinks=4"), std::string_view("budget.local=8")};

SelectorOptions With(std::string_view kind, std::initializer_list<std::string_view> knobs) {
  SelectorOptions options = Options(kind, kBudget);
  for (const std::string_view knob : knobs) {
    const size_t equals = knob.find('=');
    EXPECT_OK(options.Set(knob.substr(0, equals), knob.substr(equals + 1)));
  }
  EXPECT_OK(options.Validate());
  return options;
}

// A number of steps of the same random layer for everyone who asks with the same seed.
struct History {
  std::vector<ReferenceDecision> steps;
  int64_t Retrievals() const {  // of decode steps, by query head
    int64_t count = 0;
    for (size_t u = 1; u < steps.size(); ++u) count += std::count(steps[u].selected.begin(), steps[u].selected.end(), true);
    return count;
  }
};
constexpr uint64_t kSeed = 20260209;
template <class EachStep>
History Decode(const SelectorOptions& options, int64_t steps, const EachStep& each, const ReferenceShape& shape = kShape,
           bool all_resident = true, uint64_t seed = kSeed) {
  Rng rng(seed);
  RandomLayer layer(&rng, shape, kPrompt);
  ReferenceTrace trace(options, shape, all_resident);
  History run;
  for (int64_t u = 0; u <= steps; ++u) {
    const ReferenceInput input = layer.Next();
    run.steps.push_back(trace.Step(input));
    each(input, run.steps.back());
  }
  return run;
}
History Decode(const SelectorOptions& options, int64_t steps, const ReferenceShape& shape = kShape, bool all_resident = true) {
  return Decode(options, steps, [](const ReferenceInput&, const ReferenceDecision&) {}, shape, all_resident);
}

void ExpectSameSets(const History& a, const History& b) {
  ASSERT_EQ(a.steps.size(), b.steps.size());
  for (size_t u = 0; u < a.steps.size(); ++u) EXPECT_EQ(a.steps[u].attended, b.steps[u].attended) << "step " << u;
}

// The k heaviest of the middle by the maximum over the group of softmax weights: written once more, for the limits
// alone.
Positions TopOfGroup(const ReferenceInput& input, int32_t kv_head, int32_t k) {
  const auto n = static_cast<size_t>(input.n);
  std::vector<double> best(n, 0);
  for (int32_t h = kv_head * kShape.group; h < (kv_head + 1) * kShape.group; ++h) {
    const auto z = input.z.subspan(static_cast<size_t>(h) * n, n);
    double sum = 0;
    for (const double value : z) sum += std::exp(value);
    for (size_t i = 0; i < n; ++i) best[i] = std::max(best[i], std::exp(z[i]) / sum);
  }
  Positions order = Range(4, static_cast<int32_t>(n) - 8);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return best[static_cast<size_t>(a)] > best[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(k));
  std::sort(order.begin(), order.end());
  return Join({Range(0, 4), order, Range(static_cast<int32_t>(n) - 8, static_cast<int32_t>(n))});
}

TEST(Limits, ABudgetOfEverythingIsDense) {
  for (const char* kind : {"window", "oracle", "cis", "cpe", "sc", "tc"}) {
    const History run = Decode(With(kind, {"budget=10000", "psaw.phase=off"}), 20,
                           [&](const ReferenceInput& input, const ReferenceDecision& step) {
                             for (const auto& attended : step.attended) {
                               if (input.step == 0) continue;
                               ASSERT_EQ(attended, Range(0, static_cast<int32_t>(input.n))) << kind;
                             }
                             for (const double dropped : step.dropped) ASSERT_EQ(dropped, 0) << kind;
                           });
    EXPECT_EQ(run.Retrievals(), 0) << kind;
    ExpectSameSets(run, Decode(With("dense", {}), 20));
  }
  // The same with a choice in between: one position less than all at the first step, all of them after it.
  const History run = Decode(With("oracle", {"max_dropped_mass=0"}), 10,
                         [](const ReferenceInput& input, const ReferenceDecision& step) {
                           for (const auto& attended : step.attended) {
                             if (input.step == 0) continue;
                             ASSERT_EQ(attended, Range(0, static_cast<int32_t>(input.n)));
                           }
                         });
  EXPECT_EQ(run.Retrievals(), 10 * kShape.heads());
}

TEST(Limits, TauBelowMinusOneNeverSelectsInsideABlock) {
  for (const char* tau : {"cis.tau=-1", "cis.tau=-1.5"}) {
    Decode(With("cis", {"cis.block=5", tau}), 40, [](const ReferenceInput& input, const ReferenceDecision& step) {
      for (const bool selected : step.selected) ASSERT_EQ(selected, input.step % 5 == 0) << input.step;
    });
  }
  // Two clocks have no blocks: a choice lives for max_age steps.
  Decode(With("tc", {"tc.max_age=5", "tc.tau=-1"}), 40, [](const ReferenceInput& input, const ReferenceDecision& step) {
    for (const bool selected : step.selected) ASSERT_EQ(selected, input.step % 6 == 0) << input.step;
  });
}

TEST(Limits, TauFromOneOnSelectsAtEveryStep) {
  for (const char* tau : {"1", "1.5"}) {
    EXPECT_EQ(Decode(With("cis", {"cis.block=8", std::string("cis.tau=") + tau}), 30).Retrievals(), 30 * kShape.heads());
    EXPECT_EQ(Decode(With("tc", {std::string("tc.tau=") + tau}), 30).Retrievals(), 30 * kShape.heads());
  }
  // In between, some heads share and some do not: the two ends are no accident of the data.
  const int64_t some = Decode(With("cis", {"cis.block=8"}), 32).Retrievals();
  EXPECT_GT(some, 32 / 8 * kShape.heads());
  EXPECT_LT(some, 32 * kShape.heads());
}

TEST(Limits, BlocksOfOneStepWithoutDilationArePerStepTopK) {
  const History run = Decode(With("cis", {"cis.block=1", "cis.r=0"}), 30,
                         [](const ReferenceInput& input, const ReferenceDecision& step) {
                           for (int32_t j = 0; j < kShape.kv_heads && input.step > 0; ++j) {
                             const Positions want = TopOfGroup(input, j, 12);
                             for (int32_t h = j * kShape.group; h < (j + 1) * kShape.group; ++h) {
                               ASSERT_EQ(step.attended[static_cast<size_t>(h)], want) << "step " << input.step;
                             }
                           }
                         });
  EXPECT_EQ(run.Retrievals(), 30 * kShape.heads());
  ExpectSameSets(run, Decode(With("oracle", {}), 30));
  ExpectSameSets(run, Decode(With("tc", {"tc.tau=off"}), 30));
  ExpectSameSets(run, Decode(With("sc", {}), 30));  // everything resident
}

TEST(Limits, RadiusZeroIsThePlainSet) {
  const History plain = Decode(With("cis", {"cis.r=0"}), 40, [](const ReferenceInput& input, const ReferenceDecision& step) {
    for (const auto& attended : step.attended) ASSERT_EQ(attended.size(), input.step > 0 ? 24u : 0u);
  });
  ExpectSameSets(plain, Decode(With("cis", {"cis.m=0"}), 40));
  ExpectSameSets(plain, Decode(With("cis", {"cis.r=0", "cis.m=k", "cis.budget=cis*"}), 40));
  ExpectSameSets(plain, Decode(With("cis", {"cis.r=0", "cis.anchor_attends=plain", "cis.clip=visible"}), 40));
  bool differs = false;
  const History dilated = Decode(With("cis", {}), 40);
  for (size_t u = 1; u < plain.steps.size(); ++u) differs = differs || plain.steps[u].attended != dilated.steps[u].attended;
  EXPECT_TRUE(differs);
}

TEST(Limits, ExactBudgetHoldsAtEveryStep) {
  Decode(With("cis", {"cis.budget=cis*", "cis.m=k", "cis.r=2"}), 40, [](const ReferenceInput& input, const ReferenceDecision& step) {
    for (const auto& attended : step.attended) ASSERT_EQ(attended.size(), input.step > 0 ? 24u : 0u);
  });
}

// Over what is in sight: with PSAW, its window.
TEST(Limits, RetainedAndDroppedMassAreOne) {
  for (const std::string_view kind : SelectorKindNames()) {
    if (kind == "hshare") continue;  // ranks by labels: hshare_test.cc
    for (const bool all_resident : {true, false}) {
      const bool cuts = kind == "psaw" || kind == "cpe";
      const int32_t layer = kShape.layers - 1;
      ReferenceShape shape = kShape;
      shape.layer = layer;
      const SelectorOptions options =
          kind == "quest" ? Options(kind, {"budget=48", "quest.dense_layers=0"}) : With(kind, {"psaw.c=0.7"});
      const auto selector = MakeSelector(options);
      double most = 0;
      Decode(options, 30,
             [&](const ReferenceInput& input, const ReferenceDecision& step) {
               const auto n = static_cast<size_t>(input.n);
               const int64_t start = cuts ? std::max<int64_t>(4, selector->WindowStart(layer, kShape.layers, input.n)) : 4;
               for (size_t h = 0; h < step.attended.size() && input.step > 0; ++h) {
                 double sight = 0, retained = 0;
                 for (size_t i = 0; i < n; ++i) {
                   if (i < 4 || static_cast<int64_t>(i) >= start) sight += std::exp(input.z[h * n + i]);
                 }
                 for (const int32_t i : step.attended[h]) {
                   // What CPE inherits from before the edge is attended to, but out of sight.
                   if (i < 4 || i >= start) retained += std::exp(input.z[h * n + static_cast<size_t>(i)]) / sight;
                 }
                 ASSERT_NEAR(retained + step.dropped[h], 1, 1e-9) << kind << " step " << input.step;
                 most = std::max(most, step.dropped[h]);
               }
             },
             shape, all_resident);
      EXPECT_EQ(most > 0.01, kind != "dense" && kind != "psaw" && kind != "etf") << kind;
    }
  }
}

// The certificate on every step that the certified gate let through, against the mass that was in fact dropped.
TEST(Limits, TheCertificateIsNeverBelowTheDroppedMass) {
  for (const char* edge : {"slides", "held"}) {
    for (const char* delta : {"0.7", "0.9", "1"}) {
      for (const char* sets : {"max_weight", "per_query_head"}) {
        int64_t certified = 0;
        const SelectorOptions options =
            With("cis", {"cis.gate=certified", "cis.block=8", std::string("cis.local_edge=") + edge,
                         std::string("cis.delta_max=") + delta, std::string("cis.gqa_set=") + sets});
        // Queries that hardly move, else nothing is ever certified.
        Rng rng(kSeed);
        RandomLayer layer(&rng, kShape, kPrompt, /*jump=*/0.02, /*drift=*/0.02);
        ReferenceTrace trace(options, kShape);
        for (int u = 0; u <= 200; ++u) {
          const ReferenceInput input = layer.Next();
          const ReferenceDecision step = trace.Step(input);
          for (size_t h = 0; h < step.bound.size(); ++h) {
            if (step.bound[h] < 0) continue;
            ++certified;
            ASSERT_FALSE(step.selected[h]);
            ASSERT_GE(step.bound[h], step.dropped[h]) << "step " << u;
            ASSERT_LE(step.bound[h], std::stod(delta) + 1e-12);
          }
        }
        EXPECT_GT(certified, 20) << edge << " " << delta << " " << sets;
      }
    }
  }
}

// Scores are off by up to `err`, as a scan of codes is; the promise is about the true logits.
TEST(Limits, MaxDroppedMassHoldsForTheTrueLogits) {
  for (const char* kind : {"oracle", "cis", "sc", "tc"}) {
    for (const double limit : {0.5, 0.1, 0.01}) {
      const SelectorOptions options = With(kind, {"max_dropped_mass=" + std::to_string(limit)});
      Rng rng(kSeed + 1);
      RandomLayer layer(&rng, kShape, kPrompt);
      ReferenceTrace trace(options, kShape, false);
      size_t smallest = 1000;
      double most = 0;
      for (int u = 0; u <= 30; ++u) {
        ReferenceInput input = layer.Next();
        const std::vector<double> truth(input.z.begin(), input.z.end());
        std::vector<double> scores(truth), err(truth.size());
        for (size_t i = 0; i < scores.size(); ++i) {
          err[i] = rng.Uniform(0, 0.5);
          scores[i] += rng.Chance(0.3) ? (rng.Chance(0.5) ? err[i] : -err[i]) : rng.Uniform(-err[i], err[i]);
        }
        input.z = scores;
        input.err = err;
        const ReferenceDecision step = trace.Step(input);
        const auto n = static_cast<size_t>(input.n);
        for (size_t h = 0; h < step.attended.size() && u > 0; ++h) {
          double all = 0, kept = 0;
          for (size_t i = 0; i < n; ++i) all += std::exp(truth[h * n + i]);
          for (const int32_t i : step.attended[h]) kept += std::exp(truth[h * n + static_cast<size_t>(i)]);
          ASSERT_LE(1 - kept / all, limit + 1e-12) << kind << " step " << u;
          smallest = std::min(smallest, step.attended[h].size());
          most = std::max(most, 1 - kept / all);
        }
      }
      EXPECT_LT(smallest, static_cast<size_t>(kPrompt)) << kind << " " << limit;  // not by attending to everything
      EXPECT_GT(most, limit / 5) << kind << " " << limit;
    }
  }
}

// Blocks of 5 over 40 steps: 8 starts for every layer, whatever its phase. With a gate the numbers differ by which
// queries meet a block start; without one they must not.
TEST(Limits, StaggeredBlocksGiveTheSameRho) {
  int64_t aligned = 0, staggered = 0, moved = 0;
  for (int32_t layer = 0; layer < 4; ++layer) {
    ReferenceShape shape = kShape;
    shape.layer = layer;
    const History a = Decode(With("cis", {"cis.block=5", "cis.tau=-1"}), 40, shape);
    const History b = Decode(With("cis", {"cis.block=5", "cis.tau=-1", "cis.phase=staggered"}), 40, shape);
    aligned += a.Retrievals();
    staggered += b.Retrievals();
    for (size_t u = 1; u < a.steps.size(); ++u) moved += a.steps[u].selected != b.steps[u].selected;
  }
  EXPECT_EQ(aligned, 4 * 8 * kShape.heads());
  EXPECT_EQ(staggered, aligned);
  EXPECT_GT(moved, 0);
  // rho of shared candidates: a refresh every s steps.
  EXPECT_EQ(Decode(With("sc", {"sc.refresh=8"}), 40, kShape, false).Retrievals(), 5 * kShape.heads());
}

}  // namespace
}  // namespace prehoc
