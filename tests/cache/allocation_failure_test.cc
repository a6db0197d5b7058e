// Memory that the system does not give: every allocation of a cache's life fails once, one after the other, and each time there is an
// error or the right answer, and nothing is lost. operator new is this program's own (tests/fakes/failing_new.h); kernels' scratch and the arena's pages
// are not from there.
#include <gtest/gtest.h>

#include "tests/cache/pipeline_world.h"
#include "tests/fakes/failing_new.h"
#include "tests/support/compare.h"

namespace prehoc {
namespace {

constexpr int64_t kPrompt = 80, kSteps = 5, kMost = 96;

KvGeometry TinyGeometry(RowFormat rows = RowFormat::kF16) {
  KvGeometry geometry;
  geometry.rows = rows;
  geometry.layers = 2;
  geometry.heads = 4;
  geometry.kv_heads = 2;
  geometry.head_dim = 16;
  geometry.chunk_tokens = 16;
  return geometry;
}

struct FailureCase {
  std::string name;
  std::vector<std::pair<std::string, std::string>> knobs;
  int64_t run = 1;  // so many allocations in a row fail
  uint64_t device_bytes = 24 << 10;
  bool whole_steps = false;  // on the device; all blocks stay in host memory
  RowFormat rows = RowFormat::kF16;
};
void PrintTo(const FailureCase& c, std::ostream* os) { *os << c.name; }

// One life of a cache: prompts, steps, eviction, flush, a prefix that comes back, a repair. A call that fails is made again, with
// memory, and must succeed then.
class Life {
 public:
  Life(const FailureCase& c, const Stream& stream) : case_(c), stream_(stream) {
    MemoryChunkStore::Options store;
    options_.geometry = TinyGeometry(c.rows);
    store.chunk_bytes = options_.geometry.block_bytes();
    store.identity.layout = options_.geometry.LayoutName();
    store.identity.dtype = RowFormatName(c.rows);
    store_ = MemoryChunkStore::Create(store).value();
    options_.host_budget = (c.whole_steps ? 64 : 9) * 4096;
    options_.huge_pages = false;
    options_.audit_every = 2;
    options_.selector.budget.sinks = 2;
    options_.selector.budget.local = 4;
    options_.selector.budget.tokens = 16;
    options_.codes.group_tokens = 16;
    for (const auto& [knob, value] : c.knobs) EXPECT_OK(options_.selector.Set(knob, value));
  }

  // Allocations first .. first + run - 1 fail; none if first < 0. Returns how many there were.
  int64_t Run(int64_t first) {
    FailAllocations(first, first + case_.run - 1);
    std::unique_ptr<KvCache> cache;
    Try([&] {
      const AllocationsMayFail here;
      return Keep(KvCache::Create(options_, {.executor = &executor_, .device = &device_, .store = store_.get(), .clock = &clock_,
                                              .step_kernels = case_.whole_steps ? &step::ReferenceStepKernels() : nullptr}), &cache);
    });
    if (cache == nullptr) return 0;
    std::unique_ptr<Sequence> sequence;
    Try([&] {
      const AllocationsMayFail here;
      return Keep(cache->Open(Wanted()), &sequence);
    });
    if (sequence == nullptr) return 0;  // not for want of an allocation: it has said why
    Play(*sequence);
    RunJobs();
    Try([&] {
      const AllocationsMayFail here;
      return cache->Flush();
    });
    Close(&sequence);
    Try([&] {
      const AllocationsMayFail here;
      return Keep(cache->OpenWithPrefix(Wanted(), stream_.ids(0, kPrompt)), &sequence);
    });
    if (sequence == nullptr) return 0;
    restored_ = sequence->restored();
    Play(*sequence);
    Try([&] { return Repair(*sequence); });
    const int64_t allocations = CountAllocations();
    SpareAllocations();
    executor_.Drain();
    EXPECT_OK(sequence->CheckInvariants());
    sequence.reset();
    EXPECT_OK(cache->Flush());
    double tails = -1, pinned = -1;
    cache->VisitCounters([&](std::string_view name, double value) {
      if (name == "host.tails") tails = value;
      if (name == "host.pinned") pinned = value;
      if (name == "host.loads") loads_ = value;
    });
    EXPECT_EQ(tails, 0);
    EXPECT_EQ(pinned, 0);
    EXPECT_EQ(device_.used(), 0u);
    cache.reset();
    EXPECT_OK(store_->CheckInvariants());
    return allocations;
  }

  const std::vector<float>& outputs() const { return outputs_; }
  int planned() const { return planned_; }
  int64_t restored() const { return restored_; }
  double loads() const { return loads_; }
  bool failed() const { return failed_; }

 private:
  SequenceOptions Wanted() const {
    return {.max_tokens = kMost, .device_bytes = case_.device_bytes, .device_slots = case_.whole_steps ? 20 : 0};
  }

  template <class T>
  static Status Keep(Result<std::unique_ptr<T>> result, std::unique_ptr<T>* to) {
    if (!result.ok()) return result.status();
    *to = std::move(result).value();
    return {};
  }

  template <class Fn>
  void Try(Fn&& fn, const Sequence* touched = nullptr) {
    const Status status = fn();
    if (touched != nullptr) {
      EXPECT_OK(touched->CheckInvariants());
    }
    if (status.ok()) return;
    // An error of one allocation; whatever had to be told otherwise (a chunk that is lost) can be mended.
    failed_ = true;
    EXPECT_TRUE(status.code() == StatusCode::kOutOfSpace || status.code() == StatusCode::kNotFound) << status;
    EXPECT_FALSE(status.message().empty());
    SpareAllocations();
    EXPECT_OK(fn());
  }

  void RunJobs() {
    const AllocationsMayFail here;
    executor_.Drain();
  }
  static void Close(std::unique_ptr<Sequence>* sequence) {
    const AllocationsMayFail here;
    sequence->reset();
  }

  // One call of a sequence from its begin to its end, undone if it fails.
  template <class Begin, class End>
  Status Call(Sequence& sequence, int64_t first, int64_t count, bool decode, Begin&& begin, End&& end) {
    const auto floats = static_cast<size_t>(count * TinyGeometry().heads * TinyGeometry().head_dim);
    out_.assign(static_cast<size_t>(TinyGeometry().layers), std::vector<float>(floats, -99.0f));
    std::vector<float> q(static_cast<size_t>(TinyGeometry().heads * TinyGeometry().head_dim)), out(q.size());
    std::vector<float> k(static_cast<size_t>(TinyGeometry().kv_heads * TinyGeometry().head_dim)), v(k.size());
    const AllocationsMayFail here;
    Status status = begin();
    if (status.ok() && decode) {
      auto plan = sequence.PlanStep({.q = q.data(), .k = k.data(), .v = v.data(), .out = out.data()});
      status = plan.status();
      if (status.ok() && plan->id != 0) {
        ++planned_;
        for (int32_t l = 0; l < TinyGeometry().layers && status.ok(); ++l) {
          std::copy_n(stream_.q(l, first), q.size(), q.data());
          std::copy_n(stream_.k(l, first), k.size(), k.data());
          std::copy_n(stream_.v(l, first), v.size(), v.data());
          status = sequence.EnqueueLayer(LayerId(l), nullptr);
          std::copy(out.begin(), out.end(), out_[static_cast<size_t>(l)].begin());
          if (status.ok() && plan->pause) status = sequence.AfterLayer(LayerId(l));
        }
        if (status.ok()) status = sequence.EnqueueBehind(nullptr);
        if (status.ok()) status = sequence.EnqueueLast(nullptr);
        if (status.ok()) status = end();
        if (!status.ok()) sequence.Rollback();
        return status;
      }
    }
    for (int32_t l = 0; l < TinyGeometry().layers && status.ok(); ++l) {
      LayerInput input;
      input.q = input.q_pre_rope = stream_.q(l, first);
      input.k = stream_.k(l, first);
      input.v = stream_.v(l, first);
      input.out = out_[static_cast<size_t>(l)].data();
      status = decode ? sequence.Attend(LayerId(l), input) : sequence.Prefill(LayerId(l), input);
    }
    if (status.ok()) status = end();
    if (!status.ok()) sequence.Rollback();
    return status;
  }

  Status Repair(Sequence& sequence, ChunkIndex chunk = ChunkIndex(0)) {
    return Call(sequence, chunk.value() * 16, 16, false, [&] { return sequence.BeginRepair(chunk); }, [&] { return sequence.EndRepair(); });
  }
  // Without memory for one read a chunk may count as lost: it is made anew first.
  Status Mend(Sequence& sequence) {
    if (!failed_) return {};
    SpareAllocations();
    for (const ChunkIndex chunk : sequence.LostChunks()) PREHOC_RETURN_IF_ERROR(Repair(sequence, chunk));
    return {};
  }

  void Play(Sequence& sequence) {
    for (int64_t at = sequence.length(); at < kPrompt; at = sequence.length()) {
      const int64_t count = std::min<int64_t>(40, kPrompt - at);
      Try([&] {
        PREHOC_RETURN_IF_ERROR(Mend(sequence));
        return Call(sequence, at, count, false, [&] { return sequence.Begin(stream_.ids(at, count), kPrompt); }, [&] { return sequence.End(); });
      }, &sequence);
      if (testing::Test::HasFailure()) return;
      RunJobs();
    }
    for (int64_t step = 0; step < kSteps; ++step) {
      const int64_t at = sequence.length();
      Try([&] {
        PREHOC_RETURN_IF_ERROR(Mend(sequence));
        return Call(sequence, at, 1, true, [&] { return sequence.Begin(stream_.ids(at, 1), 0); }, [&] { return sequence.End(); });
      }, &sequence);
      for (const auto& layer : out_) outputs_.insert(outputs_.end(), layer.begin(), layer.end());
      RunJobs();
    }
  }

  const FailureCase& case_;
  const Stream& stream_;
  ManualClock clock_;
  ManualExecutor executor_;
  HostDeviceMemory device_{1 << 20};
  std::unique_ptr<MemoryChunkStore> store_;
  CacheOptions options_;
  std::vector<std::vector<float>> out_;
  std::vector<float> outputs_;
  int64_t restored_ = 0;
  double loads_ = 0;
  bool failed_ = false;
  int planned_ = 0;
};

class AllocationFailureTest : public testing::TestWithParam<FailureCase> {};

TEST_P(AllocationFailureTest, EachGivesAnErrorOrTheRightAnswer) {
  const Stream stream(TinyGeometry(), kMost, 5);
  int64_t allocations = 0;
  std::vector<double> expected;
  {
    Life whole(GetParam(), stream);
    allocations = whole.Run(-1);
    expected.assign(whole.outputs().begin(), whole.outputs().end());
    ASSERT_FALSE(HasFailure());
    ASSERT_GT(whole.restored(), 0);
    ASSERT_EQ(whole.loads() > 0, !GetParam().whole_steps);  // blocks have left, and come back
    ASSERT_EQ(whole.planned() > 0, GetParam().whole_steps);
  }
  ASSERT_GT(allocations, 300);
  int64_t told = 0;
  for (int64_t n = 0; n < allocations; ++n) {
    SCOPED_TRACE("allocation " + std::to_string(n) + " of " + std::to_string(allocations));
    Life life(GetParam(), stream);
    life.Run(n);
    told += life.failed();
    ASSERT_EQ(life.outputs().size(), expected.size());
    ASSERT_TRUE(AllClose(life.outputs(), expected, {2e-5, 2e-5}));
    if (HasFailure()) return;
  }
  EXPECT_GT(told, allocations / 4);  // the others were in jobs, or did without
  RecordProperty("allocations", static_cast<int>(allocations));
}

INSTANTIATE_TEST_SUITE_P(Caches, AllocationFailureTest,
                         testing::Values(FailureCase{"two_clocks", {{"selector", "tc"}, {"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "off"}, {"tc.refresh", "16"}}},
                                         FailureCase{"three_in_a_row", {{"selector", "tc"}, {"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "off"}, {"tc.refresh", "16"}}, 3},
                                         FailureCase{"lag", {{"selector", "tc"}, {"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "off"}, {"tc.refresh", "2"}, {"tc.lag", "1"}}},
                                         FailureCase{"lag_of_int8", {{"selector", "tc"}, {"tc.scorer", "exact"}, {"tc.theta", "0"}, {"tc.tau", "off"}, {"tc.refresh", "2"}, {"tc.lag", "1"}},
                                                     1, 24 << 10, false, RowFormat::kInt8},
                                         FailureCase{"whole_steps", {{"selector", "tc"}, {"tc.theta", "0"}, {"tc.tau", "off"}, {"tc.refresh", "2"}}, 1, 192 << 10, true},
                                         FailureCase{"bounded", {{"selector", "tc"}, {"tc.theta", "0"}, {"max_dropped_mass", "0.2"}, {"tc.refresh", "16"}}, 1, 30 << 10},
                                         FailureCase{"certified", {{"selector", "cis"}, {"cis.gate", "certified"}, {"cis.delta_max", "0.9"}, {"cis.local_edge", "held"}}, 1, 32 << 10},
                                         FailureCase{"window", {{"selector", "window"}}}, FailureCase{"dense", {{"selector", "dense"}}}),
                         [](const auto& of) { return of.param.name; });

}  // namespace
}  // namespace prehoc
