// attend and prefill against softmax in fp64.
#include <cmath>
#include <limits>

#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Answer {
  std::vector<double> out;
  double lse = 0;
  double largest = 0;  // SUM |q_c k_c| / sqrt(d) of the largest key: fp32 logits are good to some 1e-7 of this
  Tolerance tolerance() const { return {.absolute = 1e-5 + 1e-6 * largest, .relative = 1e-5}; }
};

// Attention of one query over the rows at `positions`.
Answer Naive(const float* q, const std::vector<Half>& rows, const std::vector<int64_t>& positions, int64_t d) {
  std::vector<double> z;
  double largest = 0;
  for (const int64_t i : positions) {
    const Half* k = rows.data() + 2 * i * d;
    z.push_back(NaiveLogit(q, k, static_cast<int32_t>(d)));
    const double magnitude = NaiveMagnitude(q, k, static_cast<int32_t>(d));
    if (std::isfinite(magnitude)) largest = std::max(largest, magnitude);
  }
  Answer answer{.out = std::vector<double>(static_cast<size_t>(d), 0), .lse = NaiveLse(z), .largest = largest};
  for (size_t j = 0; j < z.size() && std::isfinite(answer.lse); ++j) {
    const Half* v = rows.data() + (2 * positions[j] + 1) * d;
    for (int64_t c = 0; c < d; ++c) answer.out[static_cast<size_t>(c)] += std::exp(z[j] - answer.lse) * HalfToFloat(v[c]);
  }
  return answer;
}

std::vector<int64_t> FirstPositions(int64_t count) {
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < count; ++i) positions.push_back(i);
  return positions;
}

class AttendTest : public KernelTest {
 protected:
  // Attention over `runs` for `group` queries; guards checked.
  void Run(const std::vector<float>& q, std::span<const RowRun> runs, int32_t group, int32_t d, std::vector<float>* out,
           std::vector<float>* lse) {
    Guarded<float> o(static_cast<size_t>(group * d)), l(static_cast<size_t>(group));
    const AttendTask tasks[] = {{.q = q.data(), .runs = runs, .out = o.data(), .lse = l.data()}};
    ASSERT_OK(kernels().attend({.tasks = tasks, .group = group, .head_dim = d}, launch()));
    EXPECT_TRUE(o.GuardsIntact());
    EXPECT_TRUE(l.GuardsIntact());
    out->assign(o.span().begin(), o.span().end());
    lse->assign(l.span().begin(), l.span().end());
  }
};
PREHOC_INSTANTIATE_KERNELS(AttendTest);

TEST_P(AttendTest, EqualsSoftmaxOverRunsOfEverySize) {
  SeededRng rng;
  auto counts = EdgeSizes();
  counts.push_back(1500);
  for (const int32_t d : Dims()) {
    for (const int32_t group : Groups()) {
      for (const int32_t count : counts) {
        if (count == 1500 && (d != 64 || group == 4)) continue;
        const auto rows = MakeRows(rng, count, d);
        const auto runs = SplitIntoRuns(rng, rows, d);
        const auto q = rng.Normals(static_cast<size_t>(group * d), rng.Uniform(0, 4));
        std::vector<float> out, lse;
        Run(q, runs, group, d, &out, &lse);
        for (int64_t h = 0; h < group; ++h) {
          SCOPED_TRACE("head_dim " + std::to_string(d) + ", rows " + std::to_string(count) + ", head " + std::to_string(h));
          const Answer want = Naive(q.data() + h * d, rows, FirstPositions(count), d);
          EXPECT_TRUE(AllClose(std::span(out).subspan(static_cast<size_t>(h * d), static_cast<size_t>(d)), want.out,
                               want.tolerance(), {d}));
          EXPECT_TRUE(AllClose(std::vector<float>{lse[static_cast<size_t>(h)]}, std::vector<double>{want.lse},
                               want.tolerance()));
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_P(AttendTest, RowsMayRepeatAndRunsMayBeScattered) {
  SeededRng rng;
  const int32_t d = 64, group = 3;
  const auto rows = MakeRows(rng, 50, d);
  std::vector<RowRun> runs;
  std::vector<int64_t> positions;
  for (int i = 0; i < 200; ++i) {
    const int64_t at = rng.Int(0, 49), count = rng.Int(0, std::min<int64_t>(3, 49 - at));
    runs.push_back({.rows = count > 0 ? rows.data() + 2 * at * d : nullptr, .count = static_cast<int32_t>(count)});
    for (int64_t j = 0; j < count; ++j) positions.push_back(at + j);
  }
  const auto q = rng.Normals(static_cast<size_t>(group * d), 2);
  std::vector<float> out, lse;
  Run(q, runs, group, d, &out, &lse);
  for (int64_t h = 0; h < group; ++h) {
    const Answer want = Naive(q.data() + h * d, rows, positions, d);
    EXPECT_TRUE(AllClose(std::span(out).subspan(static_cast<size_t>(h * d), d), want.out, want.tolerance()));
    EXPECT_NEAR(lse[static_cast<size_t>(h)], want.lse, want.tolerance().absolute);
  }
}

TEST_P(AttendTest, NoRowsGiveZeroAndMinusInfinity) {
  for (const int32_t d : Dims()) {
    std::vector<float> out, lse;
    const RowRun empty[] = {{.rows = nullptr, .count = 0}, {.rows = nullptr, .count = 0}};
    for (const std::span<const RowRun> runs : {std::span<const RowRun>(), std::span<const RowRun>(empty)}) {
      Run(std::vector<float>(static_cast<size_t>(3 * d), 1), runs, 3, d, &out, &lse);
      EXPECT_EQ(out, std::vector<float>(static_cast<size_t>(3 * d), 0));
      EXPECT_EQ(lse, std::vector<float>(3, -kInfinity));
    }
  }
}

TEST_P(AttendTest, HugeLogitsPickOneRow) {
  SeededRng rng;
  for (const int32_t d : {16, 64, 128}) {
    auto rows = MakeRows(rng, 77, d);
    for (int32_t c = 0; c < d; ++c) rows[static_cast<size_t>(41 * 2 * d + c)] = FloatToHalf(300);
    for (const float scale : {100.0f, -100.0f, 1e6f}) {
      const std::vector<float> q(static_cast<size_t>(d), scale);
      const RowRun runs[] = {{.rows = rows.data(), .count = 77}};
      std::vector<float> out, lse;
      Run(q, runs, 1, d, &out, &lse);
      const Answer want = Naive(q.data(), rows, FirstPositions(77), d);
      EXPECT_NEAR(lse[0], want.lse, want.tolerance().absolute);
      if (scale > 0) {
        std::vector<double> row;
        for (int32_t c = 0; c < d; ++c) row.push_back(HalfToFloat(rows[static_cast<size_t>((41 * 2 + 1) * d + c)]));
        EXPECT_TRUE(AllClose(out, row, {1e-6, 1e-6}));
      }
    }
  }
}

TEST_P(AttendTest, MinusInfinityWeighsNothingAndNanIsSeen) {
  SeededRng rng;
  const int32_t d = 64;
  for (const int32_t count : {5, 16, 70}) {
    const std::vector<float> q(static_cast<size_t>(2 * d), 0.5f);
    const RowRun runs[] = {{.rows = nullptr, .count = 0}, {.rows = nullptr, .count = count}};
    auto rows = MakeRows(rng, count, d);
    auto with = std::vector<RowRun>(runs, runs + 2);
    std::vector<float> out, lse;

    rows[3] = 0xfc00;  // row 0: z = -inf
    with[1].rows = rows.data();
    Run(q, with, 2, d, &out, &lse);
    auto rest = FirstPositions(count);
    rest.erase(rest.begin());
    const Answer want = Naive(q.data(), rows, rest, d);
    EXPECT_TRUE(AllClose(std::span(out).subspan(0, static_cast<size_t>(d)), want.out, want.tolerance()));
    EXPECT_NEAR(lse[0], want.lse, want.tolerance().absolute);

    for (int32_t t = 0; t < count; ++t) rows[static_cast<size_t>(t * 2 * d)] = 0xfc00;  // all of them
    Run(q, with, 2, d, &out, &lse);
    EXPECT_EQ(out, std::vector<float>(static_cast<size_t>(2 * d), 0));
    EXPECT_EQ(lse, std::vector<float>(2, -kInfinity));

    for (const Half odd : {Half{0x7e00}, Half{0x7c00}}) {
      rows = MakeRows(rng, count, d);
      rows[static_cast<size_t>((count - 1) * 2 * d + 5)] = odd;
      with[1].rows = rows.data();
      Run(q, with, 2, d, &out, &lse);
      for (const float x : lse) EXPECT_TRUE(std::isnan(x)) << x;
      for (const float x : out) EXPECT_TRUE(std::isnan(x)) << x;
    }
  }
}

TEST_P(AttendTest, ManyTasksAtOnce) {
  SeededRng rng;
  const int32_t d = 48, group = 4;
  std::vector<std::vector<Half>> rows;
  std::vector<std::vector<RowRun>> runs;
  const auto q = rng.Normals(static_cast<size_t>(30 * group * d));
  Guarded<float> out(q.size()), lse(30 * group);
  std::vector<AttendTask> tasks;
  for (int64_t t = 0; t < 30; ++t) {
    rows.push_back(MakeRows(rng, t * 9, d));
    runs.push_back(SplitIntoRuns(rng, rows.back(), d));
  }
  for (int64_t t = 0; t < 30; ++t) {
    tasks.push_back({.q = q.data() + t * group * d, .runs = runs[static_cast<size_t>(t)],
                     .out = out.data() + t * group * d, .lse = lse.data() + t * group});
  }
  ASSERT_OK(kernels().attend({.tasks = tasks, .group = group, .head_dim = d}, launch()));
  ASSERT_OK(kernels().attend({.group = group, .head_dim = d}, launch()));
  for (int64_t t = 0; t < 30; ++t) {
    for (int64_t h = 0; h < group; ++h) {
      const size_t at = static_cast<size_t>((t * group + h) * d);
      const Answer want = Naive(q.data() + at, rows[static_cast<size_t>(t)], FirstPositions(t * 9), d);
      EXPECT_TRUE(AllClose(out.span().subspan(at, d), want.out, want.tolerance())) << "task " << t << ", head " << h;
    }
  }
}

struct PrefillCase {
  int32_t queries, first, sinks;
  bool windowed;
};

TEST_P(AttendTest, PrefillIsCausalWithWindowAndSinks) {
  SeededRng rng;
  const std::vector<PrefillCase> cases{{0, 5, 0, false},  {1, 0, 0, false},   {1, 63, 4, true},    {7, 0, 9, false},
                                       {16, 0, 0, false}, {17, 15, 3, true},  {64, 64, 8, true},   {65, 1, 100, true},
                                       {31, 97, 2, true}, {61, 130, 0, true}, {128, 0, 4, false},  {2, 500, 8, true}};
  for (const int32_t d : Dims()) {
    for (const PrefillCase& shape : cases) {
      const int32_t group = rng.Pick(Groups());
      const int64_t q_stride = group * d + 3, out_stride = group * d + 11;
      const auto rows = MakeRows(rng, shape.first + shape.queries + 5, d);  // rows past the last query are not seen
      const auto runs = SplitIntoRuns(rng, rows, d);
      const auto q = rng.Normals(static_cast<size_t>(shape.queries * q_stride + 1), 2);
      std::vector<int32_t> start;
      for (int32_t t = 0; t < shape.queries; ++t) {
        const int32_t last = shape.first + t;
        start.push_back(static_cast<int32_t>(rng.Chance(0.1) ? last : rng.Int(0, last)));
      }
      Guarded<float> out(static_cast<size_t>(shape.queries * out_stride));
      const PrefillTask tasks[] = {{.q = q.data(), .q_stride = q_stride, .out = out.data(), .out_stride = out_stride,
                                    .runs = runs, .start = shape.windowed ? start.data() : nullptr}};
      ASSERT_OK(kernels().prefill({.tasks = tasks, .queries = shape.queries, .first = shape.first, .sinks = shape.sinks,
                                   .group = group, .head_dim = d}, launch()));
      EXPECT_TRUE(out.GuardsIntact());
      for (int64_t t = 0; t < shape.queries; ++t) {
        std::vector<int64_t> seen;
        for (int64_t i = 0; i <= shape.first + t; ++i) {
          if (i < shape.sinks || !shape.windowed || i >= start[static_cast<size_t>(t)]) seen.push_back(i);
        }
        const size_t at = static_cast<size_t>(t * out_stride);
        for (int64_t h = 0; h < group; ++h) {
          const Answer want = Naive(q.data() + t * q_stride + h * d, rows, seen, d);
          ASSERT_TRUE(AllClose(out.span().subspan(at + static_cast<size_t>(h * d), static_cast<size_t>(d)), want.out,
                               want.tolerance()))
              << "query " << t << " of " << shape.queries << " from " << shape.first << ", head " << h << " of " << group
              << ", sinks " << shape.sinks << ", head_dim " << d;
        }
        for (size_t i = at + static_cast<size_t>(group * d); i < at + static_cast<size_t>(out_stride); ++i) {
          ASSERT_TRUE(out.Poisoned(i)) << "padding of query " << t;
        }
      }
    }
  }
}

TEST_P(AttendTest, PrefillShowsNanOfAVisibleKeyOnly) {
  SeededRng rng;
  const int32_t d = 64, group = 2, queries = 40, odd = 25;
  auto rows = MakeRows(rng, queries, d);
  rows[odd * 2 * d + 7] = 0x7e00;
  const RowRun runs[] = {{.rows = rows.data(), .count = queries}};
  const auto q = rng.Normals(static_cast<size_t>(queries * group * d));
  Guarded<float> out(q.size());
  const PrefillTask tasks[] = {
      {.q = q.data(), .q_stride = group * d, .out = out.data(), .out_stride = group * d, .runs = runs}};
  ASSERT_OK(kernels().prefill({.tasks = tasks, .queries = queries, .group = group, .head_dim = d}, launch()));
  for (int32_t t = 0; t < queries; ++t) {
    for (int32_t i = 0; i < group * d; ++i) {
      ASSERT_EQ(std::isnan(out[static_cast<size_t>(t * group * d + i)]), t >= odd) << "query " << t;
    }
  }
}

TEST_P(AttendTest, PrefillInChunksEqualsPrefillAtOnce) {
  SeededRng rng;
  const int32_t d = 64, group = 3, n = 150;
  const auto rows = MakeRows(rng, n, d);
  const RowRun runs[] = {{.rows = rows.data(), .count = n}};
  const auto q = rng.Normals(static_cast<size_t>(n * group * d));
  std::vector<float> whole(q.size()), chunked(q.size());
  const auto run = [&](int32_t first, int32_t queries, std::vector<float>& out) {
    const int64_t at = int64_t{first} * group * d;
    const PrefillTask tasks[] = {{.q = q.data() + at, .q_stride = group * d, .out = out.data() + at,
                                  .out_stride = group * d, .runs = runs}};
    ASSERT_OK(kernels().prefill({.tasks = tasks, .queries = queries, .first = first, .group = group, .head_dim = d}, launch()));
  };
  run(0, n, whole);
  for (int32_t first = 0; first < n;) {
    const auto queries = static_cast<int32_t>(std::min<int64_t>(n - first, rng.Int(1, 40)));
    run(first, queries, chunked);
    first += queries;
  }
  EXPECT_TRUE(AllClose(chunked, whole, {2e-5, 1e-5}, {n, group, d}));
}

}  // namespace
}  // namespace prehoc
