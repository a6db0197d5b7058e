// Kernels of every table that this CPU runs, at the shapes of a decode step: one call covers the 3 KV heads of a layer
// (head_dim 64, group 3, fp16 rows of 256 bytes). Question of each benchmark: see its label. Layers take turns as in a
// decode step, so data comes from the last-level cache or memory, never from L2. Seeded data shaped like keys: an offset
// and a spread per channel, and queries whose logits spread over about 15.
//
//   kernels_bench [--threads=2] --benchmark_repetitions=9 --benchmark_report_aggregates_only=true
//
// Times are of one call (one layer). bytes_per_second counts what must be read and written once; GFLOP/s where given counts
// 4 * head_dim per (query, key).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "base/device_memory.h"
#include "base/executor.h"
#include "kernels/function_table.h"
#include "kernels/row_codec.h"

namespace prehoc {
namespace {

constexpr int32_t kHeads = 3, kGroup = 3, kDim = 64, kRowHalves = 2 * kDim;
constexpr int64_t kRowBytes = kRowHalves * 2;
std::unique_ptr<ThreadPool> pool;
Launch OnPool() { return {.executor = pool.get()}; }

class Source {
 public:
  explicit Source(uint64_t seed) : random_(seed) {}
  float Normal() { return normal_(random_); }
  int32_t Below(int32_t n) { return std::uniform_int_distribution<int32_t>(0, n - 1)(random_); }

 private:
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_{0, 1};
};

void Require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "kernels_bench: %s\n", status.ToString().c_str());
  std::abort();
}

// The memory that the device tier of the CPU build uses.
DeviceBuffer Memory(size_t bytes) {
  static HostDeviceMemory memory(SIZE_MAX / 2);
  Result<DeviceBuffer> buffer = memory.Allocate(bytes, "bench");
  Require(buffer.status());
  return std::move(buffer).value();
}

// One layer: rows and queries of its KV heads.
struct Layer {
  DeviceBuffer memory;        // of rows
  std::span<Half> rows;       // [heads, n, 2, dim]
  std::vector<float> q;       // [heads, group, dim]
  DeviceBuffer code_memory;
  std::span<std::byte> codes;
  std::vector<float> z, err;  // [heads, group, n]
  const Half* head(int h, int64_t n) const { return rows.data() + h * n * kRowHalves; }
};

Layer MakeLayer(int64_t n, Source& source) {
  Layer layer;
  layer.memory = Memory(static_cast<size_t>(kHeads * n * kRowBytes));
  layer.rows = {layer.memory.as<Half>(), static_cast<size_t>(kHeads * n * kRowHalves)};
  // Normal numbers are slow to draw: draw some and walk through them with a stride.
  std::vector<float> pool_of_numbers(8191);
  for (float& x : pool_of_numbers) x = source.Normal();
  size_t at = 0;
  const auto next = [&] { return pool_of_numbers[at = (at + 4999) % pool_of_numbers.size()]; };
  for (int h = 0; h < kHeads; ++h) {
    float offset[kRowHalves], spread[kRowHalves];
    for (int c = 0; c < kRowHalves; ++c) {
      offset[c] = source.Normal() * (c % 16 == 3 ? 6.0f : 0.5f);
      spread[c] = std::exp(0.5f * source.Normal());
    }
    Half* row = layer.rows.data() + h * n * kRowHalves;
    for (int64_t i = 0; i < n * kRowHalves; ++i) {
      const auto c = static_cast<size_t>(i % kRowHalves);
      row[i] = FloatToHalf(offset[c] + spread[c] * next());
    }
  }
  layer.q.resize(kHeads * kGroup * kDim);
  for (float& x : layer.q) x = 1.8f * source.Normal();
  return layer;
}

// As many layers as a model has, within 200 MB; at least 2.
std::vector<Layer> MakeLayers(int64_t n) {
  const int64_t count = std::clamp<int64_t>(200'000'000 / (kHeads * n * kRowBytes), 2, 30);
  Source source(20260 + static_cast<uint64_t>(n));
  std::vector<Layer> layers;
  for (int64_t i = 0; i < count; ++i) layers.push_back(MakeLayer(n, source));
  return layers;
}
// Kept for all benchmarks of one context, which run one after another.
std::vector<Layer>& LayersOf(int64_t n) {
  static int64_t of = 0;
  static std::vector<Layer> layers;
  if (of != n) {
    layers.clear();
    layers = MakeLayers(n);
    of = n;
  }
  return layers;
}

// Runs call(layer index) in turn and reports bytes.
template <class Call>
void Time(benchmark::State& state, size_t layers, int64_t bytes, const char* question, const Call& call) {
  size_t turn = 0;
  for (size_t i = 0; i < layers; ++i) call(i);  // pages touched, workers awake
  for (auto _ : state) call(turn++ % layers);
  state.SetBytesProcessed(state.iterations() * bytes);
  state.counters["bytes_per_call"] = static_cast<double>(bytes);
  state.SetLabel(question);
}

// --- attention ---------------------------------------------------------------------------------------------------
struct AttendCall {
  std::vector<std::vector<RowRun>> runs{kHeads};
  std::vector<float> out = std::vector<float>(kHeads * kGroup * kDim), lse = std::vector<float>(kHeads * kGroup);
  std::vector<AttendTask> tasks;
  void Bind(const Layer& layer) {
    for (int h = 0; h < kHeads; ++h) {
      const auto at = static_cast<size_t>(h);
      tasks.push_back({layer.q.data() + h * kGroup * kDim, runs[at], out.data() + h * kGroup * kDim, lse.data() + h * kGroup});
    }
  }
};

void AttendDense(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0);
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<AttendCall> calls(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    for (int h = 0; h < kHeads; ++h) calls[i].runs[static_cast<size_t>(h)] = {{layers[i].head(h, n), static_cast<int32_t>(n)}};
    calls[i].Bind(layers[i]);
  }
  Time(state, layers.size(), kHeads * n * kRowBytes, "attention over every row of a layer", [&](size_t i) {
    Require(table->attend({calls[i].tasks, kGroup, kDim}, OnPool()));
  });
}

// The rows of the layers in another format, narrowed row by row.
struct StoredLayer {
  StoredLayer(const Layer& layer, int64_t n, RowFormat format) : bytes(RowBytes(format, kDim)), memory(Memory(static_cast<size_t>(kHeads * n) * bytes)) {
    for (int64_t i = 0; i < kHeads * n; ++i) {
      NarrowRow(layer.rows.data() + i * kRowHalves, format, kDim, memory.data() + static_cast<size_t>(i) * bytes);
    }
  }
  const std::byte* head(int h, int64_t n) const { return memory.data() + static_cast<size_t>(h * n) * bytes; }
  size_t bytes;
  DeviceBuffer memory;
};

void AttendStored(benchmark::State& state, const KernelTable* table, RowFormat format) {
  const int64_t n = state.range(0);
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<StoredLayer> stored;
  std::vector<AttendCall> calls(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    stored.emplace_back(layers[i], n, format);
    for (int h = 0; h < kHeads; ++h) calls[i].runs[static_cast<size_t>(h)] = {{stored[i].head(h, n), static_cast<int32_t>(n), format}};
    calls[i].Bind(layers[i]);
  }
  Time(state, layers.size(), kHeads * n * static_cast<int64_t>(RowBytes(format, kDim)), "attention over every row of a layer, of 8 bits", [&](size_t i) {
    Require(table->attend({calls[i].tasks, kGroup, kDim}, OnPool()));
  });
}

// 8 sinks, n / 16 rows scattered over the context, 32 local ones: 2 long runs and n / 16 runs of one row per head.
void AttendChosen(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0), k = n / 16;
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<AttendCall> calls(layers.size());
  Source source(7);
  for (size_t i = 0; i < layers.size(); ++i) {
    for (int h = 0; h < kHeads; ++h) {
      const Half* rows = layers[i].head(h, n);
      std::vector<int32_t> chosen;
      for (int64_t j = 0; j < k; ++j) chosen.push_back(8 + source.Below(static_cast<int32_t>(n - 40)));
      std::sort(chosen.begin(), chosen.end());
      std::vector<RowRun>& runs = calls[i].runs[static_cast<size_t>(h)];
      runs.push_back({rows, 8});
      for (const int32_t p : chosen) runs.push_back({rows + p * kRowHalves, 1});
      runs.push_back({rows + (n - 32) * kRowHalves, 32});
    }
    calls[i].Bind(layers[i]);
  }
  Time(state, layers.size(), kHeads * (k + 40) * kRowBytes, "attention over 1/16 of the rows, scattered, and 40 others",
       [&](size_t i) { Require(table->attend({calls[i].tasks, kGroup, kDim}, OnPool())); });
}

void PrefillChunk(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0);
  const auto queries = static_cast<int32_t>(std::min<int64_t>(n, 512));
  std::vector<Layer>& layers = LayersOf(n);
  const int64_t stride = kHeads * kGroup * kDim;
  std::vector<float> q(static_cast<size_t>(queries * stride)), out(q.size());
  Source source(8);
  for (float& x : q) x = 1.8f * source.Normal();
  const auto first = static_cast<int32_t>(n - queries);
  Time(state, layers.size(), kHeads * n * kRowBytes, "causal attention of a chunk that ends the context", [&](size_t i) {
    std::vector<PrefillTask> tasks;
    std::vector<RowRun> runs;
    for (int h = 0; h < kHeads; ++h) runs.push_back({layers[i].head(h, n), static_cast<int32_t>(n)});
    for (int h = 0; h < kHeads; ++h) {
      tasks.push_back({q.data() + h * kGroup * kDim, stride, out.data() + h * kGroup * kDim, stride,
                       std::span(&runs[static_cast<size_t>(h)], 1), nullptr});
    }
    Require(table->prefill({tasks, queries, first, 0, kGroup, kDim}, OnPool()));
  });
  const double pairs = static_cast<double>(queries) * (static_cast<double>(first) + 0.5 * (queries + 1));
  state.counters["GFLOP/s"] = benchmark::Counter(pairs * kHeads * kGroup * 4 * kDim * 1e-9,
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void ScoreRows(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0);
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<float> z(static_cast<size_t>(kHeads * kGroup * n));
  Time(state, layers.size(), kHeads * n * kRowBytes / 2, "exact logits of every row", [&](size_t i) {
    std::vector<RowRun> runs;
    std::vector<ScoreTask> tasks;
    for (int h = 0; h < kHeads; ++h) runs.push_back({layers[i].head(h, n), static_cast<int32_t>(n)});
    for (int h = 0; h < kHeads; ++h) {
      tasks.push_back({layers[i].q.data() + h * kGroup * kDim, std::span(&runs[static_cast<size_t>(h)], 1),
                       z.data() + h * kGroup * n, n});
    }
    Require(table->score({tasks, kGroup, kDim}, OnPool()));
  });
}

// --- codes -------------------------------------------------------------------------------------------------------
std::vector<EncodeTask> EncodeTasks(const KernelTable* table, Layer& layer, int64_t n, const CodeFormat& format) {
  const size_t block = table->code_block_bytes(format, kDim);
  const int64_t groups = n / format.group_tokens;
  layer.code_memory = Memory(static_cast<size_t>(kHeads * groups) * block);
  layer.codes = {layer.code_memory.data(), static_cast<size_t>(kHeads * groups) * block};
  std::vector<EncodeTask> tasks;
  for (int64_t g = 0; g < kHeads * groups; ++g) {
    tasks.push_back({layer.rows.data() + g * format.group_tokens * kRowHalves, layer.codes.data() + static_cast<size_t>(g) * block,
                     nullptr, nullptr});
  }
  return tasks;
}

void EncodeRows(benchmark::State& state, const KernelTable* table, CodeFormat format) {
  const int64_t n = state.range(0);
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<std::vector<EncodeTask>> tasks;
  for (Layer& layer : layers) tasks.push_back(EncodeTasks(table, layer, n, format));
  Time(state, layers.size(), kHeads * n * kRowBytes / 2, "codes of every K; bytes are those of K",
       [&](size_t i) { Require(table->encode({tasks[i], format, kDim}, OnPool())); });
}

void ScanCodes(benchmark::State& state, const KernelTable* table, CodeFormat format, bool with_err) {
  const int64_t n = state.range(0);
  std::vector<Layer>& layers = LayersOf(n);
  const size_t block = table->code_block_bytes(format, kDim);
  const int64_t groups = n / format.group_tokens;
  for (Layer& layer : layers) {
    Require(table->encode({EncodeTasks(table, layer, n, format), format, kDim}, OnPool()));
    layer.z.resize(static_cast<size_t>(kHeads * kGroup * n));
    layer.err.resize(layer.z.size());
  }
  const int64_t bytes = kHeads * (groups * static_cast<int64_t>(block) + kGroup * n * (with_err ? 8 : 4));
  Time(state, layers.size(), bytes, with_err ? "logits and bounds of every code" : "logits of every code", [&](size_t i) {
    ScanTask tasks[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      float* z = layers[i].z.data() + h * kGroup * n;
      tasks[h] = {layers[i].q.data() + h * kGroup * kDim, layers[i].codes.data() + static_cast<size_t>(h * groups) * block,
                  static_cast<int32_t>(groups), z, with_err ? layers[i].err.data() + h * kGroup * n : nullptr, n};
    }
    Require(table->scan({tasks, format, kGroup, kDim}, OnPool()));
  });
}

// --- choice ------------------------------------------------------------------------------------------------------
enum class Ask { kFixed, kResident, kDilated, kTarget };

void ChoosePositions(benchmark::State& state, const KernelTable* table, Ask ask) {
  const int64_t n = state.range(0);
  const auto k = static_cast<int32_t>(n / 16 - 40);
  const CodeFormat format;
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<std::vector<uint64_t>> resident(layers.size());
  Source source(9);
  for (size_t i = 0; i < layers.size(); ++i) {
    ScanTask scan[kHeads];
    Require(table->encode({EncodeTasks(table, layers[i], n, format), format, kDim}, OnPool()));
    layers[i].z.resize(static_cast<size_t>(kHeads * kGroup * n));
    layers[i].err.resize(layers[i].z.size());
    for (int h = 0; h < kHeads; ++h) {
      const size_t at = layers[i].codes.size() / kHeads * static_cast<size_t>(h);
      scan[h] = {layers[i].q.data() + h * kGroup * kDim, layers[i].codes.data() + at, static_cast<int32_t>(n / 64),
                 layers[i].z.data() + h * kGroup * n, layers[i].err.data() + h * kGroup * n, n};
    }
    Require(table->scan({scan, format, kGroup, kDim}, OnPool()));
    resident[i].resize(static_cast<size_t>((n + 63) / 64));
    for (int64_t j = 0; j < n / 4; ++j) {
      const int32_t p = source.Below(static_cast<int32_t>(n));
      resident[i][static_cast<size_t>(p / 64)] |= uint64_t{1} << (p % 64);
    }
  }
  std::vector<int32_t> chosen[kHeads];
  std::vector<float> lse(3 * kHeads * kGroup), pooled(static_cast<size_t>(kHeads * n), -100.0f);
  int32_t count[kHeads];
  const auto make = [&](size_t i, int h) {
    ChooseTask task;
    task.z = layers[i].z.data() + h * kGroup * n;
    task.z_stride = n;
    task.n = task.hi = static_cast<int32_t>(n);
    task.hi -= 32;
    task.sinks = task.lo = 8;
    task.k = k;
    if (ask == Ask::kResident) {
      task.resident = resident[i].data();
      task.log_theta = std::log(0.01f);
      task.pooled = pooled.data() + h * n;
    }
    if (ask == Ask::kDilated) {
      task.dilate_m = (k + 2) / 3;
      task.dilate_r = 1;
    }
    if (ask == Ask::kTarget) {
      task.err = layers[i].err.data() + h * kGroup * n;
      task.target_drop = 0.05f;
      task.cap = 4 * k;
      task.lse_out_bound = lse.data() + 2 * kHeads * kGroup + h * kGroup;
    }
    chosen[h].resize(static_cast<size_t>(task.max_chosen()));
    task.chosen = chosen[h].data();
    task.count = count + h;
    task.lse_all = lse.data() + h * kGroup;
    task.lse_out = lse.data() + kHeads * kGroup + h * kGroup;
    return task;
  };
  const int64_t bytes = kHeads * (kGroup * n * (ask == Ask::kTarget ? 8 : 4) + k * 4);
  const char* question = ask == Ask::kFixed      ? "the best 1/16 of all positions"
                         : ask == Ask::kResident ? "the best 1/16 of residents and heavy others, pooled"
                         : ask == Ask::kDilated  ? "the best 1/16 and the neighbours of a third"
                                                 : "1/16 and on to a proven drop of 0.05, at most 1/4";
  Time(state, layers.size(), bytes, question, [&](size_t i) {
    ChooseTask tasks[kHeads];
    for (int h = 0; h < kHeads; ++h) tasks[h] = make(i, h);
    Require(table->choose({tasks, kGroup}, OnPool()));
  });
  state.counters["kept"] = count[0];
}

void TopScores(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0);
  std::vector<Layer>& layers = LayersOf(n);
  Source source(10);
  for (Layer& layer : layers) {
    layer.z.resize(static_cast<size_t>(kHeads * kGroup * n));
    for (int64_t i = 0; i < kHeads * n; ++i) layer.z[static_cast<size_t>(i)] = 3 * source.Normal();
  }
  std::vector<int32_t> chosen(static_cast<size_t>(kHeads * n / 4));
  int32_t count[kHeads];
  Time(state, layers.size(), kHeads * n * 4, "positions of the best quarter of pooled scores", [&](size_t i) {
    TopKTask tasks[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      tasks[h] = {layers[i].z.data() + h * n, 0, static_cast<int32_t>(n), static_cast<int32_t>(n / 4),
                  chosen.data() + h * n / 4, count + h};
    }
    Require(table->top_k({tasks}, OnPool()));
  });
}

// --- the small ones -------------------------------------------------------------------------------------------------
void Gate(benchmark::State& state, const KernelTable* table) {
  std::vector<Layer>& layers = LayersOf(1024);
  float cosine[kHeads];
  Time(state, layers.size(), 2 * kHeads * kGroup * kDim * 4, "have the queries turned?", [&](size_t i) {
    GateTask tasks[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      const float* q = layers[i].q.data() + h * kGroup * kDim;
      tasks[h] = {q, layers[(i + 1) % layers.size()].q.data() + h * kGroup * kDim, cosine + h};
    }
    Require(table->gate({tasks, kGroup, kDim}, OnPool()));
  });
}

void AppendRows(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0), stride = kHeads * kDim;
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<float> k(static_cast<size_t>(n * stride)), v(k.size());
  Source source(11);
  for (float& x : k) x = source.Normal();
  for (float& x : v) x = source.Normal();
  std::vector<std::vector<Half>> rows(layers.size(), std::vector<Half>(layers[0].rows.size()));
  Time(state, layers.size(), kHeads * n * kRowBytes * 3, "fp32 K and V of a chunk to rows", [&](size_t i) {
    AppendTask tasks[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      tasks[h] = {k.data() + h * kDim, v.data() + h * kDim, stride, rows[i].data() + h * n * kRowHalves, static_cast<int32_t>(n)};
    }
    Require(table->append({tasks, kDim}, OnPool()));
  });
}

void GatherRows(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0), k = n / 16;
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<Half> slots(static_cast<size_t>(kHeads * k * kRowHalves));
  std::vector<std::vector<RowCopy>> copies(layers.size());
  Source source(12);
  for (size_t i = 0; i < layers.size(); ++i) {
    for (int64_t j = 0; j < kHeads * k; ++j) {
      copies[i].push_back({layers[i].rows.data() + int64_t{source.Below(static_cast<int32_t>(kHeads * n))} * kRowHalves,
                           slots.data() + j * kRowHalves});
    }
  }
  Time(state, layers.size(), 2 * kHeads * k * kRowBytes, "scattered rows to slots",
       [&](size_t i) { Require(table->gather({copies[i], kDim}, OnPool())); });
}

void ScorePageBounds(benchmark::State& state, const KernelTable* table) {
  const int64_t n = state.range(0), pages = n / 16;
  std::vector<Layer>& layers = LayersOf(n);
  std::vector<float> z(static_cast<size_t>(kHeads * kGroup * pages));
  // K of every other page serve as bounds: the values are of the right kind and lo <= hi does not matter for time.
  Time(state, layers.size(), kHeads * pages * kDim * 4, "bounds of every page", [&](size_t i) {
    ScorePagesTask tasks[kHeads];
    for (int h = 0; h < kHeads; ++h) {
      const Half* bounds = layers[i].head(h, n);
      tasks[h] = {layers[i].q.data() + h * kGroup * kDim, bounds, bounds + pages * kDim, static_cast<int32_t>(pages),
                  z.data() + h * kGroup * pages, pages};
    }
    Require(table->score_pages({tasks, kGroup, kDim}, OnPool()));
  });
}

void EmptyLoop(benchmark::State& state) {
  for (auto _ : state) pool->ParallelFor(8, [](int64_t i) { benchmark::DoNotOptimize(i); });
  state.SetLabel("what handing 8 empty bodies to the threads costs");
}

void Register(const KernelTable* table, int64_t n) {
  const auto add = [&](const char* name, auto fn, auto... args) {
    const std::string full = std::string(name) + "/" + std::string(table->name);
    benchmark::RegisterBenchmark(full.c_str(), fn, table, args...)->Arg(n)->Unit(benchmark::kMicrosecond)->UseRealTime();
  };
  add("attend_dense", AttendDense);
  add("attend_int8", AttendStored, RowFormat::kInt8);
  add("attend_e4m3", AttendStored, RowFormat::kE4m3);
  add("attend_chosen", AttendChosen);
  add("score", ScoreRows);
  add("scan_4bit_64", ScanCodes, CodeFormat{4, 64, false}, false);
  add("scan_4bit_64_err", ScanCodes, CodeFormat{4, 64, false}, true);
  add("scan_4bit_16_err_norms", ScanCodes, CodeFormat{4, 16, true}, true);
  add("scan_4bit_64_dither_err", ScanCodes, CodeFormat{4, 64, false, true}, true);
  add("scan_2bit_16", ScanCodes, CodeFormat{2, 16, false}, false);
  add("scan_3bit_16", ScanCodes, CodeFormat{3, 16, false}, false);
  add("scan_8bit_64", ScanCodes, CodeFormat{8, 64, false}, false);
  add("choose", ChoosePositions, Ask::kFixed);
  add("choose_resident", ChoosePositions, Ask::kResident);
  add("choose_dilated", ChoosePositions, Ask::kDilated);
  add("choose_target", ChoosePositions, Ask::kTarget);
  add("top_k", TopScores);
  add("encode_4bit_64", EncodeRows, CodeFormat{4, 64, false});
  add("encode_4bit_16_norms", EncodeRows, CodeFormat{4, 16, true});
  add("encode_4bit_64_dither", EncodeRows, CodeFormat{4, 64, false, true});
  add("append", AppendRows);
  add("gather", GatherRows);
  add("score_pages", ScorePageBounds);
  add("prefill", PrefillChunk);
  if (n == 1024) add("gate", Gate);
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) {
  int threads = 2;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg.rfind("--threads=", 0) == 0) {
      threads = std::atoi(arg.c_str() + 10);
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  auto created = prehoc::ThreadPool::Create({.loop_threads = threads});
  prehoc::Require(created.status());
  prehoc::pool = std::move(created).value();
  benchmark::RegisterBenchmark("empty_loop", prehoc::EmptyLoop)->Unit(benchmark::kMicrosecond)->UseRealTime();
  for (const int64_t n : {1024, 8192, 32768}) {
    for (const char* name : {"reference", "avx2", "avx512"}) {
      const prehoc::KernelTable* table = prehoc::FindKernels(name);
      // The reference is not there to be fast: one size shows what the vectors are worth.
      if (table != nullptr && (n == 1024 || std::string(name) != "reference")) prehoc::Register(table, n);
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  prehoc::pool.reset();
  return 0;
}
