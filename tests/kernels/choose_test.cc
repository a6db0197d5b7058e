// choose: hand-made examples of every rule, then random tasks against the model, then the promise that it is made for.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kernels/choose_model.h"
#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Outcome {
  std::vector<int32_t> chosen;
  std::vector<float> lse_all, lse_out, lse_out_bound;
  int met = -1;
};

class ChooseTest : public KernelTest {
 protected:
  // Runs one task; its result pointers are filled in here, and what was written is checked for bounds and order.
  Outcome Run(ChooseTask task, int32_t group = 1) {
    const auto heads = static_cast<size_t>(group);
    Guarded<int32_t> chosen(static_cast<size_t>(task.max_chosen())), count(1);
    Guarded<float> all(heads), out(heads), bound(heads);
    Guarded<uint8_t> met(1);
    task.chosen = chosen.data(), task.count = count.data(), task.met = met.data();
    task.lse_all = all.data(), task.lse_out = out.data(), task.lse_out_bound = bound.data();
    const ChooseTask tasks[] = {task};
    EXPECT_OK(kernels().choose({.tasks = tasks, .group = group}, launch()));
    EXPECT_TRUE(chosen.GuardsIntact() && count.GuardsIntact() && all.GuardsIntact() && out.GuardsIntact() &&
                bound.GuardsIntact() && met.GuardsIntact());
    EXPECT_GE(count[0], 0);
    EXPECT_LE(count[0], task.max_chosen());
    Outcome outcome{.met = met[0]};
    if (count[0] >= 0 && count[0] <= task.max_chosen()) {
      outcome.chosen.assign(chosen.data(), chosen.data() + count[0]);
    }
    outcome.lse_all.assign(all.span().begin(), all.span().end());
    outcome.lse_out.assign(out.span().begin(), out.span().end());
    outcome.lse_out_bound.assign(bound.span().begin(), bound.span().end());
    return outcome;
  }
  // The middle is [0, n) of one head.
  Outcome RunMiddle(const std::vector<float>& z, int32_t k, ChooseTask task = {}) {
    task.z = z.data();
    task.n = task.hi = static_cast<int32_t>(z.size());
    task.k = k;
    return Run(task);
  }
};
PREHOC_INSTANTIATE_KERNELS(ChooseTest);
using Positions = std::vector<int32_t>;

TEST_P(ChooseTest, KeepsTheLargestAndTiesGoToTheLowerPosition) {
  const std::vector<float> z{1, 5, 3, 5, 2, 3, 3, 0};
  EXPECT_EQ(RunMiddle(z, 0).chosen, Positions{});
  EXPECT_EQ(RunMiddle(z, 1).chosen, (Positions{1}));
  EXPECT_EQ(RunMiddle(z, 2).chosen, (Positions{1, 3}));
  EXPECT_EQ(RunMiddle(z, 3).chosen, (Positions{1, 2, 3}));
  EXPECT_EQ(RunMiddle(z, 4).chosen, (Positions{1, 2, 3, 5}));
  EXPECT_EQ(RunMiddle(z, 8).chosen, (Positions{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(RunMiddle(z, 1'000'000).chosen.size(), 8u);
  EXPECT_EQ(RunMiddle(std::vector<float>(300, 2.5f), 3).chosen, (Positions{0, 1, 2}));
  EXPECT_EQ(RunMiddle({}, 3).chosen, Positions{});
}

TEST_P(ChooseTest, EqualLogitsTieExactlyWhereverTheyStand) {
  SeededRng rng;
  constexpr int32_t kGroup = 3;
  for (const GroupRule rule : {GroupRule::kMaxWeight, GroupRule::kMeanWeight, GroupRule::kMaxLogit}) {
    for (int32_t n = 1; n < 150; n += 7) {
      // Columns are drawn from three only, so each score stands at many places: in vectors, in tails, in both halves.
      const auto columns = rng.Normals(3 * kGroup, 2);
      std::vector<float> z(static_cast<size_t>(kGroup * n));
      for (int32_t i = 0; i < n; ++i) {
        const auto column = static_cast<size_t>(rng.Int(0, 2));
        for (size_t h = 0; h < kGroup; ++h) {
          z[h * static_cast<size_t>(n) + static_cast<size_t>(i)] = columns[column * kGroup + h];
        }
      }
      for (const int32_t k : {1, n / 3, n / 2, n - 1}) {
        const ChooseTask task{.z = z.data(), .z_stride = n, .n = n, .hi = n, .k = k, .rule = rule};
        EXPECT_EQ(Run(task, kGroup).chosen, RunChooseModel(task, kGroup).chosen) << "n " << n << ", k " << k;
      }
    }
  }
}

TEST_P(ChooseTest, SinksWindowAndLocalAreNotChosenButCount) {
  //                            sinks | out of window | middle            | local
  const std::vector<float> z{2, 1,   9, 9, 9,        0, 3, 1, 2, -1,     4, 0};
  const ChooseTask task{.z = z.data(), .n = 12, .sinks = 2, .lo = 5, .hi = 10, .k = 2};
  const Outcome outcome = Run(task);
  EXPECT_EQ(outcome.chosen, (Positions{6, 8}));
  const double all = NaiveLse({2, 1, 0, 3, 1, 2, -1, 4, 0}), out = NaiveLse({0, 1, -1});
  EXPECT_NEAR(outcome.lse_all[0], all, 1e-5);
  EXPECT_NEAR(outcome.lse_out[0], out, 1e-5);
  EXPECT_NEAR(outcome.lse_out_bound[0], out, 1e-5);
  EXPECT_EQ(outcome.met, 1);
}

TEST_P(ChooseTest, TheGroupDecidesByWeightNotByLogit) {
  // Head 0 spreads its weight over large logits, head 1 has one peak of a small logit.
  const std::vector<float> z{10, 10, 10, 9.9f, 0, 0, 0, 4};
  ChooseTask task{.z = z.data(), .z_stride = 4, .n = 4, .hi = 4, .k = 1};
  EXPECT_EQ(Run(task, 2).chosen, (Positions{3}));
  task.rule = GroupRule::kMeanWeight;
  EXPECT_EQ(Run(task, 2).chosen, (Positions{3}));
  task.rule = GroupRule::kMaxLogit;
  EXPECT_EQ(Run(task, 2).chosen, (Positions{0}));
}

TEST_P(ChooseTest, DilationBringsNeighboursOfTheFirstRanksInsideTheMiddle) {
  std::vector<float> z(20, 0);
  z[2] = 5, z[17] = 4, z[10] = 3, z[12] = 2;
  const ChooseTask dilate{.dilate_m = 2, .dilate_r = 1};
  EXPECT_EQ(RunMiddle(z, 3, dilate).chosen, (Positions{1, 2, 3, 10, 16, 17, 18}));
  // m beyond k: every kept rank, no more. Neighbours never leave the middle, and overlap counts once.
  EXPECT_EQ(RunMiddle(z, 4, {.dilate_m = 9, .dilate_r = 2}).chosen,
            (Positions{0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}));
  const ChooseTask edge{.z = z.data(), .n = 20, .sinks = 1, .lo = 2, .hi = 18, .k = 2, .dilate_m = 2, .dilate_r = 3};
  EXPECT_EQ(Run(edge).chosen, (Positions{2, 3, 4, 5, 14, 15, 16, 17}));
}

TEST_P(ChooseTest, ExactBudgetWalksTheRanksUntilExactlyK) {
  std::vector<float> z(20, 0);
  z[2] = 5, z[17] = 4, z[10] = 3, z[12] = 2;
  ChooseTask task{.dilate_m = 2, .dilate_r = 2, .exact_budget = true};
  // Around 2: itself, 1, 3, 0, 4; then around 17: itself, 16, 18, 15, 19; then 10, 12, and the ties from the left.
  EXPECT_EQ(RunMiddle(z, 1, task).chosen, (Positions{2}));
  EXPECT_EQ(RunMiddle(z, 2, task).chosen, (Positions{1, 2}));
  EXPECT_EQ(RunMiddle(z, 4, task).chosen, (Positions{0, 1, 2, 3}));
  EXPECT_EQ(RunMiddle(z, 7, task).chosen, (Positions{0, 1, 2, 3, 4, 16, 17}));
  EXPECT_EQ(RunMiddle(z, 12, task).chosen, (Positions{0, 1, 2, 3, 4, 10, 12, 15, 16, 17, 18, 19}));
  EXPECT_EQ(RunMiddle(z, 13, task).chosen, (Positions{0, 1, 2, 3, 4, 5, 10, 12, 15, 16, 17, 18, 19}));
  EXPECT_EQ(RunMiddle(z, 50, task).chosen.size(), 20u);
}

TEST_P(ChooseTest, ResidentsAndHeavyMissingPositionsAreTheCandidates) {
  std::vector<float> z(70, 0);
  z[3] = 8, z[5] = 2, z[66] = 2, z[69] = 1;
  const uint64_t resident[] = {uint64_t{1} << 7 | uint64_t{1} << 63, uint64_t{1} << 5};  // 7, 63, 69
  ChooseTask task{.resident = resident};
  task.log_theta = std::log(0.5f);  // position 3 alone has 97 % of the mass
  const Outcome outcome = RunMiddle(z, 4, task);
  EXPECT_EQ(outcome.chosen, (Positions{3, 7, 63, 69}));
  std::vector<double> rest(64, 0);
  rest.push_back(2), rest.push_back(2);
  EXPECT_NEAR(outcome.lse_out[0], NaiveLse(rest), 1e-5) << "missing and light counts as dropped";
  task.log_theta = kInfinity;
  EXPECT_EQ(RunMiddle(z, 4, task).chosen, (Positions{7, 63, 69})) << "fewer than k where no more are candidates";
  task.log_theta = -kInfinity;
  EXPECT_EQ(RunMiddle(z, 4, task).chosen, (Positions{3, 5, 66, 69}));
  const uint64_t none[] = {0, 0};
  task.resident = none;
  task.log_theta = kInfinity;
  EXPECT_EQ(RunMiddle(z, 4, task).chosen, Positions{});
  // Neighbours come along, candidates or not.
  task.resident = resident;
  task.dilate_m = 1, task.dilate_r = 1;
  EXPECT_EQ(RunMiddle(z, 1, task).chosen, (Positions{68, 69}));
}

TEST_P(ChooseTest, ATargetWidensUntilTheBoundHolds) {
  // Weights 8, 4, 2, 1, 1 of 16.
  const std::vector<float> z{0, std::log(2.0f), std::log(8.0f), 0, std::log(4.0f)};
  ChooseTask task{.cap = 5, .target_drop = 0.3f};
  EXPECT_EQ(RunMiddle(z, 1, task).chosen, (Positions{2, 4})) << "dropped 4/16";
  EXPECT_EQ(RunMiddle(z, 3, task).chosen, (Positions{1, 2, 4})) << "never fewer than k";
  task.target_drop = 0.2f;
  EXPECT_EQ(RunMiddle(z, 0, task).chosen, (Positions{1, 2, 4})) << "dropped 2/16";
  task.target_drop = 0;
  EXPECT_EQ(RunMiddle(z, 0, task).chosen.size(), 5u);
  task.cap = 2;
  const Outcome capped = RunMiddle(z, 0, task);
  EXPECT_EQ(capped.chosen, (Positions{2, 4}));
  EXPECT_EQ(capped.met, 0);
  task.target_drop = 1;
  EXPECT_EQ(RunMiddle(z, 0, task).chosen, Positions{}) << "everything may be dropped";

  // Errors make the same weights worth less: e^-ln2 of what is kept against e^ln2 of what is not.
  const std::vector<float> err(5, std::log(2.0f));
  task = {.err = err.data(), .cap = 5, .target_drop = 0.3f};
  const Outcome bounded = RunMiddle(z, 0, task);
  EXPECT_EQ(bounded.chosen, (Positions{0, 1, 2, 4})) << "2 * 2 of 4 + 7 at three positions, 2 of 2 + 7.5 at four";
  EXPECT_NEAR(bounded.lse_out[0], 0, 1e-6);
  EXPECT_NEAR(bounded.lse_out_bound[0], std::log(2.0), 1e-6);
  EXPECT_EQ(bounded.met, 1);
}

TEST_P(ChooseTest, EveryHeadOfTheGroupMustReachTheTarget) {
  // Head 0 is done with its peak, head 1 is flat: the walk goes on for head 1.
  std::vector<float> z(20, 0);
  z[4] = 20;
  const ChooseTask task{.z = z.data(), .z_stride = 10, .n = 10, .hi = 10, .cap = 10, .target_drop = 0.5f};
  EXPECT_EQ(Run(task, 1).chosen, (Positions{4}));
  EXPECT_EQ(Run(task, 2).chosen, (Positions{0, 1, 2, 3, 4}));
}

TEST_P(ChooseTest, AnInfiniteErrorIsAllDroppedUntilKept) {
  const std::vector<float> z{3, 0, 0, -5};
  const std::vector<float> err{0, 0, 0, kInfinity};
  ChooseTask task{.err = err.data(), .cap = 4, .target_drop = 0.9f};
  EXPECT_EQ(RunMiddle(z, 1, task).chosen, (Positions{0, 1, 2, 3}));
  task.cap = 3;
  const Outcome capped = RunMiddle(z, 1, task);
  EXPECT_EQ(capped.met, 0);
  EXPECT_EQ(capped.lse_out_bound[0], kInfinity);
  EXPECT_NEAR(capped.lse_out[0], -5, 1e-6);
}

TEST_P(ChooseTest, HugeLogitsAndErrorsNeitherOverflowNorVanish) {
  const std::vector<float> z{-30000, 20000, 19999, 20000, -kInfinity};
  const Outcome outcome = RunMiddle(z, 1);
  EXPECT_EQ(outcome.chosen, (Positions{1}));
  EXPECT_NEAR(outcome.lse_all[0], 20000 + std::log(2 + std::exp(-1.0)), 0.01);
  EXPECT_NEAR(outcome.lse_out[0], 20000 + std::log(1 + std::exp(-1.0)), 0.01);
  EXPECT_EQ(RunMiddle(z, 5).lse_out[0], -kInfinity);
  EXPECT_EQ(RunMiddle(z, 4).chosen, (Positions{0, 1, 2, 3})) << "a weight of 0 is ranked last";
  // What is kept may weigh e^-2000, what is not e^-800: nothing is proven, though both vanish beside e^0.
  const std::vector<float> low{-1000, -800};
  const std::vector<float> err{1000, 0};
  ChooseTask task{.err = err.data(), .cap = 2, .target_drop = 0.5f};
  task.z = low.data(), task.n = 2, task.hi = 2, task.k = 0;
  EXPECT_EQ(Run(task).chosen, (Positions{0, 1}));
  const ChooseTask sink{.z = low.data(), .err = err.data(), .n = 2, .sinks = 1, .lo = 1, .hi = 2, .cap = 0,
                        .target_drop = 0.5f};
  EXPECT_EQ(Run(sink).met, 0);
}

TEST_P(ChooseTest, NothingInSightAndNothingButMinusInfinity) {
  const Outcome nothing = Run({.n = 0}, 3);
  EXPECT_EQ(nothing.lse_all, (std::vector<float>(3, -kInfinity)));
  EXPECT_EQ(nothing.lse_out, (std::vector<float>(3, -kInfinity)));
  EXPECT_EQ(nothing.met, 1);
  const std::vector<float> z(40, -kInfinity);
  ChooseTask task{.cap = 40, .target_drop = 0};
  const Outcome none = RunMiddle(z, 3, task);
  EXPECT_EQ(none.chosen, (Positions{0, 1, 2}));
  EXPECT_EQ(none.met, 1) << "no mass, nothing dropped";
  EXPECT_EQ(none.lse_all[0], -kInfinity);
}

TEST_P(ChooseTest, NanIsNeverPartOfAnAnswer) {
  std::vector<float> z(100, 0);
  z[37] = kNan;
  z[50] = 3;
  ChooseTask task{.cap = 100, .target_drop = 0.99f};
  const Outcome outcome = RunMiddle(z, 1, task);
  EXPECT_TRUE(std::isnan(outcome.lse_all[0]));
  EXPECT_EQ(outcome.met, 0);
  EXPECT_TRUE(std::isnan(RunMiddle(z, 5).lse_out[0])) << "no finite mass is claimed beside a NaN that is not kept";
  // A head without a NaN still decides for the group.
  z.resize(200, 0);
  z[120] = 2, z[190] = 1;
  const ChooseTask two{.z = z.data(), .z_stride = 100, .n = 100, .hi = 100, .k = 2};
  EXPECT_EQ(Run(two, 2).chosen, (Positions{20, 90}));
  z.resize(100);
  z[37] = kInfinity;
  EXPECT_EQ(RunMiddle(z, 1).chosen, (Positions{37}));
  EXPECT_EQ(RunMiddle(z, 1).lse_all[0], kInfinity);
}

TEST_P(ChooseTest, PooledKeepsTheMaximumOverScansInTheMiddleOnly) {
  SeededRng rng;
  const int32_t n = 83, sinks = 3, lo = 9, hi = 71;
  Guarded<float> pooled(static_cast<size_t>(n));
  std::vector<double> want(static_cast<size_t>(n), 0);
  for (int scan = 0; scan < 4; ++scan) {
    const auto z = rng.Normals(static_cast<size_t>(2 * n), 2);
    const ChooseTask task{.z = z.data(), .z_stride = n, .n = n, .sinks = sinks, .lo = lo, .hi = hi, .k = 5,
                          .pooled = pooled.data(), .pool_reset = scan == 0};
    static_cast<void>(Run(task, 2));
    const ChooseModel model = RunChooseModel(task, 2);
    for (size_t i = lo; i < static_cast<size_t>(hi); ++i) {
      want[i] = scan == 0 ? model.score[i] : std::max(want[i], model.score[i]);
      ASSERT_NEAR(pooled[i], want[i], 1e-5) << "scan " << scan << ", position " << i;
    }
    EXPECT_TRUE(pooled.PoisonedOutside(lo, hi));
  }
}

// One random task and everything that it points to.
struct RandomTask {
  int32_t group = 1;
  std::vector<float> z, err, pooled;
  std::vector<uint64_t> resident;
  ChooseTask task;
};

float RandomLogit(Rng& rng, int style) {
  switch (style) {
    case 0: return static_cast<float>(rng.Normal() * 3);
    case 1: return static_cast<float>(std::round(rng.Normal() * 8) / 4);  // many ties
    case 2: return 1.5f;
    case 3: return static_cast<float>(rng.HeavyTailed() * 4);
    case 4: return rng.Chance(0.3) ? -kInfinity : static_cast<float>(rng.Normal());
    default: return static_cast<float>(rng.Normal() * 5000);
  }
}

RandomTask MakeTask(Rng& rng) {
  RandomTask random{.group = rng.Pick(Groups())};
  ChooseTask& task = random.task;
  task.n = rng.Chance(0.3) ? rng.Pick(EdgeSizes()) : static_cast<int32_t>(rng.Int(0, 300));
  const auto below = [&](int32_t most) { return static_cast<int32_t>(rng.Int(0, most)); };
  task.sinks = std::min(task.n, below(9));
  task.hi = task.n - std::min(task.n - task.sinks, below(40));
  task.lo = rng.Chance(0.3) ? task.sinks + below(task.hi - task.sinks) : task.sinks;
  task.k = rng.Chance(0.1) ? 1000 : below(rng.Chance(0.5) ? 20 : 150);
  task.z_stride = task.n + below(5);
  const int style = static_cast<int>(rng.Int(0, 5));
  for (int64_t i = 0; i < random.group * task.z_stride; ++i) random.z.push_back(RandomLogit(rng, style));
  const bool bounded = rng.Chance(0.5), some_infinite = rng.Chance(0.1);
  for (size_t i = 0; i < random.z.size() && bounded; ++i) {
    random.err.push_back(some_infinite && rng.Chance(0.02) ? kInfinity : static_cast<float>(rng.Uniform(0, 0.7)));
  }
  if (rng.Chance(0.5)) {
    task.target_drop = rng.Chance(0.1) ? 0 : static_cast<float>(rng.Uniform(0, 0.5));
    task.cap = std::min(task.k, task.hi - task.lo) + below(200);
  }
  if (rng.Chance(0.5)) {
    task.dilate_m = below(30);
    task.dilate_r = below(4);
    task.exact_budget = rng.Chance(0.5);
  }
  task.rule = static_cast<GroupRule>(rng.Int(0, 2));
  if (rng.Chance(0.4)) {
    const double density = rng.Uniform();
    random.resident.assign(static_cast<size_t>((task.n + 63) / 64), 0);
    for (int32_t i = 0; i < task.n; ++i) {
      if (rng.Chance(density)) random.resident[static_cast<size_t>(i) / 64] |= uint64_t{1} << (i % 64);
    }
    task.log_theta = static_cast<float>(rng.Uniform(-8, 0));
  }
  task.pool_reset = rng.Chance(0.3);
  random.pooled = rng.Normals(static_cast<size_t>(task.n), 5);
  return random;
}

// Everything but the order of near ties, which the set itself shows.
void CheckMasses(const ChooseTask& task, int32_t group, const ChooseModel& model, const Outcome& got) {
  bool met = true, clear = true;
  for (int32_t h = 0; h < group; ++h) {
    const auto head = static_cast<size_t>(h);
    const double out = MassOf(task, h, got.chosen, false, 0), kept = MassOf(task, h, got.chosen, true, 0);
    const auto close = [](double want) { return 1e-6 * std::abs(want) + 2e-5; };
    const auto expect_near = [&](double value, double want, const char* what) {
      if (std::isinf(want) || std::isinf(value)) {
        EXPECT_EQ(value, want) << what << " of head " << h;
      } else {
        EXPECT_NEAR(value, want, close(want)) << what << " of head " << h;
      }
    };
    expect_near(got.lse_all[head], model.lse_all[head], "lse_all");
    expect_near(got.lse_out[head], out, "lse_out");
    expect_near(got.lse_out_bound[head], MassOf(task, h, got.chosen, false, 1), "lse_out_bound");
    if (std::isfinite(model.lse_all[head])) {
      EXPECT_NEAR(std::exp(got.lse_out[head] - model.lse_all[head]) + std::exp(kept - model.lse_all[head]), 1,
                  1e-4 + 2e-6 * std::abs(model.lse_all[head]))
          << "dropped + retained";
    }
    const double dropped = DroppedBound(task, h, got.chosen);
    met = met && dropped <= static_cast<double>(task.target_drop);
    const double distance = std::abs(dropped - static_cast<double>(task.target_drop));
    const bool vanishing = dropped < kVanishing && task.target_drop < kVanishing;
    clear = clear && distance >= 1e-5 * dropped && !vanishing;
  }
  if (task.target_drop < 0) {
    EXPECT_EQ(got.met, 1);
  } else if (clear) {
    EXPECT_EQ(got.met, met ? 1 : 0);
  }
}

TEST_P(ChooseTest, EqualsTheModelOnRandomTasks) {
  SeededRng rng;
  const int cases = on_pool() ? 400 : 1500;
  int compared = 0;
  for (int i = 0; i < cases; ++i) {
    RandomTask random = MakeTask(rng);
    ChooseTask& task = random.task;
    task.z = random.z.data();
    task.err = random.err.empty() ? nullptr : random.err.data();
    task.resident = random.resident.empty() ? nullptr : random.resident.data();
    auto pooled = random.pooled;
    task.pooled = pooled.data();
    SCOPED_TRACE("case " + std::to_string(i) + ": n " + std::to_string(task.n) + ", k " + std::to_string(task.k) +
                 ", group " + std::to_string(random.group) + ", target " + std::to_string(task.target_drop));
    const ChooseModel model = RunChooseModel(task, random.group);
    const Outcome got = Run(task, random.group);
    ASSERT_TRUE(std::is_sorted(got.chosen.begin(), got.chosen.end()));
    CheckMasses(task, random.group, model, got);
    // Scores of fp32 accuracy may order what is closer than this either way.
    if (model.margin > (is_reference() ? 1e-12 : 3e-6)) {
      ++compared;
      ASSERT_EQ(got.chosen, model.chosen);
    } else if (task.target_drop < 0 && task.dilate_m == 0) {
      ASSERT_EQ(got.chosen.size(), model.chosen.size());
    }
    for (int32_t p = 0; p < task.n; ++p) {
      const auto at = static_cast<size_t>(p);
      double want = random.pooled[at];
      if (p >= task.lo && p < task.hi) want = task.pool_reset ? model.score[at] : std::max(want, model.score[at]);
      if (std::isinf(want)) {
        ASSERT_EQ(pooled[at], want);
      } else {
        double largest = 0;  // the logits that the score is a difference of
        for (size_t h = 0; h < static_cast<size_t>(random.group); ++h) {
          const float z = task.z[static_cast<int64_t>(h) * task.z_stride + p];
          if (std::isfinite(z)) largest = std::max<double>(largest, std::abs(z));
          largest = std::max(largest, std::abs(model.lse_all[h]));
        }
        ASSERT_NEAR(pooled[at], want, 1e-6 * std::abs(want) + 1e-5 + 2e-7 * largest) << "pooled " << p;
      }
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(compared, cases * 3 / 4);
}

TEST_P(ChooseTest, ManyTasksAtOnceEqualEachAlone) {
  SeededRng rng;
  constexpr size_t kTasks = 40;
  std::vector<RandomTask> random;
  while (random.size() < kTasks) {
    random.push_back(MakeTask(rng));
    if (random.back().group != 3) random.pop_back();
  }
  std::vector<Positions> chosen(kTasks), want(kTasks);
  std::vector<int32_t> count(kTasks);
  std::vector<float> lse(kTasks * 6);
  std::vector<ChooseTask> tasks;
  for (size_t i = 0; i < kTasks; ++i) {
    ChooseTask task = random[i].task;
    task.z = random[i].z.data();
    task.resident = random[i].resident.empty() ? nullptr : random[i].resident.data();
    want[i] = Run(task, 3).chosen;
    chosen[i].resize(static_cast<size_t>(task.max_chosen()));
    task.chosen = chosen[i].data(), task.count = &count[i];
    task.lse_all = &lse[6 * i], task.lse_out = &lse[6 * i + 3];
    tasks.push_back(task);
  }
  ASSERT_OK(kernels().choose({.tasks = tasks, .group = 3}, launch()));
  for (size_t i = 0; i < kTasks; ++i) {
    chosen[i].resize(static_cast<size_t>(count[i]));
    EXPECT_EQ(chosen[i], want[i]) << "task " << i;
  }
}

TEST_P(ChooseTest, LongContextsPickTheSameAsASort) {
  SeededRng rng;
  for (const int32_t n : {4'097, 20'011}) {
    auto z = rng.Normals(static_cast<size_t>(n), 3);
    for (float& x : z) x = std::round(x * 64) / 64;  // ties at every rank
    for (const int32_t k : {1, 88, n / 16, n - 40}) {
      const ChooseTask task{.z = z.data(), .n = n, .sinks = 8, .lo = 8, .hi = n - 32, .k = k};
      std::vector<int32_t> want;
      for (int32_t i = task.lo; i < task.hi; ++i) want.push_back(i);
      std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) {
        return z[static_cast<size_t>(a)] > z[static_cast<size_t>(b)];
      });
      want.resize(static_cast<size_t>(std::min(k, task.hi - task.lo)));
      std::sort(want.begin(), want.end());
      EXPECT_EQ(Run(task).chosen, want) << "n " << n << ", k " << k;
    }
  }
}

// The promise: choose by codes under a target, and the true dropped mass (all keys, exact) never exceeds it.
TEST_P(ChooseTest, NoTargetIsExceededByTheExactDroppedMass) {
  SeededRng rng;
  int met_heads = 0;
  for (const KeyKind kind : kAllKinds) {
    for (const CodeFormat& format : {CodeFormat{2, 16, false}, CodeFormat{4, 64, false}, CodeFormat{4, 16, true},
                                     CodeFormat{8, 64, true}}) {
      for (const int32_t d : {16, 64, 128}) {
        SCOPED_TRACE("kind " + std::to_string(static_cast<int>(kind)) + ", bits " + std::to_string(format.bits) +
                     ", head_dim " + std::to_string(d));
        const int32_t group = 4, n = 256, groups = n / format.group_tokens;
        const auto rows = MakeRows(rng, n, d, kind);
        const size_t block_bytes = kernels().code_block_bytes(format, d);
        std::vector<std::byte> blocks(static_cast<size_t>(groups) * block_bytes);
        std::vector<EncodeTask> encodes;
        for (int32_t g = 0; g < groups; ++g) {
          encodes.push_back({.rows = rows.data() + int64_t{2} * g * format.group_tokens * d,
                             .block = blocks.data() + static_cast<size_t>(g) * block_bytes});
        }
        ASSERT_OK(kernels().encode({.tasks = encodes, .format = format, .head_dim = d}, launch()));
        double norm = 0;  // scales queries so that logits are a few units apart
        for (size_t i = 0; i < rows.size(); ++i) {
          if (static_cast<int32_t>(i) / d % 2 == 0) norm = std::max<double>(norm, std::abs(HalfToFloat(rows[i])));
        }
        const auto q = rng.Normals(static_cast<size_t>(group * d), rng.Uniform(2, 12) / std::max(norm, 1e-7));
        std::vector<float> z(static_cast<size_t>(group * n)), err(z.size());
        const ScanTask scans[] = {{.q = q.data(), .blocks = blocks.data(), .groups = groups, .z = z.data(),
                                   .err = err.data(), .z_stride = n}};
        ASSERT_OK(kernels().scan({.tasks = scans, .format = format, .group = group, .head_dim = d}, launch()));
        std::vector<float> exact;
        for (int64_t h = 0; h < group; ++h) {
          for (int64_t i = 0; i < n; ++i) {
            exact.push_back(static_cast<float>(NaiveLogit(q.data() + h * d, rows.data() + 2 * i * d, d)));
          }
        }
        for (const float target : {0.5f, 0.1f, 0.02f, 0.001f}) {
          ChooseTask task{.z = z.data(), .err = err.data(), .z_stride = n, .n = n, .sinks = 4, .lo = 4, .hi = n - 16,
                          .k = 8, .cap = 128, .target_drop = target};
          const Outcome got = Run(task, group);
          task.z = exact.data();
          for (int32_t h = 0; h < group; ++h) {
            const double kept = MassOf(task, h, got.chosen, true, 0), out = MassOf(task, h, got.chosen, false, 0);
            const double truth = 1 / (1 + std::exp(kept - out));
            if (got.met == 1) {
              EXPECT_LE(truth, target * (1 + 1e-5)) << "head " << h;
            }
            EXPECT_GE(got.lse_out_bound[static_cast<size_t>(h)] + 1e-4, out);
            met_heads += got.met;
          }
        }
      }
    }
  }
  EXPECT_GT(met_heads, 200) << "of " << 7 * 4 * 3 * 4 * 4 << ": the promise must have been put to the test";
}

}  // namespace
}  // namespace prehoc
