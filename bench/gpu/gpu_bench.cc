// How close does each kernel of a decode step come to the bytes that it must move?
//
//   gpu_bench --out=FILE.json [--commit=ID] [--only=attend,select,dense,gather,append] [--repeats=N] [--pool-gib=32] [--by=any|logits|bars]
//
// A case is a CUDA graph of its launches, one after the other, each on buffers of its own ("layers"); together they are larger than
// the L2 cache, and every launch is counted. Time is that of the graph between two events, over its layers: the median of the
// repeats, with the least and the most beside it. `floor_us` is the bytes over the copy rate of this device, measured first.
// Numbers are random: keys normal, queries scaled so that the weights are heavy-tailed; chosen positions random and sorted.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/rng.h"
#include "bench/gpu/support.h"
#include "kernels/code_block.h"
#include "kernels/cuda/device_kernels.h"

namespace prehoc {
namespace {

class Bench {
 public:
  Bench(const std::string& only, int repeats) : only_("," + only + ","), repeats_(repeats), stream_(OrExit(CudaStream::Create())) {}
  cudaStream_t stream() const { return stream_.get(); }
  bool Wants(const std::string& what) const { return only_ == ",," || only_.find("," + what + ",") != std::string::npos; }

  // Of what `enqueue` enqueues, as one graph. [us]
  Spread Measure(const std::function<void()>& enqueue) { return Graph(stream(), enqueue).Measure(stream(), repeats_); }

  void Report(const std::string& name, const Json& shape, const Spread& times, int layers, double bytes, double floor_rate, int launches) {
    Json row{{"name", name}, {"shape", shape}};
    const double us = times.median / layers;
    row["us"] = us;
    row["us_least"] = times.least / layers;
    row["us_most"] = times.most / layers;
    row["launches"] = launches;
    row["bytes"] = bytes;
    row["gb_per_s"] = bytes / us / 1e3;
    row["floor_us"] = bytes / floor_rate / 1e3;
    row["over_floor"] = us / (bytes / floor_rate / 1e3);
    rows_.push_back(row);
    std::printf("%-28s %-72s %9.2f us  %8.1f GB/s  %5.2fx of floor\n", name.c_str(), shape.dump().c_str(), us, bytes / us / 1e3,
                us / (bytes / floor_rate / 1e3));
    std::fflush(stdout);
  }
  Json rows() const { return rows_; }
  step::SelectBy by = step::SelectBy::kAny;
  double rate = 0;  // [GB/s] of a copy on the device, read and write counted

 private:
  std::string only_;
  int repeats_;
  CudaStream stream_;
  Json rows_ = Json::array();
};

// Random fp16 numbers, the same few megabytes over and over: enough that no cache and no compression sees zeros.
void FillHalves(Half* to, size_t count, Rng& rng) {
  std::vector<Half> pattern(std::min<size_t>(count, size_t{1} << 22));
  for (Half& h : pattern) h = FloatToHalf(static_cast<float>(rng.Normal()));
  for (size_t at = 0; at < count; at += pattern.size()) {
    const size_t part = std::min(pattern.size(), count - at);
    OrExit(CudaStatus(cudaMemcpy(to + at, pattern.data(), part * sizeof(Half), cudaMemcpyDefault), "fill"));
  }
  OrExit(CudaStatus(cudaDeviceSynchronize(), "wait"));
}

void MeasureCopy(Bench& bench) {
  const size_t bytes = size_t{4} << 30;
  const Array<std::byte> from(bytes), to(bytes);
  const Spread t = bench.Measure([&] { OrExit(CudaStatus(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, bench.stream()), "copy")); });
  bench.rate = 2.0 * static_cast<double>(bytes) / t.median / 1e3;
  bench.Report("copy", {{"bytes", bytes}}, t, 1, 2.0 * static_cast<double>(bytes), bench.rate, 1);
}

std::vector<int32_t> RandomSorted(Rng& rng, int32_t limit, int32_t count) {
  std::vector<int32_t> all;
  std::vector<bool> taken(static_cast<size_t>(limit));
  while (static_cast<int32_t>(all.size()) < count) {
    const auto i = static_cast<int32_t>(rng.Int(0, limit - 1));
    if (!taken[static_cast<size_t>(i)]) taken[static_cast<size_t>(i)] = true, all.push_back(i);
  }
  std::sort(all.begin(), all.end());
  return all;
}

// attend to chosen rows in slots, a gate before it.
void AttendChosen(Bench& bench, int batch, int kv_heads, int group, int d, int32_t k, int32_t slots, int layers) {
  Rng rng(1);
  const int heads = batch * kv_heads;
  const size_t row = static_cast<size_t>(2 * d), head_rows = static_cast<size_t>(slots + 64);
  const Array<Half> rows(static_cast<size_t>(layers * heads) * head_rows * row);
  FillHalves(rows.data(), rows.size(), rng);
  const Array<float> q(rng.Normals(static_cast<size_t>(layers * heads * group * d)));
  const Array<float> out(q.size()), lse(q.size());
  std::vector<int32_t> refs;
  for (int i = 0; i < layers * heads; ++i) {
    const auto some = RandomSorted(rng, slots, k);
    refs.insert(refs.end(), some.begin(), some.end());
  }
  const Array<int32_t> device_refs(refs), count(std::vector<int32_t>{k}), n(std::vector<int32_t>{100'000});
  const Array<float> cosine(static_cast<size_t>(layers * heads));
  std::vector<cuda::AttendTask> tasks;
  std::vector<cuda::GateTask> gates;
  for (size_t i = 0; i < static_cast<size_t>(layers * heads); ++i) {
    const size_t at = i * static_cast<size_t>(group * d);
    tasks.push_back({.q = q.data() + at, .out = out.data() + at, .lse = lse.data() + i * static_cast<size_t>(group),
                     .rows = rows.data() + i * head_rows * row, .row_limit = static_cast<int64_t>(head_rows), .sink_row = slots,
                     .ring_row = slots, .ring_rows = 64, .n = n.data(), .refs = device_refs.data() + i * static_cast<size_t>(k),
                     .num_refs = count.data(), .refs_room = k});
    gates.push_back({.q = q.data() + at, .anchor = q.data() + (at + 17 * static_cast<size_t>(d)) % (q.size() - static_cast<size_t>(group * d)),
                     .cosine = cosine.data() + i});
  }
  const Array<cuda::AttendTask> device_tasks(tasks);
  const Array<cuda::GateTask> device_gates(gates);
  cuda::AttendParams params{.num_tasks = heads, .max_rows = k, .group = group, .head_dim = d};
  params.tasks = device_tasks.data();
  const Array<std::byte> workspace(OrExit(cuda::AttendWorkspaceBytes(params)));
  params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  const double bytes = static_cast<double>(heads) * k * static_cast<double>(row) * 2;
  const Json shape{{"batch", batch}, {"kv_heads", kv_heads}, {"group", group}, {"head_dim", d}, {"k", k}, {"layers", layers}};
  for (const bool gate : {false, true}) {
    const Spread t = bench.Measure([&] {
      for (int layer = 0; layer < layers; ++layer) {
        params.tasks = device_tasks.data() + layer * heads;
        if (gate) {
          OrExit(cuda::Gate({.tasks = device_gates.data() + layer * heads, .num_tasks = heads, .group = group, .head_dim = d, .tau = 0.8f},
                        bench.stream()));
        }
        OrExit(cuda::Attend(params, bench.stream()));
      }
    });
    bench.Report(gate ? "gate + attend chosen" : "attend chosen", shape, t, layers, bytes, bench.rate, gate ? 2 : 1);
  }
}

void Dense(Bench& bench, int batch, int kv_heads, int group, int d, int32_t n) {
  Rng rng(2);
  const int heads = batch * kv_heads;
  const size_t row = static_cast<size_t>(2 * d);
  const double layer_bytes = static_cast<double>(heads) * n * static_cast<double>(row) * 2;
  // Several times the L2 cache, and a launch's worth at least.
  const int layers = std::clamp(static_cast<int>(1.2e9 / layer_bytes), 2, 32);
  const Array<Half> rows(static_cast<size_t>(layers * heads) * static_cast<size_t>(n) * row);
  FillHalves(rows.data(), rows.size(), rng);
  const Array<float> q(rng.Normals(static_cast<size_t>(layers * heads * group * d)));
  const Array<float> out(q.size());
  const Array<int32_t> length(std::vector<int32_t>{n});
  std::vector<cuda::AttendTask> tasks;
  for (size_t i = 0; i < static_cast<size_t>(layers * heads); ++i) {
    const size_t at = i * static_cast<size_t>(group * d);
    tasks.push_back({.q = q.data() + at, .out = out.data() + at, .rows = rows.data() + i * static_cast<size_t>(n) * row, .row_limit = n,
                     .ring_rows = n + 1, .local = n, .n = length.data()});
  }
  const Array<cuda::AttendTask> device_tasks(tasks);
  cuda::AttendParams params{.num_tasks = heads, .max_rows = n, .group = group, .head_dim = d};
  params.tasks = device_tasks.data();
  const Array<std::byte> workspace(OrExit(cuda::AttendWorkspaceBytes(params)));
  params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  const Spread t = bench.Measure([&] {
    for (int layer = 0; layer < layers; ++layer) {
      params.tasks = device_tasks.data() + layer * heads;
      OrExit(cuda::Attend(params, bench.stream()));
    }
  });
  bench.Report("dense attend", {{"batch", batch}, {"kv_heads", kv_heads}, {"group", group}, {"head_dim", d}, {"n", n}, {"layers", layers}}, t,
               layers, layer_bytes, bench.rate, 1);
}

// Codes of random keys, made by append.
void Select(Bench& bench, int kv_heads, int group, int d, int32_t n, int bits, int32_t k, bool lse_out, bool scan_too = false) {
  Rng rng(3);
  const CodeFormat format{bits, 64, false};
  const size_t head_bytes = LayoutOf(format, d).bytes * static_cast<size_t>(n / 64);
  const double layer_bytes = static_cast<double>(head_bytes) * kv_heads;
  const int layers = std::clamp(static_cast<int>(8e8 / layer_bytes), 2, 16);
  const Array<std::byte> blocks(head_bytes * static_cast<size_t>(layers * kv_heads));
  constexpr int32_t kRing = 4096 + 64;
  const Array<Half> ring(static_cast<size_t>(kRing * 2 * d));
  const Array<float> keys(rng.Normals(static_cast<size_t>(8192 * d + 4096)));
  {
    constexpr int32_t kPart = 4096;
    for (size_t head = 0; head < static_cast<size_t>(layers * kv_heads); ++head) {
      for (int32_t at = 0; at < n; at += kPart) {
        const Array<int32_t> position(std::vector<int32_t>{at});
        const Array<cuda::AppendTask> one(std::vector<cuda::AppendTask>{
            {.k = keys.data() + rng.Int(0, 4096 * d), .v = keys.data(), .stride = d, .first = position.data(), .rows = ring.data(),
             .ring_rows = kRing / 64 * 64, .count = std::min(kPart, n - at), .blocks = blocks.data() + head * head_bytes}});
        OrExit(cuda::Append({.tasks = one.data(), .num_tasks = 1, .max_count = kPart, .format = format, .head_dim = d}, bench.stream()));
        OrExit(CudaStatus(cudaStreamSynchronize(bench.stream()), "append"));
      }
    }
  }
  const Array<float> q(rng.Normals(static_cast<size_t>(layers * kv_heads * group * d), 2));
  const Array<int32_t> length(std::vector<int32_t>{n}), chosen(static_cast<size_t>(layers * kv_heads * k)), count(static_cast<size_t>(layers * kv_heads));
  const Array<float> all(static_cast<size_t>(layers * kv_heads * group)), out(all.size());
  std::vector<cuda::SelectTask> tasks;
  for (size_t i = 0; i < static_cast<size_t>(layers * kv_heads); ++i) {
    cuda::ChooseRule rule{.sinks = 8, .local = 32, .k = k, .room = k, .chosen = chosen.data() + i * static_cast<size_t>(k),
                          .count = count.data() + i, .lse_all = all.data() + i * static_cast<size_t>(group)};
    if (lse_out) rule.lse_out = out.data() + i * static_cast<size_t>(group);
    tasks.push_back({.source = {.q = q.data() + i * static_cast<size_t>(group * d), .blocks = blocks.data() + i * head_bytes, .rows = ring.data(),
                                .ring_rows = 64, .n = length.data()},
                     .rule = rule});
  }
  if (scan_too) {
    const int64_t stride = n;
    const Array<float> z(static_cast<size_t>(layers * kv_heads * group) * static_cast<size_t>(stride));
    std::vector<cuda::ScanTask> scans;
    for (size_t i = 0; i < tasks.size(); ++i) {
      scans.push_back({.source = tasks[i].source, .z = z.data() + i * static_cast<size_t>(group * stride), .z_stride = stride});
    }
    const Array<cuda::ScanTask> device_scans(scans);
    const Spread t = bench.Measure([&] {
      for (int layer = 0; layer < layers; ++layer) {
        OrExit(cuda::Scan({.tasks = device_scans.data() + layer * kv_heads, .num_tasks = kv_heads, .max_n = n, .format = format, .group = group,
                       .head_dim = d}, bench.stream()));
      }
    });
    bench.Report("scan, logits to memory", {{"kv_heads", kv_heads}, {"group", group}, {"head_dim", d}, {"n", n}, {"bits", bits}, {"layers", layers}}, t,
                 layers, layer_bytes + 4.0 * kv_heads * group * n, bench.rate, 1);
  }
  const Array<cuda::SelectTask> device(tasks);
  cuda::SelectParams params{.num_tasks = kv_heads, .max_n = n, .format = format, .group = group, .head_dim = d};
  params.by = bench.by;
  Array<int32_t> restarts(std::vector<int32_t>{0});
  params.tasks = device.data(), params.restarts = restarts.data();
  const Array<std::byte> workspace(OrExit(cuda::SelectWorkspaceBytes(params)));
  params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  const auto all_layers = [&] {
    for (int layer = 0; layer < layers; ++layer) {
      params.tasks = device.data() + layer * kv_heads;
      OrExit(cuda::Select(params, bench.stream()));
    }
  };
  const Spread t = bench.Measure(all_layers);
  restarts.Write({0});
  all_layers();
  OrExit(CudaStatus(cudaStreamSynchronize(bench.stream()), "select"));
  std::vector<int32_t> counts(count.size());
  OrExit(CudaStatus(cudaMemcpy(counts.data(), count.data(), counts.size() * 4, cudaMemcpyDefault), "read"));
  for (const int32_t c : counts) {
    if (c != k) Fail({StatusCode::kCorrupt, "select chose " + std::to_string(c) + " of " + std::to_string(k)});
  }
  bench.Report(lse_out ? "select + lse_out" : "select", {{"kv_heads", kv_heads}, {"group", group}, {"head_dim", d}, {"n", n}, {"bits", bits}, {"k", k},
               {"layers", layers}, {"restarted", double(restarts.Read()[0]) / (layers * kv_heads)}}, t, layers, layer_bytes, bench.rate, 1);
}

void Append(Bench& bench, int kv_heads, int d, bool encodes) {
  Rng rng(4);
  constexpr int kLayers = 32;
  const CodeFormat format{4, 64, false};
  const size_t block = LayoutOf(format, d).bytes;
  const Array<float> keys(rng.Normals(static_cast<size_t>(kLayers * kv_heads * d)));
  const Array<Half> rows(static_cast<size_t>(kLayers * kv_heads) * 128 * static_cast<size_t>(2 * d));
  FillHalves(rows.data(), rows.size(), rng);
  const Array<std::byte> blocks(static_cast<size_t>(kLayers * kv_heads) * block * 2);
  const Array<int32_t> first(std::vector<int32_t>{encodes ? 127 : 100});
  std::vector<cuda::AppendTask> tasks;
  for (size_t i = 0; i < static_cast<size_t>(kLayers * kv_heads); ++i) {
    tasks.push_back({.k = keys.data() + i * static_cast<size_t>(d), .v = keys.data() + i * static_cast<size_t>(d), .stride = d, .first = first.data(),
                     .rows = rows.data() + i * 128 * static_cast<size_t>(2 * d), .ring_rows = 128, .count = 1, .blocks = blocks.data() + i * block * 2});
  }
  const Array<cuda::AppendTask> device(tasks);
  const Spread t = bench.Measure([&] {
    for (int layer = 0; layer < kLayers; ++layer) {
      OrExit(cuda::Append({.tasks = device.data() + layer * kv_heads, .num_tasks = kv_heads, .max_count = 1, .format = format, .head_dim = d}, bench.stream()));
    }
  });
  const double bytes = kv_heads * (encodes ? 64.0 * 2 * d + static_cast<double>(block) : 4.0 * d);
  bench.Report(encodes ? "append + encode" : "append", {{"kv_heads", kv_heads}, {"head_dim", d}, {"layers", kLayers}}, t, kLayers, bytes, bench.rate, 1);
}

void Gather(Bench& bench, const PinnedPool& pool, size_t footprint, int32_t piece, int32_t count, int blocks, bool sorted) {
  Rng rng(5);
  constexpr int kRounds = 4;
  const auto limit = static_cast<int64_t>(footprint) / piece;
  const int64_t offset = (static_cast<int64_t>(pool.size() - footprint) / 2) & ~int64_t{4095};
  std::vector<int32_t> from, to;
  for (int r = 0; r < kRounds; ++r) {
    std::vector<int32_t> part;
    for (int32_t i = 0; i < count; ++i) part.push_back(static_cast<int32_t>(rng.Int(0, limit - 1)));
    if (sorted) std::sort(part.begin(), part.end());
    from.insert(from.end(), part.begin(), part.end());
    for (int32_t i = 0; i < count; ++i) to.push_back(i);
  }
  const Array<int32_t> device_from(from), device_to(to), device_count(std::vector<int32_t>{count});
  const Array<std::byte> slots(static_cast<size_t>(count) * static_cast<size_t>(piece));
  std::vector<cuda::GatherTask> tasks;
  for (int r = 0; r < kRounds; ++r) {
    tasks.push_back({.from = pool.data() + offset, .to = slots.data(), .from_piece = device_from.data() + int64_t{r} * count,
                     .to_piece = device_to.data() + int64_t{r} * count, .count = device_count.data(), .from_limit = limit, .to_limit = count});
  }
  const Array<cuda::GatherTask> device(tasks);
  const Spread t = bench.Measure([&] {
    for (int r = 0; r < kRounds; ++r) {
      OrExit(cuda::Gather({.tasks = device.data() + r, .num_tasks = 1, .piece_bytes = piece, .max_blocks = blocks}, bench.stream()));
    }
  });
  bench.Report("gather", {{"footprint_gib", static_cast<double>(footprint) / (1 << 30)}, {"piece", piece}, {"count", count}, {"blocks", blocks},
               {"sorted", sorted}}, t, kRounds, static_cast<double>(count) * piece, 54.8, 1);
}

int Main(int argc, char** argv) {
  Flags flags("gpu_bench", argc, argv);
  const std::string path = flags.Text("out", ""), commit = flags.Text("commit", "unknown"), only = flags.Text("only", "");
  const int repeats = flags.Int("repeats", 21), pool_gib = flags.Int("pool-gib", 32);
  const std::string by = flags.Text("by", "any");
  flags.Finish();
  Json file = Header("kernels", flags, commit);
  Bench bench(only, repeats);
  if (by != "any" && by != "logits" && by != "bars") Fail({StatusCode::kInvalid, "--by=" + by + ": use any, logits or bars"});
  bench.by = by == "logits" ? step::SelectBy::kLogits : by == "bars" ? step::SelectBy::kBars : step::SelectBy::kAny;
  MeasureCopy(bench);
  if (bench.Wants("attend")) {
    for (const int32_t k : {256, 1024, 2048, 4096}) AttendChosen(bench, 1, 8, 4, 128, k, 8192, 32);
    for (const int32_t batch : {8, 16}) {
      for (const int32_t n : {1024, 2048, 4096}) AttendChosen(bench, batch, 32, 1, 128, n / 8, n, batch * n > 16384 ? 4 : 8);
    }
  }
  if (bench.Wants("select")) {
    for (const int bits : {4, 2}) {
      Select(bench, 8, 4, 128, 131072, bits, 2048, false, true);
      Select(bench, 8, 4, 128, 131072, bits, 2048, true);
      Select(bench, 8, 4, 128, 1048576, bits, 2048, false);
      Select(bench, 8, 4, 128, 1048576, bits, 2048, true);
      Select(bench, 8, 4, 128, 32768, bits, 2048, false);
      Select(bench, 32, 4, 128, 131072, bits, 2048, true);  // four sequences
      Select(bench, 64, 4, 128, 32768, bits, 2048, true);   // eight
    }
  }
  if (bench.Wants("dense")) {
    for (const int32_t batch : {8, 16}) {
      for (const int32_t n : {1024, 2048, 4096}) Dense(bench, batch, 32, 1, 128, n);
    }
    for (const int32_t n : {8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576}) Dense(bench, 1, 8, 4, 128, n);
  }
  if (bench.Wants("append")) {
    Append(bench, 8, 128, false);
    Append(bench, 8, 128, true);
  }
  if (bench.Wants("gather")) {
    const PinnedPool pool(static_cast<size_t>(pool_gib) << 30);
    pool.Fill(bench.stream());
    for (const bool sorted : {false, true}) {
      for (const int32_t piece : {512, 1024, 2048, 8192}) Gather(bench, pool, pool.size(), piece, (64 << 20) / piece, 16, sorted);
      Gather(bench, pool, size_t{512} << 20, 512, 131072, 16, sorted);
      Gather(bench, pool, size_t{512} << 20, 512, 512, 16, sorted);  // 64 rows of 8 heads of one layer
      Gather(bench, pool, pool.size(), 512, 512, 16, sorted);
    }
    for (const int blocks : {4, 8, 32, 64}) Gather(bench, pool, pool.size(), 2048, 32768, blocks, true);
  }
  file["copy_gb_per_s"] = bench.rate;
  file["results"] = bench.rows();
  WriteJson(file, path);
  return 0;
}

}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
