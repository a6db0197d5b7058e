// How long does a decode step take with two clocks, beside the weights alone and beside dense attention with all of K and V on the device?
//
//   decode_bench --out=FILE.json [--commit=ID] [--model=llama-3.1-8b] [--context=131072] [--cases=weights,dense,scan4,gate4,...] [--steps=N]
//                [--k=2048] [--factor=4] [--refresh=64] [--theta=0.001]
//
// A step is a CUDA graph: every product of every layer (random fp16 weights), norms, RoPE, append with codes, and attention; logits at the
// end. Two clocks: gate, scan of all codes and choice, look-up of rows, attention over sinks, chosen rows and the local window; a chosen row
// that is in no slot is read from pinned host memory within the step. The slow clock turns a 1 / refresh of the heads a step: what is wanted
// is chosen beside the step, evicted at its end, gathered beside the next one and used from the one after on (lag 1 step, 2 at most).
// There is one graph for each turn of the slow clock. K, V and queries are made up (synthetic.h) and the queries of the model are replaced by
// them, because random weights have no attention to speak of. Times are of whole replays between two events, host launch included.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/stream.h"
#include "base/half.h"
#include "base/units.h"
#include "bench/gpu/synthetic.h"
#include "bench/or_exit.h"
#include "integrations/reference/cuda/device_ops.h"
#include "kernels/code_block.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/run_kernels.h"

namespace prehoc {
namespace {
using Json = nlohmann::ordered_json;

void Cuda(cudaError_t error, const char* what) { OrExit(CudaStatus(error, what)); }
size_t device_bytes = 0;  // allocated now
template <class T>
class Array {
 public:
  explicit Array(size_t size) : bytes_(OrExit(CudaBytes::Create(CudaPlace::kDevice, std::max<size_t>(size, 1) * sizeof(T)))), size_(size) {
    Cuda(cudaMemset(bytes_.data(), 0, bytes_.size()), "memset");
    device_bytes += bytes_.size();
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) { Write(values); }
  Array(Array&&) = default;
  ~Array() { if (bytes_.data() != nullptr) device_bytes -= bytes_.size(); }
  void Write(const std::vector<T>& values) { Cuda(cudaMemcpy(bytes_.data(), values.data(), values.size() * sizeof(T), cudaMemcpyDefault), "copy"); }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    Cuda(cudaMemcpy(values.data(), bytes_.data(), size_ * sizeof(T), cudaMemcpyDefault), "read");
    return values;
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  size_t size() const { return size_; }

 private:
  CudaBytes bytes_;
  size_t size_;
};
double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Shape {
  std::string name;
  int layers, heads, kv_heads, d, hidden, intermediate, vocab;
  int group() const { return heads / kv_heads; }
  int units() const { return layers * kv_heads; }
};
Shape ShapeOf(const std::string& name) {
  for (const Shape& s : {Shape{"llama-3.1-8b", 32, 32, 8, 128, 4096, 14336, 128256}, Shape{"llama-2-7b", 32, 32, 32, 128, 4096, 11008, 32000},
                         Shape{"mistral-7b", 32, 32, 8, 128, 4096, 14336, 32768}, Shape{"qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936},
                         Shape{"tiny", 2, 8, 2, 128, 512, 1024, 1000}}) {
    if (s.name == name) return s;
  }
  Fail({StatusCode::kInvalid, "--model=" + name + "; use llama-3.1-8b, llama-2-7b, mistral-7b, qwen3-8b or tiny"});
}

// Pinned host memory in huge pages: mapped, touched by all CPUs, registered piece by piece. Says how fast.
class PinnedPool {
 public:
  explicit PinnedPool(size_t size) : size_(RoundUp(size, size_t{2} << 20)) {
    const double start = Seconds();
    void* const at = ::mmap(nullptr, size_ + (size_t{2} << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) Fail({StatusCode::kOutOfSpace, "mmap of the host pool"});
    data_ = reinterpret_cast<std::byte*>(RoundUp(reinterpret_cast<uintptr_t>(at), uintptr_t{2} << 20));
    ::madvise(data_, size_, MADV_HUGEPAGE);
    const unsigned num = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < num; ++i) {
      threads.emplace_back([&, i] {
        for (size_t page = i; page < size_ >> 21; page += num) {
          for (size_t small = 0; small < size_t{2} << 20; small += 4096) data_[(page << 21) + small] = std::byte{1};
        }
      });
    }
    for (auto& thread : threads) thread.join();
    touch_seconds = Seconds() - start;
    for (size_t from = 0; from < size_; from += kPiece) {
      Cuda(cudaHostRegister(data_ + from, std::min(kPiece, size_ - from), cudaHostRegisterPortable | cudaHostRegisterMapped), "cudaHostRegister");
      if (from == 0) first_piece_seconds = Seconds() - start;
    }
    seconds = Seconds() - start;
  }
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  // A copy may not cross from one registration into the next (kernels may).
  void CopyHere(std::byte* to, const std::byte* from, size_t size, cudaStream_t stream) const {
    while (size > 0) {
      const size_t at = static_cast<size_t>(to - data_), part = std::min(size, (at / kPiece + 1) * kPiece - at);
      Cuda(cudaMemcpyAsync(to, from, part, cudaMemcpyDeviceToHost, stream), "to host");
      to += part, from += part, size -= part;
    }
  }
  double seconds = 0, touch_seconds = 0, first_piece_seconds = 0;

 private:
  static constexpr size_t kPiece = size_t{256} << 20;
  size_t size_;
  std::byte* data_ = nullptr;
};

struct LayerWeights {
  Array<uint16_t> qkv, o, gate_up, down;
  Array<float> norm1, norm2;
};

struct Case {
  std::string name;
  enum class Kind { kWeights, kDense, kTwoClock } kind = Kind::kWeights;
  int bits = 4;
  float tau = 1;  // at 1 every step scans
  float theta = 0.001f;  // a missing position lighter than this is left out, and counted as dropped
  int32_t context = 0, k = 0, factor = 4, refresh = 64, max_age = 16;
};

class Model {
 public:
  Model(const Shape& shape, cudaStream_t stream) : s(shape), output(size_t(shape.vocab) * size_t(shape.hidden)), output_norm(size_t(shape.hidden)) {
    uint64_t seed = 1;
    const auto fill = [&](const Array<uint16_t>& w, int cols) {
      OrExit(FillNormal(w.data(), static_cast<int64_t>(w.size()), 1 / std::sqrt(static_cast<float>(cols)), seed++, stream));
    };
    const auto ones = [&](const Array<float>& w) { OrExit(FillNormal(w.data(), static_cast<int64_t>(w.size()), 1, 0.1f, seed++, stream)); };
    const auto h = static_cast<size_t>(s.hidden), m = static_cast<size_t>(s.intermediate), q = static_cast<size_t>(s.heads * s.d),
               kv = static_cast<size_t>(s.kv_heads * s.d);
    for (int l = 0; l < s.layers; ++l) {
      layers.push_back({Array<uint16_t>((q + 2 * kv) * h), Array<uint16_t>(h * q), Array<uint16_t>(2 * m * h), Array<uint16_t>(h * m), Array<float>(h), Array<float>(h)});
      const LayerWeights& w = layers.back();
      fill(w.qkv, s.hidden), fill(w.o, s.heads * s.d), fill(w.gate_up, s.hidden), fill(w.down, s.intermediate), ones(w.norm1), ones(w.norm2);
    }
    fill(output, s.hidden), ones(output_norm);
    Cuda(cudaStreamSynchronize(stream), "weights");
    for (const LayerWeights& w : layers) bytes += 2 * (w.qkv.size() + w.o.size() + w.gate_up.size() + w.down.size());
    bytes += 2 * output.size();
  }
  const Shape s;
  std::vector<LayerWeights> layers;
  Array<uint16_t> output;
  Array<float> output_norm;
  size_t bytes = 0;  // that a step reads
};

// The state of a step and what is enqueued for it.
class Step {
 public:
  static constexpr int kQuerySteps = 96, kSinks = 8, kLocal = 32, kRing = 128;

  Step(const Model& model, const Case& which, const PinnedPool* pool, cudaStream_t stream)
      : m_(model), s_(model.s), c_(which), stream_(stream), side_(OrExit(CudaStream::Create())), fork_(OrExit(CudaEvent::Create())),
        join_(OrExit(CudaEvent::Create())), start_(OrExit(CudaEvent::Create(CudaEvent::Timing::kOn))), end_(OrExit(CudaEvent::Create(CudaEvent::Timing::kOn))),
        input_(size_t(s_.hidden)), hidden_(size_t(s_.hidden)), qkv_(size_t((s_.heads + 2 * s_.kv_heads) * s_.d)), q_model_(size_t(s_.heads * s_.d)),
        k_(size_t(s_.kv_heads * s_.d)), v_(size_t(s_.kv_heads * s_.d)), out_(size_t(s_.heads * s_.d)), gated_(size_t(s_.intermediate)),
        logits_(size_t(s_.vocab)), angles_(size_t(s_.d)), q_now_(size_t(s_.layers * s_.heads * s_.d)),
        q_all_(which.kind == Case::Kind::kWeights ? 1 : size_t(kQuerySteps) * q_now_.size()), n_(std::vector<int32_t>{which.context}), step_(1) {
    before_ = device_bytes;
    OrExit(FillNormal(input_.data(), s_.hidden, 0, 1, 77, stream_));
    std::vector<float> angles(size_t(s_.d), 1.0f);
    for (int i = 0; i < s_.d / 2; ++i) angles[size_t(i)] = std::cos(float(i)), angles[size_t(s_.d / 2 + i)] = std::sin(float(i));
    angles_.Write(angles);
    if (c_.kind == Case::Kind::kWeights) return;
    QueryStatistics statistics;
    OrExit(MakeQueries(q_all_.data(), kQuerySteps, s_.units(), s_.group() * s_.d, statistics, 5, stream_));
    Cuda(cudaStreamSynchronize(stream_), "queries");
    max_n_ = static_cast<int32_t>(RoundUp(uint64_t(c_.context) + 1024, 64));
    kv_before_ = device_bytes;
    if (c_.kind == Case::Kind::kDense) MakeDense();
    else MakeTwoClock(*pool);
    kv_bytes_ = device_bytes - kv_before_;
  }
  ~Step() {
    for (cudaGraphExec_t graph : graphs_) cudaGraphExecDestroy(graph);
  }

  void Capture() {
    const int variants = c_.kind == Case::Kind::kTwoClock ? c_.refresh : 1;
    for (int phase = 0; phase < variants; ++phase) {
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t run = nullptr;
      Cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "begin capture");
      Enqueue(phase);
      Cuda(cudaStreamEndCapture(stream_, &graph), "end capture");
      size_t nodes = 0;
      Cuda(cudaGraphGetNodes(graph, nullptr, &nodes), "nodes");
      nodes_ = static_cast<int>(nodes);
      Cuda(cudaGraphInstantiate(&run, graph, 0), "instantiate");
      Cuda(cudaGraphDestroy(graph), "destroy");
      graphs_.push_back(run);
    }
  }

  Json Measure(int warm, int steps) {
    for (int i = 0; i < warm; ++i) Run(false);
    Cuda(cudaStreamSynchronize(stream_), "warm");
    const int64_t misses0 = Sum(misses_), held0 = holds_seen_, asked0 = holds_asked_;
    rows_behind_ = 0;
    std::vector<double> ms;
    for (int i = 0; i < steps; ++i) ms.push_back(Run(true));
    // Back to back, as a server would run them.
    OrExit(start_.Record(stream_));
    const double host = Seconds();
    for (int i = 0; i < steps; ++i) Cuda(cudaGraphLaunch(Next(), stream_), "launch");
    const double enqueued = Seconds() - host;
    OrExit(end_.Record(stream_));
    OrExit(end_.Synchronize());
    const double back_to_back = double(OrExit(end_.MillisecondsSince(start_))) / steps;
    std::vector<double> sorted = ms;
    std::sort(sorted.begin(), sorted.end());
    Json row{{"name", c_.name}, {"context", c_.context}, {"ms_median", sorted[sorted.size() / 2]}, {"ms_least", sorted.front()},
             {"ms_most", sorted.back()}, {"ms_back_to_back", back_to_back}, {"host_us_per_launch", enqueued / steps * 1e6}, {"steps", steps},
             {"graph_nodes", nodes_}, {"weight_bytes", m_.bytes}};
    if (c_.kind != Case::Kind::kWeights) row["kv_device_bytes"] = kv_bytes_;
    if (c_.kind == Case::Kind::kTwoClock) {
      const double triples = double(steps) * s_.units();
      row["bits"] = c_.bits, row["tau"] = c_.tau, row["k"] = c_.k, row["factor"] = c_.factor, row["refresh"] = c_.refresh, row["max_age"] = c_.max_age;
      row["slots"] = slots_, row["theta"] = c_.theta;
      // What the last choices left out, by the codes.
      double dropped = 0;
      const auto lse = lse_->Read();
      for (int unit = 0; unit < s_.units(); ++unit) {
        for (int g = 0; g < s_.group(); ++g) dropped += std::exp(double(lse[size_t((2 * unit + 1) * s_.group() + g)]) - double(lse[size_t(2 * unit * s_.group() + g)]));
      }
      row["dropped_mass_estimated"] = dropped / (s_.units() * s_.group());
      row["rho"] = 1 - double(holds_seen_ - held0) / double(std::max<int64_t>(1, holds_asked_ - asked0));
      row["rows_in_step_per_head"] = double(Sum(misses_) - misses0) / 2 / triples;  // the second loop steps as often
      row["rows_behind_per_step"] = double(rows_behind_) / steps;
    }
    return row;
  }

  // The last step's attention of some heads against fp64 over the rows that host memory has.
  double Verify() {
    if (c_.kind != Case::Kind::kTwoClock) return 0;
    double worst = 0;
    const auto q = q_now_.Read();
    const auto out = out_.Read();  // of the last layer
    const auto counts = count_->Read(), chosen = chosen_->Read();
    const int32_t n = n_.Read()[0];
    for (int h = 0; h < s_.kv_heads; ++h) {
      const int unit = (s_.layers - 1) * s_.kv_heads + h;
      if (counts[size_t(unit)] < (c_.theta > 0 ? 1 : c_.k) || counts[size_t(unit)] > c_.k) Fail({StatusCode::kCorrupt, "unit " + std::to_string(unit) + " chose " + std::to_string(counts[size_t(unit)])});
      std::vector<Half> ring(size_t(kSinks + kRing) * Row());
      Cuda(cudaMemcpy(ring.data(), Rows(unit), ring.size() * sizeof(Half), cudaMemcpyDefault), "ring");
      std::vector<const Half*> rows;
      const auto add = [&](int32_t p) { rows.push_back(p >= n - kRing ? ring.data() + size_t(kSinks + p % kRing) * Row() : Host(unit) + size_t(p) * Row()); };
      for (int32_t p = 0; p < kSinks; ++p) add(p);
      for (int32_t i = 0; i < counts[size_t(unit)]; ++i) add(chosen[size_t(unit) * size_t(c_.k) + size_t(i)]);
      for (int32_t p = n - kLocal; p < n; ++p) add(p);
      for (int g = 0; g < s_.group(); ++g) {
        const float* const query = q.data() + (size_t(unit) * size_t(s_.group()) + size_t(g)) * size_t(s_.d);
        std::vector<double> z;
        for (const Half* row : rows) {
          double dot = 0;
          for (int c = 0; c < s_.d; ++c) dot += double(query[c]) * HalfToFloat(row[c]);
          z.push_back(dot / std::sqrt(double(s_.d)));
        }
        const double most = *std::max_element(z.begin(), z.end());
        double sum = 0, error = 0, norm = 0;
        std::vector<double> want(size_t(s_.d), 0.0);
        for (size_t i = 0; i < z.size(); ++i) {
          const double w = std::exp(z[i] - most);
          sum += w;
          for (int c = 0; c < s_.d; ++c) want[size_t(c)] += w * HalfToFloat(rows[i][s_.d + c]);
        }
        for (int c = 0; c < s_.d; ++c) {
          const double x = want[size_t(c)] / sum, y = double(out[(size_t(h) * size_t(s_.group()) + size_t(g)) * size_t(s_.d) + size_t(c)]);
          error += (x - y) * (x - y), norm += x * x;
        }
        const double relative = std::sqrt(error / norm);
        if (!(relative <= worst)) worst = relative;
      }
    }
    return worst;
  }
  bool LogitsFinite() const {
    const auto logits = logits_.Read();
    return std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }) &&
           std::any_of(logits.begin(), logits.end(), [](float x) { return x != 0; });
  }

 private:
  size_t Row() const { return size_t(2 * s_.d); }
  size_t HeadRows() const { return size_t(kSinks + kRing + slots_); }
  Half* Rows(int unit) const { return rows_->data() + size_t(unit) * HeadRows() * Row(); }
  const Half* Host(int unit) const { return host_ + size_t(unit) * size_t(max_n_) * Row(); }
  static int64_t Sum(const std::unique_ptr<Array<int64_t>>& values) {
    int64_t sum = 0;
    if (values) for (const int64_t x : values->Read()) sum += x;
    return sum;
  }
  cudaGraphExec_t Next() { return graphs_[size_t(turn_++) % graphs_.size()]; }
  double Run(bool count) {
    OrExit(start_.Record(stream_));
    Cuda(cudaGraphLaunch(Next(), stream_), "launch");
    OrExit(end_.Record(stream_));
    OrExit(end_.Synchronize());
    if (count && hold_) {
      for (const uint8_t hold : hold_->Read()) holds_seen_ += hold, ++holds_asked_;
      const auto fetched = fetch_count_->Read();
      const int phase = int(size_t(turn_ - 1) % graphs_.size());
      for (int unit = phase; unit < s_.units(); unit += c_.refresh) rows_behind_ += fetched[size_t(unit)];
    }
    return double(OrExit(end_.MillisecondsSince(start_)));
  }

  void MakeDense() {
    slots_ = max_n_;
    rows_ = std::make_unique<Array<Half>>(size_t(s_.units()) * size_t(max_n_) * Row());
    std::vector<cuda::AppendTask> append;
    std::vector<cuda::AttendTask> attend;
    for (int unit = 0; unit < s_.units(); ++unit) {
      Half* const rows = rows_->data() + size_t(unit) * size_t(max_n_) * Row();
      OrExit(MakeKeys(rows, max_n_, s_.d, uint64_t(1000 + unit), stream_));
      const int h = unit % s_.kv_heads;
      append.push_back({.k = k_.data() + h * s_.d, .v = v_.data() + h * s_.d, .stride = s_.d, .first = first(), .rows = rows, .ring_rows = max_n_, .count = 1});
      attend.push_back({.q = q_now_.data() + size_t(unit) * size_t(s_.group() * s_.d), .out = out_.data() + h * s_.group() * s_.d, .rows = rows,
                        .row_limit = max_n_, .ring_rows = max_n_ + 1, .local = max_n_, .n = n_.data()});
    }
    append_ = std::make_unique<Array<cuda::AppendTask>>(append);
    attend_ = std::make_unique<Array<cuda::AttendTask>>(attend);
    MakeAttendWorkspace(c_.context);
  }
  // Positions before the one that a step adds: `n_` counts that one already.
  const int32_t* first() const { return first_.data(); }
  void MakeAttendWorkspace(int32_t rows) {
    attend_params_ = {.tasks = attend_->data(), .num_tasks = s_.kv_heads, .max_rows = rows, .group = s_.group(), .head_dim = s_.d};
    attend_space_ = std::make_unique<Array<std::byte>>(OrExit(cuda::AttendWorkspaceBytes(attend_params_)));
    attend_params_.workspace = attend_space_->data(), attend_params_.workspace_bytes = attend_space_->size();
  }

  void MakeTwoClock(const PinnedPool& pool) {
    const CodeFormat format{.bits = c_.bits, .group_tokens = 64};
    slots_ = std::min(c_.factor * c_.k, 32767);
    host_ = reinterpret_cast<Half*>(pool.data());
    const auto units = size_t(s_.units()), words = size_t((max_n_ + 63) / 64), block = LayoutOf(format, s_.d).bytes, head_codes = block * size_t(max_n_ / 64);
    if (pool.size() < units * size_t(max_n_) * Row() * sizeof(Half)) Fail({StatusCode::kInvalid, "the host pool is too small"});
    rows_ = std::make_unique<Array<Half>>(units * HeadRows() * Row());
    codes_ = std::make_unique<Array<std::byte>>(units * head_codes);
    slot_of_ = std::make_unique<Array<int16_t>>(std::vector<int16_t>(units * size_t(max_n_), -1));
    owner_ = std::make_unique<Array<int32_t>>(std::vector<int32_t>(units * size_t(slots_), -1));
    // What the ring holds, or will hold, counts as resident.
    std::vector<uint64_t> ring_bits(words, 0);
    for (int32_t p = c_.context - kRing; p < max_n_; ++p) ring_bits[size_t(p) / 64] |= uint64_t{1} << (p % 64);
    std::vector<uint64_t> all_bits;
    for (size_t u = 0; u < units; ++u) all_bits.insert(all_bits.end(), ring_bits.begin(), ring_bits.end());
    resident_ = std::make_unique<Array<uint64_t>>(all_bits);
    pooled_ = std::make_unique<Array<float>>(std::vector<float>(units * size_t(max_n_), -INFINITY));
    chosen_ = std::make_unique<Array<int32_t>>(units * size_t(c_.k));
    refs_ = std::make_unique<Array<int32_t>>(units * size_t(c_.k));
    count_ = std::make_unique<Array<int32_t>>(units);
    num_refs_ = std::make_unique<Array<int32_t>>(units);
    wanted_ = std::make_unique<Array<int32_t>>(units * size_t(slots_));
    wanted_count_ = std::make_unique<Array<int32_t>>(units);
    from_ = std::make_unique<Array<int32_t>>(units * size_t(slots_));
    to_ = std::make_unique<Array<int32_t>>(units * size_t(slots_));
    fetch_count_ = std::make_unique<Array<int32_t>>(units);
    misses_ = std::make_unique<Array<int64_t>>(units);
    hold_ = std::make_unique<Array<uint8_t>>(units);
    age_ = std::make_unique<Array<int32_t>>(std::vector<int32_t>(units, 1 << 20));  // no choice yet: every head scans first
    anchor_ = std::make_unique<Array<float>>(units * size_t(s_.group() * s_.d));
    lse_ = std::make_unique<Array<float>>(units * size_t(2 * s_.group()));
    unused_ = std::make_unique<Array<float>>(1);  // choosing what is wanted gives an LSE of pooled scores
    std::vector<cuda::AppendTask> append;
    std::vector<cuda::GateTask> gate;
    std::vector<cuda::SelectTask> select;
    std::vector<cuda::ResolveTask> resolve;
    std::vector<cuda::AttendTask> attend;
    std::vector<std::vector<cuda::ChooseTask>> want(size_t(c_.refresh));
    std::vector<std::vector<cuda::RefreshTask>> refresh(size_t(c_.refresh));
    std::vector<std::vector<cuda::GatherTask>> gather(size_t(c_.refresh));
    const Array<Half> keys(size_t(max_n_) * Row());
    for (size_t u = 0; u < units; ++u) {
      const int unit = int(u), h = unit % s_.kv_heads;
      // Rows: made on the device, encoded, copied to the host.
      OrExit(MakeKeys(keys.data(), max_n_, s_.d, 1000 + u, stream_));
      std::vector<cuda::RunEncodeTask> encode;
      for (int32_t g = 0; g < max_n_ / 64; ++g) encode.push_back({.rows = keys.data() + size_t(g) * 64 * Row(), .block = codes_->data() + u * head_codes + size_t(g) * block});
      const Array<cuda::RunEncodeTask> tasks(encode);
      OrExit(cuda::EncodeRuns(tasks.data(), int32_t(encode.size()), format, s_.d, stream_));
      pool.CopyHere(pool.data() + u * size_t(max_n_) * Row() * sizeof(Half), reinterpret_cast<const std::byte*>(keys.data()), size_t(max_n_) * Row() * sizeof(Half), stream_);
      Cuda(cudaMemcpyAsync(Rows(unit), keys.data(), size_t(kSinks) * Row() * sizeof(Half), cudaMemcpyDeviceToDevice, stream_), "sinks");
      for (int32_t p = c_.context - kRing; p < c_.context; ++p) {
        Cuda(cudaMemcpyAsync(Rows(unit) + size_t(kSinks + p % kRing) * Row(), keys.data() + size_t(p) * Row(), Row() * sizeof(Half), cudaMemcpyDeviceToDevice, stream_), "ring");
      }
      Cuda(cudaStreamSynchronize(stream_), "rows");
      const size_t head_floats = size_t(s_.group() * s_.d);
      const float* const q = q_now_.data() + u * head_floats;
      const cuda::ResidencyState at{slot_of_->data() + u * size_t(max_n_), owner_->data() + u * size_t(slots_), resident_->data() + u * words, slots_, max_n_};
      append.push_back({.k = k_.data() + h * s_.d, .v = v_.data() + h * s_.d, .stride = s_.d, .first = first(), .rows = Rows(unit) + size_t(kSinks) * Row(),
                        .ring_rows = kRing, .count = 1, .blocks = codes_->data() + u * head_codes});
      gate.push_back({.q = q, .anchor = anchor_->data() + u * head_floats, .hold = hold_->data() + u, .age = age_->data() + u});
      cuda::SelectTask chooses{.source = {.q = q, .blocks = codes_->data() + u * head_codes, .rows = Rows(unit) + size_t(kSinks) * Row(), .ring_rows = kRing, .n = n_.data()}};
      chooses.rule = {.sinks = kSinks, .local = kLocal, .k = c_.k, .pooled = pooled_->data() + u * size_t(max_n_), .hold = hold_->data() + u, .room = c_.k,
                      .chosen = chosen_->data() + u * size_t(c_.k), .count = count_->data() + u, .lse_all = lse_->data() + u * size_t(2 * s_.group()),
                      .lse_out = lse_->data() + u * size_t(2 * s_.group()) + s_.group()};
      if (c_.theta > 0) {
        chooses.rule.resident = resident_->data() + u * words;
        chooses.rule.log_theta = std::log(c_.theta);
      }
      select.push_back(chooses);
      resolve.push_back({.at = at, .chosen = chosen_->data() + u * size_t(c_.k), .count = count_->data() + u, .room = c_.k, .n = n_.data(), .slot_row = kSinks + kRing,
                         .ring_row = kSinks, .ring_rows = kRing, .refs = refs_->data() + u * size_t(c_.k), .num_refs = num_refs_->data() + u,
                         .misses = misses_->data() + u, .hold = hold_->data() + u, .q = q, .anchor = anchor_->data() + u * head_floats, .age = age_->data() + u});
      attend.push_back({.q = q, .out = out_.data() + h * s_.group() * s_.d, .rows = Rows(unit), .row_limit = int64_t(HeadRows()), .sink_row = 0, .ring_row = kSinks,
                        .ring_rows = kRing, .sinks = kSinks, .local = kLocal, .n = n_.data(), .refs = refs_->data() + u * size_t(c_.k),
                        .num_refs = num_refs_->data() + u, .refs_room = c_.k, .host_rows = Host(unit), .host_limit = max_n_});
      const size_t phase = u % size_t(c_.refresh);
      cuda::ChooseTask best{.z = pooled_->data() + u * size_t(max_n_), .z_stride = max_n_, .n = n_.data()};
      best.rule = {.sinks = kSinks, .local = kLocal, .k = slots_, .room = slots_, .chosen = wanted_->data() + u * size_t(slots_), .count = wanted_count_->data() + u,
                   .lse_all = unused_->data()};
      want[phase].push_back(best);
      refresh[phase].push_back({.at = at, .wanted = wanted_->data() + u * size_t(slots_), .wanted_count = wanted_count_->data() + u, .from_piece = from_->data() + u * size_t(slots_),
                                .to_piece = to_->data() + u * size_t(slots_), .count = fetch_count_->data() + u, .pooled = pooled_->data() + u * size_t(max_n_)});
      gather[phase].push_back({.from = reinterpret_cast<const std::byte*>(Host(unit)), .to = reinterpret_cast<std::byte*>(Rows(unit) + size_t(kSinks + kRing) * Row()),
                               .from_piece = from_->data() + u * size_t(slots_), .to_piece = to_->data() + u * size_t(slots_), .count = fetch_count_->data() + u,
                               .from_limit = max_n_, .to_limit = slots_});
    }
    append_ = std::make_unique<Array<cuda::AppendTask>>(append);
    gate_ = std::make_unique<Array<cuda::GateTask>>(gate);
    select_ = std::make_unique<Array<cuda::SelectTask>>(select);
    resolve_ = std::make_unique<Array<cuda::ResolveTask>>(resolve);
    attend_ = std::make_unique<Array<cuda::AttendTask>>(attend);
    for (size_t p = 0; p < size_t(c_.refresh); ++p) {
      want_.emplace_back(want[p]);
      refresh_.emplace_back(refresh[p]);
      gather_.emplace_back(gather[p]);
    }
    MakeAttendWorkspace(c_.k + kSinks + kLocal);
    select_params_ = {.tasks = select_->data(), .num_tasks = s_.kv_heads, .max_n = max_n_, .format = format, .group = s_.group(), .head_dim = s_.d};
    select_space_ = std::make_unique<Array<std::byte>>(OrExit(cuda::SelectWorkspaceBytes(select_params_)));
    select_params_.workspace = select_space_->data(), select_params_.workspace_bytes = select_space_->size();
    want_params_ = {.tasks = want_.front().data(), .num_tasks = int32_t(want_.front().size()), .max_n = max_n_, .group = 1, .rule = GroupRule::kMaxLogit};
    want_space_ = std::make_unique<Array<std::byte>>(OrExit(cuda::ChooseWorkspaceBytes(want_params_)));
    want_params_.workspace = want_space_->data(), want_params_.workspace_bytes = want_space_->size();
  }

  void Enqueue(int phase) {
    const bool two_clock = c_.kind == Case::Kind::kTwoClock;
    const int before = (phase + c_.refresh - 1) % c_.refresh;
    Cuda(cudaMemcpyAsync(hidden_.data(), input_.data(), size_t(s_.hidden) * sizeof(float), cudaMemcpyDeviceToDevice, stream_), "input");
    if (c_.kind != Case::Kind::kWeights) {
      Cuda(cudaMemcpyAsync(first_.data(), n_.data(), sizeof(int32_t), cudaMemcpyDeviceToDevice, stream_), "first");
      OrExit(Advance(q_all_.data(), kQuerySteps, int64_t(q_now_.size()), q_now_.data(), step_.data(), n_.data(), stream_));
    }
    if (two_clock) {
      OrExit(fork_.Record(stream_));
      OrExit(fork_.Before(side_.get()));
      const auto& gather = gather_[size_t(before)];
      OrExit(cuda::Gather({.tasks = gather.data(), .num_tasks = int32_t(gather.size()), .piece_bytes = int32_t(Row() * sizeof(Half)), .max_blocks = 8}, side_.get()));
      OrExit(join_.Record(side_.get()));
    }
    for (int l = 0; l < s_.layers; ++l) Layer(l);
    OrExit(reference::MultiplyVector({.weights = m_.output.data(), .x = hidden_.data(), .norm = m_.output_norm.data(), .eps = 1e-5f, .y = logits_.data(), .rows = s_.vocab,
                                  .cols = s_.hidden}, stream_));
    if (!two_clock) return;
    OrExit(join_.Before(stream_));
    OrExit(cuda::Land(refresh_[size_t(before)].data(), int32_t(refresh_[size_t(before)].size()), stream_));
    want_params_.tasks = want_[size_t(phase)].data();
    OrExit(cuda::Choose(want_params_, stream_));
    OrExit(cuda::Refresh(refresh_[size_t(phase)].data(), int32_t(refresh_[size_t(phase)].size()), max_n_, stream_));
  }

  void Layer(int l) {
    const LayerWeights& w = m_.layers[size_t(l)];
    const int q_width = s_.heads * s_.d, kv_width = s_.kv_heads * s_.d, first_unit = l * s_.kv_heads;
    OrExit(reference::MultiplyVector({.weights = w.qkv.data(), .x = hidden_.data(), .norm = w.norm1.data(), .eps = 1e-5f, .y = qkv_.data(), .rows = q_width + 2 * kv_width,
                                  .cols = s_.hidden}, stream_));
    const float* attended = out_.data();
    if (c_.kind == Case::Kind::kWeights) {
      attended = qkv_.data();
    } else {
      OrExit(reference::RotateHeads({.qkv = qkv_.data(), .cos = angles_.data(), .sin = angles_.data() + s_.d / 2, .q = q_model_.data(), .k = k_.data(), .v = v_.data(),
                                 .tokens = 1, .heads = s_.heads, .kv_heads = s_.kv_heads, .head_dim = s_.d}, stream_));
      OrExit(cuda::Append({.tasks = append_->data() + first_unit, .num_tasks = s_.kv_heads, .max_count = 1, .format = {.bits = c_.bits, .group_tokens = 64}, .head_dim = s_.d}, stream_));
      if (c_.kind == Case::Kind::kTwoClock) {
        OrExit(cuda::Gate({.tasks = gate_->data() + first_unit, .num_tasks = s_.kv_heads, .group = s_.group(), .head_dim = s_.d, .tau = c_.tau, .max_age = c_.max_age}, stream_));
        select_params_.tasks = select_->data() + first_unit;
        OrExit(cuda::Select(select_params_, stream_));
        OrExit(cuda::Resolve(resolve_->data() + first_unit, s_.kv_heads, s_.group(), s_.d, stream_));
      }
      attend_params_.tasks = attend_->data() + first_unit;
      OrExit(cuda::Attend(attend_params_, stream_));
    }
    OrExit(reference::MultiplyVector({.weights = w.o.data(), .x = attended, .y = hidden_.data(), .add = true, .rows = s_.hidden, .cols = q_width}, stream_));
    OrExit(reference::MultiplyVector({.weights = w.gate_up.data(), .x = hidden_.data(), .norm = w.norm2.data(), .eps = 1e-5f, .y = gated_.data(), .gated = true,
                                  .rows = s_.intermediate, .cols = s_.hidden}, stream_));
    OrExit(reference::MultiplyVector({.weights = w.down.data(), .x = gated_.data(), .y = hidden_.data(), .add = true, .rows = s_.hidden, .cols = s_.intermediate}, stream_));
  }

  const Model& m_;
  const Shape s_;
  const Case c_;
  const cudaStream_t stream_;
  CudaStream side_;
  CudaEvent fork_, join_, start_, end_;
  Array<float> input_, hidden_, qkv_, q_model_, k_, v_, out_, gated_, logits_, angles_, q_now_, q_all_;
  Array<int32_t> n_, step_;
  Array<int32_t> first_{1};
  size_t before_ = 0, kv_before_ = 0, kv_bytes_ = 0;
  int32_t max_n_ = 0, slots_ = 0;
  const Half* host_ = nullptr;
  std::unique_ptr<Array<Half>> rows_;
  std::unique_ptr<Array<std::byte>> codes_, attend_space_, select_space_, want_space_;
  std::unique_ptr<Array<int16_t>> slot_of_;
  std::unique_ptr<Array<int32_t>> owner_, chosen_, refs_, count_, num_refs_, wanted_, wanted_count_, from_, to_, fetch_count_, age_;
  std::unique_ptr<Array<uint64_t>> resident_;
  std::unique_ptr<Array<int64_t>> misses_;
  std::unique_ptr<Array<uint8_t>> hold_;
  std::unique_ptr<Array<float>> pooled_, anchor_, lse_, unused_;
  std::unique_ptr<Array<cuda::AppendTask>> append_;
  std::unique_ptr<Array<cuda::GateTask>> gate_;
  std::unique_ptr<Array<cuda::SelectTask>> select_;
  std::unique_ptr<Array<cuda::ResolveTask>> resolve_;
  std::unique_ptr<Array<cuda::AttendTask>> attend_;
  std::vector<Array<cuda::ChooseTask>> want_;
  std::vector<Array<cuda::RefreshTask>> refresh_;
  std::vector<Array<cuda::GatherTask>> gather_;
  cuda::AttendParams attend_params_;
  cuda::SelectParams select_params_;
  cuda::ChooseParams want_params_;
  std::vector<cudaGraphExec_t> graphs_;
  int64_t turn_ = 0, holds_seen_ = 0, holds_asked_ = 0, rows_behind_ = 0;
  int nodes_ = 0;
};

// "scan4": two clocks, 4-bit codes, every step scanned; "gate4@0.8": with the gate at cosine 0.8.
Case CaseOf(const std::string& text, const Case& defaults) {
  Case c = defaults;
  c.name = text;
  if (text == "weights") return c;
  if (text == "dense") {
    c.kind = Case::Kind::kDense;
    return c;
  }
  const bool gate = text.rfind("gate", 0) == 0;
  if (!gate && text.rfind("scan", 0) != 0) Fail({StatusCode::kInvalid, "--cases: " + text + "; use weights, dense, scan2, scan4, scan8, gate4@0.8, ..."});
  c.kind = Case::Kind::kTwoClock;
  c.bits = text[4] - '0';
  const size_t at = text.find('@');
  if (gate) c.tau = at == std::string::npos ? 0.9f : std::stof(text.substr(at + 1));
  return c;
}
}  // namespace

int Main(int argc, char** argv) {
  std::string out, commit = "unknown", model = "llama-3.1-8b", cases = "weights,dense,scan4,gate4@0.8,gate4@0.9,scan2,gate2@0.8", line = "decode_bench";
  Case defaults{.context = 131072, .k = 2048};
  int steps = 128;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t equals = arg.find('=');
    const std::string name = arg.substr(0, equals), value = equals == std::string::npos ? "" : arg.substr(equals + 1);
    if (name == "--out") out = value;
    else if (name == "--commit") commit = value;
    else if (name == "--model") model = value;
    else if (name == "--cases") cases = value;
    else if (name == "--context") defaults.context = std::stoi(value);
    else if (name == "--k") defaults.k = std::stoi(value);
    else if (name == "--factor") defaults.factor = std::stoi(value);
    else if (name == "--refresh") defaults.refresh = std::stoi(value);
    else if (name == "--theta") defaults.theta = std::stof(value);
    else if (name == "--steps") steps = std::stoi(value);
    else Fail({StatusCode::kInvalid, arg + " is no flag; see the top of decode_bench.cc"});
    if (name != "--out" && name != "--commit") line += " " + arg;
  }
  const CudaDevice device = OrExit(CurrentCudaDevice());
  const CudaStream stream = OrExit(CudaStream::Create());
  const Shape shape = ShapeOf(model);
  const Model weights(shape, stream.get());
  Json file{{"bench", "decode step"}, {"command", line}, {"device", device.name}, {"driver", device.driver_version}, {"commit", commit}, {"model", model},
            {"dtype", "fp16"}, {"batch", 1}, {"queries", {{"share_that_stays", {0.5, 0.95}}, {"memory", 0.5}, {"scale", 2}}}, {"weight_bytes", weights.bytes}};
  file["cases"] = Json::array();
  std::unique_ptr<PinnedPool> pool;
  double weights_ms = 0;
  std::string rest = cases;
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const Case which = CaseOf(rest.substr(0, comma), defaults);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    if (which.kind == Case::Kind::kTwoClock && !pool) {
      const size_t rows = size_t(RoundUp(uint64_t(which.context) + 1024, 64)) * size_t(shape.units());
      pool = std::make_unique<PinnedPool>(rows * size_t(2 * shape.d) * sizeof(Half));
      file["pinning"] = {{"bytes", pool->size()}, {"seconds", pool->seconds}, {"touch_seconds", pool->touch_seconds},
                         {"first_256_mib_usable_after_s", pool->first_piece_seconds}, {"gb_per_s", double(pool->size()) / pool->seconds / 1e9}};
      std::printf("pinned %.1f GB at %.1f GB/s\n", double(pool->size()) / 1e9, double(pool->size()) / pool->seconds / 1e9);
    }
    Step step(weights, which, pool.get(), stream.get());
    step.Capture();
    // The slow clock has turned over all heads once before anything is measured.
    Json row = step.Measure(which.kind == Case::Kind::kTwoClock ? 2 * which.refresh : 8, steps);
    if (which.kind == Case::Kind::kWeights) weights_ms = row["ms_median"];
    if (weights_ms > 0) row["over_weights"] = double(row["ms_median"]) / weights_ms;
    if (which.kind == Case::Kind::kTwoClock) row["output_error_against_fp64"] = step.Verify();
    row["logits_finite"] = step.LogitsFinite();
    std::printf("%-10s %6d  %7.3f ms (%.3f to %.3f, back to back %.3f)  %.3fx  rho %.2f  in step %.1f rows a head  behind %.0f rows  dropped %.4f  KV on device %.2f GiB  error %.1e\n",
                which.name.c_str(), which.context, double(row["ms_median"]), double(row["ms_least"]), double(row["ms_most"]), double(row["ms_back_to_back"]),
                weights_ms > 0 ? double(row["over_weights"]) : 0.0, row.value("rho", 0.0), row.value("rows_in_step_per_head", 0.0), row.value("rows_behind_per_step", 0.0), row.value("dropped_mass_estimated", 0.0),
                double(row.value("kv_device_bytes", size_t{0})) / double(size_t{1} << 30), row.value("output_error_against_fp64", 0.0));
    std::fflush(stdout);
    file["cases"].push_back(row);
    if (!out.empty()) {
      std::FILE* const to = std::fopen(out.c_str(), "w");
      if (to == nullptr) Fail({StatusCode::kIoError, "cannot write " + out});
      std::fputs((file.dump(1) + "\n").c_str(), to);
      std::fclose(to);
    }
  }
  return 0;
}
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
