// How near does the reference engine come to reading each weight byte once, and to the CPU's arithmetic?
//   engine_bench --model=FILE_OR_DIR [--threads=N] [Google Benchmark flags]
// Attention is left out: each token attends to itself alone, which at depth 0 is exact. Decode is bound by bytes: its
// floor is the weights / the read rate, measured here on as many bytes with the same threads. Prefill is bound by
// arithmetic. Tokens come from a fixed seed.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/or_exit.h"
#include "integrations/reference/engine/aligned_floats.h"
#include "integrations/reference/engine/engine.h"
#include "integrations/reference/engine/kernel_table.h"

namespace prehoc::reference {
namespace {

class SelfAttention final : public AttentionBackend {
 public:
  explicit SelfAttention(const ModelConfig& config) : config_(config) {}
  int64_t length() const override { return 0; }
  Status Begin(std::span<const int32_t>, int64_t) override { return {}; }
  FreezeRule Freeze(int32_t) const override { return {}; }
  Status Attend(const AttendCall& call) override {
    const int64_t d = config_.head_dim, group = config_.heads / config_.kv_heads;
    for (int64_t t = 0; t < call.count; ++t) {
      for (int64_t h = 0; h < config_.heads; ++h) {
        const float* v = call.v + (t * config_.kv_heads + h / group) * d;
        std::copy(v, v + d, call.out + (t * config_.heads + h) * d);
      }
    }
    return {};
  }
  Status End() override { return {}; }
  void Rollback() override {}

 private:
  const ModelConfig& config_;
};

struct World {
  std::shared_ptr<const Model> model;
  std::unique_ptr<ThreadPool> executor;
};
World& TheWorld() {
  static World world;
  return world;
}

std::vector<int32_t> RandomTokens(int64_t count) {
  std::mt19937 rng(20240607);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& t : tokens) t = static_cast<int32_t>(rng() % static_cast<uint32_t>(TheWorld().model->config.vocab));
  return tokens;
}

// What decode reads for a token: every matrix once, the embedding only where it is the output too.
double DecodeBytes(const Model& model) {
  double bytes = static_cast<double>(model.weight_bytes);
  if (model.output.data != model.embedding.data) {
    bytes -= static_cast<double>(model.embedding.row_bytes) * static_cast<double>(model.embedding.rows);
  }
  return bytes;
}

// [bytes/s] of all threads reading `bytes` again and again; the best of several passes.
double ReadRate(double bytes) {
  Executor& executor = *TheWorld().executor;
  const auto& kernels = KernelsFor(BestSimdLevel());
  const int64_t pieces = 64 * executor.concurrency(), floats = static_cast<int64_t>(bytes) / 4 / pieces;
  AlignedFloats buffer(pieces * floats);
  for (int64_t i = 0; i < pieces * floats; ++i) buffer.data()[i] = static_cast<float>(i & 1023);
  std::vector<float> sums(static_cast<size_t>(pieces));
  double best = 0;
  for (int pass = 0; pass < 10; ++pass) {
    const int64_t start = SteadyClock::Get().NowNanos();
    executor.ParallelFor(pieces, [&](int64_t i) {
      const float* p = buffer.data() + i * floats;
      sums[static_cast<size_t>(i)] = kernels.dot(p, p, floats);
    });
    benchmark::DoNotOptimize(sums.data());
    best = std::max(best, static_cast<double>(buffer.bytes()) / SteadyClock::Get().SecondsSince(start));
  }
  return best;
}

void Run(benchmark::State& state, SimdLevel level, int64_t count, bool logits_wanted) {
  World& world = TheWorld();
  const auto engine = OrExit(Engine::Create(
      world.model, {.executor = world.executor.get(), .max_batch_tokens = 512, .max_tokens = 1 << 20, .simd = level}));
  SelfAttention backend(world.model->config);
  const std::vector<int32_t> tokens = RandomTokens(count);
  std::vector<float> logits(logits_wanted ? static_cast<size_t>(world.model->config.vocab) : 0);
  for (auto _ : state) {
    const Status status = engine->Forward(backend, tokens, count > 1 ? count : 0, logits);
    if (!status.ok()) return state.SkipWithError(status.ToString().c_str());
  }
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["tok/s"] =
      benchmark::Counter(iterations * static_cast<double>(count), benchmark::Counter::kIsRate);
  state.counters["ms_projections"] = 1e3 * engine->seconds().projections / iterations;
  state.counters["ms_logits"] = 1e3 * engine->seconds().logits / iterations;
  state.counters["scratch_MB"] = static_cast<double>(engine->scratch_bytes()) * 1e-6;
  if (count > 1) return;
  const double bytes = DecodeBytes(*world.model), seconds = engine->seconds().total() / iterations;
  static const double rate = ReadRate(bytes);
  state.counters["weights_GB/s"] = bytes / seconds * 1e-9;
  state.counters["read_GB/s"] = rate * 1e-9;
  state.counters["%_of_read"] = 100 * bytes / seconds / rate;
}

void RegisterAll() {
  for (const SimdLevel level : {SimdLevel::kPlain, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (!SimdLevelAvailable(level)) continue;
    const std::string suffix = "/" + std::string(SimdLevelName(level));
    const auto add = [&](const char* name, int64_t count, bool logits) {
      benchmark::RegisterBenchmark((name + suffix).c_str(), Run, level, count, logits)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();
    };
    add("decode/depth:0", 1, true);
    add("prefill/tokens:512", 512, false);
  }
}

// The value of --name=value, taken out of the arguments; empty if it is not there.
std::string TakeFlag(std::vector<char*>& args, const std::string& name) {
  for (size_t i = 1; i < args.size(); ++i) {
    const std::string arg = args[i];
    if (arg.rfind(name + "=", 0) != 0) continue;
    args.erase(args.begin() + static_cast<std::ptrdiff_t>(i));
    return arg.substr(name.size() + 1);
  }
  return "";
}

int Main(int argc, char** argv) {
  std::vector<char*> args(argv, argv + argc);
  const std::string path = TakeFlag(args, "--model"), threads = TakeFlag(args, "--threads");
  if (path.empty()) {
    std::fprintf(stderr, "engine_bench: give a model with --model=FILE_OR_DIR\n");
    return 2;
  }
  int count = static_cast<int>(args.size());
  benchmark::Initialize(&count, args.data());
  if (benchmark::ReportUnrecognizedArguments(count, args.data())) return 2;
  World& world = TheWorld();
  world.model = OrExit(LoadModel({.path = path}));
  world.executor = OrExit(ThreadPool::Create({.loop_threads = threads.empty() ? 0 : std::atoi(threads.c_str())}));
  benchmark::AddCustomContext("model", world.model->config.name);
  benchmark::AddCustomContext("threads", std::to_string(world.executor->concurrency()));
  benchmark::AddCustomContext("simd", std::string(SimdLevelName(BestSimdLevel())));
  RegisterAll();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace prehoc::reference

int main(int argc, char** argv) { return prehoc::reference::Main(argc, argv); }
