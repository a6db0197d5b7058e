// How long does a decode step take with two clocks, beside the weights alone and beside dense attention with all of K and V on the device?
//
//   decode_bench --out=FILE.json [--commit=ID] [--model=llama-3.1-8b] [--cases=weights,dense,scan4,gate4@0.8/b8/n32768/m13,...] [--steps=N]
//                [--context=131072] [--batch=1] [--k=2048] [--factor=4] [--refresh=0] [--pool=16] [--max-age=14] [--theta=auto]
//                [--budget-gib=G] [--host-pool-gib=G] [--fused=1] [--keep=1] [--rows=f16|int8|e4m3]
//
// A case may end in settings of its own: /b batch, /n context, /k chosen rows, /f factor, /r refresh, /t theta, /m budget in GiB.
//
// A step is a CUDA graph: every product of every layer (random fp16 weights), norms, RoPE, append with codes, and attention; logits at the
// end. Two clocks: gate, scan of all codes and choice, look-up of rows, attention over sinks, chosen rows and the local window; a chosen row
// that is in no slot is read from pinned host memory within the step, and stays (keep 0: it does not) in a slot that was free for it: what is resident is what
// steps have read, and what a clock's hand has left; half of the steps before the measured ones read whatever they choose, so that slots are full of what was chosen
// lately, as they are behind a prompt. With a refresh the slow clock turns a 1 / refresh of the heads a step: what is wanted
// is chosen beside the step, evicted at its end, gathered beside the next one's last product and used from the one after on (lag 1 step, 2 at most).
// Scores are pooled over the scans of the last pool - 1 steps before a head's turn, so that a pool / refresh of the heads needs the memory.
// Gates are done with append and look-ups, of up to 16 heads, with the choice; or (fused 0) by launches of their own.
// There is one graph for each turn of the slow clock, or one. K, V and queries are made up (synthetic.h) and the queries of the model are replaced by
// them, because random weights have no attention to speak of. Times are of whole replays between two events, host launch included; the last
// step reaches the case's context.
//
// A batch has K, V, codes, slots and queries for each sequence, all of one length; its products are those of batch_product.h, one vector's
// are the reference engine's, with RoPE in the launch of q, k and v. Where the host's rows do not fit the pool's limit, heads share its rows at
// different offsets: the keys of a head are those of the rows that it points to, and addresses are spread over the whole pool. With --rows the
// host's rows are of 8 bits: codes are made of what they stand for, a row that is read within the step or behind it becomes one of fp16.
//
// The budget is compared with what the driver says was allocated for K, V and index: rows, codes, residency, lists and workspaces. A case
// over its budget is marked and makes the program fail.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/half.h"
#include "base/units.h"
#include "bench/gpu/batch_product.h"
#include "bench/gpu/support.h"
#include "bench/gpu/synthetic.h"
#include "cache/internal/device_step.h"
#include "integrations/reference/cuda/device_ops.h"
#include "kernels/code_block.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/run_kernels.h"
#include "kernels/row_codec.h"
#include "selector/options.h"

namespace prehoc {
namespace {

struct Shape {
  std::string name;
  int layers, heads, kv_heads, d, hidden, intermediate, vocab;
  int group() const { return heads / kv_heads; }
  int units() const { return layers * kv_heads; }
};
Shape ShapeOf(const std::string& name) {
  for (const Shape& s : {Shape{"llama-3.1-8b", 32, 32, 8, 128, 4096, 14336, 128256}, Shape{"llama-2-7b", 32, 32, 32, 128, 4096, 11008, 32000},
                         Shape{"mistral-7b", 32, 32, 8, 128, 4096, 14336, 32768}, Shape{"qwen3-8b", 36, 32, 8, 128, 4096, 12288, 151936},
                         Shape{"tiny", 2, 8, 2, 128, 512, 1024, 1024}}) {
    if (s.name == name) return s;
  }
  Fail({StatusCode::kInvalid, "--model=" + name + "; use llama-3.1-8b, llama-2-7b, mistral-7b, qwen3-8b or tiny"});
}

struct LayerWeights {
  Array<uint16_t> qkv, o, gate_up, down;
  Array<float> norm1, norm2;
};

struct Case {
  std::string name;
  enum class Kind { kWeights, kDense, kTwoClock } kind = Kind::kWeights;
  int bits = 4;
  float tau = 1;  // at 1 every step scans
  float theta = -1;  // a missing position lighter than this is left out, and counted as dropped; below 0: the product's default
  int32_t batch = 1, context = 0, k = 0, refresh = 0, max_age = 14, pool = 16;
  double factor = 4, budget_gib = 0;
  bool fused = true, keep = true;
  RowFormat rows = RowFormat::kF16;  // of the host
  int32_t max_n() const { return static_cast<int32_t>(RoundUp(static_cast<uint64_t>(context), 64)); }
  bool turns() const { return refresh > 0; }
  int phases() const { return kind == Kind::kTwoClock ? std::max(refresh, 1) : 1; }
  bool fills() const { return kind == Kind::kTwoClock && !turns() && theta > 0; }
  int warm() const { return kind != Kind::kTwoClock ? 8 : turns() ? 2 * refresh : 128; }  // slots are full
  int32_t slots() const { return std::min(static_cast<int32_t>(factor * k), StepArrays::kMostSlots); }
  int32_t room() const { return keep ? StepArrays::SpareRoom(slots()) : 0; }
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

// The state of a step and what is enqueued for it. A task is a KV head of a sequence; a unit is a task of a layer.
class Step {
 public:
  static constexpr int kQuerySteps = 96, kSinks = 8, kLocal = 32, kRing = 128;
  static constexpr uint64_t kKeySeed = 1000;

  Step(const Model& model, const Case& which, const PinnedPool* pool, int steps, cudaStream_t stream)
      : m_(model), s_(model.s), c_(which), tasks_(which.batch * model.s.kv_heads), stream_(stream), side_(OrExit(CudaStream::Create())),
        fork_(OrExit(CudaEvent::Create())), join_(OrExit(CudaEvent::Create())), start_(OrExit(CudaEvent::Create(CudaEvent::Timing::kOn))),
        end_(OrExit(CudaEvent::Create(CudaEvent::Timing::kOn))), input_(PerToken(s_.hidden)), hidden_(PerToken(s_.hidden)),
        qkv_(PerToken((s_.heads + 2 * s_.kv_heads) * s_.d)), q_model_(PerToken(s_.heads * s_.d)), k_(PerToken(s_.kv_heads * s_.d)),
        v_(PerToken(s_.kv_heads * s_.d)), out_(PerToken(s_.heads * s_.d)), gated_(PerToken(s_.intermediate)), logits_(PerToken(s_.vocab)),
        angles_(PerToken(s_.d)), q_now_(size_t(units()) * HeadFloats()),
        q_all_(which.kind == Case::Kind::kWeights ? 1 : size_t(kQuerySteps) * q_now_.size()), normed_(PerToken(s_.hidden)),
        gated_half_(PerToken(s_.intermediate)), n_(std::vector<int32_t>{which.context - which.warm() - 2 * steps}), step_(1) {
    first_n_ = n_.Read()[0];
    if (c_.kind != Case::Kind::kWeights && first_n_ < 2 * kRing + c_.k) Fail({StatusCode::kInvalid, c_.name + ": the context is too short for the steps"});
    OrExit(FillNormal(input_.data(), int64_t(input_.size()), 0, 1, 77, stream_));
    OrExit(FillNormal(out_.data(), int64_t(out_.size()), 0, 1, 78, stream_));  // what the weights alone multiply
    std::vector<float> angles(PerToken(s_.d));
    for (size_t i = 0; i < angles.size() / 2; ++i) {
      const auto turn = float(i % size_t(s_.d / 2));
      angles[i] = std::cos(turn), angles[angles.size() / 2 + i] = std::sin(turn);
    }
    angles_.Write(angles);
    if (c_.kind == Case::Kind::kWeights) return;
    OrExit(MakeQueries(q_all_.data(), kQuerySteps, units(), s_.group() * s_.d, QueryStatistics{}, 5, stream_));
    Cuda(cudaStreamSynchronize(stream_), "queries");
    max_n_ = c_.max_n();
    kv_before_ = DriverBytes();
    if (c_.kind == Case::Kind::kDense) MakeDense();
    else MakeTwoClock(*pool);
    kv_bytes_ = DriverBytes() - kv_before_;
  }

  void Capture() {
    for (int phase = 0; phase < c_.phases(); ++phase) graphs_.emplace_back(stream_, [&] { Enqueue(phase); });
    if (c_.fills()) filling_ = std::make_unique<Graph>(stream_, [&] { Enqueue(1); });
  }

  Json Measure(int steps) {
    for (int i = 0; i < c_.warm(); ++i) {
      if (filling_ && i < c_.warm() / 2) filling_->Launch(stream_);
      else Run(false);
    }
    Cuda(cudaStreamSynchronize(stream_), "warm");
    const int32_t restarts0 = restarts_ ? restarts_->Read()[0] : 0;
    const int64_t misses0 = Sum(misses_), held0 = holds_seen_, asked0 = holds_asked_;
    rows_behind_ = 0;
    std::vector<double> ms;
    for (int i = 0; i < steps; ++i) ms.push_back(Run(true));
    // Back to back, as a server would run them.
    OrExit(start_.Record(stream_));
    const double host = Seconds();
    for (int i = 0; i < steps; ++i) Next().Launch(stream_);
    const double enqueued = Seconds() - host;
    OrExit(end_.Record(stream_));
    OrExit(end_.Synchronize());
    const double back_to_back = double(OrExit(end_.MillisecondsSince(start_))) / steps;
    const Spread spread = SpreadOf(ms);
    Json row{{"name", c_.name}, {"batch", c_.batch}, {"ms_median", spread.median}, {"ms_least", spread.least}, {"ms_most", spread.most},
             {"ms_back_to_back", back_to_back}, {"tokens_per_s", c_.batch / spread.median * 1e3}, {"host_us_per_launch", enqueued / steps * 1e6},
             {"steps", steps}, {"graph_nodes", graphs_.back().nodes()}};
    if (c_.kind == Case::Kind::kWeights) return row;
    row["context"] = {first_n_, first_n_ + c_.warm() + 2 * steps};
    row["kv_driver_bytes"] = kv_bytes_;
    if (c_.budget_gib > 0) row["budget_gib"] = c_.budget_gib, row["within_budget"] = WithinBudget();
    if (c_.kind != Case::Kind::kTwoClock) return row;
    const double triples = double(steps) * units();
    row["bits"] = c_.bits, row["tau"] = c_.tau, row["k"] = c_.k, row["factor"] = c_.factor, row["slots"] = slots_, row["refresh"] = c_.refresh;
    row["pool"] = c_.pool, row["max_age"] = c_.max_age, row["theta"] = c_.theta;
    row["fused"] = c_.fused, row["keep"] = c_.keep, row["host_rows"] = RowFormatName(c_.rows);
    row["kv_parts_bytes"] = {{"rows", rows_->bytes()}, {"codes", codes_->bytes()}, {"pooled", pooled_->bytes()},
                             {"residency", slot_of_->bytes() + owner_->bytes() + resident_->bytes() + (c_.keep ? keep_->bytes() + used_->bytes() : 0)},
                             {"workspace", attend_space_->bytes() + select_space_->bytes() + want_space_->bytes()}};
    row["host_rows_per_head"] = max_n_, row["host_stride_rows"] = host_stride_, row["host_rows_shared"] = host_stride_ < size_t(max_n_);
    // What the last choices left out, by the codes.
    double dropped = 0;
    const auto lse = lse_->Read();
    for (int unit = 0; unit < units(); ++unit) {
      for (int g = 0; g < s_.group(); ++g) dropped += std::exp(double(lse[size_t((2 * unit + 1) * s_.group() + g)]) - double(lse[size_t(2 * unit * s_.group() + g)]));
    }
    row["dropped_mass_estimated"] = dropped / (units() * s_.group());
    row["rho"] = 1 - double(holds_seen_ - held0) / double(std::max<int64_t>(1, holds_asked_ - asked0));
    row["selects_restarted"] = double(restarts_->Read()[0] - restarts0) / 2 / triples;
    row["rows_in_step_per_head"] = double(Sum(misses_) - misses0) / 2 / triples;  // the second loop steps as often
    row["rows_behind_per_step"] = double(rows_behind_) / steps;
    return row;
  }
  // Milliseconds of what a step does besides products, each kind of launch of all layers alone: what is missing to the step are gaps, and what
  // is more ran at once. At a context of whole groups append is the one step in 64 that encodes. The state that this leaves is of no use.
  Json Parts() {
    const auto part = [&](const std::function<void(int)>& enqueue) {
      const Graph graph(stream_, [&] {
        for (int l = 0; l < s_.layers; ++l) enqueue(l);
      });
      return graph.Measure(stream_, 7, 1).median / 1e3;
    };
    Json parts{{"attend", part([&](int l) { AttendLayer(l); })}};
    if (c_.kind != Case::Kind::kTwoClock) return parts;
    parts["select"] = part([&](int l) { SelectLayer(0, l); });  // with the last step's gates
    if (!c_.fused) {
      parts["resolve"] = part([&](int l) { ResolveLayer(l); });
      parts["gate"] = part([&](int l) { OrExit(cuda::Gate(GateOf(l), stream_)); });
    }
    parts["append"] = part([&](int l) { AppendLayer(l); });
    std::vector<double> turns;
    for (int phase = 0; phase < std::min(c_.phases(), 8); ++phase) turns.push_back(Graph(stream_, [&] { Turn(phase); }).Measure(stream_, 1, 0).median / 1e3);
    parts["turn"] = SpreadOf(turns).median;
    return parts;
  }
  bool WithinBudget() const { return c_.budget_gib <= 0 || double(kv_bytes_) <= c_.budget_gib * double(kGiB); }

  // The last step's attention of the last layer's heads against fp64 over the rows that host memory has.
  double Verify() const {
    if (c_.kind != Case::Kind::kTwoClock) return 0;
    double worst = 0;
    const size_t first_unit = size_t(s_.layers - 1) * size_t(tasks_);
    const auto q = q_now_.Read(first_unit * HeadFloats(), size_t(tasks_) * HeadFloats());
    const auto out = out_.Read();  // of the last layer
    const auto counts = count_->Read(), chosen = chosen_->Read();
    const int32_t n = n_.Read()[0];
    for (size_t h = 0; h < size_t(tasks_); ++h) {
      const size_t unit = first_unit + h;
      const int32_t count = counts[unit];
      if (count < (c_.theta > 0 ? 1 : c_.k) || count > c_.k) Fail({StatusCode::kCorrupt, "unit " + std::to_string(unit) + " chose " + std::to_string(count)});
      std::vector<Half> ring(size_t(kSinks + kRing) * Row());
      Cuda(cudaMemcpy(ring.data(), Rows(unit), ring.size() * sizeof(Half), cudaMemcpyDefault), "ring");
      std::vector<const Half*> rows;
      std::vector<Half> widened(size_t(kSinks + count + kLocal) * Row());
      const auto from_host = [&](int32_t p) -> const Half* {
        Half* const to = widened.data() + rows.size() * Row();
        WidenRow(Host(unit) + size_t(p) * HostRowBytes(), c_.rows, s_.d, to);
        return to;
      };
      const auto add = [&](int32_t p) { rows.push_back(p >= n - kRing ? ring.data() + size_t(kSinks + p % kRing) * Row() : from_host(p)); };
      for (int32_t p = 0; p < kSinks; ++p) add(p);
      for (int32_t i = 0; i < count; ++i) add(chosen[unit * size_t(c_.k) + size_t(i)]);
      for (int32_t p = n - kLocal; p < n; ++p) add(p);
      for (size_t g = 0; g < size_t(s_.group()); ++g) {
        const double error = Error(q.data() + h * HeadFloats() + g * size_t(s_.d), rows, out.data() + h * HeadFloats() + g * size_t(s_.d));
        if (!(error <= worst)) worst = error;
      }
    }
    return worst;
  }
  // Logits of some tokens against fp64 from the hidden state that they came from.
  double VerifyLogits() const {
    const auto hidden = hidden_.Read(), norm = m_.output_norm.Read(), logits = logits_.Read();
    const auto h = size_t(s_.hidden);
    double error = 0, all = 0;
    for (size_t b = 0; b < size_t(c_.batch); ++b) {
      const float* const x = hidden.data() + b * h;
      double square = 0;
      for (size_t c = 0; c < h; ++c) square += double(x[c]) * double(x[c]);
      const double scale = 1 / std::sqrt(square / double(h) + 1e-5);
      for (size_t r = 0; r < size_t(s_.vocab); r += size_t(s_.vocab) / 37) {
        const auto weights = m_.output.Read(r * h, h);
        double sum = 0;
        for (size_t c = 0; c < h; ++c) sum += HalfToFloat(weights[c]) * double(norm[c]) * double(x[c]) * scale;
        const double off = sum - double(logits[b * size_t(s_.vocab) + r]);
        error += off * off, all += sum * sum;
      }
    }
    return std::sqrt(error / all);
  }
  bool LogitsFinite() const {
    const auto logits = logits_.Read();
    return std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }) &&
           std::any_of(logits.begin(), logits.end(), [](float x) { return x != 0; });
  }

 private:
  int units() const { return s_.layers * tasks_; }
  size_t PerToken(int64_t size) const { return size_t(c_.batch) * size_t(size); }
  size_t Row() const { return size_t(2 * s_.d); }
  size_t RowBytes() const { return Row() * sizeof(Half); }
  size_t HeadFloats() const { return size_t(s_.group() * s_.d); }
  size_t HeadRows() const { return size_t(kSinks + kRing + slots_); }
  Half* Rows(size_t unit) const { return rows_->data() + unit * HeadRows() * Row(); }
  size_t HostRow(size_t unit) const { return unit * host_stride_; }
  size_t HostRowBytes() const { return prehoc::RowBytes(c_.rows, s_.d); }
  const std::byte* Host(size_t unit) const { return host_ + HostRow(unit) * HostRowBytes(); }
  static int64_t Sum(const std::unique_ptr<Array<int64_t>>& values) {
    int64_t sum = 0;
    if (values) for (const int64_t x : values->Read()) sum += x;
    return sum;
  }
  const Graph& Next() { return graphs_[size_t(turn_++) % graphs_.size()]; }
  double Run(bool count) {
    OrExit(start_.Record(stream_));
    Next().Launch(stream_);
    OrExit(end_.Record(stream_));
    OrExit(end_.Synchronize());
    if (count && hold_) {
      for (const uint8_t hold : hold_->Read()) holds_seen_ += hold, ++holds_asked_;
      const auto phase = size_t(turn_ - 1) % size_t(c_.phases());
      for (const int32_t rows : fetch_count_->Read(phase % 2 * PerPhase(), size_t(want_[phase].size()))) rows_behind_ += rows;
    }
    return double(OrExit(end_.MillisecondsSince(start_)));
  }
  // Relative error of `out` for query q over `rows`.
  double Error(const float* q, const std::vector<const Half*>& rows, const float* out) const {
    std::vector<double> z;
    for (const Half* row : rows) {
      double dot = 0;
      for (int c = 0; c < s_.d; ++c) dot += double(q[c]) * HalfToFloat(row[c]);
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
      const double x = want[size_t(c)] / sum, y = double(out[c]);
      error += (x - y) * (x - y), norm += x * x;
    }
    return std::sqrt(error / norm);
  }

  void MakeDense() {
    rows_ = std::make_unique<Array<Half>>(size_t(units()) * size_t(max_n_) * Row());
    std::vector<cuda::AppendTask> append;
    std::vector<cuda::AttendTask> attend;
    for (size_t unit = 0; unit < size_t(units()); ++unit) {
      Half* const rows = rows_->data() + unit * size_t(max_n_) * Row();
      OrExit(MakeKeys(rows, int64_t(unit) * max_n_, max_n_, s_.d, kKeySeed, stream_));
      const size_t h = unit % size_t(tasks_);
      append.push_back({.k = k_.data() + h * size_t(s_.d), .v = v_.data() + h * size_t(s_.d), .stride = s_.d, .first = first_.data(), .rows = rows,
                        .ring_rows = max_n_, .count = 1});
      attend.push_back({.q = q_now_.data() + unit * HeadFloats(), .out = out_.data() + h * HeadFloats(), .rows = rows, .row_limit = max_n_,
                        .ring_rows = max_n_ + 1, .local = max_n_, .n = n_.data()});
    }
    append_ = std::make_unique<Array<cuda::AppendTask>>(append);
    attend_ = std::make_unique<Array<cuda::AttendTask>>(attend);
    MakeAttendWorkspace(c_.context);
  }
  void MakeAttendWorkspace(int32_t rows) {
    attend_params_ = {.tasks = attend_->data(), .num_tasks = tasks_, .max_rows = rows, .host_format = c_.rows, .group = s_.group(), .head_dim = s_.d};
    attend_space_ = std::make_unique<Array<std::byte>>(OrExit(cuda::AttendWorkspaceBytes(attend_params_)));
    attend_params_.workspace = attend_space_->data(), attend_params_.workspace_bytes = attend_space_->size();
  }

  // Units of a turn; lists of two turns exist at a time, pooled scores of `pool` turns.
  size_t PerPhase() const { return c_.turns() ? size_t(CeilDiv(units(), c_.refresh)) : 0; }
  size_t TurnOf(size_t unit) const { return unit % size_t(c_.refresh); }
  size_t ListOf(size_t unit) const { return TurnOf(unit) % 2 * PerPhase() + unit / size_t(c_.refresh); }
  float* PooledOf(size_t unit) const {
    return pooled_->data() + (TurnOf(unit) % size_t(c_.pool) * PerPhase() + unit / size_t(c_.refresh)) * size_t(max_n_);
  }
  bool Pools(size_t unit, size_t phase) const { return c_.turns() && (TurnOf(unit) + size_t(c_.refresh) - phase) % size_t(c_.refresh) < size_t(c_.pool); }

  void MakeTwoClock(const PinnedPool& pool) {
    if (c_.turns() && (c_.refresh % 2 != 0 || c_.pool < 2 || c_.refresh % c_.pool != 0 || c_.max_age > c_.pool - 2)) {
      Fail({StatusCode::kInvalid, c_.name + ": use refresh 0, or an even refresh, a pool that divides it, and a max-age of at most pool - 2"});
    }
    const CodeFormat format{.bits = c_.bits, .group_tokens = 64};
    slots_ = c_.slots();
    host_ = pool.data();
    const auto all = size_t(units()), block = LayoutOf(format, s_.d).bytes, head_codes = block * size_t(max_n_ / 64), k = size_t(c_.k), slots = size_t(slots_);
    host_stride_ = std::min(size_t(max_n_), (pool.size() / HostRowBytes() - size_t(max_n_)) / std::max<size_t>(1, all - 1));
    if (host_stride_ == 0) Fail({StatusCode::kInvalid, c_.name + ": the host pool is too small"});
    rows_ = std::make_unique<Array<Half>>(all * HeadRows() * Row());
    codes_ = std::make_unique<Array<std::byte>>(all * head_codes);
    MakeState(all, k, slots);
    EncodeKeys(format, head_codes, block);

    const size_t words = Words();
    std::vector<cuda::AppendTask> append;
    std::vector<cuda::GateTask> gate;
    std::vector<cuda::SelectTask> select;
    std::vector<cuda::ResolveTask> resolve;
    std::vector<cuda::AttendTask> attend;
    std::vector<cuda::AdoptTask> adopt;
    const auto phases = size_t(c_.phases());
    std::vector<std::vector<cuda::ChooseTask>> want(phases);
    std::vector<std::vector<cuda::RefreshTask>> refresh(phases);
    std::vector<std::vector<cuda::GatherTask>> gather(phases);
    for (size_t u = 0; u < all; ++u) {
      const size_t h = u % size_t(tasks_);
      const float* const q = q_now_.data() + u * HeadFloats();
      cuda::ResidencyState at{slot_of_->data() + u * size_t(max_n_), owner_->data() + u * slots, resident_->data() + u * words, slots_, max_n_};
      const auto room = size_t(c_.room());
      if (c_.keep) {
        at.spare = {.state = spare_->data() + u, .slot = spare_slot_->data() + u * room, .position = spare_position_->data() + u * room,
                    .used = used_->data() + u * slots, .room = c_.room()};
      }
      append.push_back({.k = k_.data() + h * size_t(s_.d), .v = v_.data() + h * size_t(s_.d), .stride = s_.d, .first = first_.data(),
                        .rows = Rows(u) + size_t(kSinks) * Row(), .ring_rows = kRing, .count = 1, .blocks = codes_->data() + u * head_codes});
      gate.push_back({.q = q, .anchor = anchor_->data() + u * HeadFloats(), .hold = hold_->data() + u, .age = age_->data() + u});
      cuda::SelectTask chooses{.source = {.q = q, .blocks = codes_->data() + u * head_codes, .rows = Rows(u) + size_t(kSinks) * Row(), .ring_rows = kRing, .n = n_.data()}};
      chooses.rule = {.sinks = kSinks, .local = kLocal, .k = c_.k, .hold = hold_->data() + u, .room = c_.k, .chosen = chosen_->data() + u * k,
                      .count = count_->data() + u, .lse_all = lse_->data() + u * size_t(2 * s_.group()), .lse_out = lse_->data() + u * size_t(2 * s_.group()) + s_.group()};
      if (c_.theta > 0) chooses.rule.resident = resident_->data() + u * words, chooses.rule.log_theta = std::log(c_.theta);
      select.push_back(chooses);
      resolve.push_back({.at = at, .chosen = chosen_->data() + u * k, .count = count_->data() + u, .room = c_.k, .n = n_.data(), .slot_row = kSinks + kRing,
                         .ring_row = kSinks, .ring_rows = kRing, .refs = refs_->data() + u * k,
                         .keep = c_.keep ? keep_->data() + u * k : nullptr, .num_refs = num_refs_->data() + u,
                         .misses = misses_->data() + u, .hold = hold_->data() + u, .q = q, .anchor = anchor_->data() + u * HeadFloats(), .age = age_->data() + u});
      attend.push_back({.q = q, .out = out_.data() + h * HeadFloats(), .rows = Rows(u), .row_limit = int64_t(HeadRows()), .sink_row = 0, .ring_row = kSinks,
                        .ring_rows = kRing, .sinks = kSinks, .local = kLocal, .n = n_.data(), .refs = refs_->data() + u * k,
                        .num_refs = num_refs_->data() + u, .refs_room = c_.k, .host_rows = Host(u), .host_limit = max_n_,
                        .keep = c_.keep ? keep_->data() + u * k : nullptr, .slots = Rows(u) + size_t(kSinks + kRing) * Row(), .slot_limit = slots_});
      if (c_.keep) adopt.push_back({.at = at, .n = n_.data(), .ring_rows = kRing});
      if (!c_.turns()) continue;
      const size_t list = ListOf(u);
      cuda::ChooseTask best{.z = PooledOf(u), .z_stride = max_n_, .n = n_.data()};
      best.rule = {.sinks = kSinks, .local = kLocal, .k = slots_ - c_.room(), .room = slots_, .chosen = wanted_->data() + list * slots, .count = wanted_count_->data() + list,
                   .lse_all = unused_->data() + list};
      want[TurnOf(u)].push_back(best);
      refresh[TurnOf(u)].push_back({.at = at, .wanted = wanted_->data() + list * slots, .wanted_count = wanted_count_->data() + list,
                                    .n = n_.data(), .ring_rows = kRing, .position = position_->data() + list * slots,
                                    .from_piece = from_->data() + list * slots, .to_piece = to_->data() + list * slots, .count = fetch_count_->data() + list,
                                    .pooled = PooledOf(u)});
      gather[TurnOf(u)].push_back({.from = Host(u), .to = reinterpret_cast<std::byte*>(Rows(u) + size_t(kSinks + kRing) * Row()),
                                   .from_piece = from_->data() + list * slots, .to_piece = to_->data() + list * slots, .count = fetch_count_->data() + list,
                                   .from_limit = max_n_, .to_limit = slots_});
    }
    append_ = std::make_unique<Array<cuda::AppendTask>>(append);
    gate_ = std::make_unique<Array<cuda::GateTask>>(gate);
    std::vector<cuda::SelectTask> of_phases;
    for (size_t phase = 0; phase < phases + c_.fills(); ++phase) {
      for (size_t u = 0; u < all; ++u) {
        of_phases.push_back(select[u]);
        if (phase == phases) of_phases.back().rule.resident = nullptr;  // whatever it chooses
        if (Pools(u, phase)) of_phases.back().rule.pooled = PooledOf(u), of_phases.back().rule.pool_level = of_phases.back().rule.lse_all;
      }
    }
    select_ = std::make_unique<Array<cuda::SelectTask>>(of_phases);
    resolve_ = std::make_unique<Array<cuda::ResolveTask>>(resolve);
    attend_ = std::make_unique<Array<cuda::AttendTask>>(attend);
    adopt_ = std::make_unique<Array<cuda::AdoptTask>>(adopt);
    for (size_t p = 0; p < phases; ++p) {
      want_.emplace_back(want[p]);
      refresh_.emplace_back(refresh[p]);
      gather_.emplace_back(gather[p]);
    }
    MakeAttendWorkspace(c_.k + kSinks + kLocal);
    restarts_ = std::make_unique<Array<int32_t>>(std::vector<int32_t>{0});
    select_params_ = {.tasks = select_->data(), .num_tasks = tasks_, .max_n = max_n_, .format = format, .group = s_.group(), .head_dim = s_.d,
                      .gated = c_.tau < 1, .restarts = restarts_->data()};
    select_space_ = std::make_unique<Array<std::byte>>(OrExit(cuda::SelectWorkspaceBytes(select_params_)));
    select_params_.workspace = select_space_->data(), select_params_.workspace_bytes = select_space_->size();
    // Turns may differ by one unit, and the workspace with the number of tasks.
    size_t want_bytes = 0;
    for (const auto& tasks : want_) {
      want_params_ = {.tasks = tasks.data(), .num_tasks = int32_t(tasks.size()), .max_n = max_n_, .group = 1, .rule = GroupRule::kMaxLogit};
      want_bytes = std::max(want_bytes, OrExit(cuda::ChooseWorkspaceBytes(want_params_)));
    }
    want_space_ = std::make_unique<Array<std::byte>>(want_bytes);
    want_params_.workspace = want_space_->data(), want_params_.workspace_bytes = want_space_->size();
  }
  size_t Words() const { return size_t((max_n_ + 63) / 64); }
  void MakeState(size_t all, size_t k, size_t slots) {
    slot_of_ = std::make_unique<Array<int16_t>>(all * size_t(max_n_));
    Cuda(cudaMemset(slot_of_->data(), 0xff, slot_of_->bytes()), "no slots");
    owner_ = std::make_unique<Array<int32_t>>(all * slots);
    Cuda(cudaMemset(owner_->data(), 0xff, owner_->bytes()), "free slots");
    // What the ring will still hold when the first step has appended; resolve goes on from there.
    std::vector<uint64_t> ring_bits(Words(), 0), all_bits;
    for (int32_t p = first_n_ + 1 - kRing; p < first_n_; ++p) ring_bits[size_t(p) / 64] |= uint64_t{1} << (p % 64);
    for (size_t u = 0; u < all; ++u) all_bits.insert(all_bits.end(), ring_bits.begin(), ring_bits.end());
    resident_ = std::make_unique<Array<uint64_t>>(all_bits);
    pooled_ = std::make_unique<Array<float>>(size_t(c_.pool) * PerPhase() * size_t(max_n_));
    OrExit(FillNormal(pooled_->data(), int64_t(pooled_->size()), -INFINITY, 0, 1, stream_));
    chosen_ = std::make_unique<Array<int32_t>>(all * k);
    refs_ = std::make_unique<Array<int32_t>>(all * k);
    if (c_.keep) {
      const size_t room = all * size_t(c_.room());
      keep_ = std::make_unique<Array<int16_t>>(all * k);
      spare_ = std::make_unique<Array<cuda::SpareSlots::State>>(std::vector<cuda::SpareSlots::State>(all));
      spare_slot_ = std::make_unique<Array<int16_t>>(room);
      spare_position_ = std::make_unique<Array<int32_t>>(room);
      used_ = std::make_unique<Array<uint8_t>>(std::vector<uint8_t>(all * slots));
    }
    count_ = std::make_unique<Array<int32_t>>(all);
    num_refs_ = std::make_unique<Array<int32_t>>(all);
    const size_t lists = 2 * PerPhase();
    wanted_ = std::make_unique<Array<int32_t>>(lists * slots);
    position_ = std::make_unique<Array<int32_t>>(lists * slots);
    from_ = std::make_unique<Array<int32_t>>(lists * slots);
    to_ = std::make_unique<Array<int32_t>>(lists * slots);
    wanted_count_ = std::make_unique<Array<int32_t>>(lists);
    fetch_count_ = std::make_unique<Array<int32_t>>(lists);
    unused_ = std::make_unique<Array<float>>(lists);  // choosing what is wanted gives an LSE of pooled scores
    misses_ = std::make_unique<Array<int64_t>>(all);
    hold_ = std::make_unique<Array<uint8_t>>(all);
    age_ = std::make_unique<Array<int32_t>>(std::vector<int32_t>(all, 1 << 20));  // no choice yet: every head scans first
    anchor_ = std::make_unique<Array<float>>(all * HeadFloats());
    lse_ = std::make_unique<Array<float>>(all * size_t(2 * s_.group()));
  }
  // Keys of a unit are those of its rows of the host pool: made on the device, encoded; sinks and ring filled.
  void EncodeKeys(const CodeFormat& format, size_t head_codes, size_t block) {
    const Array<Half> keys(size_t(max_n_) * Row());
    std::vector<cuda::RunEncodeTask> encode(size_t(max_n_ / 64));
    Array<cuda::RunEncodeTask> tasks(encode.size());
    const auto copy = [&](Half* to, size_t from, size_t rows) {
      Cuda(cudaMemcpyAsync(to, keys.data() + from * Row(), rows * RowBytes(), cudaMemcpyDeviceToDevice, stream_), "rows");
    };
    for (size_t u = 0; u < size_t(units()); ++u) {
      if (c_.rows == RowFormat::kF16) {
        OrExit(MakeKeys(keys.data(), int64_t(HostRow(u)), max_n_, s_.d, kKeySeed, stream_));
      } else {
        OrExit(cuda::WidenTasks(Host(u), 0, reinterpret_cast<std::byte*>(keys.data()), 0, 1, max_n_, s_.d, c_.rows, stream_));
      }
      for (size_t g = 0; g < encode.size(); ++g) encode[g] = {.rows = keys.data() + g * 64 * Row(), .block = codes_->data() + u * head_codes + g * block};
      tasks.Write(encode);
      OrExit(cuda::EncodeRuns(tasks.data(), int32_t(encode.size()), format, s_.d, stream_));
      copy(Rows(u), 0, kSinks);
      const auto n = size_t(first_n_), end = n / kRing * kRing;  // the ring's rows of the last round, then those of the one before
      copy(Rows(u) + size_t(kSinks) * Row(), end, n - end);
      copy(Rows(u) + (size_t(kSinks) + n - end) * Row(), n - kRing, kRing - (n - end));
      Cuda(cudaStreamSynchronize(stream_), "rows");
    }
  }

  void Enqueue(int phase) {
    const bool two_clock = c_.kind == Case::Kind::kTwoClock;
    const int before = (phase + c_.phases() - 1) % c_.phases();
    Cuda(cudaMemcpyAsync(hidden_.data(), input_.data(), input_.bytes(), cudaMemcpyDeviceToDevice, stream_), "input");
    if (c_.kind != Case::Kind::kWeights) {
      // Positions before the one that this step adds; n counts that one already.
      Cuda(cudaMemcpyAsync(first_.data(), n_.data(), sizeof(int32_t), cudaMemcpyDeviceToDevice, stream_), "first");
      OrExit(Advance(q_all_.data(), kQuerySteps, int64_t(q_now_.size()), q_now_.data(), step_.data(), n_.data(), stream_));
    }
    for (int l = 0; l < s_.layers; ++l) Layer(phase, l);
    // Beside the last product: a choice needs all multiprocessors at once, and would wait for the gather.
    if (two_clock && c_.turns()) {
      OrExit(fork_.Record(stream_));
      OrExit(fork_.Before(side_.get()));
      const auto& gather = gather_[size_t(before)];
      OrExit(cuda::Gather({.tasks = gather.data(), .num_tasks = int32_t(gather.size()), .piece_bytes = int32_t(HostRowBytes()), .rows = c_.rows,
                           .head_dim = s_.d, .max_blocks = 8}, side_.get()));
      OrExit(join_.Record(side_.get()));
    }
    Normed(m_.output.data(), m_.output_norm.data(), logits_.data(), s_.vocab, false);
    if (!two_clock) return;
    if (c_.turns()) OrExit(join_.Before(stream_));
    Turn(phase);
  }
  // The slow clock: what was gathered or kept is used from now on, what is wanted next is listed.
  void Turn(int phase) {
    const int before = (phase + c_.phases() - 1) % c_.phases();
    if (c_.turns()) OrExit(cuda::Land(RefreshOf(before), stream_));
    if (c_.keep) OrExit(cuda::Adopt({.tasks = adopt_->data(), .num_tasks = units()}, stream_));
    if (!c_.turns()) return;
    want_params_.tasks = want_[size_t(phase)].data(), want_params_.num_tasks = int32_t(want_[size_t(phase)].size());
    OrExit(cuda::Choose(want_params_, stream_));
    OrExit(cuda::Refresh(RefreshOf(phase), stream_));
  }
  cuda::RefreshParams RefreshOf(int phase) const {
    const auto& tasks = refresh_[size_t(phase)];
    return {.tasks = tasks.data(), .num_tasks = int32_t(tasks.size()), .max_n = max_n_};
  }

  // y = W norm(hidden), or the gated one to where Added() takes it from.
  void Normed(const uint16_t* weights, const float* norm, float* y, int rows, bool gated) {
    if (c_.batch == 1) {
      OrExit(reference::MultiplyVector({.weights = weights, .x = hidden_.data(), .norm = norm, .eps = 1e-5f, .y = gated ? gated_.data() : y, .gated = gated,
                                    .rows = rows, .cols = s_.hidden}, stream_));
      return;
    }
    OrExit(NormBatch(hidden_.data(), norm, 1e-5f, normed_.data(), c_.batch, s_.hidden, stream_));
    OrExit(MultiplyBatch({.weights = weights, .x = normed_.data(), .y = y, .y_half = gated ? gated_half_.data() : nullptr, .gated = gated, .tokens = c_.batch,
                          .rows = rows, .cols = s_.hidden}, stream_));
  }
  // hidden += W x; x null is what the gated product left.
  void Added(const uint16_t* weights, const float* x, int cols) {
    if (c_.batch == 1) {
      OrExit(reference::MultiplyVector({.weights = weights, .x = x != nullptr ? x : gated_.data(), .y = hidden_.data(), .add = true, .rows = s_.hidden, .cols = cols},
                                       stream_));
      return;
    }
    OrExit(MultiplyBatch({.weights = weights, .x = x != nullptr ? nullptr : gated_half_.data(), .x_float = x, .y = hidden_.data(), .add = true, .tokens = c_.batch,
                          .rows = s_.hidden, .cols = cols}, stream_));
  }

  void AppendLayer(int l) {
    OrExit(cuda::Append({.tasks = append_->data() + l * tasks_, .num_tasks = tasks_, .max_count = 1, .format = {.bits = c_.bits, .group_tokens = 64},
                         .head_dim = s_.d, .gate = c_.kind == Case::Kind::kTwoClock && c_.fused ? GateOf(l) : cuda::GateParams{}}, stream_));
  }
  cuda::GateParams GateOf(int l) const {
    return {.tasks = gate_->data() + l * tasks_, .num_tasks = tasks_, .group = s_.group(), .head_dim = s_.d, .tau = c_.tau, .max_age = c_.max_age};
  }
  // As cache/device_step.cc does.
  bool ResolvesWithin() const { return c_.fused && tasks_ <= 16; }
  void SelectLayer(int phase, int l) {
    select_params_.resolves = ResolvesWithin() ? resolve_->data() + l * tasks_ : nullptr;
    select_params_.tasks = select_->data() + size_t(phase) * size_t(units()) + l * tasks_;
    OrExit(cuda::Select(select_params_, stream_));
  }
  void ResolveLayer(int l) {
    OrExit(cuda::Resolve({.tasks = resolve_->data() + l * tasks_, .num_tasks = tasks_, .group = s_.group(), .head_dim = s_.d}, stream_));
  }
  void AttendLayer(int l) {
    attend_params_.tasks = attend_->data() + l * tasks_;
    OrExit(cuda::Attend(attend_params_, stream_));
  }

  void Layer(int phase, int l) {
    const LayerWeights& w = m_.layers[size_t(l)];
    const int q_width = s_.heads * s_.d, kv_width = s_.kv_heads * s_.d;
    const reference::RotateParams rotation{.qkv = qkv_.data(), .cos = angles_.data(), .sin = angles_.data() + angles_.size() / 2, .q = q_model_.data(),
                                           .k = k_.data(), .v = v_.data(), .tokens = c_.batch, .heads = s_.heads, .kv_heads = s_.kv_heads, .head_dim = s_.d};
    const bool rotates = c_.kind != Case::Kind::kWeights;
    if (rotates && c_.batch == 1) {
      OrExit(reference::MultiplyRotated({.weights = w.qkv.data(), .x = hidden_.data(), .norm = w.norm1.data(), .eps = 1e-5f, .rows = q_width + 2 * kv_width,
                                         .cols = s_.hidden}, rotation, stream_));
    } else {
      Normed(w.qkv.data(), w.norm1.data(), qkv_.data(), q_width + 2 * kv_width, false);
      if (rotates) OrExit(reference::RotateHeads(rotation, stream_));
    }
    if (rotates) {
      AppendLayer(l);
      if (c_.kind == Case::Kind::kTwoClock) {
        if (!c_.fused) OrExit(cuda::Gate(GateOf(l), stream_));
        SelectLayer(phase, l);
        if (!ResolvesWithin()) ResolveLayer(l);
      }
      AttendLayer(l);
    }
    Added(w.o.data(), c_.kind == Case::Kind::kWeights && c_.batch == 1 ? qkv_.data() : out_.data(), q_width);
    Normed(w.gate_up.data(), w.norm2.data(), nullptr, s_.intermediate, true);
    Added(w.down.data(), nullptr, s_.intermediate);
  }

  const Model& m_;
  const Shape s_;
  const Case c_;
  const int32_t tasks_;
  const cudaStream_t stream_;
  CudaStream side_;
  CudaEvent fork_, join_, start_, end_;
  Array<float> input_, hidden_, qkv_, q_model_, k_, v_, out_, gated_, logits_, angles_, q_now_, q_all_;
  Array<uint16_t> normed_, gated_half_;  // of a batch
  Array<int32_t> n_, step_;
  Array<int32_t> first_{1};
  size_t kv_before_ = 0, kv_bytes_ = 0, host_stride_ = 0;
  int32_t max_n_ = 0, slots_ = 0, first_n_ = 0;
  const std::byte* host_ = nullptr;
  std::unique_ptr<Array<Half>> rows_;
  std::unique_ptr<Array<std::byte>> codes_, attend_space_, select_space_, want_space_;
  std::unique_ptr<Array<int16_t>> slot_of_, keep_, spare_slot_;
  std::unique_ptr<Array<cuda::SpareSlots::State>> spare_;
  std::unique_ptr<Array<int32_t>> spare_position_;
  std::unique_ptr<Array<int32_t>> owner_, chosen_, refs_, count_, num_refs_, restarts_, wanted_, wanted_count_, position_, from_, to_, fetch_count_, age_;
  std::unique_ptr<Array<uint64_t>> resident_;
  std::unique_ptr<Array<int64_t>> misses_;
  std::unique_ptr<Array<uint8_t>> hold_, used_;
  std::unique_ptr<Array<float>> pooled_, anchor_, lse_, unused_;
  std::unique_ptr<Array<cuda::AppendTask>> append_;
  std::unique_ptr<Array<cuda::GateTask>> gate_;
  std::unique_ptr<Array<cuda::SelectTask>> select_;  // [refresh, units]
  std::unique_ptr<Array<cuda::ResolveTask>> resolve_;
  std::unique_ptr<Array<cuda::AttendTask>> attend_;
  std::unique_ptr<Array<cuda::AdoptTask>> adopt_;
  std::vector<Array<cuda::ChooseTask>> want_;
  std::vector<Array<cuda::RefreshTask>> refresh_;
  std::vector<Array<cuda::GatherTask>> gather_;
  cuda::AttendParams attend_params_;
  cuda::SelectParams select_params_;
  cuda::ChooseParams want_params_;
  std::vector<Graph> graphs_;
  std::unique_ptr<Graph> filling_;
  int64_t turn_ = 0, holds_seen_ = 0, holds_asked_ = 0, rows_behind_ = 0;
};

// "scan4": two clocks, 4-bit codes, every step scanned; "gate4@0.8": with the gate at cosine 0.8; settings of the case after slashes.
Case CaseOf(const std::string& text, const Case& defaults) {
  const auto parts = Split(text, '/');
  if (parts.empty()) Fail({StatusCode::kInvalid, "--cases: an empty case"});
  Case c = defaults;
  c.name = text;
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::string value = parts[i].substr(1);
    if (value.empty()) Fail({StatusCode::kInvalid, "--cases: " + text + ": /" + parts[i] + " has no value"});
    switch (parts[i][0]) {
      case 'b': c.batch = std::stoi(value); break;
      case 'n': c.context = std::stoi(value); break;
      case 'k': c.k = std::stoi(value); break;
      case 'f': c.factor = std::stod(value); break;
      case 'r': c.refresh = std::stoi(value); break;
      case 't': c.theta = std::stof(value); break;
      case 'm': c.budget_gib = std::stod(value); break;
      default: Fail({StatusCode::kInvalid, "--cases: " + text + ": /" + parts[i] + " is no setting; use b, n, k, f, r, t or m"});
    }
  }
  const std::string& kind = parts.front();
  if (kind == "weights") return c;
  if (kind == "dense") {
    c.kind = Case::Kind::kDense;
    return c;
  }
  const bool gate = kind.rfind("gate", 0) == 0;
  if (kind.size() < 5 || (!gate && kind.rfind("scan", 0) != 0)) Fail({StatusCode::kInvalid, "--cases: " + text + "; use weights, dense, scan2, scan4, scan8, gate4@0.8, ..."});
  c.kind = Case::Kind::kTwoClock;
  c.bits = kind[4] - '0';
  const size_t at = kind.find('@');
  if (c.theta < 0) c.theta = float(TwoClockOptions::ThetaOfMemory(c.k));
  if (gate) c.tau = at == std::string::npos ? 0.9f : std::stof(kind.substr(at + 1));
  return c;
}

// Every row of the pool, as MakeKeys() makes it, or rounded to `format`.
void FillPool(const PinnedPool& pool, int32_t d, RowFormat format, cudaStream_t stream) {
  const size_t wide = size_t(2 * d), row_bytes = RowBytes(format, d), rows = pool.size() / row_bytes, part = std::min(rows, (size_t{256} << 20) / wide);
  const Array<Half> keys(part * wide);
  for (size_t from = 0; from < rows; from += part) {
    const size_t count = std::min(part, rows - from);
    OrExit(MakeKeys(keys.data(), int64_t(from), int64_t(count), d, Step::kKeySeed, stream));
    if (format == RowFormat::kF16) {
      pool.CopyHere(pool.data() + from * row_bytes, reinterpret_cast<const std::byte*>(keys.data()), count * row_bytes, stream);
      continue;
    }
    Cuda(cudaStreamSynchronize(stream), "keys");
    const std::vector<Half> here = keys.Read(0, count * wide);
    const size_t workers = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (size_t w = 0; w < workers; ++w) {
      threads.emplace_back([&, w] {
        for (size_t r = w * count / workers; r < (w + 1) * count / workers; ++r) {
          NarrowRow(here.data() + r * wide, format, d, pool.data() + (from + r) * row_bytes);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  Cuda(cudaStreamSynchronize(stream), "pool");
}
}  // namespace

int Main(int argc, char** argv) {
  Flags flags("decode_bench", argc, argv);
  Case defaults;
  const std::string out = flags.Text("out", ""), commit = flags.Text("commit", "unknown"), model = flags.Text("model", "llama-3.1-8b");
  const std::string texts = flags.Text("cases", "weights,dense,scan4,gate4@0.8,gate4@0.9,scan2,gate2@0.8");
  defaults.context = flags.Int("context", 131072), defaults.batch = flags.Int("batch", 1), defaults.k = flags.Int("k", 2048);
  defaults.factor = flags.Number("factor", 4), defaults.refresh = flags.Int("refresh", 0), defaults.pool = flags.Int("pool", 16);
  defaults.max_age = flags.Int("max-age", 14), defaults.theta = float(flags.Number("theta", -1)), defaults.budget_gib = flags.Number("budget-gib", 0);
  const double pool_gib = flags.Number("host-pool-gib", 0);
  defaults.fused = flags.Int("fused", 1) != 0, defaults.keep = flags.Int("keep", 1) != 0;
  const std::string rows_of = flags.Text("rows", "f16");
  if (!FindRowFormat(rows_of)) Fail({StatusCode::kInvalid, "--rows=" + rows_of + "; use f16, int8 or e4m3"});
  defaults.rows = *FindRowFormat(rows_of);
  const int steps = flags.Int("steps", 128);
  flags.Finish();
  std::vector<Case> cases;
  for (const std::string& text : Split(texts, ',')) cases.push_back(CaseOf(text, defaults));
  const CudaStream stream = OrExit(CudaStream::Create());
  const Shape shape = ShapeOf(model);
  const Model weights(shape, stream.get());
  Json file = Header("decode step", flags, commit);
  file["model"] = model, file["dtype"] = "fp16", file["weight_bytes"] = weights.bytes;
  file["queries"] = {{"share_that_stays", {0.5, 0.95}}, {"memory", 0.5}, {"scale", 2}};
  size_t wanted = 0;
  for (const Case& c : cases) {
    if (c.kind == Case::Kind::kTwoClock) {
      wanted = std::max(wanted, size_t(c.max_n()) * size_t(c.batch) * size_t(shape.units()) * RowBytes(c.rows, shape.d));
    }
  }
  std::unique_ptr<PinnedPool> pool;
  if (wanted > 0) {
    // Below 32 GiB translating addresses would be easier than it is.
    const double limit = pool_gib > 0 ? std::max(pool_gib, 32.0) * double(kGiB) : double(wanted);
    pool = std::make_unique<PinnedPool>(std::min(wanted, size_t(limit)));
    file["host_pool"] = pool->Report();
    file["host_pool"]["bytes_without_limit"] = wanted;
    std::printf("pinned %.1f of %.1f GB at %.1f GB/s\n", double(pool->size()) / 1e9, double(wanted) / 1e9, double(file["host_pool"]["gb_per_s"]));
    FillPool(*pool, shape.d, defaults.rows, stream.get());
  }
  file["cases"] = Json::array();
  std::vector<std::pair<int32_t, double>> weights_ms;  // by batch
  bool good = true;
  for (const Case& which : cases) {
    Step step(weights, which, pool.get(), steps, stream.get());
    step.Capture();
    Json row = step.Measure(steps);
    double alone = 0;
    if (which.kind == Case::Kind::kWeights) weights_ms.emplace_back(which.batch, double(row["ms_median"]));
    for (const auto& [batch, ms] : weights_ms) alone = batch == which.batch ? ms : alone;
    if (alone > 0) row["over_weights"] = double(row["ms_median"]) / alone;
    if (which.kind == Case::Kind::kTwoClock) row["output_error_against_fp64"] = step.Verify();
    row["logits_error_against_fp64"] = step.VerifyLogits();
    row["logits_finite"] = step.LogitsFinite();
    std::printf("%-32s %8.3f ms (%.3f to %.3f, back to back %.3f)  %.3fx  %.1f tokens/s  rho %.2f  in step %.1f rows a head  behind %.0f rows  dropped %.5f  restarted %.4f  "
                "KV and index %.3f GiB of %.1f  errors %.1e, %.1e\n",
                which.name.c_str(), double(row["ms_median"]), double(row["ms_least"]), double(row["ms_most"]), double(row["ms_back_to_back"]),
                row.value("over_weights", 0.0), double(row["tokens_per_s"]), row.value("rho", 0.0), row.value("rows_in_step_per_head", 0.0),
                row.value("rows_behind_per_step", 0.0), row.value("dropped_mass_estimated", 0.0), row.value("selects_restarted", 0.0), double(row.value("kv_driver_bytes", size_t{0})) / double(kGiB),
                which.budget_gib, row.value("output_error_against_fp64", 0.0), double(row["logits_error_against_fp64"]));
    std::fflush(stdout);
    const bool right = row.value("output_error_against_fp64", 0.0) < 1e-4 && double(row["logits_error_against_fp64"]) < 2e-3 && bool(row["logits_finite"]);
    if (!right || !step.WithinBudget()) {
      good = false;
      std::fprintf(stderr, "decode_bench: %s: %s\n", which.name.c_str(), right ? "over its budget" : "WRONG OUTPUT");
    }
    if (which.kind != Case::Kind::kWeights) row["parts_ms"] = step.Parts();
    if (row.contains("parts_ms")) std::printf("  %s\n", row["parts_ms"].dump().c_str());
    file["cases"].push_back(row);
    WriteJson(file, out);
  }
  return good ? 0 : 1;
}
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
