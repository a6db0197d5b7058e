// What does a store cost that is no help, and what do its checks cost where it is one?
//
//   harm_bench --dir=EMPTY_DIR [--pairs=31] [Google Benchmark flags]
//
// Each figure is a ratio of two runs side by side, one of each kind in turn, the order changing from pair to pair: the median over the
// pairs, and the quartiles, which say what the machine makes of it. Attention alone is timed, without a model around it, so a
// store weighs more here than in an engine.
//
//   harm/<store>     prompt of 2,048 tokens and 64 decode steps beside this store, over the same without one. `useless`: takes everything, on
//                    disk, and has never what is asked for. `slow`: has all of every prompt, and takes 200 ms for each block. `dead`:
//                    every read and write fails. `none`: no store on either side, which is what the method makes of no difference.
//                    All of them after the cache has had two runs to learn.
//   checks/restore   a prefix of 4,096 tokens (480 blocks of 192 KiB, direct I/O) brought back from --dir with its checksums compared,
//                    over the same without.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <charconv>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/device_memory.h"
#include "base/executor.h"
#include "base/rng.h"
#include "base/units.h"
#include "bench/or_exit.h"
#include "cache/kv_cache.h"
#include "transfer/rocksdb_store.h"

namespace prehoc {
namespace {

std::string dir;
int64_t pairs = 31;

KvGeometry Geometry(int32_t layers) {
  KvGeometry geometry;
  geometry.layers = layers;
  geometry.heads = 9;
  geometry.kv_heads = 3;
  geometry.head_dim = 64;
  geometry.chunk_tokens = 256;
  return geometry;
}

// The same numbers for every layer and prompt: what they are does not matter here.
class Input {
 public:
  explicit Input(int64_t tokens) {
    Rng rng(1);
    q_ = rng.Normals(static_cast<size_t>(tokens) * 9 * 64);
    k_ = rng.Normals(static_cast<size_t>(tokens) * 3 * 64);
    for (int64_t i = 0; i < tokens; ++i) ids_.push_back(static_cast<int32_t>(rng.Int(0, 999)));
  }
  std::span<const int32_t> ids(int64_t first, int64_t count) const {
    return std::span(ids_).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
  }
  void Run(Sequence& sequence, int32_t layers, int64_t count, int64_t prompt) {
    const int64_t first = sequence.length();
    out_.resize(static_cast<size_t>(count) * 9 * 64);
    OrExit(sequence.Begin(ids(first, count), prompt));
    LayerInput input;
    input.q = input.q_pre_rope = q_.data() + first * 9 * 64;
    input.k = input.v = k_.data() + first * 3 * 64;
    input.out = out_.data();
    for (int32_t l = 0; l < layers; ++l) OrExit(prompt > 0 ? sequence.Prefill(LayerId(l), input) : sequence.Attend(LayerId(l), input));
    OrExit(sequence.End());
  }

 private:
  std::vector<int32_t> ids_;
  std::vector<float> q_, k_, out_;
};

// Takes `nanos` for every read, or fails everything.
class PoorStore final : public ChunkStoreWrapper {
 public:
  PoorStore(ChunkStore* base, int64_t nanos, bool dead) : ChunkStoreWrapper(base), nanos_(nanos), dead_(dead) {}

 private:
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override {
    if (dead_) return {StatusCode::kIoError, "dead"};
    std::this_thread::sleep_for(std::chrono::nanoseconds(nanos_));
    return base()->Get(key, out, seal);
  }
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override {
    return dead_ ? Status(StatusCode::kIoError, "dead") : base()->Put(key, data, origin);
  }
  Status DoFlush() override { return dead_ ? Status(StatusCode::kIoError, "dead") : base()->Flush(); }
  const int64_t nanos_;
  const bool dead_;
};

std::unique_ptr<RocksDbStore> OpenStore(const std::string& name, const KvGeometry& geometry, bool read_only, bool verify) {
  RocksDbStore::Options options;
  options.path = dir + "/" + name;
  options.identity.layout = geometry.LayoutName();
  options.chunk_bytes = geometry.block_bytes();
  options.budget = 4 * kGiB;
  options.read_only = read_only;
  options.verify = verify;
  return OrExit(RocksDbStore::Open(options));
}

struct Cache {
  Cache(const KvGeometry& geometry, uint64_t host_budget, ChunkStore* store) : layers(geometry.layers) {
    pool = OrExit(ThreadPool::Create({.loop_threads = 2, .job_threads = 1}));
    io = OrExit(ThreadPool::Create({.loop_threads = 4, .job_threads = 4}));  // as the command has it: each thread waits most of the time
    CacheOptions options;
    options.geometry = geometry;
    options.host_budget = host_budget;
    options.audit_every = 0;
    cache = OrExit(KvCache::Create(options, {.executor = pool.get(), .io = io.get(), .device = &device, .store = store}));
  }
  int32_t layers;
  HostDeviceMemory device{kGiB};
  std::unique_ptr<ThreadPool> pool, io;
  std::unique_ptr<KvCache> cache;
};

double Seconds(const std::function<void()>& what) {
  const auto start = std::chrono::steady_clock::now();
  what();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Quantile(std::vector<double> values, double at) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(at * static_cast<double>(values.size() - 1) + 0.5)];
}

// `of` and `over` time one run each, told which.
void Compare(benchmark::State& state, const std::function<double(int64_t)>& of, const std::function<double(int64_t)>& over) {
  std::vector<double> ratios, of_seconds, over_seconds;
  for (auto _ : state) {
    for (int64_t pair = -2; pair < pairs; ++pair) {
      const bool of_first = pair % 2 == 0;
      double a = of_first ? of(pair) : 0;
      const double b = over(pair);
      if (!of_first) a = of(pair);
      if (pair < 0) continue;
      ratios.push_back(a / b);
      of_seconds.push_back(a);
      over_seconds.push_back(b);
    }
    state.SetIterationTime(Quantile(of_seconds, 0.5));
  }
  state.counters["ratio_median"] = Quantile(ratios, 0.5);
  state.counters["ratio_q1"] = Quantile(ratios, 0.25);
  state.counters["ratio_q3"] = Quantile(ratios, 0.75);
  state.counters["ratio_of_best"] = Quantile(of_seconds, 0) / Quantile(over_seconds, 0);
  state.counters["pairs"] = static_cast<double>(ratios.size());
}

constexpr int32_t kLayers = 4;
constexpr int64_t kPrompt = 2048, kSteps = 64;
std::string Variant(int64_t run) { return std::to_string(run); }

double RunOnce(Cache& world, Input& input, int64_t run) {
  const double seconds = Seconds([&] {
    auto sequence = OrExit(world.cache->OpenWithPrefix({.max_tokens = kPrompt + kSteps, .variant = Variant(run)}, input.ids(0, kPrompt)));
    while (sequence->length() < kPrompt) input.Run(*sequence, world.layers, std::min<int64_t>(512, kPrompt - sequence->length()), kPrompt);
    for (int64_t step = 0; step < kSteps; ++step) input.Run(*sequence, world.layers, 1, 0);
  });
  world.pool->Drain();  // what runs behind this run, and is not done, must not weigh on the next one of the other kind
  return seconds;
}

void BM_Harm(benchmark::State& state, const std::string& kind) {
  Input input(kPrompt + kSteps);
  const KvGeometry geometry = Geometry(kLayers);
  const uint64_t host_budget = 64 * kMiB;  // some sequences: what old ones left has to go
  const auto disk = OpenStore("harm_" + kind, geometry, false, true);
  if (kind == "slow") {
    Cache writer(geometry, host_budget, disk.get());
    for (int64_t run = -2; run < pairs; ++run) RunOnce(writer, input, run);
    OrExit(writer.cache->Flush());
  }
  PoorStore poor(disk.get(), kind == "slow" ? 200'000'000 : 0, kind == "dead");
  Cache with(geometry, host_budget, kind == "none" ? nullptr : &poor), without(geometry, host_budget, nullptr);
  const auto run_with = [&](int64_t run) {
    const double seconds = RunOnce(with, input, run);
    OrExit(disk->Flush());  // likewise
    return seconds;
  };
  Compare(state, run_with, [&](int64_t run) { return RunOnce(without, input, run); });
  with.cache->VisitCounters([&](std::string_view name, double value) {
    if (name == "host.loads") state.counters["blocks_read"] = value;
    if (name == "write_behind.written") state.counters["blocks_written"] = value;
  });
}

void BM_Checks(benchmark::State& state) {
  const int64_t tokens = 4096;
  Input input(tokens + 1);
  const KvGeometry geometry = Geometry(30);
  const uint64_t host_budget = 160 * kMiB;
  {
    const auto store = OpenStore("checks", geometry, false, true);
    Cache writer(geometry, host_budget, store.get());
    auto sequence = OrExit(writer.cache->OpenWithPrefix({.max_tokens = tokens + 1}, input.ids(0, tokens + 1)));
    while (sequence->length() < tokens) input.Run(*sequence, geometry.layers, 512, tokens + 1);
    OrExit(writer.cache->Flush());
  }
  const auto restore = [&](ChunkStore* store) {
    Cache reader(geometry, host_budget, store);
    std::unique_ptr<Sequence> sequence;
    const double seconds = Seconds([&] { sequence = OrExit(reader.cache->OpenWithPrefix({.max_tokens = tokens + 1}, input.ids(0, tokens + 1))); });
    if (sequence->restored() != tokens) Fail({StatusCode::kNotFound, "not everything came back"});
    return seconds;
  };
  const auto verified = OpenStore("checks", geometry, true, true), unverified = OpenStore("checks", geometry, true, false);
  Compare(state, [&](int64_t) { return restore(verified.get()); }, [&](int64_t) { return restore(unverified.get()); });
}

int Main(int argc, char** argv) {
  std::vector<char*> rest;
  for (int i = 0; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument.starts_with("--dir=")) {
      dir = argument.substr(6);
    } else if (argument.starts_with("--pairs=")) {
      std::from_chars(argument.data() + 8, argument.data() + argument.size(), pairs);
    } else {
      rest.push_back(argv[i]);
    }
  }
  if (dir.empty() || pairs < 1) Fail({StatusCode::kInvalid, "needs --dir=EMPTY_DIR, on the disk to be measured, and --pairs of 1 or more"});
  int rest_count = static_cast<int>(rest.size());
  benchmark::Initialize(&rest_count, rest.data());
  if (benchmark::ReportUnrecognizedArguments(rest_count, rest.data())) return 2;
  benchmark::AddCustomContext("question", "what does a store cost that is no help, and what do its checks cost?");
  for (const char* kind : {"none", "useless", "slow", "dead"}) {
    benchmark::RegisterBenchmark((std::string("harm/") + kind).c_str(), BM_Harm, std::string(kind))->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
  }
  benchmark::RegisterBenchmark("checks/restore", BM_Checks)->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
