// Every weight type times vectors and rows, on every level, against fp64 over the expanded weights.
#include "integrations/reference/engine/products.h"

#include <gtest/gtest.h>

#include <cmath>
#include <tuple>

#include "tests/integrations/engine/engine_fixture.h"
#include "tests/integrations/engine/random_model.h"
#include "tests/support/guarded.h"
#include "tests/support/seeded_rng.h"

namespace prehoc::reference {
namespace {

constexpr WeightType kTypes[] = {WeightType::kF32, WeightType::kF16, WeightType::kBF16, WeightType::kQ8_0,
                                 WeightType::kQ4_0, WeightType::kQ4_1, WeightType::kQ4_K, WeightType::kQ6_K};

// Odd, one block, an odd number of blocks, over the 64 blocks unpacked at once, over the depth of a panel.
std::vector<int64_t> ColumnsFor(WeightType type) {
  if (type == WeightType::kQ4_K || type == WeightType::kQ6_K) return {256, 768, 1280};
  if (IsBlockType(type)) return {32, 224, 576, 2080};
  return {1, 7, 8, 33, 130, 801};
}

class ProductsTest : public testing::TestWithParam<std::tuple<SimdLevel, WeightType>> {
 protected:
  SimdLevel level() const { return std::get<0>(GetParam()); }
  WeightType type() const { return std::get<1>(GetParam()); }
  const EngineKernels& kernels() const { return KernelsFor(level()); }

  // Within fp32's rounding of SUM |w| |x| and, in vector mode, half a step of the activation's 16-bit codes.
  void ExpectProduct(ProductMode mode, const WeightMatrix& w, const std::vector<float>& x, int64_t rows,
                     const float* got, int64_t stride, double bias = 0, double before = 0) {
    const std::vector<float> weights = Expanded(w);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t r = 0; r < w.rows; ++r) {
        double want = bias + before, size = std::abs(want), code_error = 0;
        for (int64_t first = 0; first < w.cols; first += 32) {
          double largest = 0, block_weights = 0;
          for (int64_t c = first; c < std::min(w.cols, first + 32); ++c) {
            const auto weight = static_cast<double>(weights[static_cast<size_t>(r * w.cols + c)]);
            const auto value = static_cast<double>(x[static_cast<size_t>(t * w.cols + c)]);
            want += weight * value;
            size += std::abs(weight * value);
            largest = std::max(largest, std::abs(value));
            block_weights += std::abs(weight);
          }
          code_error += 0.501 * largest / 32767 * block_weights;
        }
        const double allowed = 2e-6 * size + (mode == ProductMode::kVector ? code_error : 0);
        ASSERT_NEAR(got[t * stride + r], want, allowed)
            << "row " << t << ", output " << r << " of " << w.rows << ", " << w.cols << " columns";
      }
    }
  }
};

TEST_P(ProductsTest, VectorAgreesWithFp64) {
  SeededRng rng(1);
  ManualExecutor executor;
  for (const int64_t cols : ColumnsFor(type())) {
    for (const int64_t rows : {1, 3, 64, 131}) {
      const OwnedMatrix owned = RandomMatrix(rng, type(), rows, cols, 0.1);
      std::vector<float> x = rng.Normals(static_cast<size_t>(cols));
      x[0] = 30;  // an outlier, as models have them, costs its block precision
      Products products(kernels(), executor, 1, cols);
      products.SetInput(ProductMode::kVector, 1, cols,
                        [&](int64_t, float* out) { std::copy(x.begin(), x.end(), out); });
      Guarded<float> out(static_cast<size_t>(rows));
      const Product product{.weights = &owned.matrix, .out = out.data(), .stride = rows};
      products.Run({&product, 1});
      ExpectProduct(ProductMode::kVector, owned.matrix, x, 1, out.data(), rows);
      EXPECT_TRUE(out.GuardsIntact());
    }
  }
}

TEST_P(ProductsTest, MatrixAgreesWithFp64) {
  SeededRng rng(2);
  ManualExecutor executor;
  for (const int64_t cols : ColumnsFor(type())) {
    for (const auto& [tokens, rows] : {std::pair<int64_t, int64_t>{1, 1}, {2, 40}, {29, 65}, {16, 70}}) {
      const OwnedMatrix owned = RandomMatrix(rng, type(), rows, cols, 0.1);
      const std::vector<float> x = rng.Normals(static_cast<size_t>(tokens * cols));
      Products products(kernels(), executor, tokens, cols);
      products.SetInput(ProductMode::kMatrix, tokens, cols,
                        [&](int64_t t, float* out) { std::copy_n(x.data() + t * cols, cols, out); });
      Guarded<float> out(static_cast<size_t>(tokens * rows));
      const Product product{.weights = &owned.matrix, .out = out.data(), .stride = rows};
      products.Run({&product, 1});
      ExpectProduct(ProductMode::kMatrix, owned.matrix, x, tokens, out.data(), rows);
      EXPECT_TRUE(out.GuardsIntact());
    }
  }
}

TEST_P(ProductsTest, BiasesAreAddedAndSumsKeepWhatWasThere) {
  SeededRng rng(3);
  ManualExecutor executor;
  const int64_t cols = 768, rows = 45, stride = 50, tokens = 5;
  const OwnedMatrix owned = RandomMatrix(rng, type(), rows, cols, 0.1);
  const std::vector<float> x = rng.Normals(static_cast<size_t>(tokens * cols)), bias(45, 0.75f);
  for (const auto& [mode, count] : {std::pair{ProductMode::kVector, int64_t{1}}, {ProductMode::kMatrix, tokens}}) {
    for (const bool add : {false, true}) {
      std::vector<float> out(static_cast<size_t>(tokens * stride), 2.0f);
      Products products(kernels(), executor, tokens, cols);
      products.SetInput(mode, count, cols,
                        [&](int64_t t, float* to) { std::copy_n(x.data() + t * cols, cols, to); });
      const Product product{.weights = &owned.matrix, .bias = bias, .out = out.data(), .stride = stride, .add = add};
      products.Run({&product, 1});
      ExpectProduct(mode, owned.matrix, x, count, out.data(), stride, 0.75, add ? 2 : 0);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = t < count ? rows : 0; r < stride; ++r) {
          EXPECT_EQ(out[static_cast<size_t>(t * stride + r)], 2.0f) << "row " << t << ", column " << r;
        }
      }
    }
  }
}

TEST_P(ProductsTest, AMatrixOutputHasTheSameBitsWhateverStandsBesideIt) {
  SeededRng rng(4);
  const int64_t cols = 1280, rows = 77, tokens = 33;
  const OwnedMatrix a = RandomMatrix(rng, type(), rows, cols, 0.1), b = RandomMatrix(rng, type(), 20, cols, 0.1);
  const std::vector<float> x = rng.Normals(static_cast<size_t>(tokens * cols));
  const auto run = [&](Executor& executor, int64_t piece) {
    std::vector<float> out(static_cast<size_t>(tokens * rows)), other(static_cast<size_t>(tokens * 20));
    Products products(kernels(), executor, tokens, cols);
    for (int64_t first = 0; first < tokens; first += piece) {
      const int64_t count = std::min(piece, tokens - first);
      products.SetInput(ProductMode::kMatrix, count, cols,
                        [&](int64_t t, float* to) { std::copy_n(x.data() + (first + t) * cols, cols, to); });
      const Product both[] = {{.weights = &b.matrix, .out = other.data(), .stride = 20},
                              {.weights = &a.matrix, .out = out.data() + first * rows, .stride = rows}};
      products.Run(both);
    }
    return out;
  };
  ManualExecutor one;
  const auto pool = ThreadPool::Create({.loop_threads = 3}).value();
  const std::vector<float> want = run(one, tokens);
  for (const int64_t piece : {1, 2, 7, 16, 33}) {
    EXPECT_EQ(run(one, piece), want) << "pieces of " << piece;
    EXPECT_EQ(run(*pool, piece), want) << "pieces of " << piece << ", three threads";
  }
}

TEST_P(ProductsTest, RowsBeforeTheFirstAreNotNeeded) {
  SeededRng rng(5);
  ManualExecutor executor;
  const int64_t cols = 256, rows = 33, tokens = 40, first = 21;
  const OwnedMatrix owned = RandomMatrix(rng, type(), rows, cols, 0.1);
  const std::vector<float> x = rng.Normals(static_cast<size_t>(tokens * cols));
  Products products(kernels(), executor, tokens, cols);
  products.SetInput(ProductMode::kMatrix, tokens, cols,
                    [&](int64_t t, float* to) { std::copy_n(x.data() + t * cols, cols, to); });
  std::vector<float> out(static_cast<size_t>(tokens * rows), -1);
  const Product product{.weights = &owned.matrix, .out = out.data(), .stride = rows, .first_row = first};
  products.Run({&product, 1});
  const std::vector<float> tail(x.begin() + first * cols, x.end());
  ExpectProduct(ProductMode::kMatrix, owned.matrix, tail, tokens - first, out.data() + first * rows, rows);
  EXPECT_EQ(out[0], -1) << "a whole tile before the first row is left out";
}

TEST_P(ProductsTest, NanAndInfinityAreNeverLost) {
  SeededRng rng(8);
  ManualExecutor executor;
  const int64_t cols = 512, rows = 20;
  const OwnedMatrix owned = RandomMatrix(rng, type(), rows, cols, 0.1);
  for (const float poison : {NAN, INFINITY, -INFINITY}) {
    for (const int64_t at : {0, 33, 300, 511}) {
      for (const ProductMode mode : {ProductMode::kVector, ProductMode::kMatrix}) {
        std::vector<float> x = rng.Normals(static_cast<size_t>(cols)), out(static_cast<size_t>(rows));
        x[static_cast<size_t>(at)] = poison;
        Products products(kernels(), executor, 1, cols);
        products.SetInput(mode, 1, cols, [&](int64_t, float* to) { std::copy(x.begin(), x.end(), to); });
        const Product product{.weights = &owned.matrix, .out = out.data(), .stride = rows};
        products.Run({&product, 1});
        for (int64_t r = 0; r < rows; ++r) EXPECT_FALSE(std::isfinite(out[static_cast<size_t>(r)])) << r << ", element " << at;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, ProductsTest,
                         testing::Combine(testing::ValuesIn(AvailableLevels()), testing::ValuesIn(kTypes)),
                         [](const auto& param) {
                           return std::string(SimdLevelName(std::get<0>(param.param))) + "_" +
                                  std::string(WeightTypeName(std::get<1>(param.param)));
                         });

class KernelsTest : public testing::TestWithParam<SimdLevel> {};

TEST_P(KernelsTest, DotAndAddScaled) {
  SeededRng rng(6);
  const EngineKernels& kernels = KernelsFor(GetParam());
  for (const int64_t n : {0, 1, 7, 8, 9, 31, 64, 101}) {
    const std::vector<float> a = rng.Normals(static_cast<size_t>(n)), b = rng.Normals(static_cast<size_t>(n));
    double want = 0, size = 1e-30;
    for (size_t i = 0; i < a.size(); ++i) {
      want += static_cast<double>(a[i]) * static_cast<double>(b[i]);
      size += std::abs(static_cast<double>(a[i]) * static_cast<double>(b[i]));
    }
    EXPECT_NEAR(kernels.dot(a.data(), b.data(), n), want, 1e-6 * size) << n << " elements";
    Guarded<float> y(static_cast<size_t>(n));
    std::copy(b.begin(), b.end(), y.data());
    kernels.add_scaled(0.3f, a.data(), n, y.data());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(y[i], b[i] + 0.3f * a[i], 1e-6) << i << " of " << n;
    EXPECT_TRUE(y.GuardsIntact());
  }
}

TEST_P(KernelsTest, SiluOfOrdinaryAndExtremeValues) {
  const EngineKernels& kernels = KernelsFor(GetParam());
  std::vector<float> gate = {0.0f, -0.0f, 1e-30f, 1.0f, -1.0f, 20.0f, -20.0f, 85.0f, -85.0f, 200.0f, -200.0f, 3e38f};
  for (int i = -2000; i < 2000; ++i) gate.push_back(static_cast<float>(i) * 0.01f);
  gate.push_back(0.5f);  // not a multiple of any vector
  const std::vector<float> up(gate.size(), 3.0f);
  Guarded<float> out(gate.size());
  kernels.silu_multiply(gate.data(), up.data(), static_cast<int64_t>(gate.size()), out.data());
  for (size_t i = 0; i < gate.size(); ++i) {
    const double g = static_cast<double>(gate[i]);
    const double want = std::min(g / (1 + std::exp(-g)) * 3, 3.5e38);
    if (g > 1e38) {
      EXPECT_TRUE(std::isinf(out[i]) || out[i] > 1e38f);
    } else {
      EXPECT_NEAR(out[i], want, 1e-6 * std::abs(want) + 1e-30) << "silu of " << g;
    }
  }
  EXPECT_TRUE(out.GuardsIntact());
}

TEST_P(KernelsTest, SiluOfNanIsNan) {
  const EngineKernels& kernels = KernelsFor(GetParam());
  const std::vector<float> gate(17, NAN), up(17, 1.0f);
  std::vector<float> out(17);
  kernels.silu_multiply(gate.data(), up.data(), 17, out.data());
  for (const float value : out) EXPECT_TRUE(std::isnan(value));
}

TEST_P(KernelsTest, QuantizeIsWithinHalfAStepAndZeroStaysZero) {
  const EngineKernels& kernels = KernelsFor(GetParam());
  if (kernels.quantize == nullptr) GTEST_SKIP() << "plain C++ multiplies fp32 activations";
  SeededRng rng(7);
  std::vector<float> x = rng.Normals(96, 2.0);
  std::fill(x.begin() + 32, x.begin() + 64, 0.0f);
  x[70] = -50;
  std::vector<int16_t> codes(96);
  float scale[8] = {}, sum[8] = {};
  kernels.quantize(x.data(), 96, codes.data(), scale, sum);
  for (size_t b = 0; b < 3; ++b) {
    double total = 0;
    for (size_t i = 32 * b; i < 32 * b + 32; ++i) {
      EXPECT_NEAR(static_cast<double>(codes[i]) * static_cast<double>(scale[b]), x[i], 0.51 * static_cast<double>(scale[b])) << i;
      total += codes[i];
    }
    EXPECT_NEAR(sum[b], total * static_cast<double>(scale[b]), 1e-4);
  }
  EXPECT_EQ(scale[1], 0.0f);
  EXPECT_EQ(codes[70], -32767);
}

INSTANTIATE_TEST_SUITE_P(All, KernelsTest, testing::ValuesIn(AvailableLevels()),
                         [](const auto& param) { return std::string(SimdLevelName(param.param)); });

}  // namespace
}  // namespace prehoc::reference
