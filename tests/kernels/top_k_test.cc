#include <algorithm>
#include <limits>

#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {

class TopKTest : public KernelTest {
 protected:
  std::vector<int32_t> Run(const std::vector<float>& score, int32_t lo, int32_t hi, int32_t k) {
    const int32_t most = std::min(k, hi - lo);
    Guarded<int32_t> chosen(static_cast<size_t>(most)), count(1);
    const TopKTask tasks[] = {
        {.score = score.data(), .lo = lo, .hi = hi, .k = k, .chosen = chosen.data(), .count = count.data()}};
    EXPECT_OK(kernels().top_k({.tasks = tasks}, launch()));
    EXPECT_TRUE(chosen.GuardsIntact());
    EXPECT_EQ(count[0], most);
    return {chosen.span().begin(), chosen.span().end()};
  }
};
PREHOC_INSTANTIATE_KERNELS(TopKTest);

TEST_P(TopKTest, HandMade) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<float> score{9, 1, 4, 4, kNan, 4, -kInfinity, 7, kInfinity, 9};
  using Positions = std::vector<int32_t>;
  EXPECT_EQ(Run(score, 0, 10, 3), (Positions{0, 8, 9}));
  EXPECT_EQ(Run(score, 1, 9, 3), (Positions{2, 7, 8}));
  EXPECT_EQ(Run(score, 1, 8, 4), (Positions{2, 3, 5, 7}));
  EXPECT_EQ(Run(score, 1, 8, 6), (Positions{1, 2, 3, 4, 5, 7})) << "nan ranks as -inf, so the lower position wins";
  EXPECT_EQ(Run(score, 1, 8, 7), (Positions{1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(Run(score, 3, 3, 2), Positions{});
  EXPECT_EQ(Run(score, 0, 10, 0), Positions{});
  EXPECT_EQ(Run({0.0f, -0.0f, 0.0f}, 0, 3, 2), (Positions{0, 1})) << "-0 is 0";
}

TEST_P(TopKTest, EqualsASort) {
  SeededRng rng;
  for (int i = 0; i < 400; ++i) {
    const auto n = static_cast<int32_t>(i % 10 == 0 ? rng.Int(1000, 9000) : rng.Int(0, 300));
    const auto lo = static_cast<int32_t>(rng.Int(0, n)), hi = static_cast<int32_t>(rng.Int(lo, n));
    const auto k = static_cast<int32_t>(rng.Int(0, n + 2));
    std::vector<float> score;
    const bool ties = rng.Chance(0.5);
    for (int32_t p = 0; p < n; ++p) {
      score.push_back(static_cast<float>(ties ? static_cast<double>(rng.Int(-3, 3)) : rng.HeavyTailed()));
    }
    std::vector<int32_t> want;
    for (int32_t p = lo; p < hi; ++p) want.push_back(p);
    std::stable_sort(want.begin(), want.end(),
                     [&](int32_t a, int32_t b) { return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)]; });
    want.resize(static_cast<size_t>(std::min(k, hi - lo)));
    std::sort(want.begin(), want.end());
    ASSERT_EQ(Run(score, lo, hi, k), want) << "[" << lo << ", " << hi << ") of " << n << ", k " << k;
  }
}

}  // namespace
}  // namespace prehoc
