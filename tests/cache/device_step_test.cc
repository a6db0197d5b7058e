// Whole decode steps on the device, run by the reference's step kernels: the same method as the steps of the host, from the device's state alone.
#include <cstring>
#include <functional>
#include <map>
#include <set>

#include "base/units.h"
#include "kernels/step_kernels.h"
#include "tests/cache/pipeline_world.h"
#include "tests/fakes/faulty_device_memory.h"
#include "tests/support/compare.h"

namespace prehoc {
namespace {

constexpr int64_t kPrompt = 600;

// What was enqueued, to be run again as a captured graph would be: the very calls, with the very pointers.
std::vector<std::function<Status()>>* recorded = nullptr;

template <auto kMember>
struct Recorder;
template <class Params, Status (*step::StepKernels::*kMember)(const Params&, void*)>
struct Recorder<kMember> {
  static Status Call(const Params& params, void* stream) {
    if (recorded != nullptr) recorded->push_back([params, stream] { return (step::ReferenceStepKernels().*kMember)(params, stream); });
    return (step::ReferenceStepKernels().*kMember)(params, stream);
  }
};
const step::StepKernels& RecordingKernels() {
  static const step::StepKernels kernels = [] {
    step::StepKernels k = step::ReferenceStepKernels();
    k.append = Recorder<&step::StepKernels::append>::Call;
    k.gate = Recorder<&step::StepKernels::gate>::Call;
    k.select = Recorder<&step::StepKernels::select>::Call;
    k.resolve = Recorder<&step::StepKernels::resolve>::Call;
    k.attend = Recorder<&step::StepKernels::attend>::Call;
    k.choose = Recorder<&step::StepKernels::choose>::Call;
    k.refresh = Recorder<&step::StepKernels::refresh>::Call;
    k.land = Recorder<&step::StepKernels::land>::Call;
    k.adopt = Recorder<&step::StepKernels::adopt>::Call;
    k.gather = Recorder<&step::StepKernels::gather>::Call;
    return k;
  }();
  return kernels;
}

// Plays the engine: one set of buffers for all layers, a graph for each id.
class StepEngine {
 public:
  StepEngine(const KvGeometry& geometry, const Stream& stream)
      : geometry_(geometry), stream_(stream), q_(static_cast<size_t>(geometry.heads * geometry.head_dim)), out_(q_.size()),
        k_(static_cast<size_t>(geometry.kv_heads * geometry.head_dim)), v_(k_.size()) {}

  // One token; `out` as RunLayers() gives it.
  Status Step(Sequence& sequence, Outputs* out) {
    const int64_t first = sequence.length();
    PREHOC_RETURN_IF_ERROR(sequence.Begin(stream_.ids(first, 1), 0));
    Status status = Run(sequence, first, out);
    if (status.ok()) status = sequence.End();
    if (!status.ok()) sequence.Rollback();
    return status;
  }
  int planned = 0, replayed = 0, paused = 0;
  // Broken off before this layer, if not negative.
  int32_t break_at = -1;

 private:
  struct Graph {
    std::vector<std::function<Status()>> behind, last;
    std::vector<std::vector<std::function<Status()>>> layers;
  };

  Status Run(Sequence& sequence, int64_t first, Outputs* out) {
    const LayerInput io{.q = q_.data(), .k = k_.data(), .v = v_.data(), .out = out_.data()};
    PREHOC_ASSIGN_OR_RETURN(const Sequence::StepPlan plan, sequence.PlanStep(io));
    if (plan.id == 0) return RunLayers(sequence, stream_, first, 1, true, out);
    ++planned;
    paused += plan.pause;
    out->assign(static_cast<size_t>(geometry_.layers), {});
    Graph& graph = graphs_[plan.id];
    const bool again = !plan.pause && !graph.layers.empty();
    replayed += again;
    Graph fresh;
    const auto part = [&](std::vector<std::function<Status()>>& calls, auto&& enqueue) -> Status {
      if (again) {
        for (const auto& call : calls) PREHOC_RETURN_IF_ERROR(call());
        return {};
      }
      recorded = &calls;
      const Status status = enqueue();
      recorded = nullptr;
      return status;
    };
    Graph& used = again ? graph : fresh;
    used.layers.resize(static_cast<size_t>(geometry_.layers));
    PREHOC_RETURN_IF_ERROR(part(used.behind, [&] { return sequence.EnqueueBehind(nullptr); }));
    for (int32_t l = 0; l < geometry_.layers; ++l) {
      if (l == break_at) return {StatusCode::kCuda, "broken off"};
      std::copy_n(stream_.q(l, first), q_.size(), q_.data());
      std::copy_n(stream_.k(l, first), k_.size(), k_.data());
      std::copy_n(stream_.v(l, first), v_.size(), v_.data());
      PREHOC_RETURN_IF_ERROR(part(used.layers[static_cast<size_t>(l)], [&] { return sequence.EnqueueLayer(LayerId(l), nullptr); }));
      (*out)[static_cast<size_t>(l)] = out_;
      if (plan.pause) PREHOC_RETURN_IF_ERROR(sequence.AfterLayer(LayerId(l)));
    }
    PREHOC_RETURN_IF_ERROR(part(used.last, [&] { return sequence.EnqueueLast(nullptr); }));
    if (!again && !plan.pause) graph = std::move(fresh);
    return {};
  }

  const KvGeometry geometry_;
  const Stream& stream_;
  std::vector<float> q_, out_, k_, v_;
  std::map<uint64_t, Graph> graphs_;
};

// One query head for each KV head: heads of a group are weighed by their log-sum-exps, in which the two ways score sinks differently.
WorldOptions Options() {
  WorldOptions options = WorldOptions::Default();
  options.cache.geometry.heads = options.cache.geometry.kv_heads = 2;
  options.cache.selector.kind = SelectorKind::kTwoClock;
  options.cache.selector.tc.theta = 0;
  options.cache.selector.tc.refresh = 16;  // every head turns in some dozens of steps
  options.cache.selector.tc.dense_below = 0;
  options.cache.audit_every = 16;
  options.cache.persist_decode = true;
  options.step_kernels = &RecordingKernels();
  return options;
}

class DeviceStepTest : public ::testing::Test {
 protected:
  static std::unique_ptr<Sequence> Open(World& world, const Stream& stream, int64_t steps, int64_t device_slots = 0) {
    auto opened = world.cache().Open({.max_tokens = kPrompt + steps, .device_slots = device_slots});
    EXPECT_OK(opened);
    EXPECT_OK(PrefillAll(**opened, stream, kPrompt, 128));
    return std::move(*opened);
  }
  static std::set<int32_t> Attended(const Sequence& sequence, int32_t layer, int32_t head) {
    auto view = sequence.LastStep(LayerId(layer), KvHeadId(head));
    EXPECT_OK(view);
    return {view->attended.begin(), view->attended.end()};
  }
  static void ExpectAttention(const Stream& stream, const Sequence& sequence, int64_t t, const Outputs& out) {
    const KvGeometry& geometry = stream.geometry();
    for (int32_t l = 0; l < geometry.layers; ++l) {
      for (int32_t head = 0; head < geometry.heads; ++head) {
        const std::set<int32_t> set = Attended(sequence, l, head / geometry.group());
        const std::vector<int32_t> positions(set.begin(), set.end());
        const std::span got(out[static_cast<size_t>(l)].data() + head * geometry.head_dim, static_cast<size_t>(geometry.head_dim));
        EXPECT_TRUE(AllClose(got, NaiveAttention(stream, l, t, head, positions), {1e-4, 1e-3})) << "token " << t << " layer " << l << " head " << head;
      }
    }
  }
  // The same stream through both ways: the same sets, the same outputs, the same counts.
  // `held`: what rows hold of the stream, where that is not all.
  static void Compare(const WorldOptions& options, int64_t steps, int64_t device_slots, StepEngine* engine, const Stream& stream,
                      SequenceReport* of_device = nullptr, const Stream* held = nullptr) {
    World there(options);
    WorldOptions plain = options;
    plain.step_kernels = nullptr;
    World here(plain);
    const auto device = Open(there, stream, steps, device_slots), host = Open(here, stream, steps, device_slots);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = device->length();
      Outputs out, want;
      ASSERT_OK(engine->Step(*device, &out));
      ASSERT_OK(DecodeOne(*host, stream, &want));
      ASSERT_OK(device->CheckInvariants());
      for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
        for (int32_t h = 0; h < options.cache.geometry.kv_heads; ++h) {
          ASSERT_EQ(Attended(*device, l, h), Attended(*host, l, h)) << "step " << step << " layer " << l << " head " << h;
        }
        ASSERT_TRUE(AllClose(std::span<const float>(out[static_cast<size_t>(l)]), std::vector<double>(want[static_cast<size_t>(l)].begin(), want[static_cast<size_t>(l)].end()), {1e-4, 1e-3}))
            << "step " << step << " layer " << l;
      }
      ExpectAttention(held != nullptr ? *held : stream, *device, t, out);
    }
    const SequenceReport& a = device->Report();
    const SequenceReport& b = host->Report();
    EXPECT_EQ(a.retrievals, b.retrievals);
    EXPECT_EQ(a.inherited, b.inherited);
    EXPECT_EQ(a.attended, b.attended);
    EXPECT_EQ(a.triples, b.triples);
    EXPECT_EQ(a.dense_triples, b.dense_triples);
    EXPECT_EQ(a.audited_steps, b.audited_steps);
    EXPECT_EQ(a.rows_device + a.rows_host + a.rows_disk, b.rows_device + b.rows_host + b.rows_disk);
    EXPECT_EQ(a.bytes_attended, b.bytes_attended);
    EXPECT_NEAR(a.dropped_audited.mean(), b.dropped_audited.mean(), 1e-5);
    EXPECT_NEAR(a.output_error.mean(), b.output_error.mean(), 1e-4);
    EXPECT_NEAR(a.dropped_estimated.mean(), b.dropped_estimated.mean(), 0.02);
    if (of_device != nullptr) *of_device = a;
    EXPECT_LE(there.device().peak(), there.device().budget());
  }
};

TEST_F(DeviceStepTest, AttendToWhatStepsOfTheHostAttendTo) {
  const WorldOptions options = Options();
  const Stream stream(options.cache.geometry, kPrompt + 200, 3);
  StepEngine engine(options.cache.geometry, stream);
  SequenceReport report;
  Compare(options, 200, /*device_slots=*/160, &engine, stream, &report);
  EXPECT_EQ(engine.planned, 200);
  EXPECT_EQ(engine.paused, 13);  // steps 1, 17, ...
  EXPECT_GT(engine.replayed, 180);
  EXPECT_GT(report.inherited, 0);
  EXPECT_GT(report.retrievals, 0);
  EXPECT_GT(report.rows_behind, 0);
  EXPECT_GT(report.refreshes, 60);
  EXPECT_GT(report.rows_in_step, 0);
  // The slow clock is of use: most rows that are chosen wait on the device.
  EXPECT_LT(report.rows_in_step * 2, report.attended - report.triples * 12) << "most of the middle is read from the host";
}

// Without turns, the default, what a step read from the host is on the device for the next ones: what it chose and then found away is all that it reads.
TEST_F(DeviceStepTest, RowsStayByTheirUse) {
  for (const RowFormat format : {RowFormat::kF16, RowFormat::kInt8}) {
    SCOPED_TRACE(RowFormatName(format));
    WorldOptions options = Options();
    options.cache.selector.tc.refresh = 0;
    options.cache.geometry.rows = format;
    options.cache.geometry.chunk_tokens = 256;
    const Stream stream(options.cache.geometry, kPrompt + 200, 3);
    Stream held = stream;
    held.RoundTo(format);
    StepEngine engine(options.cache.geometry, stream);
    SequenceReport report;
    Compare(options, 200, /*device_slots=*/160, &engine, stream, &report, format == RowFormat::kF16 ? nullptr : &held);
    EXPECT_EQ(engine.planned, 200);
    EXPECT_EQ(report.refreshes, 0);
    EXPECT_EQ(report.rows_behind, 0);
    // Less than if every position were read when it is first attended to, and never again.
    World world(options);
    StepEngine other(options.cache.geometry, stream);
    const auto sequence = Open(world, stream, 200, 160);
    int64_t different = 0;
    std::map<std::pair<int32_t, int32_t>, std::set<int32_t>> seen;
    for (int step = 0; step < 200; ++step) {
      Outputs out;
      ASSERT_OK(other.Step(*sequence, &out));
      for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
        for (int32_t h = 0; h < options.cache.geometry.kv_heads; ++h) {
          std::set<int32_t>& before = seen[{l, h}];
          for (const int32_t p : Attended(*sequence, l, h)) different += before.insert(p).second;
        }
      }
    }
    EXPECT_GT(report.rows_in_step, 0);
    EXPECT_LT(report.rows_in_step, different);
  }
}

// Steps of the host evict what was attended to longest ago: 100 slots hold a head's 20 positions of each of the last four steps, and what this one reads.
TEST_F(DeviceStepTest, StepsOfTheHostKeepWhatWasUsedLast) {
  WorldOptions options = Options();
  options.step_kernels = nullptr;
  options.cache.selector.tc.refresh = 0;
  options.cache.selector.tc.tau = 1;
  const Stream stream(options.cache.geometry, kPrompt + 120, 3);
  World world(options);
  const auto sequence = Open(world, stream, 120, 100);
  std::map<std::pair<int32_t, int32_t>, std::vector<std::set<int32_t>>> history;
  int64_t read = 0;
  for (int step = 0; step < 120; ++step) {
    Outputs out;
    ASSERT_OK(DecodeOne(*sequence, stream, &out));
    int64_t may_read = 0;
    for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
      for (int32_t h = 0; h < options.cache.geometry.kv_heads; ++h) {
        std::vector<std::set<int32_t>>& steps = history[{l, h}];
        steps.push_back(Attended(*sequence, l, h));
        for (const int32_t p : steps.back()) {
          bool lately = p < 4 || p >= sequence->length() - 8;  // sinks, and the window
          for (size_t back = 2; back <= std::min<size_t>(steps.size(), 5); ++back) lately |= steps[steps.size() - back].count(p) > 0;
          may_read += !lately;
        }
      }
    }
    ASSERT_LE(sequence->Report().rows_in_step - read, may_read) << "step " << step;
    read = sequence->Report().rows_in_step;
  }
  EXPECT_GT(read, 120);
  EXPECT_EQ(sequence->Report().rows_behind, 0);
}

// A budget that is a share of the context chooses more from step to step, and skips by another weight: both are in the tasks of a step.
TEST_F(DeviceStepTest, AChoiceThatGrowsReplaysTheSamePlan) {
  WorldOptions options = Options();
  ASSERT_OK(options.cache.selector.Set("budget", "3/4"));
  options.cache.selector.tc.theta = TwoClockOptions::kAuto;
  // Where so many are chosen, two scores at the edge may be the same but for the rounding in which the two ways differ: not in this stream.
  const Stream stream(options.cache.geometry, kPrompt + 60, 6);
  const Budget& budget = options.cache.selector.budget;
  ASSERT_GT(budget.MiddleK(kPrompt), 200) << "theta would be the same in all steps";
  ASSERT_GT(budget.MiddleK(kPrompt + 60), budget.MiddleK(kPrompt) + 30);
  StepEngine engine(options.cache.geometry, stream);
  Compare(options, 60, 0, &engine, stream);
  EXPECT_EQ(engine.planned, 60);
  EXPECT_GT(engine.replayed, 40);
}

// Of 8 bits in host memory, of fp16 on the device: what is written, copied and read within a step.
TEST_F(DeviceStepTest, RowsOfOtherFormatsInHostMemory) {
  for (const RowFormat format : {RowFormat::kInt8, RowFormat::kE4m3}) {
    SCOPED_TRACE(RowFormatName(format));
    WorldOptions options = Options();
    options.cache.geometry.rows = format;
    options.cache.geometry.chunk_tokens = 256;  // blocks of whole pages of memory lie whole rows apart
    const Stream stream(options.cache.geometry, kPrompt + 200, 3);
    Stream held = stream;
    held.RoundTo(format);
    for (const int64_t slots : {int64_t{160}, int64_t{0}}) {  // 0: everything on the device
      StepEngine engine(options.cache.geometry, stream);
      SequenceReport report;
      Compare(options, 200, slots, &engine, stream, &report, &held);
      EXPECT_EQ(engine.planned, 200);
      EXPECT_EQ(report.rows_behind > 0, slots > 0);
      EXPECT_EQ(report.rows_in_step > 0, slots > 0);
    }
  }
}

TEST_F(DeviceStepTest, EverythingOnTheDevice) {
  WorldOptions options = Options();
  const Stream stream(options.cache.geometry, kPrompt + 60, 4);
  {
    StepEngine engine(options.cache.geometry, stream);
    SequenceReport report;
    Compare(options, 60, 0, &engine, stream, &report);
    EXPECT_EQ(engine.planned, 60);
    EXPECT_EQ(report.rows_host + report.rows_disk, 0);
    EXPECT_GT(report.inherited, 0);
  }
  options.cache.selector.tc.dense_below = kPrompt + 30;  // dense first, then chosen
  {
    StepEngine engine(options.cache.geometry, stream);
    SequenceReport report;
    Compare(options, 60, 0, &engine, stream, &report);
    EXPECT_EQ(engine.planned, 60);
    EXPECT_GT(report.dense_triples, 0);
    EXPECT_GT(report.triples, 0);
  }
  options.cache.selector.kind = SelectorKind::kDense;
  {
    StepEngine engine(options.cache.geometry, stream);
    Compare(options, 60, 0, &engine, stream);
    EXPECT_EQ(engine.planned, 60);
    EXPECT_GT(engine.replayed, 50);
  }
}

TEST_F(DeviceStepTest, EveryStepLooksWithoutAGate) {
  WorldOptions options = Options();
  options.cache.selector.tc.tau = 1;
  const Stream stream(options.cache.geometry, kPrompt + 80, 5);
  StepEngine engine(options.cache.geometry, stream);
  SequenceReport report;
  Compare(options, 80, 160, &engine, stream, &report);
  EXPECT_EQ(engine.planned, 80);
  EXPECT_EQ(report.inherited, 0);
}

// Look-ups of many heads are a launch of their own.
TEST_F(DeviceStepTest, ManyHeads) {
  WorldOptions options = Options();
  options.cache.geometry.layers = 1;
  options.cache.geometry.heads = options.cache.geometry.kv_heads = 17;
  const Stream stream(options.cache.geometry, kPrompt + 40, 12);
  StepEngine engine(options.cache.geometry, stream);
  SequenceReport report;
  Compare(options, 40, 160, &engine, stream, &report);
  EXPECT_EQ(engine.planned, 40);
  EXPECT_GT(report.inherited, 0);
  EXPECT_GT(report.rows_behind, 0);
}

// Groups of query heads, and missing rows that are too light to fetch: what is attended to is attended to rightly, and the estimate knows of the rest.
TEST_F(DeviceStepTest, LightRowsThatAreMissingAreLeftOutAndCounted) {
  WorldOptions options = Options();
  options.cache.geometry.heads = 4;
  options.cache.selector.tc.theta = 0.01;
  options.cache.audit_every = 4;
  const Stream stream(options.cache.geometry, kPrompt + 120, 6);
  StepEngine engine(options.cache.geometry, stream);
  World world(options);
  const auto sequence = Open(world, stream, 120, 64);
  for (int step = 0; step < 120; ++step) {
    const int64_t t = sequence->length();
    Outputs out;
    ASSERT_OK(engine.Step(*sequence, &out));
    ExpectAttention(stream, *sequence, t, out);
  }
  const SequenceReport& report = sequence->Report();
  EXPECT_EQ(engine.planned, 120);
  EXPECT_LT(report.mean_attended(), 4 + 8 + 32) << "light rows are left out";
  EXPECT_LT(report.estimate_error.mean(), 0.05);
}

// Right after a prompt both ways have the same residents, so a theta leaves out the same rows.
TEST_F(DeviceStepTest, TheFirstStepLeavesOutWhatAStepOfTheHostLeavesOut) {
  std::vector<std::set<int32_t>> whatever;  // of every head: as chosen, with theta 0
  int64_t heads_that_skip = 0, read = 0;
  for (const double theta : {0.0, 0.003, 0.01, 0.03}) {
    WorldOptions options = Options();
    options.cache.selector.tc.theta = theta;
    WorldOptions plain = options;
    plain.step_kernels = nullptr;
    const Stream stream(options.cache.geometry, kPrompt + 1, 6);
    StepEngine engine(options.cache.geometry, stream);
    World there(options), here(plain);
    const auto device = Open(there, stream, 1, 64), host = Open(here, stream, 1, 64);
    Outputs out, want;
    ASSERT_OK(engine.Step(*device, &out));
    ASSERT_OK(DecodeOne(*host, stream, &want));
    ASSERT_EQ(engine.planned, 1);
    for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
      for (int32_t h = 0; h < options.cache.geometry.kv_heads; ++h) {
        const std::set<int32_t> attended = Attended(*device, l, h);
        EXPECT_EQ(attended, Attended(*host, l, h)) << "theta " << theta << " layer " << l << " head " << h;
        if (theta == 0) whatever.push_back(attended);
        heads_that_skip += attended != whatever[static_cast<size_t>(l * options.cache.geometry.kv_heads + h)];
      }
    }
    if (theta > 0) read += device->Report().rows_in_step;
  }
  EXPECT_GT(heads_that_skip, 0);
  EXPECT_GT(read, 0);
}

// Prompts between steps, steps of the host between those of the device, and steps that broke off: the state goes back and forth.
TEST_F(DeviceStepTest, StateGoesToTheDeviceAndComesBack) {
  const WorldOptions options = Options();
  const Stream stream(options.cache.geometry, kPrompt + 200, 7);
  World there(options);
  WorldOptions plain = options;
  plain.step_kernels = nullptr;
  World here(plain);
  StepEngine engine(options.cache.geometry, stream);
  const auto device = Open(there, stream, 200, 160), host = Open(here, stream, 200, 160);
  Rng rng(1);
  bool broke = false;
  for (int step = 0; step < 120; ++step) {
    Outputs out, want;
    const int64_t kind = step < 40 && step % 10 == 1 ? 0 : rng.Int(step < 40 ? 2 : 0, 9);
    if (kind == 0) {
      ASSERT_OK(PrefillPiece(*device, stream, 3, device->length() + 3, &out));
      ASSERT_OK(PrefillPiece(*host, stream, 3, host->length() + 3, &want));
      continue;
    }
    if (kind == 1) {
      engine.break_at = static_cast<int32_t>(rng.Int(0, 2));
      EXPECT_STATUS(StatusCode::kCuda, "broken off", engine.Step(*device, &out));
      engine.break_at = -1;
    }
    ASSERT_OK(kind == 2 ? DecodeOne(*device, stream, &out) : engine.Step(*device, &out));
    ASSERT_OK(DecodeOne(*host, stream, &want));
    ASSERT_OK(device->CheckInvariants());
    // After a step that broke off heads choose anew, where those of the host keep their choice.
    broke |= kind == 1;
    for (int32_t l = 0; l < options.cache.geometry.layers && !broke; ++l) {
      for (int32_t h = 0; h < options.cache.geometry.kv_heads; ++h) EXPECT_EQ(Attended(*device, l, h), Attended(*host, l, h)) << "step " << step;
    }
    ExpectAttention(stream, *device, device->length() - 1, out);
  }
  EXPECT_GT(engine.planned, 80);
  EXPECT_GT(device->CountResidency().device_rows, 0);
}

// A device that the host cannot read or write for a moment: the call says so, and what the device knew is made anew.
TEST_F(DeviceStepTest, CopiesMayFail) {
  const WorldOptions options = Options();
  const Stream stream(options.cache.geometry, kPrompt + 200, 13);
  HostDeviceMemory memory(options.device_budget);
  FaultyDeviceMemory faulty(&memory);
  World world(options, nullptr, &faulty);
  StepEngine engine(options.cache.geometry, stream);
  const auto sequence = Open(world, stream, 200, 160);
  int failures = 0;
  for (int step = 0; step < 60; ++step) {
    Outputs out;
    if (step % 3 == 2) faulty.FailCopies(1 + step % 5);
    const bool goes_on = step % 12 == 11;  // a prompt, which takes the state back
    Status status = goes_on ? PrefillPiece(*sequence, stream, 2, sequence->length() + 2, &out) : engine.Step(*sequence, &out);
    for (int tries = 0; !status.ok() && tries < 9; ++tries) {
      ++failures;
      EXPECT_STATUS(StatusCode::kCuda, "on request", status);
      ASSERT_OK(sequence->CheckInvariants());
      status = goes_on ? PrefillPiece(*sequence, stream, 2, sequence->length() + 2, &out) : engine.Step(*sequence, &out);
    }
    ASSERT_OK(status);
    faulty.FailCopies(0);
    if (!goes_on) ExpectAttention(stream, *sequence, sequence->length() - 1, out);
  }
  EXPECT_GT(failures, 20);
}

// Rows of generated tokens reach host memory and the store as those of the host's steps do.
TEST_F(DeviceStepTest, GeneratedRowsAreWrittenBehind) {
  WorldOptions options = Options();
  options.cache.selector.kind = SelectorKind::kDense;  // such rows are shared
  const Stream stream(options.cache.geometry, kPrompt + 200, 8);
  World world(options);
  StepEngine engine(options.cache.geometry, stream);
  {
    const auto sequence = Open(world, stream, 200);
    for (int step = 0; step < 180; ++step) {
      Outputs out;
      ASSERT_OK(engine.Step(*sequence, &out));
    }
    EXPECT_EQ(engine.planned, 180);
  }
  ASSERT_OK(world.cache().Flush());
  const auto tokens = stream.ids(0, kPrompt + 180);
  auto again = world.cache().OpenWithPrefix({.max_tokens = kPrompt + 200}, tokens);
  ASSERT_OK(again);
  EXPECT_EQ((*again)->restored(), (kPrompt + 180) / 64 * 64);
  ASSERT_OK(PrefillAll(**again, stream, kPrompt + 180, 128));
  const int64_t t = (*again)->length();
  Outputs out;
  ASSERT_OK(DecodeOne(**again, stream, &out));
  ExpectAttention(stream, **again, t, out);
}

TEST_F(DeviceStepTest, WhatIsNotOfferedTakesTheStepsOfTheHost) {
  const auto planned_of = [&](const WorldOptions& options) {
    const Stream stream(SmallGeometry(), kPrompt + 40, 9);
    Stream held = stream;
    held.RoundTo(options.cache.geometry.rows);
    World world(options);
    StepEngine engine(options.cache.geometry, stream);
    const auto sequence = Open(world, stream, 40, 160);
    for (int step = 0; step < 40; ++step) {
      Outputs out;
      const int64_t t = sequence->length();
      EXPECT_OK(engine.Step(*sequence, &out));
      ExpectAttention(held, *sequence, t, out);
    }
    return engine.planned;
  };
  WorldOptions options = Options();
  options.cache.geometry.heads = 4;
  EXPECT_EQ(planned_of(options), 40);
  WorldOptions other = options;
  other.cache.selector.max_dropped_mass = 0.1;
  EXPECT_EQ(planned_of(other), 0);
  other = options;
  other.cache.verify_pins = true;
  EXPECT_EQ(planned_of(other), 0);
  other = options;
  other.cache.geometry.rows = RowFormat::kInt8;  // blocks of 64 rows of 48 bytes take two pages of memory
  EXPECT_EQ(planned_of(other), 0);
  other = options;
  other.cache.selector.kind = SelectorKind::kOracle;
  EXPECT_EQ(planned_of(other), 0);
  other = options;  // a host tier that holds two layers and some: rows come from the store, step by step
  other.cache.host_budget = 3 * 16 * options.cache.geometry.block_bytes();
  other.cache.host_budget = static_cast<uint64_t>(CeilDiv(kPrompt + 40, 64) + 6) * options.cache.geometry.block_bytes();
  EXPECT_EQ(planned_of(other), 0);
}

// Blocks that a sequence holds for its steps are everybody's again when it goes.
TEST_F(DeviceStepTest, HeldBlocksAreGivenBack) {
  const WorldOptions options = Options();
  const Stream stream(options.cache.geometry, kPrompt + 40, 10);
  World world(options);
  StepEngine engine(options.cache.geometry, stream);
  {
    const auto sequence = Open(world, stream, 40, 160);
    Outputs out;
    ASSERT_OK(engine.Step(*sequence, &out));
    EXPECT_EQ(engine.planned, 1);
    EXPECT_GE(world.Counter("host.pinned"), 3 * 9);
  }
  EXPECT_EQ(world.Counter("host.pinned"), 0);
}

TEST_F(DeviceStepTest, CallsOutOfTurnAreRefused) {
  const WorldOptions options = Options();
  const Stream stream(options.cache.geometry, kPrompt + 40, 11);
  World world(options);
  const auto sequence = Open(world, stream, 40, 160);
  EXPECT_STATUS(StatusCode::kInvalid, "did not offer", sequence->EnqueueLayer(LayerId(0), nullptr));
  EXPECT_STATUS(StatusCode::kInvalid, "did not offer", sequence->EnqueueBehind(nullptr));
  EXPECT_STATUS(StatusCode::kInvalid, "did not offer", sequence->EnqueueLast(nullptr));
  EXPECT_STATUS(StatusCode::kInvalid, "did not offer", sequence->AfterLayer(LayerId(0)));
  EXPECT_STATUS(StatusCode::kInvalid, "PlanStep", sequence->PlanStep({}));
  // A step with pauses that never paused.
  std::vector<float> buffer(64);
  ASSERT_OK(sequence->Begin(stream.ids(kPrompt, 1), 0));
  auto plan = sequence->PlanStep({.q = buffer.data(), .k = buffer.data(), .v = buffer.data(), .out = buffer.data()});
  ASSERT_OK(plan);
  EXPECT_TRUE(plan->pause);
  EXPECT_STATUS(StatusCode::kInvalid, "AfterLayer", sequence->End());
  sequence->Rollback();
  Outputs out;
  EXPECT_OK(DecodeOne(*sequence, stream, &out));
}

}  // namespace
}  // namespace prehoc
