// append, gather, gate, score and score_pages.
#include <cmath>
#include <limits>

#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class RowsTest : public KernelTest {};
PREHOC_INSTANTIATE_KERNELS(RowsTest);

TEST_P(RowsTest, AppendRoundsToNearestEvenAtEverySize) {
  SeededRng rng;
  for (const int32_t d : Dims()) {
    for (const int32_t count : {0, 1, 15, 16, 17, 67}) {
      const int64_t stride = d + 7;
      auto k = rng.Normals(static_cast<size_t>(count * stride + 1)), v = rng.Normals(k.size(), 100);
      Guarded<Half> rows(static_cast<size_t>(2 * count * d));
      const AppendTask tasks[] = {{.k = k.data(), .v = v.data(), .stride = stride, .rows = rows.data(), .count = count}};
      ASSERT_OK(kernels().append({.tasks = tasks, .head_dim = d}, launch()));
      std::vector<Half> want;
      for (int32_t t = 0; t < count; ++t) {
        for (int32_t c = 0; c < d; ++c) want.push_back(FloatToHalf(k[static_cast<size_t>(t * stride + c)]));
        for (int32_t c = 0; c < d; ++c) want.push_back(FloatToHalf(v[static_cast<size_t>(t * stride + c)]));
      }
      EXPECT_TRUE(AllEqual(rows.span(), want, {count, 2, d}));
      EXPECT_TRUE(rows.GuardsIntact());
    }
  }
}

TEST_P(RowsTest, AppendKeepsWhatFp16CannotHoldVisible) {
  constexpr int32_t kDim = 16;
  float k[kDim] = {1, -1, 65504, 65519.9f, 65520, -1e30f, kInfinity, -kInfinity, kNan, 0, -0.0f, 0x1p-24f, 0x1p-25f,
                   0x1.8p-25f, 2049, 2051};
  const Half want[kDim] = {0x3c00, 0xbc00, 0x7bff, 0x7bff, 0x7c00, 0xfc00, 0x7c00, 0xfc00, 0x7e00, 0, 0x8000, 1, 0, 1,
                           0x6800, 0x6802};
  Guarded<Half> rows(2 * kDim);
  const AppendTask tasks[] = {{.k = k, .v = k, .stride = 0, .rows = rows.data(), .count = 1}};
  ASSERT_OK(kernels().append({.tasks = tasks, .head_dim = kDim}, launch()));
  for (size_t c = 0; c < kDim; ++c) {
    if (c == 8) {
      EXPECT_TRUE(std::isnan(HalfToFloat(rows[c]))) << rows[c];
    } else {
      EXPECT_EQ(rows[c], want[c]) << "channel " << c;
      EXPECT_EQ(rows[kDim + c], want[c]) << "channel " << c;
    }
  }
}

TEST_P(RowsTest, GatherCopiesRowsRepeatedOnesToo) {
  SeededRng rng;
  for (const int32_t d : Dims()) {
    const auto rows = MakeRows(rng, 40, d);
    const size_t width = static_cast<size_t>(2 * d);
    for (const int32_t count : EdgeSizes()) {
      Guarded<Half> to(static_cast<size_t>(count) * width);
      std::vector<RowCopy> copies;
      std::vector<Half> want;
      for (int32_t i = 0; i < count; ++i) {
        const Half* from = rows.data() + static_cast<size_t>(rng.Int(0, 39)) * width;
        copies.push_back({.from = from, .to = to.data() + static_cast<size_t>(i) * width});
        want.insert(want.end(), from, from + width);
      }
      ASSERT_OK(kernels().gather({.rows = copies, .head_dim = d}, launch()));
      EXPECT_TRUE(AllEqual(to.span(), want, {count, 2, d}));
      EXPECT_TRUE(to.GuardsIntact());
    }
  }
}

TEST_P(RowsTest, GateIsTheSmallestCosineOfTheGroup) {
  SeededRng rng;
  for (const int32_t d : Dims()) {
    for (const int32_t group : Groups()) {
      const size_t width = static_cast<size_t>(group * d);
      constexpr size_t kTasks = 9;
      const auto q = rng.Normals(kTasks * width, 3);
      auto anchor = rng.Normals(q.size(), 3);
      for (size_t i = 0; i < q.size(); ++i) anchor[i] += 2 * q[i];
      Guarded<float> cosine(kTasks);
      std::vector<GateTask> tasks;
      std::vector<double> want;
      for (size_t t = 0; t < kTasks; ++t) {
        tasks.push_back({.q = q.data() + t * width, .anchor = anchor.data() + t * width, .cosine = cosine.data() + t});
        double least = 1;
        for (size_t h = 0; h < static_cast<size_t>(group); ++h) {
          double dot = 0, aa = 0, bb = 0;
          for (size_t c = 0; c < static_cast<size_t>(d); ++c) {
            const double a = q[t * width + h * static_cast<size_t>(d) + c];
            const double b = anchor[t * width + h * static_cast<size_t>(d) + c];
            dot += a * b, aa += a * a, bb += b * b;
          }
          least = std::min(least, dot / std::sqrt(aa * bb));
        }
        want.push_back(least);
      }
      ASSERT_OK(kernels().gate({.tasks = tasks, .group = group, .head_dim = d}, launch()));
      EXPECT_TRUE(AllClose(cosine.span(), want, {.absolute = 2e-6}));
      EXPECT_TRUE(cosine.GuardsIntact());
    }
  }
}

TEST_P(RowsTest, GateSpreadIsHowFarLogitsMoved) {
  SeededRng rng;
  for (const int32_t d : Dims()) {
    for (const int32_t group : Groups()) {
      const auto width = static_cast<size_t>(group * d);
      const auto q = rng.Normals(width, 3), anchor = rng.Normals(width, 3);
      auto variance = rng.Normals(static_cast<size_t>(d), 2);
      for (float& x : variance) x *= x;
      Guarded<float> spread(static_cast<size_t>(group)), cosine(1);
      std::vector<double> want;
      for (size_t h = 0; h < static_cast<size_t>(group); ++h) {
        double sum = 0;
        for (size_t c = 0; c < static_cast<size_t>(d); ++c) {
          const double moved = static_cast<double>(q[h * static_cast<size_t>(d) + c]) - anchor[h * static_cast<size_t>(d) + c];
          sum += variance[c] * moved * moved;
        }
        want.push_back(std::sqrt(sum / d));
      }
      for (float* with_cosine : {static_cast<float*>(nullptr), cosine.data()}) {
        const GateTask task{.q = q.data(), .anchor = anchor.data(), .cosine = with_cosine, .variance = variance.data(), .spread = spread.data()};
        ASSERT_OK(kernels().gate({.tasks = {&task, 1}, .group = group, .head_dim = d}, launch()));
        EXPECT_TRUE(AllClose(spread.span(), want, {.relative = 1e-6}));
      }
      EXPECT_TRUE(spread.GuardsIntact());
    }
  }
  const std::vector<float> ones(16, 1.0f);
  auto far = ones;
  far[3] = std::numeric_limits<float>::infinity();
  float spread = 0;
  const GateTask task{.q = far.data(), .anchor = ones.data(), .variance = ones.data(), .spread = &spread};
  ASSERT_OK(kernels().gate({.tasks = {&task, 1}, .group = 1, .head_dim = 16}, launch()));
  EXPECT_EQ(spread, std::numeric_limits<float>::infinity());
}

TEST_P(RowsTest, GateRefusesNormsThatMeanNothingAndClampsTheRest) {
  constexpr int32_t kDim = 16, kGroup = 3;
  const std::vector<float> ones(kDim * kGroup, 1.0f);
  const auto cosine_with = [&](float value, size_t at, bool in_anchor) {
    auto odd = ones;
    if (value == 0) std::fill(odd.begin() + static_cast<long>(at / kDim * kDim),
                              odd.begin() + static_cast<long>((at / kDim + 1) * kDim), 0.0f);
    odd[at] = value;
    float cosine = 5;
    const GateTask tasks[] = {{.q = in_anchor ? ones.data() : odd.data(), .anchor = in_anchor ? odd.data() : ones.data(),
                               .cosine = &cosine}};
    EXPECT_OK(kernels().gate({.tasks = tasks, .group = kGroup, .head_dim = kDim}, launch()));
    return cosine;
  };
  for (const bool in_anchor : {false, true}) {
    for (const size_t at : {size_t{0}, size_t{17}, size_t{47}}) {
      EXPECT_EQ(cosine_with(0, at, in_anchor), -2);
      EXPECT_EQ(cosine_with(kNan, at, in_anchor), -2);
      EXPECT_EQ(cosine_with(kInfinity, at, in_anchor), -2);
      const float same = cosine_with(1, at, in_anchor);
      EXPECT_LE(same, 1);
      EXPECT_GT(same, 1 - 1e-6f);
    }
  }
}

TEST_P(RowsTest, ScoreIsTheDotProductOverRuns) {
  SeededRng rng;
  for (const int32_t d : Dims()) {
    for (const int32_t group : Groups()) {
      for (const int32_t count : EdgeSizes()) {
        const auto rows = MakeRows(rng, count, d, rng.Chance(0.3) ? KeyKind::kManyScales : KeyKind::kNormal);
        const auto runs = SplitIntoRuns(rng, rows, d);
        const auto q = rng.Normals(static_cast<size_t>(group * d), 2);
        const int64_t stride = count + 3;
        Guarded<float> z(static_cast<size_t>(group * stride));
        const ScoreTask tasks[] = {{.q = q.data(), .runs = runs, .z = z.data(), .z_stride = stride}};
        ASSERT_OK(kernels().score({.tasks = tasks, .group = group, .head_dim = d}, launch()));
        EXPECT_TRUE(z.GuardsIntact());
        for (int64_t h = 0; h < group; ++h) {
          for (int64_t i = 0; i < stride; ++i) {
            const auto at = static_cast<size_t>(h * stride + i);
            if (i >= count) {
              ASSERT_TRUE(z.Poisoned(at)) << "head " << h << ", padding " << i - count;
              continue;
            }
            const Half* k = rows.data() + 2 * i * d;
            const double want = NaiveLogit(q.data() + h * d, k, d);
            ASSERT_NEAR(z[at], want, 1e-6 * NaiveMagnitude(q.data() + h * d, k, d) + 1e-30)
                << "head " << h << " of " << group << ", row " << i << " of " << count << ", head_dim " << d;
          }
        }
      }
    }
  }
}

TEST_P(RowsTest, ScorePagesBoundsEveryKeyOfThePage) {
  SeededRng rng;
  for (const int32_t d : Dims()) {
    for (const int32_t group : Groups()) {
      for (const int32_t pages : {0, 1, 3, 15, 16, 17, 37}) {
        const auto rows = MakeRows(rng, pages * 16, d);
        std::vector<Half> lo(static_cast<size_t>(pages * d)), hi(lo.size());
        for (int64_t p = 0; p < pages; ++p) {
          for (int64_t c = 0; c < d; ++c) {
            float least = kInfinity, most = -kInfinity;
            for (int64_t t = 0; t < 16; ++t) {
              const float k = HalfToFloat(rows[static_cast<size_t>(2 * (p * 16 + t) * d + c)]);
              least = std::min(least, k), most = std::max(most, k);
            }
            lo[static_cast<size_t>(p * d + c)] = FloatToHalf(least), hi[static_cast<size_t>(p * d + c)] = FloatToHalf(most);
          }
        }
        const auto q = rng.Normals(static_cast<size_t>(group * d), 2);
        const int64_t stride = pages + 5;
        Guarded<float> z(static_cast<size_t>(group * stride));
        const ScorePagesTask tasks[] = {
            {.q = q.data(), .lo = lo.data(), .hi = hi.data(), .pages = pages, .z = z.data(), .z_stride = stride}};
        ASSERT_OK(kernels().score_pages({.tasks = tasks, .group = group, .head_dim = d}, launch()));
        EXPECT_TRUE(z.GuardsIntact());
        for (int64_t h = 0; h < group; ++h) {
          for (int64_t p = pages; p < stride; ++p) ASSERT_TRUE(z.Poisoned(static_cast<size_t>(h * stride + p)));
          for (int64_t p = 0; p < pages; ++p) {
            double want = 0, magnitude = 0;
            for (int64_t c = 0; c < d; ++c) {
              const double x = q[static_cast<size_t>(h * d + c)];
              const double a = x * HalfToFloat(lo[static_cast<size_t>(p * d + c)]);
              const double b = x * HalfToFloat(hi[static_cast<size_t>(p * d + c)]);
              want += std::max(a, b), magnitude += std::max(std::abs(a), std::abs(b));
            }
            const double root = std::sqrt(static_cast<double>(d));
            const double slack = 1e-6 * magnitude / root;
            const double got = z[static_cast<size_t>(h * stride + p)];
            ASSERT_NEAR(got, want / root, slack) << "head " << h << ", page " << p << ", head_dim " << d;
            for (int64_t t = 0; t < 16; ++t) {
              ASSERT_GE(got + slack, NaiveLogit(q.data() + h * d, rows.data() + 2 * (p * 16 + t) * d, d));
            }
          }
        }
      }
    }
  }
}

TEST_P(RowsTest, ScorePagesIsInfiniteWhereABoundIs) {
  constexpr int32_t kDim = 16;
  std::vector<Half> lo(2 * kDim, 0xbc00), hi(2 * kDim, 0x3c00);
  lo[kDim + 3] = 0xfc00;
  hi[kDim + 3] = 0x7c00;
  for (const float at3 : {1.0f, -1.0f, 0.0f}) {
    std::vector<float> q(kDim, 0.5f);
    q[3] = at3;
    Guarded<float> z(2);
    const ScorePagesTask tasks[] = {
        {.q = q.data(), .lo = lo.data(), .hi = hi.data(), .pages = 2, .z = z.data(), .z_stride = 2}};
    ASSERT_OK(kernels().score_pages({.tasks = tasks, .group = 1, .head_dim = kDim}, launch()));
    EXPECT_FLOAT_EQ(z[0], (7.5f + std::abs(at3)) / 4);
    EXPECT_EQ(z[1], kInfinity);
  }
}

}  // namespace
}  // namespace prehoc
