// The engine over a cache, both on the device: a decode step as one graph beside the steps that wait for each layer.
#include <cmath>
#include <tuple>

#include "base/cuda/device_memory.h"
#include "base/cuda/host_registrar.h"
#include "cache/kv_cache.h"
#include "integrations/reference/cache_backend.h"
#include "integrations/reference/cuda/cuda_decoder.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/kernel_table.h"
#include "tests/integrations/engine/random_model.h"
#include "tests/support/compare.h"
#include "tests/support/cuda_test.h"
#include "tests/support/seeded_rng.h"

namespace prehoc::reference {
namespace {

constexpr int64_t kPrompt = 500, kSteps = 90;

class Machine {
 public:
  Machine(std::shared_ptr<const Model> model, const SelectorOptions& selector, bool whole_steps) : device_(uint64_t{64} << 20) {
    executor_ = ThreadPool::Create({.loop_threads = 2, .job_threads = 1}).value();
    kernels_ = cuda::DeviceKernels::Create(&device_).value();
    const ModelConfig& c = model->config;
    CacheOptions options;
    options.geometry = {.layers = c.layers, .heads = c.heads, .kv_heads = c.kv_heads, .head_dim = c.head_dim, .chunk_tokens = 64};
    options.host_budget = uint64_t{64} << 20;
    options.huge_pages = false;
    options.selector = selector;
    options.audit_every = 16;
    CacheResources resources;
    resources.executor = executor_.get();
    resources.device = &device_;
    resources.kernels = &cuda::DeviceKernels::Table();
    resources.stream = kernels_->launch_stream();
    resources.registrar = &registrar_;
    if (whole_steps) resources.step_kernels = &cuda::DeviceStepKernels();
    cache_ = KvCache::Create(options, resources).value();
    EngineOptions engine{.executor = executor_.get(), .max_batch_tokens = 128};
    engine.make_decoder = MakeCudaDecoder;
    engine_ = Engine::Create(std::move(model), engine).value();
  }
  KvCache& cache() { return *cache_; }
  Engine& engine() { return *engine_; }

 private:
  CudaHostRegistrar registrar_;
  CudaDeviceMemory device_;
  std::unique_ptr<ThreadPool> executor_;
  std::unique_ptr<cuda::DeviceKernels> kernels_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Engine> engine_;
};

class CudaStepsTest : public CudaTest {};

TEST_F(CudaStepsTest, LogitsAreThoseOfTheLayerByLayerSteps) {
  Rng rng = SeededRng();
  // Heads without a norm are rotated by the launch of their product.
  for (const auto& [type, qk_norm, layout] : {std::tuple{WeightType::kF16, true, RopeLayout::kHalf}, {WeightType::kF16, false, RopeLayout::kInterleaved},
                                              {WeightType::kBF16, false, RopeLayout::kHalf}}) {
    SCOPED_TRACE(std::string(WeightTypeName(type)) + (qk_norm ? " with" : " without") + " norms of heads");
    const auto model = RandomModel(rng, {.layers = 3, .heads = 2, .kv_heads = 2, .head_dim = 64, .hidden = 128, .intermediate = 256, .type = type,
                                         .qk_norm = qk_norm, .layout = layout});
    const std::vector<int32_t> tokens = RandomTokens(rng, model->config, kPrompt + kSteps);
    const auto vocab = static_cast<size_t>(model->config.vocab);
    for (const bool dense : {true, false}) {
      for (const int64_t slots : {0, 128}) {
        if (dense && slots > 0) continue;
        SCOPED_TRACE((dense ? "dense" : "two clocks") + std::string(", slots ") + std::to_string(slots));
        SelectorOptions selector;
        selector.kind = dense ? SelectorKind::kDense : SelectorKind::kTwoClock;
        selector.budget.sinks = 4, selector.budget.local = 8, selector.budget.tokens = 64;
        selector.tc.refresh = 16;  // heads turn within the steps
        selector.tc.theta = 0, selector.tc.dense_below = 0;
        Machine whole(model, selector, true), layered(model, selector, false);
        auto a = whole.cache().Open({.max_tokens = kPrompt + kSteps, .device_slots = slots});
        auto b = layered.cache().Open({.max_tokens = kPrompt + kSteps, .device_slots = slots});
        ASSERT_OK(a);
        ASSERT_OK(b);
        std::vector<float> got(vocab), want(vocab);
        const auto prompt = std::span(tokens).first(kPrompt);
        ASSERT_OK(RunWithRepair(whole.engine(), **a, prompt, kPrompt, got));
        ASSERT_OK(RunWithRepair(layered.engine(), **b, prompt, kPrompt, want));
        int alike = 0;
        for (int64_t step = 0; step < kSteps; ++step) {
          const auto token = std::span(tokens).subspan(static_cast<size_t>(kPrompt + step), 1);
          ASSERT_OK(RunWithRepair(whole.engine(), **a, token, 0, got)) << "step " << step;
          ASSERT_OK(RunWithRepair(layered.engine(), **b, token, 0, want));
          double largest = 0;
          for (const float x : want) largest = std::max(largest, static_cast<double>(std::abs(x)));
          alike += static_cast<bool>(AllClose(std::span<const float>(got), std::vector<double>(want.begin(), want.end()), {2e-3 * largest, 0}));
        }
        // Where two scores tie to a rounding, a head may attend to another row, and later rows remember.
        EXPECT_GE(alike, dense ? kSteps : kSteps * 8 / 10);
        const SequenceReport &r = (*a)->Report(), &s = (*b)->Report();
        EXPECT_EQ(r.decode_steps, kSteps);
        EXPECT_EQ(r.triples + r.dense_triples, s.triples + s.dense_triples);
        EXPECT_EQ(r.audited_steps, s.audited_steps);
        EXPECT_LT(r.output_error.mean(), s.output_error.mean() + 1e-2);
        double seconds_of_steps = 0, elsewhere = 0;
        whole.engine().VisitCounters([&](std::string_view name, double value) { if (name == "engine.seconds.steps") seconds_of_steps = value; });
        layered.engine().VisitCounters([&](std::string_view name, double value) { if (name == "engine.seconds.steps") elsewhere = value; });
        EXPECT_GT(seconds_of_steps, 0);
        EXPECT_EQ(elsewhere, 0);
      }
    }
  }
}

}  // namespace
}  // namespace prehoc::reference
