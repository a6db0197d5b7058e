// The pipeline with its device tier in GPU memory: the same cache, the same stream of K, V and queries, beside the CPU build.
#include <cmath>
#include <map>

#include "base/cuda/device_memory.h"
#include "base/cuda/faults.h"
#include "base/cuda/graph.h"
#include "base/cuda/host_registrar.h"
#include "base/units.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/kernel_table.h"
#include "tests/cache/pipeline_world.h"
#include "tests/support/compare.h"
#include "tests/support/cuda_test.h"
#include "transfer/cuda_transfer_engine.h"

namespace prehoc {
namespace {

constexpr int64_t kPrompt = 700, kSteps = 24;

class CudaWorld {
 public:
  explicit CudaWorld(const WorldOptions& options) : device_(options.device_budget) {
    executor_ = ThreadPool::Create({.loop_threads = 2, .job_threads = 1, .spin_iterations = 100}).value();
    kernels_ = cuda::DeviceKernels::Create(&device_).value();
    MemoryChunkStore::Options store;
    store.chunk_bytes = options.cache.geometry.block_bytes();
    store.identity.layout = options.cache.geometry.LayoutName();
    store.budget = options.store_budget;
    store_ = MemoryChunkStore::Create(store).value();
    CacheResources resources;
    resources.executor = executor_.get();
    resources.device = &device_;
    resources.store = options.with_store ? store_.get() : nullptr;
    resources.kernels = &cuda::DeviceKernels::Table();
    resources.stream = kernels_->launch_stream();
    resources.registrar = &registrar_;
    resources.step_kernels = &cuda::DeviceStepKernels();
    if (options.cache.selector.tc.lag > 0) {
      transfer_ = CudaTransferEngine::Create().value();
      resources.transfer = transfer_.get();
    }
    auto cache = KvCache::Create(options.cache, resources);
    status_ = cache.status();
    if (cache.ok()) cache_ = std::move(cache).value();
  }
  const Status& status() const { return status_; }
  KvCache& cache() { return *cache_; }
  const DeviceMemory& device() const { return device_; }

 private:
  CudaHostRegistrar registrar_;
  CudaDeviceMemory device_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<cuda::DeviceKernels> kernels_;
  std::unique_ptr<CudaTransferEngine> transfer_;
  std::unique_ptr<MemoryChunkStore> store_;
  std::unique_ptr<KvCache> cache_;
  Status status_;
};

WorldOptions OptionsFor(SelectorKind kind) {
  WorldOptions options = WorldOptions::Default();
  options.cache.geometry.head_dim = 64;
  options.cache.selector.kind = kind;
  options.cache.selector.tc.refresh = 16;  // every head turns in some dozens of steps
  options.cache.audit_every = 8;
  return options;
}

// What one decode did, in every head of every layer, beside the truth over the very positions that it attended to.
struct Decoded {
  std::vector<std::vector<int32_t>> attended;
  SequenceReport report;
};

class CudaPipelineTest : public CudaTest {
 protected:
  template <class AnyWorld>
  static Decoded Run(AnyWorld& world, const WorldOptions& options, const Stream& stream) {
    Decoded result;
    auto opened = world.cache().Open({.max_tokens = kPrompt + kSteps});
    EXPECT_OK(opened);
    if (!opened.ok()) return result;
    Sequence& sequence = **opened;
    const KvGeometry& geometry = options.cache.geometry;
    EXPECT_OK(PrefillAll(sequence, stream, kPrompt, 128));
    for (int64_t step = 0; step < kSteps; ++step) {
      const int64_t t = sequence.length();
      Outputs out;
      const Status decoded = DecodeOne(sequence, stream, &out);
      EXPECT_OK(decoded);
      if (!decoded.ok()) return result;
      EXPECT_OK(sequence.CheckInvariants());
      for (int32_t l = 0; l < geometry.layers; ++l) {
        for (int32_t h = 0; h < geometry.kv_heads; ++h) {
          auto view = sequence.LastStep(LayerId(l), KvHeadId(h));
          EXPECT_OK(view);
          result.attended.push_back(view->attended);
          for (int32_t g = 0; g < geometry.group(); ++g) {
            const int32_t head = h * geometry.group() + g;
            const std::vector<double> want = NaiveAttention(stream, l, t, head, view->attended);
            const std::span got(out[static_cast<size_t>(l)].data() + head * geometry.head_dim, static_cast<size_t>(geometry.head_dim));
            EXPECT_TRUE(AllClose(got, want, {1e-4, 1e-3})) << "step " << step << " layer " << l << " head " << head;
          }
        }
      }
    }
    result.report = sequence.Report();
    return result;
  }
  // Runs both builds.
  static void Compare(const WorldOptions& options, Decoded* cpu, Decoded* cuda) {
    const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
    World here(options);
    *cpu = Run(here, options, stream);
    CudaWorld there(options);
    ASSERT_OK(there.status());
    *cuda = Run(there, options, stream);
    EXPECT_LE(there.device().peak(), there.device().budget());
  }
};

TEST_F(CudaPipelineTest, MethodsWithExactScoresAttendToTheSamePositions) {
  for (const SelectorKind kind : {SelectorKind::kDense, SelectorKind::kWindow, SelectorKind::kCis, SelectorKind::kPsaw, SelectorKind::kOracle}) {
    SCOPED_TRACE(SelectorKindName(kind));
    Decoded cpu, cuda;
    ASSERT_NO_FATAL_FAILURE(Compare(OptionsFor(kind), &cpu, &cuda));
    EXPECT_EQ(cuda.attended, cpu.attended);
    EXPECT_EQ(cuda.report.retrievals, cpu.report.retrievals);
    EXPECT_EQ(cuda.report.attended, cpu.report.attended);
  }
}

TEST_F(CudaPipelineTest, TwoClocksUseAllTiers) {
  WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
  options.cache.selector.tc.theta = 0;
  options.cache.selector.tc.factor = 1;
  const KvGeometry& geometry = options.cache.geometry;
  options.device_budget = SmallestDevice(options, kPrompt + kSteps) + 64 * 1024;
  options.cache.host_budget = static_cast<uint64_t>(geometry.layers + CeilDiv(kPrompt + kSteps, geometry.chunk_tokens) + 2) * geometry.block_bytes();
  Decoded cpu, cuda;
  ASSERT_NO_FATAL_FAILURE(Compare(options, &cpu, &cuda));
  EXPECT_GT(cuda.report.rows_device, 0);
  EXPECT_GT(cuda.report.rows_host, 0);
  EXPECT_GT(cuda.report.rows_disk, 0);
  EXPECT_GT(cuda.report.refreshes, 0);
  EXPECT_EQ(cuda.report.retrievals, cpu.report.retrievals) << "the gate's decisions do not depend on the device";
  // Codes are scanned with other rounding there: a choice may differ where two scores tie to 2^-7 of a step.
  ASSERT_EQ(cuda.attended.size(), cpu.attended.size());
  size_t equal = 0;
  for (size_t i = 0; i < cpu.attended.size(); ++i) equal += cpu.attended[i] == cuda.attended[i];
  EXPECT_GT(equal, cpu.attended.size() / 2);
}

TEST_F(CudaPipelineTest, RowsMayComeBehindTheSteps) {
  WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
  options.cache.selector.tc.factor = 2;
  options.cache.selector.tc.refresh = 4;
  options.cache.selector.tc.lag = 2;
  options.device_budget = SmallestDevice(options, kPrompt + kSteps) + 64 * 1024;
  Decoded cpu, cuda;
  ASSERT_NO_FATAL_FAILURE(Compare(options, &cpu, &cuda));
  EXPECT_GT(cuda.report.rows_behind, 0);
  EXPECT_EQ(cuda.report.failed_fetches, 0);
}

TEST_F(CudaPipelineTest, APrefixComesBackFromTheStore) {
  WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 12);
  CudaWorld world(options);
  ASSERT_OK(world.status());
  std::vector<float> first, second;
  for (std::vector<float>* all : {&first, &second}) {
    auto opened = world.cache().OpenWithPrefix({.max_tokens = kPrompt + kSteps}, stream.ids(0, kPrompt));
    ASSERT_OK(opened);
    EXPECT_EQ((*opened)->restored() > 0, all == &second);
    ASSERT_OK(PrefillAll(**opened, stream, kPrompt, 64));
    for (int step = 0; step < 4; ++step) {
      Outputs out;
      ASSERT_OK(DecodeOne(**opened, stream, &out));
      for (const auto& layer : out) all->insert(all->end(), layer.begin(), layer.end());
    }
  }
  EXPECT_EQ(first, second) << "restored rows and codes are the same bytes";
}

// Plays the engine for whole steps: buffers on the device that all layers use, a graph for what a plan enqueues.
class StepEngine {
 public:
  StepEngine(const KvGeometry& geometry, const Stream& stream)
      : geometry_(geometry), stream_(stream), q_(static_cast<size_t>(geometry.heads * geometry.head_dim)), out_(q_.size()),
        k_(static_cast<size_t>(geometry.kv_heads * geometry.head_dim)), v_(k_.size()), on_(CudaStream::Create().value()),
        side_(CudaStream::Create().value()) {}

  Status Step(Sequence& sequence, Outputs* out) {
    const int64_t first = sequence.length();
    PREHOC_RETURN_IF_ERROR(sequence.Begin(stream_.ids(first, 1), 0));
    Status status = Run(sequence, first, out);
    if (status.ok()) status = sequence.End();
    if (!status.ok()) {
      on_.Synchronize().IgnoreError();
      side_.Synchronize().IgnoreError();
      sequence.Rollback();
    }
    return status;
  }
  int planned = 0, replayed = 0;

 private:
  // [behind, layers.., last]
  using Graphs = std::vector<CudaGraph>;

  Status Run(Sequence& sequence, int64_t first, Outputs* out) {
    PREHOC_ASSIGN_OR_RETURN(const Sequence::StepPlan plan,
                            sequence.PlanStep({.q = q_.data(), .k = k_.data(), .v = v_.data(), .out = out_.data()}));
    if (plan.id == 0) return RunLayers(sequence, stream_, first, 1, true, out);
    ++planned;
    const auto known = graphs_.find(plan.id);
    const bool again = known != graphs_.end() && !plan.pause;
    replayed += again;
    Graphs fresh;
    const Graphs& used = again ? known->second : fresh;
    const auto part = [&](size_t index, const CudaStream& stream, auto&& enqueue) -> Status {
      if (plan.pause) {
        PREHOC_RETURN_IF_ERROR(enqueue());
      } else {
        if (!again) {
          PREHOC_ASSIGN_OR_RETURN(CudaGraph graph, CudaGraph::Capture(stream, enqueue));
          fresh.push_back(std::move(graph));
        }
        PREHOC_RETURN_IF_ERROR(used[index].Launch(stream));
      }
      return stream.Synchronize();
    };
    const auto copy = [](const float* from, const CudaArray<float>& to) {
      return CudaStatus(cudaMemcpy(to.data(), from, to.size() * sizeof(float), cudaMemcpyHostToDevice), "copy");
    };
    out->assign(static_cast<size_t>(geometry_.layers), {});
    PREHOC_RETURN_IF_ERROR(part(0, side_, [&] { return sequence.EnqueueBehind(side_.get()); }));
    for (int32_t l = 0; l < geometry_.layers; ++l) {
      PREHOC_RETURN_IF_ERROR(copy(stream_.q(l, first), q_));
      PREHOC_RETURN_IF_ERROR(copy(stream_.k(l, first), k_));
      PREHOC_RETURN_IF_ERROR(copy(stream_.v(l, first), v_));
      PREHOC_RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(cudaStreamLegacy), "copy"));
      PREHOC_RETURN_IF_ERROR(part(static_cast<size_t>(l) + 1, on_, [&] { return sequence.EnqueueLayer(LayerId(l), on_.get()); }));
      std::vector<float>& of_layer = (*out)[static_cast<size_t>(l)];
      of_layer.resize(out_.size());
      PREHOC_RETURN_IF_ERROR(CudaStatus(cudaMemcpy(of_layer.data(), out_.data(), of_layer.size() * sizeof(float), cudaMemcpyDeviceToHost), "copy"));
      if (plan.pause) PREHOC_RETURN_IF_ERROR(sequence.AfterLayer(LayerId(l)));
    }
    PREHOC_RETURN_IF_ERROR(part(static_cast<size_t>(geometry_.layers) + 1, on_, [&] { return sequence.EnqueueLast(on_.get()); }));
    if (!again && !plan.pause) graphs_.emplace(plan.id, std::move(fresh));
    return {};
  }

  const KvGeometry geometry_;
  const Stream& stream_;
  CudaArray<float> q_, out_, k_, v_;
  const CudaStream on_, side_;
  std::map<uint64_t, Graphs> graphs_;
};

// Whole steps on the device: the method of the steps that the host takes part in, in every head of every layer.
TEST_F(CudaPipelineTest, WholeStepsAttendAsTheStepsOfTheHostDo) {
  constexpr int64_t kMany = 160;
  for (const int64_t slots : {160, 0}) {
    for (const double tau : {0.9, 1.0}) {
      SCOPED_TRACE("slots " + std::to_string(slots) + " tau " + std::to_string(tau));
      WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
      options.cache.geometry.heads = options.cache.geometry.kv_heads;  // in groups, sinks' scores decide among heads, and the two ways score them differently
      options.cache.selector.tc.theta = 0;
      options.cache.selector.tc.dense_below = slots == 0 ? kPrompt + 40 : 0;
      options.cache.selector.tc.tau = tau;
      options.cache.audit_every = 16;
      const Stream stream(options.cache.geometry, kPrompt + kMany, 14);
      CudaWorld there(options), here(options);
      ASSERT_OK(there.status());
      StepEngine engine(options.cache.geometry, stream);
      auto device = there.cache().Open({.max_tokens = kPrompt + kMany, .device_slots = slots}), host = here.cache().Open({.max_tokens = kPrompt + kMany, .device_slots = slots});
      ASSERT_OK(device);
      ASSERT_OK(host);
      ASSERT_OK(PrefillAll(**device, stream, kPrompt, 128));
      ASSERT_OK(PrefillAll(**host, stream, kPrompt, 128));
      size_t equal = 0, all = 0;
      for (int64_t step = 0; step < kMany; ++step) {
        const int64_t t = (*device)->length();
        Outputs out, want;
        ASSERT_OK(engine.Step(**device, &out)) << "step " << step;
        ASSERT_OK(DecodeOne(**host, stream, &want));
        ASSERT_OK((*device)->CheckInvariants());
        for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
          for (int32_t h = 0; h < options.cache.geometry.kv_heads; ++h) {
            auto mine = (*device)->LastStep(LayerId(l), KvHeadId(h)), theirs = (*host)->LastStep(LayerId(l), KvHeadId(h));
            ASSERT_OK(mine);
            ASSERT_OK(theirs);
            // Two scores may tie to the rounding of a scan, which sums in another order there.
            equal += mine->attended == theirs->attended;
            ++all;
            const std::span got(out[static_cast<size_t>(l)].data() + h * options.cache.geometry.head_dim, static_cast<size_t>(options.cache.geometry.head_dim));
            ASSERT_TRUE(AllClose(got, NaiveAttention(stream, l, t, h, mine->attended), {1e-4, 1e-3})) << "step " << step << " layer " << l << " head " << h;
          }
        }
      }
      EXPECT_GT(equal * 100, all * 95) << equal << " of " << all << " sets are equal";
      EXPECT_EQ(engine.planned, kMany);
      EXPECT_GT(engine.replayed, kMany * 3 / 4);
      const SequenceReport &a = (*device)->Report(), &b = (*host)->Report();
      EXPECT_EQ(a.retrievals, b.retrievals);
      EXPECT_EQ(a.inherited, b.inherited);
      EXPECT_EQ(a.attended, b.attended);
      EXPECT_EQ(a.audited_steps, b.audited_steps);
      EXPECT_NEAR(a.dropped_audited.mean(), b.dropped_audited.mean(), 1e-3);
      EXPECT_LT(a.output_error.mean(), b.output_error.mean() + 1e-3);
      EXPECT_EQ(a.rows_behind > 0, slots > 0);
      EXPECT_LE(there.device().peak(), there.device().budget());
    }
  }
}

// A failing call anywhere in a whole step, captures and launches included.
TEST_F(CudaPipelineTest, AnyCallOfAWholeStepMayFail) {
  constexpr int64_t kMany = 120;
  WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
  options.cache.selector.tc.refresh = 4;
  options.cache.selector.tc.dense_below = 0;
  options.cache.audit_every = 16;
  const Stream stream(options.cache.geometry, kPrompt + kMany, 15);
  CudaWorld world(options);
  ASSERT_OK(world.status());
  StepEngine engine(options.cache.geometry, stream);
  auto opened = world.cache().Open({.max_tokens = kPrompt + kMany, .device_slots = 160});
  ASSERT_OK(opened);
  Sequence& sequence = **opened;
  ASSERT_OK(PrefillAll(sequence, stream, kPrompt, 128));
  int64_t failures = 0;
  for (int64_t step = 0; step < kMany; ++step) {
    Outputs out;
    FailNthCudaCall(step + 1);
    const Status failed = engine.Step(sequence, &out);
    FailNthCudaCall(0);
    const int64_t t = sequence.length() - (failed.ok() ? 1 : 0);
    if (!failed.ok()) {
      ++failures;
      EXPECT_EQ(failed.code(), StatusCode::kCuda) << failed;
      ASSERT_OK(sequence.CheckInvariants()) << "call " << step + 1 << ": " << failed;
      ASSERT_OK(engine.Step(sequence, &out)) << "call " << step + 1 << ": " << failed;
    }
    for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
      for (int32_t head = 0; head < options.cache.geometry.heads; ++head) {
        auto view = sequence.LastStep(LayerId(l), KvHeadId(head / options.cache.geometry.group()));
        ASSERT_OK(view);
        const std::span got(out[static_cast<size_t>(l)].data() + head * options.cache.geometry.head_dim, static_cast<size_t>(options.cache.geometry.head_dim));
        ASSERT_TRUE(AllClose(got, NaiveAttention(stream, l, t, head, view->attended), {1e-4, 1e-3})) << "call " << step + 1 << " layer " << l << ": " << failed;
      }
    }
  }
#ifdef PREHOC_TEST_POINTS
  EXPECT_GT(failures, 30);
#endif
}

// A failing call ends the step that it belongs to, with an error; run again, the step gives what it would have given.
TEST_F(CudaPipelineTest, AnyCallMayFail) {
  WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
  options.cache.selector.tc.theta = 0;
  options.cache.selector.tc.factor = 1;
  options.cache.selector.tc.refresh = 4;
  const KvGeometry& geometry = options.cache.geometry;
  constexpr int64_t kMostSteps = 200;
  options.device_budget = SmallestDevice(options, kPrompt + kMostSteps) + 64 * 1024;
  options.cache.host_budget = static_cast<uint64_t>(geometry.layers + CeilDiv(kPrompt + kMostSteps, geometry.chunk_tokens) + 2) * geometry.block_bytes();
  const Stream stream(geometry, kPrompt + kMostSteps, 13);
  CudaWorld faulty(options), twin(options);
  ASSERT_OK(faulty.status());
  ASSERT_OK(twin.status());
  auto a = faulty.cache().Open({.max_tokens = kPrompt + kMostSteps}), b = twin.cache().Open({.max_tokens = kPrompt + kMostSteps});
  ASSERT_OK(a);
  ASSERT_OK(b);
  ASSERT_OK(PrefillAll(**a, stream, kPrompt, 128));
  ASSERT_OK(PrefillAll(**b, stream, kPrompt, 128));
  int64_t failures = 0;
  for (int64_t step = 0; step < kMostSteps; ++step) {
    Outputs got, want;
    FailNthCudaCall(step + 1);
    const Status failed = DecodeOne(**a, stream, &got);
    FailNthCudaCall(0);
    if (!failed.ok()) {
      ++failures;
      EXPECT_EQ(failed.code(), StatusCode::kCuda) << failed;
      EXPECT_NE(failed.message().find("cudaErrorLaunchFailure"), std::string::npos) << failed;
      ASSERT_OK((*a)->CheckInvariants()) << "call " << step + 1 << ": " << failed;
      ASSERT_OK(DecodeOne(**a, stream, &got));
    }
    ASSERT_OK(DecodeOne(**b, stream, &want));
    ASSERT_EQ(got, want) << "call " << step + 1;
    ASSERT_OK((*a)->CheckInvariants());
  }
#ifdef PREHOC_TEST_POINTS
  EXPECT_GT(failures, 40) << "a step makes more calls than that";
#endif
  const Status flushed = faulty.cache().Flush();
  EXPECT_OK(flushed);
}

// One piece with q, k, v and out on the device. Its `fail`-th call into CUDA fails, if it makes so many: then *failed.
Status PieceOnDevice(Sequence& sequence, const Stream& stream, int64_t count, int64_t prompt, Outputs* out, int64_t fail = 0,
                     bool* failed = nullptr) {
  const KvGeometry& geometry = stream.geometry();
  const int64_t q_width = int64_t{geometry.heads} * geometry.head_dim, kv_width = int64_t{geometry.kv_heads} * geometry.head_dim;
  const int64_t first = sequence.length();
  out->assign(static_cast<size_t>(geometry.layers), {});
  // What the layers before would compute comes on a stream of its own, as late as may be.
  const CudaStream layers = CudaStream::Create().value();
  std::vector<CudaArray<float>> there, q, k, v, to;
  const auto room = [&](const float* from, int64_t width) {
    there.emplace_back(std::vector<float>(from, from + count * width), CudaPlace::kPinned);
    return CudaArray<float>(static_cast<size_t>(count * width));
  };
  for (int32_t l = 0; l < geometry.layers; ++l) {
    q.push_back(room(stream.q(l, first), q_width));
    k.push_back(room(stream.k(l, first), kv_width));
    v.push_back(room(stream.v(l, first), kv_width));
    to.emplace_back(static_cast<size_t>(count * q_width));
  }
  FailNthCudaCall(fail);
  Status status = sequence.Begin(stream.ids(first, count), prompt);
  for (int32_t l = 0; l < geometry.layers && status.ok(); ++l) {
    const auto at = static_cast<size_t>(l);
    for (const auto& [array, from] : {std::pair{&q[at], 3 * at}, {&k[at], 3 * at + 1}, {&v[at], 3 * at + 2}}) {
      EXPECT_EQ(cudaMemcpyAsync(array->data(), there[from].data(), array->size() * sizeof(float), cudaMemcpyDefault, layers.get()), cudaSuccess);
    }
    status = sequence.Prefill(LayerId(l), {.q = q[at].data(), .q_pre_rope = q[at].data(), .k = k[at].data(), .v = v[at].data(), .out = to[at].data(),
                                           .on_device = true, .stream = layers.get()});
    if (status.ok() && l != 1) status = sequence.WhileOthersWork();  // it is optional
  }
  if (status.ok()) status = sequence.End();
  if (!status.ok()) sequence.Rollback();
  EXPECT_EQ(cudaStreamSynchronize(layers.get()), cudaSuccess);
  const bool reported = FailNthCudaCall(0) >= fail;  // of so many calls
  if (failed != nullptr) *failed = reported;
  for (size_t l = 0; l < to.size(); ++l) {
    (*out)[l] = to[l].Read();
    EXPECT_TRUE(q[l].GuardsIntact() && to[l].GuardsIntact());
  }
  return status;
}

// A prompt that stays on the device leaves what one through host memory leaves, to the last bit: outputs, rows in all tiers, codes.
TEST_F(CudaPipelineTest, APromptMayStayOnTheDevice) {
  enum Tiers { kComplete, kSmallDevice, kSmallHost };
  for (const Tiers tiers : {kComplete, kSmallDevice, kSmallHost}) {
    for (const bool by_mass : {false, true}) {
      SCOPED_TRACE(std::to_string(tiers) + (by_mass ? " by mass" : ""));
      WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
      options.cache.selector.tc.theta = 0;
      options.cache.selector.tc.factor = 1;
      if (by_mass) options.cache.selector.tc.gate = TwoClockOptions::Gate::kMass;
      const KvGeometry& geometry = options.cache.geometry;
      if (tiers != kComplete) options.device_budget = SmallestDevice(options, kPrompt + kSteps) + 64 * 1024;
      if (tiers == kSmallHost) {
        // A piece that begins within a chunk keeps its own chunks of all layers until it ends.
        options.cache.host_budget = static_cast<uint64_t>(5 * geometry.layers + CeilDiv(kPrompt + kSteps, geometry.chunk_tokens) + 2) *
                                    geometry.block_bytes();
      }
      const Stream stream(geometry, kPrompt + kSteps, 15);
      CudaWorld here(options), there(options);
      ASSERT_OK(here.status());
      ASSERT_OK(there.status());
      auto a = here.cache().Open({.max_tokens = kPrompt + kSteps}), b = there.cache().Open({.max_tokens = kPrompt + kSteps});
      ASSERT_OK(a);
      ASSERT_OK(b);
      ASSERT_TRUE((*a)->takes_device_memory());
      // Pieces that end within chunks and groups of codes, and one token alone.
      for (const int64_t count : {128, 64, 100, 1, 171, 200, 36}) {
        Outputs got, want;
        ASSERT_OK(PieceOnDevice(**a, stream, count, kPrompt, &got));
        ASSERT_OK(PrefillPiece(**b, stream, count, kPrompt, &want));
        ASSERT_EQ(got, want) << "piece of " << count;
        ASSERT_OK((*a)->CheckInvariants());
      }
      ASSERT_EQ((*a)->length(), kPrompt);
      for (int64_t step = 0; step < kSteps; ++step) {
        Outputs got, want;
        ASSERT_OK(DecodeOne(**a, stream, &got));
        ASSERT_OK(DecodeOne(**b, stream, &want));
        ASSERT_EQ(got, want) << "step " << step;
        ASSERT_EQ((*a)->LastStep(LayerId(1), KvHeadId(1))->attended, (*b)->LastStep(LayerId(1), KvHeadId(1))->attended);
      }
      EXPECT_EQ((*a)->Report().retrievals, (*b)->Report().retrievals);
      ASSERT_OK(here.cache().Flush());
    }
  }
}

// Each failure leaves the sequence as it was before the piece, with nothing on its way into memory that others may get.
TEST_F(CudaPipelineTest, AnyCallOfAPromptOnTheDeviceMayFail) {
  WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
  const KvGeometry& geometry = options.cache.geometry;
  const int64_t prompt = 400;
  options.device_budget = SmallestDevice(options, prompt + 8) + 64 * 1024;
  const Stream stream(geometry, prompt + 8, 16);
  CudaWorld faulty(options), twin(options);
  ASSERT_OK(faulty.status());
  ASSERT_OK(twin.status());
  auto b = twin.cache().Open({.max_tokens = prompt + 8});
  ASSERT_OK(b);
  Outputs want[3], step;
  const int64_t counts[3] = {128, 150, 122};
  for (int i = 0; i < 3; ++i) ASSERT_OK(PrefillPiece(**b, stream, counts[i], prompt, &want[i]));
  ASSERT_OK(DecodeOne(**b, stream, &step));
  int64_t failures = 0;
  bool more = true;
  for (int64_t nth = 1; more; nth += 3) {  // one call of each run fails
    more = false;
    auto a = faulty.cache().Open({.max_tokens = prompt + 8});
    ASSERT_OK(a);
    for (int i = 0; i < 3; ++i) {
      Outputs got;
      bool reported = false;
      const Status failed = PieceOnDevice(**a, stream, counts[i], prompt, &got, nth, &reported);
      more = more || reported;
      if (!failed.ok()) {
        ++failures;
        EXPECT_NE(failed.message().find("cudaErrorLaunchFailure"), std::string::npos) << failed;
        ASSERT_OK((*a)->CheckInvariants()) << "call " << nth << ": " << failed;
        ASSERT_OK(PieceOnDevice(**a, stream, counts[i], prompt, &got));
      }
      ASSERT_EQ(got, want[i]) << "call " << nth << " of piece " << i;
    }
    Outputs got;
    ASSERT_OK(DecodeOne(**a, stream, &got));
    ASSERT_EQ(got, step) << "call " << nth;
  }
#ifdef PREHOC_TEST_POINTS
  EXPECT_GT(failures, 40) << "a piece makes more calls than that";
#endif
}

// Host memory and store hold rows of 8 bits: what is attended to, and the outputs, are those of a cache of fp16 rows that was given what they hold.
TEST_F(CudaPipelineTest, RowsOfAFormatAreTheRowsThatTheyStandFor) {
  for (const RowFormat format : {RowFormat::kInt8, RowFormat::kE4m3}) {
    for (const bool whole : {false, true}) {
      for (const int32_t head_dim : {64, 128}) {
        SCOPED_TRACE(std::string(RowFormatName(format)) + (whole ? ", whole steps, " : ", ") + std::to_string(head_dim));
        WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
        options.cache.geometry.head_dim = head_dim;
        options.cache.selector.tc.theta = 0;
        options.cache.selector.tc.refresh = 4;
        options.cache.selector.tc.dense_below = 0;
        if (!whole) options.cache.selector.tc.lag = 2;
        std::vector<Outputs> outputs[2];
        std::vector<std::vector<int32_t>> attended[2];
        SequenceReport report[2];
        Stream rounded(options.cache.geometry, kPrompt + kSteps, 17);
        rounded.RoundTo(format);
        for (const size_t narrow : {size_t{0}, size_t{1}}) {
          options.cache.geometry.rows = narrow == 1 ? format : RowFormat::kF16;
          const Stream raw(options.cache.geometry, kPrompt + kSteps, 17);
          const Stream& stream = narrow == 1 ? raw : rounded;
          CudaWorld world(options);
          ASSERT_OK(world.status());
          StepEngine engine(options.cache.geometry, stream);
          for (const bool restored : {false, true}) {
            auto opened = world.cache().OpenWithPrefix({.max_tokens = kPrompt + kSteps, .device_slots = 160}, stream.ids(0, kPrompt));
            ASSERT_OK(opened);
            Sequence& sequence = **opened;
            ASSERT_EQ(sequence.restored() > 0, restored);
            while (sequence.length() < kPrompt) {
              Outputs out;
              ASSERT_OK(PieceOnDevice(sequence, stream, std::min<int64_t>(150, kPrompt - sequence.length()), kPrompt, &out));
              outputs[narrow].push_back(out);
            }
            for (int64_t step = 0; step < kSteps; ++step) {
              const int64_t t = sequence.length();
              Outputs out;
              ASSERT_OK(whole ? engine.Step(sequence, &out) : DecodeOne(sequence, stream, &out)) << "step " << step;
              ASSERT_OK(sequence.CheckInvariants());
              for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
                for (int32_t head = 0; head < options.cache.geometry.heads; ++head) {
                  auto view = sequence.LastStep(LayerId(l), KvHeadId(head / options.cache.geometry.group()));
                  ASSERT_OK(view);
                  attended[narrow].push_back(view->attended);
                  const std::span got(out[static_cast<size_t>(l)].data() + head * head_dim, static_cast<size_t>(head_dim));
                  ASSERT_TRUE(AllClose(got, NaiveAttention(rounded, l, t, head, view->attended), {1e-4, 1e-3}))
                      << "step " << step << " layer " << l << " head " << head << " narrow " << narrow << " restored " << restored;
                }
              }
              outputs[narrow].push_back(out);
            }
            if (!restored) report[narrow] = sequence.Report();
            opened->reset();
            ASSERT_OK(world.cache().Flush());
          }
          EXPECT_EQ(engine.planned, whole ? 2 * kSteps : 0);
        }
        EXPECT_EQ(attended[1], attended[0]);
        EXPECT_EQ(outputs[1], outputs[0]);
        // How many of them come in time behind the steps is not the same from run to run.
        EXPECT_GT(report[1].rows_behind, 0);
        EXPECT_EQ(report[1].failed_fetches, 0);
      }
    }
  }
}

TEST_F(CudaPipelineTest, RefusesByName) {
  const auto refusal = [](const auto& change) {
    WorldOptions options = OptionsFor(SelectorKind::kTwoClock);
    change(options);
    return CudaWorld(options).status();
  };
  EXPECT_OK(refusal([](WorldOptions&) {}));
  const auto expect = [&](const char* what, const auto& change) {
    const Status status = refusal(change);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported) << status;
    EXPECT_NE(status.message().find(what), std::string::npos) << status;
  };
  expect("quest", [](WorldOptions& o) { o.cache.selector.kind = SelectorKind::kQuest, o.cache.selector.budget.tokens = 64; });
  expect("hshare", [](WorldOptions& o) { o.cache.selector.kind = SelectorKind::kHShare; });
  expect("bound", [](WorldOptions& o) { o.cache.selector.bound = BoundKind::kProven; });
  expect("mass", [](WorldOptions& o) { o.cache.selector.budget.mass = 0.9; });
  expect("head_dim", [](WorldOptions& o) { o.cache.geometry.head_dim = 80; });
}

}  // namespace
}  // namespace prehoc
