// What does prefill cost, by its parts and as a whole, and what does offloading K and V behind it add?
//
//   prefill_bench --out=FILE.json [--commit=ID] [--tokens=16384] [--chunk=8192] [--layers=32] [--lengths=0,8192,24576,57344,122880] [--repeats=3]
//                 [--only=parts,whole] [--precision=fp32|half]
//
// parts: the products of one layer over a chunk of tokens, and causal attention of a chunk after `lengths` earlier tokens (128K is reached
// by 122,880 and a chunk of 8,192). Rates count each multiplication of the model once, whether
// the precision takes two or one.
// whole: a prompt of --tokens tokens in chunks through all layers of Llama-3.1-8B's shape (random weights), without offload and with it, in
// turns. With it a thread waits for each layer's K and V and posts them to CudaTransferEngine, 4 MiB a head; the prefill is over when the last
// byte is on the host. What is on the host is compared with the device.
// Nothing here is extrapolated: --tokens=131072 runs 128K, and takes as long as the kernels need.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/half.h"
#include "base/units.h"
#include "bench/gpu/support.h"
#include "bench/gpu/synthetic.h"
#include "integrations/reference/cuda/device_ops.h"
#include "kernels/cuda/run_kernels.h"
#include "transfer/cuda_transfer_engine.h"

namespace prehoc {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kGroup = kHeads / kKvHeads, kD = 128, kHidden = 4096, kIntermediate = 14336;
constexpr int kQkv = (kHeads + 2 * kKvHeads) * kD;
constexpr size_t kRow = 2 * kD;

struct Layer {
  Array<uint16_t> qkv{size_t{kQkv} * kHidden}, o{size_t{kHidden} * kHidden}, gate_up{size_t{2} * kIntermediate * kHidden}, down{size_t{kHidden} * kIntermediate};
};

class PrefillBench {
 public:
  PrefillBench(int tokens, int chunk, int layers, int longest, int repeats, PromptPrecision precision)
      : tokens_(tokens), chunk_(chunk), repeats_(repeats), precision_(precision), room_(std::max(tokens, longest + chunk)), stream_(OrExit(CudaStream::Create())),
        engine_(OrExit(CudaTransferEngine::Create())), norm_(size_t{kHidden}), input_(Of(kHidden)), x_(Of(kHidden)), normed_(Of(kHidden)), qkv_(Of(kQkv)), q_(Of(kHidden)),
        k_(Of(kKvHeads * kD)), v_(Of(kKvHeads * kD)), attended_(Of(kHidden)), gate_up_(Of(2 * kIntermediate)), gated_(Of(kIntermediate)), angles_(Of(kD)), workspace_(Of(kIntermediate)) {
    layers_.resize(size_t(layers));
    uint64_t seed = 1;
    const auto fill = [&](const Array<uint16_t>& w, int cols) { OrExit(FillNormal(w.data(), int64_t(w.size()), 1 / std::sqrt(float(cols)), seed++, Stream())); };
    for (const Layer& l : layers_) fill(l.qkv, kHidden), fill(l.o, kHidden), fill(l.gate_up, kHidden), fill(l.down, kIntermediate);
    OrExit(FillNormal(norm_.data(), kHidden, 1, 0.1f, seed++, Stream()));
    OrExit(FillNormal(input_.data(), int64_t(input_.size()), 0, 1, seed++, Stream()));
    // One table of angles for every chunk: which angle it is costs nothing.
    std::vector<float> angles(angles_.size());
    for (size_t i = 0; i < angles.size() / 2; ++i) angles[i] = std::cos(float(i)), angles[angles.size() / 2 + i] = std::sin(float(i));
    angles_.Write(angles);
    OrExit(stream_.Synchronize());
  }
  const Json& rows() const { return rows_; }

  void Parts(const std::vector<int>& lengths) {
    OrExit(FillNormal(gated_.data(), int64_t(gated_.size()), 0, 1, 91, Stream()));
    const Layer& l = layers_.front();
    Product("product qkv", l.qkv, input_, qkv_, kQkv, kHidden);
    Product("product o", l.o, input_, x_, kHidden, kHidden);
    Product("product gate and up", l.gate_up, input_, gate_up_, 2 * kIntermediate, kHidden);
    Product("product down", l.down, gated_, x_, kHidden, kIntermediate);
    // Attention: one layer's rows, as long as the longest case.
    const Array<Half> rows(size_t(kKvHeads) * size_t(room_) * kRow);
    OrExit(MakeKeys(rows.data(), 0, int64_t(kKvHeads) * room_, kD, 17, Stream()));
    OrExit(FillNormal(q_.data(), int64_t(q_.size()), 0, 2, 18, Stream()));
    OrExit(stream_.Synchronize());
    const auto tasks = Tasks(rows);
    for (const int first : lengths) {
      const auto run = [&] {
        OrExit(cuda::PrefillRuns({.tasks = tasks.data(), .num_tasks = kKvHeads, .queries = chunk_, .first = first, .group = kGroup, .head_dim = kD, .rows = rows.data(),
                                .pitch = int64_t(room_) * int64_t(kRow), .precision = precision_}, Stream()));
      };
      const Spread us = Time(run, first >= 32768 ? 1 : repeats_);
      const double keys = double(chunk_) * first + double(chunk_) * (chunk_ + 1) / 2;
      Report("attention", {{"first", first}, {"queries", chunk_}}, us, 4.0 * kD * kHeads * keys);
      rows_.back()["output_error_against_fp64"] = VerifyAttention(rows, first);
    }
  }

  void Whole() {
    const size_t units = layers_.size() * size_t(kKvHeads), head_bytes = size_t(tokens_) * kRow * sizeof(Half);
    const Array<Half> rows(units * size_t(tokens_) * kRow);
    const PinnedPool host(units * head_bytes);
    std::vector<CudaEvent> written;  // K and V of a layer of a chunk
    for (size_t i = 0; i < size_t(tokens_ / chunk_) * layers_.size(); ++i) written.push_back(OrExit(CudaEvent::Create()));
    std::vector<double> without, with;
    for (int i = 0; i < repeats_; ++i) {
      without.push_back(Run(rows, nullptr, written));
      with.push_back(Run(rows, &host, written));
      const Array<Half>& device = rows;
      for (size_t u = 0; u < units; u += 5) {
        const auto want = device.Read(u * size_t(tokens_) * kRow, size_t(tokens_) * kRow);
        if (std::memcmp(want.data(), host.data() + u * head_bytes, head_bytes) != 0) Fail({StatusCode::kCorrupt, "offload: head " + std::to_string(u) + " differs on the host"});
        if (std::all_of(want.begin(), want.end(), [](Half x) { return x == 0; })) Fail({StatusCode::kCorrupt, "prefill wrote no keys"});
      }
      std::memset(host.data(), 0x5a, host.size());
    }
    const Spread a = SpreadOf(without), b = SpreadOf(with);
    rows_.push_back({{"name", "prefill, all layers"}, {"tokens", tokens_}, {"chunk", chunk_}, {"layers", layers_.size()}, {"seconds", a.median}, {"seconds_least", a.least},
                     {"seconds_with_offload", b.median}, {"seconds_with_offload_least", b.least}, {"offload_over", b.median / a.median}, {"offloaded_bytes", host.size()}});
    std::printf("prefill of %d tokens in chunks of %d, %zu layers: %.3f s, with offload of %.2f GB %.3f s (%.4fx)\n", tokens_, chunk_, layers_.size(), a.median,
                double(host.size()) / 1e9, b.median, b.median / a.median);
  }

 private:
  size_t Of(int64_t width) const { return size_t(chunk_) * size_t(width); }
  cudaStream_t Stream() const { return stream_.get(); }
  Spread Time(const std::function<void()>& run, int repeats) const { return MeasureStream(Stream(), run, repeats, repeats > 1 ? 1 : 0); }
  void Report(const char* name, Json shape, const Spread& us, double flops) {
    Json row{{"name", name}};
    row.update(shape);
    row["us"] = us.median, row["us_least"] = us.least, row["us_most"] = us.most, row["tflops"] = flops / us.median / 1e6;
    rows_.push_back(row);
    std::printf("%-20s %-40s %12.1f us  %7.1f TFLOP/s\n", name, shape.dump().c_str(), us.median, flops / us.median / 1e6);
    std::fflush(stdout);
  }
  void Product(const char* name, const Array<uint16_t>& w, const Array<float>& x, const Array<float>& y, int rows, int cols) {
    const Spread us = Time([&] { OrExit(reference::MultiplyMatrix({.weights = w.data(), .x = x.data(), .y = y.data(), .workspace = workspace_.data(), .tokens = chunk_, .rows = rows, .cols = cols, .precision = precision_}, Stream())); },
                           repeats_);
    Report(name, {{"tokens", chunk_}, {"rows", rows}, {"cols", cols}}, us, 2.0 * chunk_ * rows * cols);
    double error = 0, all = 0;
    for (const int t : {0, chunk_ / 2 + 3, chunk_ - 1}) {
      const auto input = x.Read(size_t(t) * size_t(cols), size_t(cols));
      for (int r = 1; r < rows; r += rows / 11) {
        const auto weights = w.Read(size_t(r) * size_t(cols), size_t(cols));
        double sum = 0;
        for (size_t c = 0; c < size_t(cols); ++c) sum += double(input[c]) * HalfToFloat(weights[c]);
        const double off = sum - double(y.Read(size_t(t) * size_t(rows) + size_t(r), 1)[0]);
        error += off * off, all += sum * sum;
      }
    }
    rows_.back()["output_error_against_fp64"] = std::sqrt(error / all);
    if (!(std::sqrt(error / all) < 2e-3)) Fail({StatusCode::kCorrupt, std::string(name) + ": error " + std::to_string(std::sqrt(error / all))});
  }
  Array<cuda::RunPrefillTask> Tasks(const Array<Half>& rows, size_t layer = 0, size_t stride = 0) const {
    std::vector<cuda::RunPrefillTask> tasks;
    for (size_t h = 0; h < size_t{kKvHeads}; ++h) {
      tasks.push_back({.q = q_.data() + h * kGroup * kD, .q_stride = kHeads * kD, .out = attended_.data() + h * kGroup * kD, .out_stride = kHeads * kD,
                       .rows = rows.data() + (layer * kKvHeads + h) * (stride > 0 ? stride : size_t(room_)) * kRow});
    }
    return Array<cuda::RunPrefillTask>(tasks);
  }
  double VerifyAttention(const Array<Half>& rows, int first) const {
    double worst = 0;
    for (const auto& [t, head] : {std::pair{0, 0}, std::pair{chunk_ - 1, kHeads - 1}, std::pair{chunk_ / 3, 7}}) {
      const size_t at = size_t(t) * kHidden + size_t(head) * kD, n = size_t(first + t + 1);
      const auto q = q_.Read(at, kD), out = attended_.Read(at, kD);
      const auto keys = rows.Read(size_t(head / kGroup) * size_t(room_) * kRow, n * kRow);
      std::vector<double> z(n), want(kD, 0.0);
      for (size_t p = 0; p < n; ++p) {
        for (size_t c = 0; c < kD; ++c) z[p] += double(q[c]) * HalfToFloat(keys[p * kRow + c]) / std::sqrt(double(kD));
      }
      const double most = *std::max_element(z.begin(), z.end());
      double sum = 0, error = 0, norm = 0;
      for (size_t p = 0; p < n; ++p) {
        const double w = std::exp(z[p] - most);
        sum += w;
        for (size_t c = 0; c < kD; ++c) want[c] += w * HalfToFloat(keys[p * kRow + kD + c]);
      }
      for (size_t c = 0; c < kD; ++c) error += (want[c] / sum - out[c]) * (want[c] / sum - out[c]), norm += want[c] / sum * want[c] / sum;
      const double relative = std::sqrt(error / norm);
      if (!(relative < 5e-3)) Fail({StatusCode::kCorrupt, "prefill attention: error " + std::to_string(relative) + " at " + std::to_string(first + t)});
      worst = std::max(worst, relative);
    }
    return worst;
  }

  // A prompt; seconds until all is computed, and on the host if there is one.
  double Run(const Array<Half>& rows, const PinnedPool* host, const std::vector<CudaEvent>& written) {
    const size_t layers = layers_.size(), chunks = size_t(tokens_ / chunk_), stride = size_t(tokens_);
    std::vector<Array<cuda::RunPrefillTask>> attend;
    std::vector<Array<cuda::RunAppendTask>> append;
    for (size_t l = 0; l < layers; ++l) attend.push_back(Tasks(rows, l, stride));
    for (size_t i = 0; i < chunks * layers; ++i) {
      std::vector<cuda::RunAppendTask> tasks;
      for (size_t h = 0; h < size_t{kKvHeads}; ++h) {
        tasks.push_back({.k = k_.data() + h * kD, .v = v_.data() + h * kD, .stride = kKvHeads * kD,
                         .rows = rows.data() + ((i % layers * kKvHeads + h) * stride + i / layers * size_t(chunk_)) * kRow, .count = chunk_});
      }
      append.emplace_back(tasks);
    }
    std::atomic<size_t> recorded{0};
    const double start = Seconds();
    std::thread offload;
    if (host != nullptr) {
      offload = std::thread([&] {
        for (size_t i = 0; i < written.size(); ++i) {
          while (recorded.load(std::memory_order_acquire) <= i) std::this_thread::yield();
          OrExit(written[i].Synchronize());
          std::vector<TransferPiece> pieces;
          for (size_t h = 0; h < size_t{kKvHeads}; ++h) {
            const size_t at = ((i % layers * kKvHeads + h) * stride + i / layers * size_t(chunk_)) * kRow * sizeof(Half), size = size_t(chunk_) * kRow * sizeof(Half);
            // Not across two registrations.
            for (size_t from = 0; from < size; from += kMiB) {
              pieces.push_back({reinterpret_cast<const std::byte*>(rows.data()) + at + from, host->data() + at + from, std::min<size_t>(kMiB, size - from)});
            }
          }
          auto request = OrExit(engine_->Prepare(std::move(pieces)));
          OrExit(request.Post());
          OrExit(request.Wait());
        }
      });
    }
    for (size_t i = 0; i < chunks * layers; ++i) {
      if (i % layers == 0) Cuda(cudaMemcpyAsync(x_.data(), input_.data(), input_.bytes(), cudaMemcpyDeviceToDevice, Stream()), "input");
      OneLayer(layers_[i % layers], append[i], attend[i % layers], rows.data() + i % layers * size_t(kKvHeads) * size_t(tokens_) * kRow,
               int32_t(i / layers) * chunk_, written[i]);
      recorded.store(i + 1, std::memory_order_release);
    }
    OrExit(stream_.Synchronize());
    if (offload.joinable()) offload.join();
    return Seconds() - start;
  }
  void OneLayer(const Layer& l, const Array<cuda::RunAppendTask>& append, const Array<cuda::RunPrefillTask>& attend, const Half* kv, int32_t first,
                const CudaEvent& written) {
    const auto multiply = [&](const Array<uint16_t>& w, const Array<float>& x, const Array<float>& y, int rows, int cols, bool add) {
      OrExit(reference::MultiplyMatrix({.weights = w.data(), .x = x.data(), .y = y.data(), .add = add, .workspace = workspace_.data(), .tokens = chunk_, .rows = rows, .cols = cols, .precision = precision_}, Stream()));
    };
    OrExit(reference::NormRows(x_.data(), norm_.data(), 1e-5f, normed_.data(), chunk_, kHidden, Stream()));
    multiply(l.qkv, normed_, qkv_, kQkv, kHidden, false);
    OrExit(reference::RotateHeads({.qkv = qkv_.data(), .cos = angles_.data(), .sin = angles_.data() + angles_.size() / 2, .q = q_.data(), .k = k_.data(), .v = v_.data(),
                               .tokens = chunk_, .heads = kHeads, .kv_heads = kKvHeads, .head_dim = kD}, Stream()));
    OrExit(cuda::AppendRuns(append.data(), kKvHeads, chunk_, kD, Stream()));
    OrExit(written.Record(Stream()));
    OrExit(cuda::PrefillRuns({.tasks = attend.data(), .num_tasks = kKvHeads, .queries = chunk_, .first = first, .group = kGroup, .head_dim = kD,
                              .rows = kv, .pitch = int64_t(tokens_) * int64_t(kRow), .precision = precision_}, Stream()));
    multiply(l.o, attended_, x_, kHidden, kHidden, true);
    OrExit(reference::NormRows(x_.data(), norm_.data(), 1e-5f, normed_.data(), chunk_, kHidden, Stream()));
    multiply(l.gate_up, normed_, gate_up_, 2 * kIntermediate, kHidden, false);
    OrExit(reference::GateRows(gate_up_.data(), gated_.data(), chunk_, kIntermediate, Stream()));
    multiply(l.down, gated_, x_, kHidden, kIntermediate, true);
  }

  const int tokens_, chunk_, repeats_;
  const PromptPrecision precision_;
  const int room_;
  const CudaStream stream_;
  const std::unique_ptr<CudaTransferEngine> engine_;
  std::vector<Layer> layers_;
  Array<float> norm_, input_, x_, normed_, qkv_, q_, k_, v_, attended_, gate_up_, gated_, angles_, workspace_;
  Json rows_ = Json::array();
};

int Main(int argc, char** argv) {
  Flags flags("prefill_bench", argc, argv);
  const std::string out = flags.Text("out", ""), commit = flags.Text("commit", "unknown"), only = "," + flags.Text("only", "parts,whole") + ",";
  const int tokens = flags.Int("tokens", 16384), chunk = flags.Int("chunk", 8192), layers = flags.Int("layers", 32), repeats = flags.Int("repeats", 3);
  std::vector<int> lengths;
  for (const std::string& length : Split(flags.Text("lengths", "0,8192,24576,57344,122880"), ',')) lengths.push_back(std::stoi(length));
  const PromptPrecision precision = PrecisionOf(flags);
  flags.Finish();
  if (chunk < 64 || tokens % chunk != 0) Fail({StatusCode::kInvalid, "--tokens=" + std::to_string(tokens) + "; use a multiple of --chunk=" + std::to_string(chunk)});
  Json file = Header("prefill", flags, commit);
  file["model"] = "llama-3.1-8b", file["weights"] = "fp16", file["activations"] = "fp32", file["precision"] = PromptPrecisionName(precision);
  PrefillBench bench(tokens, chunk, layers, lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end()), repeats, precision);
  if (only.find(",parts,") != std::string::npos) bench.Parts(lengths);
  file["results"] = bench.rows();
  WriteJson(file, out);
  if (only.find(",whole,") != std::string::npos) bench.Whole();
  file["results"] = bench.rows();
  WriteJson(file, out);
  return 0;
}
}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
