// The table itself: which there are, what they refuse, and that a refusal writes nothing.
#include <functional>
#include <limits>

#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {

TEST(KernelTables, AreFoundByName) {
  ASSERT_NE(FindKernels("reference"), nullptr);
  EXPECT_EQ(FindKernels("reference"), &ReferenceKernels());
  EXPECT_EQ(FindKernels("nonsense"), nullptr);
  EXPECT_EQ(FindKernels(""), nullptr);
  const KernelTable& best = BestCpuKernels();
  EXPECT_EQ(FindKernels(best.name), &best);
  for (const char* name : {"avx512", "avx2", "reference"}) {
    if (const KernelTable* first = FindKernels(name)) {
      EXPECT_EQ(first->name, name);
      EXPECT_EQ(&best, first) << "the best is the first that this CPU runs";
      break;
    }
  }
}

TEST(KernelTables, RoomForWhatIsChosen) {
  ChooseTask task{.n = 100, .sinks = 10, .lo = 10, .hi = 90, .k = 20};
  EXPECT_EQ(task.max_chosen(), 20);
  task.dilate_m = 5, task.dilate_r = 2;
  EXPECT_EQ(task.max_chosen(), 40);
  task.dilate_m = 30;  // more ranks than are kept
  EXPECT_EQ(task.max_chosen(), 80);
  task.exact_budget = true;
  EXPECT_EQ(task.max_chosen(), 20);
  task.target_drop = 0.1f, task.cap = 50;
  EXPECT_EQ(task.max_chosen(), 50);
  task.cap = 1000;
  EXPECT_EQ(task.max_chosen(), 80);
  constexpr int32_t kHuge = std::numeric_limits<int32_t>::max();
  const ChooseTask huge{.n = kHuge, .hi = kHuge, .k = kHuge, .dilate_m = kHuge, .dilate_r = kHuge};
  EXPECT_EQ(huge.max_chosen(), kHuge);
  EXPECT_EQ(ChooseTask{}.max_chosen(), 0);
}

constexpr int32_t kDim = 16;

class RefusalTest : public KernelTest {
 protected:
  std::vector<float> floats = std::vector<float>(4096, 1.0f);
  std::vector<Half> halves = std::vector<Half>(16384, 0x3c00);
  std::vector<std::byte> blocks = std::vector<std::byte>(16384);
  Guarded<float> out{4096}, out2{4096};
  Guarded<int32_t> ints{64}, count{1};
  Guarded<Half> rows{4096};

  void ExpectNothingWritten() {
    EXPECT_TRUE(out.Untouched());
    EXPECT_TRUE(out2.Untouched());
    EXPECT_TRUE(ints.Untouched());
    EXPECT_TRUE(count.Untouched());
    EXPECT_TRUE(rows.Untouched());
  }
  // The second of two tasks is bad: the first must not have run.
  template <class Params, class Task>
  void Refuses(Status (*kernel)(const Params&, const Launch&), Params params, const Task& good, StatusCode code,
               const char* text, const std::function<void(Params&, Task&)>& spoil) {
    SCOPED_TRACE(text);
    Task tasks[] = {good, good};
    spoil(params, tasks[1]);
    params.tasks = tasks;
    EXPECT_STATUS(code, text, kernel(params, launch()));
    ExpectNothingWritten();
  }
};
PREHOC_INSTANTIATE_KERNELS(RefusalTest);
using enum StatusCode;

TEST_P(RefusalTest, Append) {
  const AppendTask good{.k = floats.data(), .v = floats.data(), .stride = kDim, .rows = rows.data(), .count = 2};
  const auto refuses = [&](StatusCode code, const char* text, std::function<void(AppendParams&, AppendTask&)> spoil) {
    Refuses<AppendParams, AppendTask>(kernels().append, {.head_dim = kDim}, good, code, text, spoil);
  };
  refuses(kUnsupported, "append: head_dim=72; use a multiple of 16", [](auto& p, auto&) { p.head_dim = 72; });
  refuses(kUnsupported, "head_dim=0", [](auto& p, auto&) { p.head_dim = 0; });
  refuses(kUnsupported, "head_dim=272", [](auto& p, auto&) { p.head_dim = 272; });
  refuses(kInvalid, "append: task 1: count=-1", [](auto&, auto& t) { t.count = -1; });
  refuses(kInvalid, "append: task 1: stride=15 is below head_dim = 16", [](auto&, auto& t) { t.stride = 15; });
  refuses(kInvalid, "task 1: k is null", [](auto&, auto& t) { t.k = nullptr; });
  refuses(kInvalid, "task 1: v is null", [](auto&, auto& t) { t.v = nullptr; });
  refuses(kInvalid, "task 1: rows is null", [](auto&, auto& t) { t.rows = nullptr; });
}

TEST_P(RefusalTest, Encode) {
  Guarded<std::byte> block(4096);
  const EncodeTask good{.rows = halves.data(), .block = block.data()};
  const auto refuses = [&](StatusCode code, const char* text, std::function<void(EncodeParams&, EncodeTask&)> spoil) {
    Refuses<EncodeParams, EncodeTask>(kernels().encode, {.head_dim = kDim}, good, code, text, spoil);
    EXPECT_TRUE(block.Untouched());
  };
  refuses(kUnsupported, "encode: head_dim=17", [](auto& p, auto&) { p.head_dim = 17; });
  refuses(kUnsupported, "bits=6, group_tokens=64; use bits 2, 3, 4, 5 or 8", [](auto& p, auto&) { p.format.bits = 6; });
  refuses(kUnsupported, "group_tokens=32", [](auto& p, auto&) { p.format.group_tokens = 32; });
  refuses(kInvalid, "encode: task 1: rows is null", [](auto&, auto& t) { t.rows = nullptr; });
  refuses(kInvalid, "task 1: block is null", [](auto&, auto& t) { t.block = nullptr; });
  refuses(kInvalid, "task 1: page_hi is null", [&](auto&, auto& t) { t.page_lo = rows.data(); });
}

TEST_P(RefusalTest, GateAndScan) {
  const GateTask gate{.q = floats.data(), .anchor = floats.data(), .cosine = out.data()};
  const auto gate_refuses = [&](StatusCode code, const char* text, std::function<void(GateParams&, GateTask&)> spoil) {
    Refuses<GateParams, GateTask>(kernels().gate, {.group = 2, .head_dim = kDim}, gate, code, text, spoil);
  };
  gate_refuses(kUnsupported, "gate: group=0; use 1 to 256", [](auto& p, auto&) { p.group = 0; });
  gate_refuses(kUnsupported, "gate: group=257", [](auto& p, auto&) { p.group = 257; });
  gate_refuses(kInvalid, "gate: task 1: anchor is null", [](auto&, auto& t) { t.anchor = nullptr; });

  const ScanTask scan{.q = floats.data(), .blocks = blocks.data(), .groups = 2, .z = out.data(), .err = out2.data(),
                      .z_stride = 128};
  const auto refuses = [&](StatusCode code, const char* text, std::function<void(ScanParams&, ScanTask&)> spoil) {
    Refuses<ScanParams, ScanTask>(kernels().scan, {.group = 2, .head_dim = kDim}, scan, code, text, spoil);
  };
  refuses(kUnsupported, "scan: group=-3", [](auto& p, auto&) { p.group = -3; });
  refuses(kUnsupported, "scan: format is bits=1", [](auto& p, auto&) { p.format.bits = 1; });
  refuses(kInvalid, "scan: task 1: groups=-1", [](auto&, auto& t) { t.groups = -1; });
  refuses(kInvalid, "scan: task 1: z_stride=127 is below groups * group_tokens = 128",
          [](auto&, auto& t) { t.z_stride = 127; });
  refuses(kInvalid, "task 1: blocks is null", [](auto&, auto& t) { t.blocks = nullptr; });
  refuses(kInvalid, "task 1: z is null", [](auto&, auto& t) { t.z = nullptr; });
}

TEST_P(RefusalTest, ScoreAndPagesAndAttend) {
  const RowRun runs[] = {{.rows = halves.data(), .count = 3}, {.rows = halves.data(), .count = 4}};
  const RowRun negative[] = {{.rows = halves.data(), .count = 3}, {.rows = halves.data(), .count = -4}};
  const RowRun missing[] = {{.rows = nullptr, .count = 3}};
  const ScoreTask score{.q = floats.data(), .runs = runs, .z = out.data(), .z_stride = 7};
  const auto score_refuses = [&](const char* text, std::function<void(ScoreParams&, ScoreTask&)> spoil) {
    Refuses<ScoreParams, ScoreTask>(kernels().score, {.group = 2, .head_dim = kDim}, score, kInvalid, text, spoil);
  };
  score_refuses("score: task 1: runs[1].count=-4", [&](auto&, auto& t) { t.runs = negative; });
  score_refuses("score: task 1: runs[0].rows is null", [&](auto&, auto& t) { t.runs = missing; });
  score_refuses("score: task 1: z_stride=6 is below the rows of all runs = 7", [](auto&, auto& t) { t.z_stride = 6; });

  const ScorePagesTask pages{.q = floats.data(), .lo = halves.data(), .hi = halves.data(), .pages = 3, .z = out.data(),
                             .z_stride = 3};
  const auto pages_refuses = [&](const char* text, std::function<void(ScorePagesParams&, ScorePagesTask&)> spoil) {
    Refuses<ScorePagesParams, ScorePagesTask>(kernels().score_pages, {.group = 2, .head_dim = kDim}, pages, kInvalid, text,
                                              spoil);
  };
  pages_refuses("score_pages: task 1: pages=-2", [](auto&, auto& t) { t.pages = -2; });
  pages_refuses("score_pages: task 1: z_stride=2 is below pages = 3", [](auto&, auto& t) { t.z_stride = 2; });
  pages_refuses("task 1: hi is null", [](auto&, auto& t) { t.hi = nullptr; });

  const AttendTask attend{.q = floats.data(), .runs = runs, .out = out.data(), .lse = out2.data()};
  const auto attend_refuses = [&](const char* text, std::function<void(AttendParams&, AttendTask&)> spoil) {
    Refuses<AttendParams, AttendTask>(kernels().attend, {.group = 2, .head_dim = kDim}, attend, kInvalid, text, spoil);
  };
  attend_refuses("attend: task 1: runs[1].count=-4", [&](auto&, auto& t) { t.runs = negative; });
  attend_refuses("attend: task 1: lse is null", [](auto&, auto& t) { t.lse = nullptr; });
  attend_refuses("attend: task 1: q is null", [](auto&, auto& t) { t.q = nullptr; });
}

TEST_P(RefusalTest, Choose) {
  const ChooseTask good{.z = floats.data(), .z_stride = 20, .n = 20, .sinks = 2, .lo = 3, .hi = 15, .k = 4, .cap = 8,
                        .target_drop = 0.1f, .chosen = ints.data(), .count = count.data(), .lse_all = out.data(),
                        .lse_out = out2.data()};
  const auto refuses = [&](const char* text, std::function<void(ChooseParams&, ChooseTask&)> spoil) {
    Refuses<ChooseParams, ChooseTask>(kernels().choose, {.group = 2}, good, kInvalid, text, spoil);
  };
  refuses("choose: task 1: n=-5", [](auto&, auto& t) { t.n = -5; });
  refuses("choose: task 1: sinks=-1", [](auto&, auto& t) { t.sinks = -1; });
  refuses("choose: task 1: lo=1 is below sinks = 2", [](auto&, auto& t) { t.lo = 1; });
  refuses("choose: task 1: hi=2 is below lo = 3", [](auto&, auto& t) { t.hi = 2; });
  refuses("choose: task 1: n=14 is below hi = 15", [](auto&, auto& t) { t.n = 14; });
  refuses("choose: task 1: k=-4", [](auto&, auto& t) { t.k = -4; });
  refuses("choose: task 1: dilate_m=-1", [](auto&, auto& t) { t.dilate_m = -1; });
  refuses("choose: task 1: dilate_r=-1", [](auto&, auto& t) { t.dilate_r = -1; });
  refuses("choose: task 1: cap=3 is below k (or all of the middle) = 4", [](auto&, auto& t) { t.cap = 3; });
  refuses("choose: task 1: target_drop is NaN",
          [](auto&, auto& t) { t.target_drop = std::numeric_limits<float>::quiet_NaN(); });
  refuses("choose: task 1: z_stride=19 is below n = 20", [](auto&, auto& t) { t.z_stride = 19; });
  refuses("choose: task 1: chosen is null", [](auto&, auto& t) { t.chosen = nullptr; });
  refuses("choose: task 1: z is null", [](auto&, auto& t) { t.z = nullptr; });
  refuses("choose: task 1: rule=9", [](auto&, auto& t) { t.rule = static_cast<GroupRule>(9); });
}

TEST_P(RefusalTest, TopKAndGather) {
  const TopKTask good{.score = floats.data(), .lo = 2, .hi = 9, .k = 3, .chosen = ints.data(), .count = count.data()};
  const auto refuses = [&](const char* text, std::function<void(TopKParams&, TopKTask&)> spoil) {
    Refuses<TopKParams, TopKTask>(kernels().top_k, {}, good, kInvalid, text, spoil);
  };
  refuses("top_k: task 1: lo=-1", [](auto&, auto& t) { t.lo = -1; });
  refuses("top_k: task 1: hi=1 is below lo = 2", [](auto&, auto& t) { t.hi = 1; });
  refuses("top_k: task 1: k=-1", [](auto&, auto& t) { t.k = -1; });
  refuses("top_k: task 1: score is null", [](auto&, auto& t) { t.score = nullptr; });
  refuses("top_k: task 1: count is null", [](auto&, auto& t) { t.count = nullptr; });

  const RowCopy copies[] = {{.from = halves.data(), .to = rows.data()}, {.from = nullptr, .to = rows.data()}};
  EXPECT_STATUS(kInvalid, "gather: task 1: from is null", kernels().gather({.rows = copies, .head_dim = kDim}, launch()));
  EXPECT_STATUS(kUnsupported, "gather: head_dim=8", kernels().gather({.rows = copies, .head_dim = 8}, launch()));
  ExpectNothingWritten();
}

TEST_P(RefusalTest, Prefill) {
  const RowRun runs[] = {{.rows = halves.data(), .count = 10}};
  const int32_t early[] = {0, -1, 0, 0}, late[] = {6, 7, 9, 9};
  const PrefillTask good{.q = floats.data(), .q_stride = 2 * kDim, .out = out.data(), .out_stride = 2 * kDim, .runs = runs};
  const auto refuses = [&](const char* text, std::function<void(PrefillParams&, PrefillTask&)> spoil) {
    const PrefillParams params{.queries = 4, .first = 6, .sinks = 1, .group = 2, .head_dim = kDim};
    Refuses<PrefillParams, PrefillTask>(kernels().prefill, params, good, kInvalid, text, spoil);
  };
  refuses("prefill: queries=-1", [](auto& p, auto&) { p.queries = -1; });
  refuses("prefill: first=-1", [](auto& p, auto&) { p.first = -1; });
  refuses("prefill: sinks=-1", [](auto& p, auto&) { p.sinks = -1; });
  refuses("rows of all runs=10 is below first + queries = 11", [](auto& p, auto&) { p.first = 7; });
  refuses("prefill: task 1: q_stride=31 is below group * head_dim = 32", [](auto&, auto& t) { t.q_stride = 31; });
  refuses("prefill: task 1: out_stride=31", [](auto&, auto& t) { t.out_stride = 31; });
  refuses("prefill: task 1: start[1]=-1; use 0 to first + t", [&](auto&, auto& t) { t.start = early; });
  refuses("prefill: task 1: start[2]=9", [&](auto&, auto& t) { t.start = late; });
}

}  // namespace
}  // namespace prehoc
