// The engine's layers on the device beside those of the CPU, over the same attention.
#include <cmath>
#include <tuple>

#include "base/cuda/device_memory.h"
#include "base/cuda/host_registrar.h"
#include "base/device_memory.h"
#include "cache/kv_cache.h"
#include "integrations/reference/cache_backend.h"
#include "integrations/reference/cuda/cuda_decoder.h"
#include "integrations/reference/cuda/device_ops.h"
#include "kernels/cuda/kernel_table.h"
#include "tests/integrations/engine/engine_fixture.h"
#include "tests/integrations/engine/random_model.h"
#include "tests/support/compare.h"
#include "tests/support/cuda_test.h"
#include "tests/support/seeded_rng.h"

namespace prehoc::reference {
namespace {

class CudaEngineTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped()) executor_ = ThreadPool::Create({.loop_threads = 2, .job_threads = 1}).value();
  }
  std::unique_ptr<Engine> Make(std::shared_ptr<const Model> model, bool cuda) {
    EngineOptions options{.executor = executor_.get(), .max_batch_tokens = 96};
    if (cuda) options.make_decoder = MakeCudaDecoder;
    auto made = Engine::Create(std::move(model), options);
    EXPECT_OK(made);
    return std::move(made).value();
  }
  std::unique_ptr<ThreadPool> executor_;
};

TEST_F(CudaEngineTest, LogitsAgreeWithTheCpu) {
  Rng rng = SeededRng();
  for (const WeightType type : {WeightType::kF16, WeightType::kBF16, WeightType::kQ4_1, WeightType::kQ8_0}) {
    for (const RopeLayout layout : {RopeLayout::kHalf, RopeLayout::kInterleaved}) {
      SCOPED_TRACE(std::string(WeightTypeName(type)));
      ModelShape shape{.type = type, .layout = layout};
      shape.biases = shape.qk_norm = layout == RopeLayout::kHalf;
      const auto model = RandomModel(rng, shape);
      const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 130);
      const auto cpu = Make(model, false), cuda = Make(model, true);
      DenseBackend here = DenseFor(model->config), there = DenseFor(model->config);
      // 96 tokens at once, then one alone on the prompt's way, then the rest one at a time.
      for (const auto& [first, count, prompt] : {std::tuple{0, 96, 97}, {96, 1, 97}, {97, 33, 0}}) {
        const auto piece = std::span(tokens).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
        std::vector<float> want, got;
        for (size_t i = 0; i < piece.size(); i += prompt > 0 ? piece.size() : 1) {
          const auto part = prompt > 0 ? piece : piece.subspan(i, 1);
          const std::vector<float> a = AllLogits(*cpu, here, part, prompt), b = AllLogits(*cuda, there, part, prompt);
          want.insert(want.end(), a.begin(), a.end());
          got.insert(got.end(), b.begin(), b.end());
        }
        double largest = 0;
        for (const float x : want) largest = std::max(largest, static_cast<double>(std::abs(x)));
        // Weights of Q4_1 and Q8_0 are rounded to 2^-11 there; bf16 activations are split into 2^-16.
        const double share = type == WeightType::kF16 ? 1e-3 : 5e-3;
        EXPECT_TRUE(AllClose(got, want, {share * largest, 0}, {count, model->config.vocab})) << "first " << first;
      }
    }
  }
}

TEST_F(CudaEngineTest, APromptLeavesTheSameBitsHoweverItIsCut) {
  Rng rng = SeededRng();
  const auto model = RandomModel(rng, {});
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 90);
  const auto engine = Make(model, true);
  std::vector<std::vector<float>> logits;
  for (const std::vector<size_t>& cuts : {std::vector<size_t>{90}, {1, 63, 26}, {64, 26}}) {
    DenseBackend backend = DenseFor(model->config);
    std::vector<float> last(static_cast<size_t>(model->config.vocab));
    size_t at = 0;
    for (const size_t count : cuts) {
      ASSERT_OK(engine->Forward(backend, std::span(tokens).subspan(at, count), 90, last));
      at += count;
    }
    logits.push_back(last);
  }
  EXPECT_EQ(logits[1], logits[0]);
  EXPECT_EQ(logits[2], logits[0]);
}

// Over a cache on the device a prompt's q, k, v and outputs stay there; over one in host memory they do not. Both agree.
TEST_F(CudaEngineTest, APromptOverACacheOnTheDevice) {
  Rng rng = SeededRng();
  ModelShape shape{};
  shape.head_dim = 64;
  const auto model = RandomModel(rng, shape);
  const std::vector<int32_t> tokens = RandomTokens(rng, model->config, 230);
  CacheOptions options;
  options.geometry = {.layers = model->config.layers, .heads = model->config.heads, .kv_heads = model->config.kv_heads, .head_dim = model->config.head_dim,
                      .chunk_tokens = 64};
  options.host_budget = 64 << 20;
  options.huge_pages = false;
  options.selector.kind = SelectorKind::kDense;
  HostDeviceMemory host_memory(64 << 20);
  CudaDeviceMemory device_memory(64 << 20);
  CudaHostRegistrar registrar;
  const auto kernels = cuda::DeviceKernels::Create(&device_memory).value();
  const auto host = KvCache::Create(options, {.executor = executor_.get(), .device = &host_memory}).value();
  const auto device = KvCache::Create(options, {.executor = executor_.get(), .device = &device_memory, .kernels = &cuda::DeviceKernels::Table(),
                                                .stream = kernels->launch_stream(), .registrar = &registrar}).value();
  std::vector<std::vector<float>> logits;
  for (KvCache* cache : {host.get(), device.get()}) {
    const auto engine = Make(model, true);
    const auto sequence = cache->Open({.max_tokens = 256}).value();
    CacheBackend backend(sequence.get());
    EXPECT_EQ(backend.takes_device_memory(), cache == device.get());
    std::vector<float>& all = logits.emplace_back(static_cast<size_t>(model->config.vocab));
    ASSERT_OK(engine->Forward(backend, std::span(tokens).first(220), 220, all));  // three pieces
    for (size_t t = 220; t < 230; ++t) {
      std::vector<float> last(static_cast<size_t>(model->config.vocab));
      ASSERT_OK(engine->Forward(backend, std::span(tokens).subspan(t, 1), 0, last));
      all.insert(all.end(), last.begin(), last.end());
    }
  }
  double largest = 0;
  for (const float x : logits[0]) largest = std::max(largest, static_cast<double>(std::abs(x)));
  EXPECT_TRUE(AllClose(logits[1], logits[0], {1e-3 * largest, 0}));
}

// Sizes around the tiles and the loads of a lane; outputs poisoned, the truth in fp64.
TEST_F(CudaEngineTest, ProductsOfEverySize) {
  Rng rng = SeededRng();
  // 12288 floats are 48 KiB of shared memory: with what the kernel declares itself, more than a block gets unasked.
  for (const int32_t cols : {8, 24, 64, 264, 2048, 2056, 4608, 12288}) {
    for (const int32_t rows : {1, 7, 63, 64, 65, 300}) {
      if (cols > 5000 && rows > 7) continue;
      for (const bool gated : {false, true}) {
        const int32_t all = gated ? 2 * rows : rows;
        std::vector<Half> weights(static_cast<size_t>(all) * static_cast<size_t>(cols));
        for (Half& h : weights) h = FloatToHalf(static_cast<float>(rng.Normal() / std::sqrt(cols)));
        const std::vector<float> x = rng.Normals(static_cast<size_t>(cols), 3), norm = rng.Normals(static_cast<size_t>(cols)), bias = rng.Normals(static_cast<size_t>(rows));
        const std::vector<float> before = rng.Normals(static_cast<size_t>(rows));
        const CudaArray<Half> w(weights);
        const CudaArray<float> dx(x), dnorm(norm), dbias(bias);
        CudaArray<float> y(before);
        ASSERT_OK(MultiplyVector({.weights = w.data(), .x = dx.data(), .norm = dnorm.data(), .eps = 1e-5f, .bias = dbias.data(), .y = y.data(),
                                  .add = true, .gated = gated, .rows = rows, .cols = cols}, nullptr));
        ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
        double square = 0;
        for (const float v : x) square += static_cast<double>(v) * v;
        const double scale = 1 / std::sqrt(square / cols + 1e-5);
        const auto dot = [&](int32_t row) {
          double sum = 0;
          for (int32_t c = 0; c < cols; ++c) {
            const auto at = static_cast<size_t>(c);
            sum += static_cast<double>(HalfToFloat(weights[static_cast<size_t>(row) * static_cast<size_t>(cols) + at])) * norm[at] * x[at] * scale;
          }
          return sum;
        };
        std::vector<double> want;
        for (int32_t r = 0; r < rows; ++r) {
          const double a = dot(r), value = gated ? a / (1 + std::exp(-a)) * dot(rows + r) : a;
          want.push_back(value + bias[static_cast<size_t>(r)] + before[static_cast<size_t>(r)]);
        }
        EXPECT_TRUE(AllClose(y.Read(), want, {3e-4, 1e-4})) << "rows " << rows << " cols " << cols << " gated " << gated;
        EXPECT_TRUE(y.GuardsIntact());
      }
      for (const int32_t tokens : {1, 5, 64, 70, 133}) {
        if (cols > 2100 && tokens > 5) continue;  // the truth takes its time
        if (tokens > 100 && cols > 300) continue;
        std::vector<Half> weights(static_cast<size_t>(rows) * static_cast<size_t>(cols));
        for (Half& h : weights) h = FloatToHalf(static_cast<float>(rng.Normal() / std::sqrt(cols)));
        const std::vector<float> x = rng.Normals(static_cast<size_t>(tokens) * static_cast<size_t>(cols), 3);
        const CudaArray<Half> w(weights);
        const CudaArray<float> dx(x);
        const auto truth = [&](const auto& activation) {
          std::vector<double> sums;
          for (int32_t t = 0; t < tokens; ++t) {
            for (int32_t r = 0; r < rows; ++r) {
              double sum = 0;
              for (int32_t c = 0; c < cols; ++c) {
                sum += static_cast<double>(HalfToFloat(weights[static_cast<size_t>(r) * static_cast<size_t>(cols) + static_cast<size_t>(c)])) *
                       activation(x[static_cast<size_t>(t) * static_cast<size_t>(cols) + static_cast<size_t>(c)]);
              }
              sums.push_back(sum);
            }
          }
          return sums;
        };
        const std::vector<double> exact = truth([](float a) { return a; }), rounded = truth([](float a) { return HalfToFloat(FloatToHalf(a)); });
        // With a workspace another kernel may run.
        for (const auto& [wide, precision] : {std::pair{false, PromptPrecision::kSplit}, {true, PromptPrecision::kSplit}, {false, PromptPrecision::kHalf},
                                              {true, PromptPrecision::kHalf}}) {
          const std::vector<double>& want = precision == PromptPrecision::kHalf ? rounded : exact;
          CudaArray<float> y(static_cast<size_t>(tokens * rows)), workspace(x.size());
          const MatrixProduct product{.weights = w.data(), .x = dx.data(), .y = y.data(), .workspace = wide ? workspace.data() : nullptr,
                                      .tokens = tokens, .rows = rows, .cols = cols, .precision = precision};
          ASSERT_OK(MultiplyMatrix(product, nullptr));
          ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
          EXPECT_TRUE(AllClose(y.Read(), want, {1e-4, 1e-4}, {tokens, rows})) << "rows " << rows << " cols " << cols << " tokens " << tokens << " wide " << wide << ' ' << PromptPrecisionName(precision);
          EXPECT_TRUE(y.GuardsIntact() && workspace.GuardsIntact());
          // Once more, on top of it, with a bias.
          MatrixProduct again = product;
          const std::vector<float> bias = rng.Normals(static_cast<size_t>(rows));
          const CudaArray<float> dbias(bias);
          again.add = true, again.bias = dbias.data();
          ASSERT_OK(MultiplyMatrix(again, nullptr));
          ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
          std::vector<double> twice;
          for (size_t i = 0; i < want.size(); ++i) twice.push_back(2 * want[i] + bias[i % bias.size()]);
          EXPECT_TRUE(AllClose(y.Read(), twice, {2e-4, 1e-4}, {tokens, rows})) << "rows " << rows << " cols " << cols << " tokens " << tokens << " wide " << wide << ' ' << PromptPrecisionName(precision);
        }
      }
    }
  }
}

TEST_F(CudaEngineTest, NormsAndGatesOfEverySize) {
  Rng rng = SeededRng();
  const int32_t tokens = 3;
  for (const int32_t cols : {1, 7, 12, 576, 4096, 8192, 8196, 9001}) {
    const std::vector<float> x = rng.Normals(static_cast<size_t>(tokens * cols), 2), weight = rng.Normals(static_cast<size_t>(cols));
    const CudaArray<float> dx(x), dweight(weight);
    CudaArray<float> y(x.size());
    ASSERT_OK(NormRows(dx.data(), dweight.data(), 1e-5f, y.data(), tokens, cols, nullptr));
    ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
    std::vector<double> want;
    for (int32_t t = 0; t < tokens; ++t) {
      double square = 0;
      for (int32_t c = 0; c < cols; ++c) square += static_cast<double>(x[static_cast<size_t>(t * cols + c)]) * x[static_cast<size_t>(t * cols + c)];
      const double scale = 1 / std::sqrt(square / cols + 1e-5);
      for (int32_t c = 0; c < cols; ++c) want.push_back(weight[static_cast<size_t>(c)] * x[static_cast<size_t>(t * cols + c)] * scale);
    }
    EXPECT_TRUE(AllClose(y.Read(), want, {1e-5, 1e-5}, {tokens, cols})) << "cols " << cols;
    EXPECT_TRUE(y.GuardsIntact());
    const CudaArray<float> both(rng.Normals(static_cast<size_t>(2 * tokens * cols), 3));
    const std::vector<float> gate_up = both.Read();
    CudaArray<float> gated(static_cast<size_t>(tokens * cols));
    ASSERT_OK(GateRows(both.data(), gated.data(), tokens, cols, nullptr));
    ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
    std::vector<double> product;
    for (int32_t t = 0; t < tokens; ++t) {
      for (int32_t c = 0; c < cols; ++c) {
        const double gate = gate_up[static_cast<size_t>(2 * t * cols + c)], up = gate_up[static_cast<size_t>((2 * t + 1) * cols + c)];
        product.push_back(gate / (1 + std::exp(-gate)) * up);
      }
    }
    EXPECT_TRUE(AllClose(gated.Read(), product, {1e-5, 1e-5}, {tokens, cols})) << "width " << cols;
    EXPECT_TRUE(gated.GuardsIntact());
  }
}

TEST_F(CudaEngineTest, RotationsOfEverySize) {
  Rng rng = SeededRng();
  for (const int32_t d : {2, 6, 8, 64, 96, 128, 256}) {
    for (const auto& [tokens, heads, kv_heads] : {std::tuple{1, 1, 1}, {5, 6, 2}, {33, 9, 3}}) {
      for (const bool interleaved : {false, true}) {
        for (const bool normed : {false, true}) {
          const int32_t all = heads + 2 * kv_heads, half = d / 2;
          const std::vector<float> qkv = rng.Normals(static_cast<size_t>(tokens * all * d)), q_norm = rng.Normals(static_cast<size_t>(d)), k_norm = rng.Normals(static_cast<size_t>(d));
          std::vector<float> cosines, sines;
          for (int32_t i = 0; i < tokens * half; ++i) {
            const double angle = rng.Uniform() * 6;
            cosines.push_back(static_cast<float>(std::cos(angle))), sines.push_back(static_cast<float>(std::sin(angle)));
          }
          const CudaArray<float> from(qkv), qn(q_norm), kn(k_norm), cos(cosines), sin(sines);
          const auto of_q = static_cast<size_t>(tokens * heads * d), of_kv = static_cast<size_t>(tokens * kv_heads * d);
          CudaArray<float> q(of_q), before(of_q), k(of_kv), v(of_kv);
          ASSERT_OK(RotateHeads({.qkv = from.data(), .q_norm = normed ? qn.data() : nullptr, .k_norm = normed ? kn.data() : nullptr, .eps = 1e-6f,
                                 .cos = cos.data(), .sin = sin.data(), .interleaved = interleaved, .q = q.data(), .q_before = before.data(), .k = k.data(),
                                 .v = v.data(), .tokens = tokens, .heads = heads, .kv_heads = kv_heads, .head_dim = d}, nullptr));
          ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
          std::vector<double> want[4];  // q, before, k, v
          for (int32_t t = 0; t < tokens; ++t) {
            for (int32_t h = 0; h < all; ++h) {
              std::vector<double> x;
              double square = 0;
              for (int32_t c = 0; c < d; ++c) {
                x.push_back(qkv[static_cast<size_t>((t * all + h) * d + c)]);
                square += x.back() * x.back();
              }
              const bool is_q = h < heads, is_k = !is_q && h < heads + kv_heads;
              if (!is_q && !is_k) {
                want[3].insert(want[3].end(), x.begin(), x.end());
                continue;
              }
              const std::vector<float>& norm = is_q ? q_norm : k_norm;
              for (int32_t c = 0; normed && c < d; ++c) x[static_cast<size_t>(c)] *= norm[static_cast<size_t>(c)] / std::sqrt(square / d + 1e-6);
              if (is_q) want[1].insert(want[1].end(), x.begin(), x.end());
              for (int32_t c = 0; c < d; ++c) {
                const int32_t pair = interleaved ? c / 2 : c % half;
                const bool second = interleaved ? c % 2 == 1 : c >= half;
                const double other = x[static_cast<size_t>(interleaved ? c ^ 1 : second ? c - half : c + half)];
                const double co = cosines[static_cast<size_t>(t * half + pair)], si = sines[static_cast<size_t>(t * half + pair)];
                want[is_q ? 0 : 2].push_back(second ? x[static_cast<size_t>(c)] * co + other * si : x[static_cast<size_t>(c)] * co - other * si);
              }
            }
          }
          const CudaArray<float>* got[4] = {&q, &before, &k, &v};
          for (int i = 0; i < 4; ++i) {
            EXPECT_TRUE(AllClose(got[i]->Read(), want[i], {1e-5, 1e-5})) << i << " d " << d << " tokens " << tokens << " interleaved " << interleaved << " normed " << normed;
            EXPECT_TRUE(got[i]->GuardsIntact());
          }
        }
      }
    }
  }
}

// Pairs that a block takes of two heads, rows of less than a block, of several rounds, and of more rounds than a block keeps; the truth in fp64,
// and the two calls that this one stands for.
TEST_F(CudaEngineTest, RotatedProductsOfEverySize) {
  Rng rng = SeededRng();
  constexpr float kEps = 1e-5f;
  for (const auto& [heads, kv_heads, cols] : {std::tuple{1, 1, 8}, {6, 2, 40}, {9, 3, 576}, {32, 8, 4096}, {700, 100, 8}, {30001, 1000, 8}}) {
    for (const int32_t d : {2, 6, 64, 96, 128}) {
      if (cols > 1000 && d != 6 && d != 128) continue;  // the truth takes its time
      if (heads > 100 && d != 6) continue;
      for (const DeviceNumber type : {DeviceNumber::kF16, DeviceNumber::kBF16}) {
        const int32_t all = heads + 2 * kv_heads, rows = all * d, half = d / 2;
        const bool f16 = type == DeviceNumber::kF16;
        std::vector<uint16_t> weights;
        for (int64_t i = 0; i < int64_t{rows} * cols; ++i) {
          const auto w = static_cast<float>(rng.Normal() / std::sqrt(cols));
          weights.push_back(f16 ? FloatToHalf(w) : FloatToBFloat16(w));
        }
        const std::vector<float> x = rng.Normals(static_cast<size_t>(cols), 3), norm = rng.Normals(static_cast<size_t>(cols)), bias = rng.Normals(static_cast<size_t>(rows));
        std::vector<float> cosines, sines;
        for (int32_t i = 0; i < half; ++i) {
          const double angle = rng.Uniform() * 6;
          cosines.push_back(static_cast<float>(std::cos(angle))), sines.push_back(static_cast<float>(std::sin(angle)));
        }
        const CudaArray<uint16_t> w(weights);
        const CudaArray<float> dx(x), dnorm(norm), dbias(bias), cos(cosines), sin(sines);
        double square = 0;
        for (const float v : x) square += static_cast<double>(v) * v;
        const double scale = 1 / std::sqrt(square / cols + kEps);
        std::vector<double> sums[2];  // of x, and of x with its norm
        for (int32_t r = 0; r < rows; ++r) {
          double plain = 0, with_norm = 0;
          for (size_t c = 0; c < x.size(); ++c) {
            const uint16_t bits = weights[static_cast<size_t>(r) * x.size() + c];
            const double term = static_cast<double>(f16 ? HalfToFloat(bits) : BFloat16ToFloat(bits)) * x[c];
            plain += term, with_norm += term * norm[c] * scale;
          }
          sums[0].push_back(plain), sums[1].push_back(with_norm);
        }
        for (const bool interleaved : {false, true}) {
          for (const bool normed : {false, true}) {
            for (const bool biased : {false, true}) {
              SCOPED_TRACE("heads " + std::to_string(heads) + " kv_heads " + std::to_string(kv_heads) + " cols " + std::to_string(cols) + " d " + std::to_string(d) +
                           (f16 ? " f16" : " bf16") + (interleaved ? " interleaved" : "") + (normed ? " normed" : "") + (biased ? " biased" : ""));
              const auto of_q = static_cast<size_t>(heads * d), of_kv = static_cast<size_t>(kv_heads * d);
              // By one launch, then by two; q_before is asked for or not.
              const CudaArray<float> one[4] = {CudaArray<float>(of_q), CudaArray<float>(of_q), CudaArray<float>(of_kv), CudaArray<float>(of_kv)};
              const CudaArray<float> two[4] = {CudaArray<float>(of_q), CudaArray<float>(of_q), CudaArray<float>(of_kv), CudaArray<float>(of_kv)};
              const CudaArray<float> qkv(static_cast<size_t>(rows));
              const bool keeps = normed || !biased;
              VectorProduct product{.weights = w.data(), .x = dx.data(), .norm = normed ? dnorm.data() : nullptr, .eps = kEps,
                                    .bias = biased ? dbias.data() : nullptr, .rows = rows, .cols = cols, .type = type};
              RotateParams rotation{.cos = cos.data(), .sin = sin.data(), .interleaved = interleaved, .q = one[0].data(), .q_before = keeps ? one[1].data() : nullptr,
                                    .k = one[2].data(), .v = one[3].data(), .tokens = 1, .heads = heads, .kv_heads = kv_heads, .head_dim = d};
              ASSERT_OK(MultiplyRotated(product, rotation, nullptr));
              product.y = qkv.data();
              rotation.qkv = qkv.data(), rotation.q = two[0].data(), rotation.q_before = keeps ? two[1].data() : nullptr;
              rotation.k = two[2].data(), rotation.v = two[3].data();
              ASSERT_OK(MultiplyVector(product, nullptr));
              ASSERT_OK(RotateHeads(rotation, nullptr));
              ASSERT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
              std::vector<double> want[4];  // q, before, k, v
              for (int32_t h = 0; h < all; ++h) {
                std::vector<double> head;
                for (int32_t c = 0; c < d; ++c) {
                  const auto row = static_cast<size_t>(h * d + c);
                  head.push_back(sums[normed ? 1 : 0][row] + (biased ? bias[row] : 0));
                }
                if (h < heads) want[1].insert(want[1].end(), head.begin(), head.end());
                if (h >= heads + kv_heads) {
                  want[3].insert(want[3].end(), head.begin(), head.end());
                  continue;
                }
                for (int32_t c = 0; c < d; ++c) {
                  const auto pair = static_cast<size_t>(interleaved ? c / 2 : c % half);
                  const bool second = interleaved ? c % 2 == 1 : c >= half;
                  const double mine = head[static_cast<size_t>(c)], other = head[static_cast<size_t>(interleaved ? c ^ 1 : second ? c - half : c + half)];
                  want[h < heads ? 0 : 2].push_back(mine * cosines[pair] + (second ? other : -other) * sines[pair]);
                }
              }
              for (int i = 0; i < 4; ++i) {
                const std::vector<float> got = one[i].Read();
                EXPECT_TRUE(one[i].GuardsIntact()) << i;
                if (i == 1 && !keeps) {
                  EXPECT_EQ(got, two[i].Read()) << "q_before was not asked for";  // poison both
                  continue;
                }
                EXPECT_TRUE(AllClose(got, want[i], {1e-4, 1e-4}, {static_cast<int64_t>(got.size()) / d, d})) << i;
                // What is not rotated are the same sums; of the rest a product may be rounded, of numbers up to some 16.
                const bool rotated = i == 0 || i == 2;
                EXPECT_TRUE(AllClose(got, two[i].Read(), rotated ? Tolerance{4e-6, 1e-6} : Tolerance{}, {static_cast<int64_t>(got.size()) / d, d})) << i << ", against two launches";
              }
            }
          }
        }
      }
    }
  }
}

// Before anything is enqueued, so without a device.
TEST(RotatedProductTest, RefusesWhatItDoesNotRotate) {
  const VectorProduct product{.rows = 48, .cols = 16};
  const RotateParams rotation{.tokens = 1, .heads = 4, .kv_heads = 1, .head_dim = 8};
  const auto with = [&](auto&& change) {
    VectorProduct p = product;
    RotateParams r = rotation;
    change(p, r);
    return MultiplyRotated(p, r, nullptr);
  };
  const float norm[8] = {};
  EXPECT_STATUS(StatusCode::kInvalid, "rows=47", with([](auto& p, auto&) { p.rows = 47; }));
  EXPECT_STATUS(StatusCode::kInvalid, "rows=-48", with([](auto& p, auto&) { p.rows = -48; }));
  EXPECT_STATUS(StatusCode::kInvalid, "cols=12", with([](auto& p, auto&) { p.cols = 12; }));
  EXPECT_STATUS(StatusCode::kInvalid, "add=1", with([](auto& p, auto&) { p.add = true; }));
  EXPECT_STATUS(StatusCode::kInvalid, "gated=1", with([](auto& p, auto&) { p.gated = true; }));
  EXPECT_STATUS(StatusCode::kInvalid, "q_norm", with([&](auto&, auto& r) { r.q_norm = norm; }));
  EXPECT_STATUS(StatusCode::kInvalid, "k_norm", with([&](auto&, auto& r) { r.k_norm = norm; }));
  EXPECT_STATUS(StatusCode::kInvalid, "tokens=2", with([](auto&, auto& r) { r.tokens = 2; }));
  EXPECT_STATUS(StatusCode::kInvalid, "heads=-4", with([](auto&, auto& r) { r.heads = -4; }));
  EXPECT_STATUS(StatusCode::kInvalid, "kv_heads=-1", with([](auto&, auto& r) { r.kv_heads = -1; }));
  for (const int32_t d : {-8, 0, 7}) {
    EXPECT_STATUS(StatusCode::kInvalid, "head_dim=" + std::to_string(d), with([&](auto&, auto& r) { r.head_dim = d; }));
  }
  EXPECT_OK(with([](auto& p, auto& r) { p.rows = r.heads = r.kv_heads = 0; }));
}

}  // namespace
}  // namespace prehoc::reference
