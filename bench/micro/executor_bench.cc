// What does a ParallelFor cost beyond its bodies?
//
// A decode step runs hundreds of small loops, a few microseconds apart. For 2 to 6 bodies: empty bodies (the cost
// alone) and bodies of about 4 microseconds (what is left of the speed-up), loop after loop and with a pause between
// them, on an idle machine and beside threads that want the CPUs, too. `serial` runs the same bodies on the caller
// alone.
//
//   executor_bench [Google Benchmark flags]
#include <benchmark/benchmark.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"

namespace prehoc {
namespace {

// Work that the compiler cannot shorten and that needs no memory: about 1 ns a round.
uint64_t Churn(int64_t rounds, uint64_t x) {
  for (int64_t i = 0; i < rounds; ++i) x = x * 6364136223846793005u + 1442695040888963407u;
  return x;
}
constexpr int64_t kBodyRounds = 3500;

ThreadPool& Pool() {
  static const std::unique_ptr<ThreadPool> pool = [] {
    auto created = ThreadPool::Create({});
    if (!created.ok()) {
      std::fprintf(stderr, "executor_bench: %s\n", created.status().ToString().c_str());
      std::exit(1);
    }
    return std::move(*created);
  }();
  return *pool;
}

// Threads that compute without end, one a CPU.
class Neighbours {
 public:
  explicit Neighbours(bool any) {
    if (!any) return;
    for (unsigned i = 0; i < std::thread::hardware_concurrency(); ++i) {
      threads_.emplace_back([this] {
        uint64_t x = 1;
        while (!stop_.load(std::memory_order_relaxed)) benchmark::DoNotOptimize(x = Churn(1000, x));
      });
    }
  }
  ~Neighbours() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

enum class How { kSerial, kPool };

// Arguments: bodies, rounds in a body, rounds between loops, neighbours.
void Loop(benchmark::State& state, How how) {
  const int64_t bodies = state.range(0), rounds = state.range(1), between = state.range(2);
  const Neighbours neighbours(state.range(3) != 0);
  const auto body = [&](int64_t i) { benchmark::DoNotOptimize(Churn(rounds, static_cast<uint64_t>(i))); };
  for (auto _ : state) {
    if (between > 0) benchmark::DoNotOptimize(Churn(between, 7));
    if (how == How::kPool) {
      Pool().ParallelFor(bodies, body);
    } else {
      for (int64_t i = 0; i < bodies; ++i) body(i);
    }
  }
  state.counters["threads"] = how == How::kPool ? Pool().concurrency() : 1;
}

void Arguments(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"bodies", "rounds", "between", "neighbours"});
  for (const int64_t neighbours : {0, 1}) {
    for (const int64_t rounds : {int64_t{0}, kBodyRounds}) {
      for (const int64_t between : {0, 5000}) {
        for (const int64_t bodies : {2, 6}) benchmark->Args({bodies, rounds, between, neighbours});
      }
    }
  }
  benchmark->UseRealTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(Loop, serial, How::kSerial)->Apply(Arguments);
BENCHMARK_CAPTURE(Loop, pool, How::kPool)->Apply(Arguments);

// From Post() to the first line of the job, with a job thread that sleeps.
void PostToRun(benchmark::State& state) {
  std::atomic<int64_t> began{0};
  double total = 0;
  for (auto _ : state) {
    began.store(0, std::memory_order_relaxed);
    const int64_t start = SteadyClock::Get().NowNanos();
    const Status posted = Pool().Post([&] { began.store(SteadyClock::Get().NowNanos(), std::memory_order_release); });
    if (!posted.ok()) state.SkipWithError("the job was refused");
    Pool().Drain();
    total += static_cast<double>(began.load(std::memory_order_acquire) - start) * 1e-9;
    state.SetIterationTime(static_cast<double>(began.load(std::memory_order_relaxed) - start) * 1e-9);
  }
  state.counters["mean_us"] = total * 1e6 / static_cast<double>(state.iterations());
}
BENCHMARK(PostToRun)->UseManualTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("question", "what does a ParallelFor cost beyond its bodies?");
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
