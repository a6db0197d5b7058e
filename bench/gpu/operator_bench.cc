// What does sparse decode attention cost as an operator, selection billed, beside dense attention over the same keys?
//
//   operator_bench --out=FILE.json [--commit=ID] [--only=16x2048,...] [--bits=4] [--repeats=11]
//
// The grid of HShare's operator script: 32 heads without groups, head_dim 128, fp16, batch 8 and 16, 1K to 4K keys, a budget C of an eighth
// of them: 8 sinks, 64 local, the rest chosen. All rows are on the device. 32 layers with K and V of their own, so nothing waits in L2.
// A block is 16 steps of 32 layers in one CUDA graph with every launch that a step needs; `us` is its time a call, over 16 x 32, and
// `us_without_graph` the same launched one by one. Tasks are the same at every step, as in an engine; a step's queries are copied to where tasks
// look for them, all layers at once (0.2 us a call).
//
//   dense             our dense attention
//   cis exact         CIS, s = 16: at the block's start scores from K itself (score + choose, dilation m = k/3, r = 1), then gate at 0.8.
//                     A choice that skips heads which hold exists, a scoring that does so does not: only with queries that hold (checked)
//   cis codes         the same with low-bit codes as the scorer; heads that fail the gate select again and take a new anchor
//   two-clock         gate at 0.8 at every step, heads that fail scan their codes; no block, no dilation
//   two-clock, scan   every head scans at every step
//
// "budget" says how dilation counts: "on top" as published (more than C keys are attended), or "within C", the fair one: k is so small that
// k + 2 m fits. Queries "hold" (0.92 to 0.98 of a head's query stays, the rest loses half of its correlation a step: no gate fails) or
// "drift" (0.5 to 0.95 stays). floor_us is the bytes of the attended rows and of what was scored over 4.2 TB/s.
// Keys are normal with a heavy-tailed factor a row. Checked: attention of some heads against fp64; exact choices against a sort.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/units.h"
#include "bench/gpu/support.h"
#include "bench/gpu/synthetic.h"
#include "kernels/code_block.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/run_kernels.h"

namespace prehoc {
namespace {

constexpr int kLayers = 32, kSteps = 16, kHeads = 32, kD = 128, kSinks = 8, kLocal = 64;
constexpr size_t kRow = 2 * kD;
constexpr double kRate = 4200;  // [GB/s]
constexpr float kTau = 0.8f;

struct Mode {
  const char* name;
  bool block = false;     // CIS: selects at the start of a block whatever the gate says
  bool exact = false;     // from K
  bool gate = false;
  bool within = true;     // dilation counts in the budget
  bool drift = false;
};

// K, V, codes and queries of a cell.
class Cell {
 public:
  Cell(int sequences, int32_t keys, int bits, cudaStream_t stream)
      : batch(sequences), n(keys), tasks(sequences * kHeads), format{.bits = bits, .group_tokens = 64}, rows_(units() * size_t(n) * kRow),
        codes_(units() * CodeBytes()), n_(std::vector<int32_t>{n}), out_(size_t(tasks) * kD), now_(units() * kD), z_(size_t(tasks) * size_t(n)) {
    OrExit(MakeKeys(rows_.data(), 0, int64_t(units()) * n, kD, 11, stream));
    const size_t block = LayoutOf(format, kD).bytes;
    std::vector<cuda::RunEncodeTask> encode(size_t(n / 64));
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<cuda::RunEncodeTask> all;
      for (size_t u = size_t(layer) * size_t(tasks); u < size_t(layer + 1) * size_t(tasks); ++u) {
        for (size_t g = 0; g < size_t(n / 64); ++g) all.push_back({.rows = Rows(u) + g * 64 * kRow, .block = Codes(u) + g * block});
      }
      const Array<cuda::RunEncodeTask> device(all);
      OrExit(cuda::EncodeRuns(device.data(), int32_t(all.size()), format, kD, stream));
      Cuda(cudaStreamSynchronize(stream), "encode");
    }
    for (const bool drift : {false, true}) {
      QueryStatistics statistics;
      if (!drift) statistics.least = 0.92f, statistics.most = 0.98f;
      q_[drift] = std::make_unique<Array<float>>(size_t(kSteps) * units() * kD);
      OrExit(MakeQueries(q_[drift]->data(), kSteps, int32_t(units()), kD, statistics, drift ? 7 : 8, stream));
    }
    Cuda(cudaStreamSynchronize(stream), "queries");
  }
  size_t units() const { return size_t(kLayers) * size_t(tasks); }
  size_t CodeBytes() const { return LayoutOf(format, kD).bytes * size_t(n / 64); }  // of a head
  const Half* Rows(size_t unit) const { return rows_.data() + unit * size_t(n) * kRow; }
  std::byte* Codes(size_t unit) const { return codes_.data() + unit * CodeBytes(); }
  const float* Q(bool drift, int step, size_t unit) const { return q_[drift]->data() + (size_t(step) * units() + unit) * kD; }
  const float* Now(size_t unit) const { return now_.data() + unit * kD; }
  // Enqueues: the queries of a step become those that tasks see.
  void Turn(bool drift, int step, cudaStream_t stream) const {
    Cuda(cudaMemcpyAsync(now_.data(), Q(drift, step, 0), units() * kD * sizeof(float), cudaMemcpyDeviceToDevice, stream), "queries");
  }
  float* Out(size_t unit) const { return out_.data() + unit % size_t(tasks) * kD; }  // layers take turns: later ones overwrite
  float* Z(size_t unit) const { return z_.data() + unit % size_t(tasks) * size_t(n); }
  const int32_t* N() const { return n_.data(); }
  // Exact logits of a head over all keys.
  std::vector<double> Logits(bool drift, int step, size_t unit, std::vector<Half>* rows) const {
    rows->resize(size_t(n) * kRow);
    std::vector<float> q(kD);
    Cuda(cudaMemcpy(rows->data(), Rows(unit), rows->size() * sizeof(Half), cudaMemcpyDefault), "rows");
    Cuda(cudaMemcpy(q.data(), Q(drift, step, unit), kD * sizeof(float), cudaMemcpyDefault), "query");
    std::vector<double> z;
    for (size_t p = 0; p < size_t(n); ++p) {
      double dot = 0;
      for (size_t c = 0; c < kD; ++c) dot += double(q[c]) * HalfToFloat((*rows)[p * kRow + c]);
      z.push_back(dot / std::sqrt(double(kD)));
    }
    return z;
  }
  // Relative error of the output of a head of the last layer, attended to `positions`.
  double Error(const std::vector<double>& z, const std::vector<Half>& rows, const std::vector<int32_t>& positions, size_t unit) const {
    std::vector<float> out(kD);
    Cuda(cudaMemcpy(out.data(), Out(unit), kD * sizeof(float), cudaMemcpyDefault), "out");
    double most = -INFINITY, sum = 0, error = 0, norm = 0;
    for (const int32_t p : positions) most = std::max(most, z[size_t(p)]);
    std::vector<double> want(kD, 0.0);
    for (const int32_t p : positions) {
      const double w = std::exp(z[size_t(p)] - most);
      sum += w;
      for (size_t c = 0; c < kD; ++c) want[c] += w * HalfToFloat(rows[size_t(p) * kRow + kD + c]);
    }
    for (size_t c = 0; c < kD; ++c) error += (want[c] / sum - out[c]) * (want[c] / sum - out[c]), norm += want[c] / sum * want[c] / sum;
    return std::sqrt(error / norm);
  }

  const int batch;
  const int32_t n, tasks;
  const CodeFormat format;

 private:
  Array<Half> rows_;
  Array<std::byte> codes_;
  Array<int32_t> n_;
  Array<float> out_, now_, z_;
  std::unique_ptr<Array<float>> q_[2];
};

constexpr double kMostError = 1e-4;
void Require(bool good, const Cell& cell, const std::string& mode, const std::string& what) {
  if (!good) Fail({StatusCode::kCorrupt, std::to_string(cell.batch) + "x" + std::to_string(cell.n) + " " + mode + ": " + what});
}

template <class T>
std::unique_ptr<Array<std::byte>> Workspace(T* params, size_t bytes) {
  auto space = std::make_unique<Array<std::byte>>(bytes);
  params->workspace = space->data(), params->workspace_bytes = space->size();
  return space;
}

Json Dense(const Cell& cell, cudaStream_t stream, int repeats, double* us) {
  std::vector<cuda::AttendTask> tasks;
  for (size_t u = 0; u < cell.units(); ++u) {
    tasks.push_back({.q = cell.Q(false, 0, u), .out = cell.Out(u), .rows = cell.Rows(u), .row_limit = cell.n, .ring_rows = cell.n + 1, .local = cell.n, .n = cell.N()});
  }
  const Array<cuda::AttendTask> device(tasks);
  cuda::AttendParams params{.tasks = device.data(), .num_tasks = cell.tasks, .max_rows = cell.n, .group = 1, .head_dim = kD};
  const auto space = Workspace(&params, OrExit(cuda::AttendWorkspaceBytes(params)));
  const Graph graph(stream, [&] {
    for (int layer = 0; layer < kLayers; ++layer) {
      params.tasks = device.data() + layer * cell.tasks;
      OrExit(cuda::Attend(params, stream));
    }
  });
  const Spread spread = graph.Measure(stream, repeats);
  double worst = 0;
  for (const size_t u : {cell.units() - 1, cell.units() - size_t(cell.tasks) / 2, cell.units() - size_t(cell.tasks)}) {
    std::vector<Half> rows;
    const auto z = cell.Logits(false, 0, u, &rows);
    std::vector<int32_t> all;
    for (int32_t p = 0; p < cell.n; ++p) all.push_back(p);
    worst = std::max(worst, cell.Error(z, rows, all, u));
  }
  Require(worst < kMostError, cell, "dense", "error " + std::to_string(worst));
  const double bytes = double(cell.tasks) * cell.n * 4 * kD, floor = bytes / kRate / 1e3;
  *us = spread.median / kLayers;
  std::printf("%2dx%-5d %-18s %38s %8.2f us  %5.2fx of its floor\n", cell.batch, cell.n, "dense", "", *us, *us / floor);
  return {{"name", "dense"}, {"batch", cell.batch}, {"n", cell.n}, {"us", *us}, {"us_least", spread.least / kLayers}, {"us_most", spread.most / kLayers}, {"launches", 1},
          {"floor_us", floor}, {"over_floor", *us / floor}, {"output_error_against_fp64", worst}};
}

class Sparse {
 public:
  Sparse(const Cell& cell, const Mode& mode, cudaStream_t stream)
      : cell_(cell), mode_(mode), stream_(stream), budget_(cell.n / 8 - kSinks - kLocal),
        k_(mode.block && mode.within ? (budget_ - 2) * 3 / 5 : budget_), m_(mode.block ? int32_t(CeilDiv(k_, 3)) : 0), room_(k_ + 2 * m_),
        chosen_(cell.units() * size_t(room_)), count_(cell.units()), age_(cell.units()), hold_(cell.units()),
        anchor_(cell.units() * kD), lse_(cell.units()) {
    if (mode_.within) Require(room_ <= budget_, cell, mode.name, "dilation leaves the budget");
    const size_t units = cell.units();
    if (!mode_.block) age_.Write(std::vector<int32_t>(units, 1 << 20));  // the first step selects
    std::vector<cuda::DeviceRun> runs;
    for (size_t u = 0; u < units; ++u) runs.push_back({cell.Rows(u), 0, cell.n});
    runs_ = std::make_unique<Array<cuda::DeviceRun>>(runs);
    std::vector<cuda::GateTask> gate;
    std::vector<cuda::SelectTask> select;
    std::vector<cuda::ChooseTask> choose;
    std::vector<cuda::RunScoreTask> score;
    std::vector<cuda::ResolveTask> resolve;
    std::vector<cuda::AttendTask> attend;
    for (const bool starts : {false, true}) {  // a block
      for (size_t u = 0; u < units; ++u) {
        const bool holds = mode_.gate && !(mode_.block && starts);
        const float* const q = cell.Now(u);
        int32_t* const chosen = chosen_.data() + u * size_t(room_);
        const cuda::ChooseRule rule{.sinks = kSinks, .local = kLocal, .k = k_, .dilate_m = m_, .dilate_r = m_ > 0 ? 1 : 0, .hold = holds ? hold_.data() + u : nullptr,
                                    .room = room_, .chosen = chosen, .count = count_.data() + u, .lse_all = lse_.data() + u};
        gate.push_back({.q = q, .anchor = anchor_.data() + u * kD, .hold = hold_.data() + u, .age = age_.data() + u});
        if (mode_.exact) {
          if (starts) score.push_back({.q = q, .runs = runs_->data() + u, .num_runs = 1, .total = cell.n, .z = cell.Z(u), .z_stride = cell.n});
          choose.push_back({.z = cell.Z(u), .z_stride = cell.n, .n = cell.N(), .rule = rule});
        } else {
          select.push_back({.source = {.q = q, .blocks = cell.Codes(u), .rows = cell.Rows(u), .ring_rows = cell.n, .n = cell.N()}, .rule = rule});
        }
        // Positions are rows: anchors move, and nothing is looked up.
        resolve.push_back({.at = {.max_n = cell.n}, .chosen = chosen, .count = count_.data() + u, .room = room_, .n = cell.N(), .hold = holds ? hold_.data() + u : nullptr, .q = q,
                           .anchor = anchor_.data() + u * kD, .age = age_.data() + u});
        attend.push_back({.q = q, .out = cell.Out(u), .rows = cell.Rows(u), .row_limit = cell.n, .ring_rows = cell.n + 1, .sinks = kSinks, .local = kLocal, .n = cell.N(),
                          .refs = chosen, .num_refs = count_.data() + u, .refs_room = room_});
      }
    }
    gate_ = std::make_unique<Array<cuda::GateTask>>(gate);
    select_ = std::make_unique<Array<cuda::SelectTask>>(select);
    choose_ = std::make_unique<Array<cuda::ChooseTask>>(choose);
    score_ = std::make_unique<Array<cuda::RunScoreTask>>(score);
    resolve_ = std::make_unique<Array<cuda::ResolveTask>>(resolve);
    attend_ = std::make_unique<Array<cuda::AttendTask>>(attend);
    attend_params_ = {.tasks = attend_->data(), .num_tasks = cell.tasks, .max_rows = room_ + kSinks + kLocal, .group = 1, .head_dim = kD};
    attend_space_ = Workspace(&attend_params_, OrExit(cuda::AttendWorkspaceBytes(attend_params_)));
    if (mode_.exact) {
      choose_params_ = {.tasks = choose_->data(), .num_tasks = cell.tasks, .max_n = cell.n, .group = 1, .dilate = m_ > 0};
      choose_space_ = Workspace(&choose_params_, OrExit(cuda::ChooseWorkspaceBytes(choose_params_)));
    } else {
      select_params_ = {.tasks = select_->data(), .num_tasks = cell.tasks, .max_n = cell.n, .format = cell.format, .group = 1, .head_dim = kD, .dilate = m_ > 0};
      choose_space_ = Workspace(&select_params_, OrExit(cuda::SelectWorkspaceBytes(select_params_)));
    }
  }

  Json Measure(int repeats, double dense_us) {
    std::vector<Graph> steps;
    for (int step = 0; step < kSteps; ++step) steps.emplace_back(stream_, [&] { Enqueue(step); });
    const Graph block(stream_, [&] {
      for (int step = 0; step < kSteps; ++step) Enqueue(step);
    });
    // Once in steps, for what happens in them; the second block is like all that follow.
    double attended = 0, selected = 0, error = 0;
    for (int step = -kSteps; step < kSteps; ++step) {
      const int at = (step + kSteps) % kSteps;
      steps[size_t(at)].Launch(stream_);
      Cuda(cudaStreamSynchronize(stream_), "step");
      if (step < 0) continue;
      const bool asked = mode_.gate && !(mode_.block && step == 0);
      const auto counts = count_.Read();
      const auto holds = hold_.Read();
      for (size_t u = 0; u < counts.size(); ++u) {
        Require(counts[u] >= k_ && counts[u] <= room_, cell_, mode_.name, "chose " + std::to_string(counts[u]) + " of " + std::to_string(k_));
        attended += counts[u] + kSinks + kLocal;
        selected += asked && holds[u] == 1 ? 0 : 1;
        if (mode_.exact && asked) Require(holds[u] == 1, cell_, mode_.name, "a gate failed");
      }
      if (step == 0 || step == kSteps - 1) error = std::max(error, Verify(step));
    }
    const double calls = double(kSteps) * double(cell_.units());
    attended /= calls, selected /= calls;
    const Spread all = block.Measure(stream_, repeats, 2);
    const double launched = MeasureStream(stream_, [&] {
      for (int step = 0; step < kSteps; ++step) Enqueue(step);
    }, 3, 1).median / (kSteps * kLayers);
    const double us = all.median / (kSteps * kLayers), first = steps[0].Measure(stream_, repeats, 1).median / kLayers;
    // Step 0 leaves the state that step 1 finds in a block.
    std::vector<double> reuse;
    for (int i = 0; i < repeats; ++i) {
      steps[0].Launch(stream_);
      reuse.push_back(steps[1].Measure(stream_, 1, 0).median / kLayers);
    }
    const double second = SpreadOf(reuse).median;
    const double scored = selected * (mode_.exact ? 2.0 * kD * cell_.n : double(cell_.CodeBytes()));
    const double bytes = cell_.tasks * (attended * 4 * kD + scored + 8.0 * kD), floor = bytes / kRate / 1e3;
    const int gate_launches = mode_.exact ? 1 : 0, moves = MovesAnchors() ? 1 : 0;
    Json row{{"name", mode_.name}, {"batch", cell_.batch}, {"n", cell_.n}};
    if (mode_.block) row["budget"] = mode_.within ? "within C" : "on top";
    row["queries"] = mode_.drift ? "drift" : "hold", row["k"] = k_, row["dilate_m"] = m_, row["attended"] = attended, row["rho"] = selected;
    if (!mode_.exact) row["bits"] = cell_.format.bits;
    row["us"] = us, row["us_least"] = all.least / (kSteps * kLayers), row["us_most"] = all.most / (kSteps * kLayers);
    row["us_without_graph"] = launched, row["us_first_step"] = first, row["us_second_step"] = second;
    row["launches_first"] = (mode_.exact ? 2 : 1) + 1 + moves, row["launches"] = 2 + gate_launches + moves;
    row["floor_us"] = floor, row["over_floor"] = us / floor, row["dense_over_this"] = dense_us / us, row["output_error_against_fp64"] = error;
    std::printf("%2dx%-5d %-18s %-8s %-5s %5.0f attended  rho %.3f %8.2f us (first step %.2f, second %.2f)  %5.2fx of its floor  %5.2fx faster than dense\n", cell_.batch,
                cell_.n, mode_.name, mode_.block ? (mode_.within ? "within C" : "on top") : "", mode_.drift ? "drift" : "hold", attended, selected, us, first, second,
                us / floor, dense_us / us);
    std::fflush(stdout);
    return row;
  }

 private:
  bool MovesAnchors() const { return mode_.exact; }  // by a launch of its own; where codes are scanned select does it, and the gates
  cuda::GateParams GateOf(size_t at) const {
    return {.tasks = gate_->data() + at, .num_tasks = cell_.tasks, .group = 1, .head_dim = kD, .tau = kTau, .max_age = kSteps};
  }
  void Enqueue(int step) {
    const bool starts = mode_.block && step == 0;
    cell_.Turn(mode_.drift, step, stream_);
    for (int layer = 0; layer < kLayers; ++layer) {
      const size_t of_layer = size_t(layer) * size_t(cell_.tasks), at = (starts ? cell_.units() : 0) + of_layer;
      if (mode_.exact) {
        if (!starts) OrExit(cuda::Gate(GateOf(at), stream_));
        if (starts) OrExit(cuda::ScoreRuns(score_->data() + of_layer, cell_.tasks, cell_.n, 1, kD, stream_));
        choose_params_.tasks = choose_->data() + at;
        OrExit(cuda::Choose(choose_params_, stream_));
      } else {
        select_params_.tasks = select_->data() + at;
        select_params_.resolves = mode_.gate ? resolve_->data() + at : nullptr;
        select_params_.gate = mode_.gate && !starts ? GateOf(at) : cuda::GateParams{};
        OrExit(cuda::Select(select_params_, stream_));
      }
      if (MovesAnchors()) OrExit(cuda::Resolve({.tasks = resolve_->data() + at, .num_tasks = cell_.tasks, .group = 1, .head_dim = kD}, stream_));
      attend_params_.tasks = attend_->data() + at;
      OrExit(cuda::Attend(attend_params_, stream_));
    }
  }
  // Heads of the last layer after `step`.
  double Verify(int step) const {
    double worst = 0;
    for (const size_t u : {cell_.units() - 1, cell_.units() - size_t(cell_.tasks) / 3, cell_.units() - size_t(cell_.tasks)}) {
      std::vector<Half> rows;
      const auto z = cell_.Logits(mode_.drift, step, u, &rows);
      auto positions = chosen_.Read(u * size_t(room_), size_t(count_.Read(u, 1)[0]));
      const int32_t end = cell_.n - kLocal;
      for (const int32_t p : positions) Require(p >= kSinks && p < end, cell_, mode_.name, "position " + std::to_string(p));
      Require(std::set<int32_t>(positions.begin(), positions.end()).size() == positions.size(), cell_, mode_.name, "a position twice");
      if (mode_.exact && step == 0) {
        std::vector<double> middle(z.begin() + kSinks, z.begin() + end);
        std::nth_element(middle.begin(), middle.begin() + (k_ - 1), middle.end(), std::greater<>());
        const double least = middle[size_t(k_ - 1)];
        for (int32_t p = kSinks; p < end; ++p) {
          const bool must = z[size_t(p)] > least + 1e-3;
          Require(!must || std::binary_search(positions.begin(), positions.end(), p), cell_, mode_.name, "left out position " + std::to_string(p));
        }
      }
      for (int32_t p = 0; p < kSinks; ++p) positions.push_back(p);
      for (int32_t p = end; p < cell_.n; ++p) positions.push_back(p);
      const double error = cell_.Error(z, rows, positions, u);
      Require(error < kMostError, cell_, mode_.name, "error " + std::to_string(error));
      worst = std::max(worst, error);
    }
    return worst;
  }

  const Cell& cell_;
  const Mode mode_;
  const cudaStream_t stream_;
  const int32_t budget_, k_, m_, room_;
  Array<int32_t> chosen_, count_, age_;
  Array<uint8_t> hold_;
  Array<float> anchor_, lse_;
  std::unique_ptr<Array<cuda::DeviceRun>> runs_;
  std::unique_ptr<Array<cuda::GateTask>> gate_;  // this and what follows: [2, units], of a block's first step behind those of the others
  std::unique_ptr<Array<cuda::SelectTask>> select_;
  std::unique_ptr<Array<cuda::ChooseTask>> choose_;
  std::unique_ptr<Array<cuda::RunScoreTask>> score_;  // [units]
  std::unique_ptr<Array<cuda::ResolveTask>> resolve_;
  std::unique_ptr<Array<cuda::AttendTask>> attend_;
  cuda::AttendParams attend_params_;
  cuda::SelectParams select_params_;
  cuda::ChooseParams choose_params_;
  std::unique_ptr<Array<std::byte>> attend_space_, choose_space_;
};

int Main(int argc, char** argv) {
  Flags flags("operator_bench", argc, argv);
  const std::string out = flags.Text("out", ""), commit = flags.Text("commit", "unknown"), only = flags.Text("only", "");
  const int bits = flags.Int("bits", 4), repeats = flags.Int("repeats", 11);
  flags.Finish();
  const CudaStream stream = OrExit(CudaStream::Create());
  Json file = Header("operator", flags, commit);
  file["dtype"] = "fp16", file["heads"] = kHeads, file["head_dim"] = kD, file["layers"] = kLayers, file["floor_gb_per_s"] = kRate;
  file["results"] = Json::array();
  constexpr Mode kModes[] = {
      {.name = "cis exact", .block = true, .exact = true, .gate = true},
      {.name = "cis exact", .block = true, .exact = true, .gate = true, .within = false},
      {.name = "cis codes", .block = true, .gate = true},
      {.name = "cis codes", .block = true, .gate = true, .within = false},
      {.name = "cis codes", .block = true, .gate = true, .drift = true},
      {.name = "two-clock", .gate = true},
      {.name = "two-clock", .gate = true, .drift = true},
      {.name = "two-clock, scan", .drift = true},
  };
  for (const int batch : {8, 16}) {
    for (const int32_t n : {1024, 2048, 4096}) {
      if (!only.empty() && ("," + only + ",").find("," + std::to_string(batch) + "x" + std::to_string(n) + ",") == std::string::npos) continue;
      const Cell cell(batch, n, bits, stream.get());
      double dense_us = 0;
      file["results"].push_back(Dense(cell, stream.get(), repeats, &dense_us));
      for (const Mode& mode : kModes) file["results"].push_back(Sparse(cell, mode, stream.get()).Measure(repeats, dense_us));
      WriteJson(file, out);
    }
  }
  return 0;
}
}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
