// attend: sinks, window in a ring, chosen rows on the device and in pinned memory, against the reference over the same rows.
#include <cmath>
#include <limits>
#include <numeric>

#include "tests/kernels/cuda/cuda_kernel_test.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One task on the host; its device arrays live as long as it.
struct Scene {
  int32_t n = 0, sinks = 0, local = 0;
  std::vector<int32_t> refs;
  std::vector<float> q;
  std::vector<Half> rows, host_rows;  // [sinks + ring + slots], pinned
  int32_t sink_row = 0, ring_row = 0, ring_rows = 0;
  std::vector<RowRun> runs;           // what is attended to
  std::vector<int16_t> keep;          // of each ref: a slot, none, or one that does not exist
  std::vector<Half> kept;             // [kKeptSlots] what these are to have then; all else stays poisoned

  CudaArray<int32_t> device_n{1}, device_refs{0}, num_refs{1};
  CudaArray<float> device_q{0}, out{0}, lse{0};
  CudaArray<Half> device_rows{0}, pinned{0}, slots{0};
  CudaArray<int16_t> device_keep{0};
};

class AttendCudaTest : public CudaKernelTest {
 protected:
  static constexpr int32_t kSlots = 40, kHostRows = 30, kKeptSlots = 50;

  Scene Make(Rng& rng, cuda::RowType type, int32_t d, int32_t group, int32_t n, int32_t sinks, int32_t local, int32_t chosen) {
    Scene s;
    s.n = n, s.sinks = sinks, s.local = local;
    s.ring_rows = std::max(1, std::min(n, local) + static_cast<int32_t>(rng.Int(0, 20)));
    s.sink_row = static_cast<int32_t>(rng.Int(0, 5));
    s.ring_row = s.sink_row + sinks;
    const int32_t slots_at = s.ring_row + s.ring_rows;
    s.rows = SharedRows(rng, type, slots_at + kSlots, d);
    s.host_rows = SharedRows(rng, type, kHostRows, d);
    s.q = rng.Normals(static_cast<size_t>(group * d));
    const auto row = [&](const std::vector<Half>& rows, int64_t i) { return rows.data() + 2 * i * d; };
    const int32_t first = std::min(sinks, n), last = std::min(local, n - first);
    for (int32_t p = 0; p < first; ++p) s.runs.push_back({row(s.rows, s.sink_row + p), 1});
    for (int32_t p = n - last; p < n; ++p) s.runs.push_back({row(s.rows, s.ring_row + p % s.ring_rows), 1});
    for (int32_t i = 0; i < chosen; ++i) {
      const bool host = rng.Chance(0.2);
      s.refs.push_back(static_cast<int32_t>(host ? ~rng.Int(0, kHostRows - 1) : slots_at + rng.Int(0, kSlots - 1)));
      s.runs.push_back({host ? row(s.host_rows, ~s.refs.back()) : row(s.rows, s.refs.back()), 1});
    }
    KeepSome(rng, type, d, &s);
    s.device_n = CudaArray<int32_t>(std::vector<int32_t>{n});
    s.device_refs = CudaArray<int32_t>(s.refs);
    s.num_refs = CudaArray<int32_t>(std::vector<int32_t>{chosen});
    s.device_q = CudaArray<float>(s.q);
    s.out = CudaArray<float>(static_cast<size_t>(group * d));
    s.lse = CudaArray<float>(static_cast<size_t>(group));
    s.device_rows = CudaArray<Half>(AsStored(type, s.rows));
    s.pinned = CudaArray<Half>(AsStored(type, s.host_rows), CudaPlace::kPinned);
    return s;
  }
  // Of the rows of the host some are kept, others name no slot; what rows of the device name is not looked at.
  static void KeepSome(Rng& rng, cuda::RowType type, int32_t d, Scene* s) {
    const std::vector<Half> stored = AsStored(type, s->host_rows);
    const size_t row = 2 * static_cast<size_t>(d);
    s->slots = CudaArray<Half>(kKeptSlots * row);
    s->kept = s->slots.Read();
    std::vector<int16_t> places(kKeptSlots);
    std::iota(places.begin(), places.end(), int16_t{0});
    rng.Shuffle(places);
    s->keep.clear();
    for (const int32_t ref : s->refs) {
      const bool host = ref < 0, none = host ? places.empty() || rng.Chance(0.3) : rng.Chance(0.5);
      s->keep.push_back(static_cast<int16_t>(none ? rng.Pick(std::vector<int64_t>{-1, kKeptSlots}) : host ? places.back() : rng.Int(0, kKeptSlots - 1)));
      if (!host || none) continue;
      places.pop_back();
      std::copy_n(stored.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(~ref) * row), row,
                  s->kept.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(s->keep.back()) * row));
    }
    s->device_keep = CudaArray<int16_t>(s->keep);
  }
  static cuda::AttendTask TaskOf(const Scene& s, int32_t d) {
    return {.q = s.device_q.data(), .out = s.out.data(), .lse = s.lse.data(), .rows = s.device_rows.data(),
            .row_limit = static_cast<int64_t>(s.rows.size()) / (2 * d), .sink_row = s.sink_row, .ring_row = s.ring_row,
            .ring_rows = s.ring_rows, .sinks = s.sinks, .local = s.local, .n = s.device_n.data(), .refs = s.device_refs.data(),
            .num_refs = s.num_refs.data(), .refs_room = static_cast<int32_t>(s.refs.size()), .host_rows = s.pinned.data(), .host_limit = kHostRows,
            .keep = s.device_keep.data(), .slots = s.slots.data(), .slot_limit = kKeptSlots};
  }
  void Run(const std::vector<Scene>& scenes, cuda::RowType type, int32_t d, int32_t group, int32_t max_rows) {
    std::vector<cuda::AttendTask> tasks;
    for (const Scene& s : scenes) tasks.push_back(TaskOf(s, d));
    const CudaArray<cuda::AttendTask> device(tasks);
    cuda::AttendParams params{.tasks = device.data(), .num_tasks = static_cast<int32_t>(tasks.size()), .max_rows = max_rows,
                              .type = type, .group = group, .head_dim = d};
    const auto workspace = Workspace(cuda::AttendWorkspaceBytes(params));
    params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
    ASSERT_OK(cuda::Attend(params, stream()));
    ASSERT_OK(Wait());
    EXPECT_TRUE(workspace.GuardsIntact());
  }
  void Check(const Scene& s, cuda::RowType type, int32_t d, int32_t group) {
    std::vector<float> out(static_cast<size_t>(group * d)), lse(static_cast<size_t>(group));
    const AttendTask tasks[] = {{.q = s.q.data(), .runs = s.runs, .out = out.data(), .lse = lse.data()}};
    ASSERT_OK(ReferenceKernels().attend({.tasks = tasks, .group = group, .head_dim = d}, {}));
    double size = 0;  // of the largest logit's parts
    for (const RowRun& run : s.runs) {
      for (int32_t h = 0; h < group; ++h) size = std::max(size, NaiveMagnitude(s.q.data() + int64_t{h} * d, static_cast<const Half*>(run.rows), d));
    }
    const double allowed = 2e-5 + size * (type == cuda::RowType::kF16 ? 0x1p-20 : 0x1p-15);
    EXPECT_TRUE(AllClose(s.out.Read(), out, {.absolute = allowed, .relative = allowed}, {group, d}));
    EXPECT_TRUE(AllClose(s.lse.Read(), lse, {.absolute = allowed, .relative = 1e-6}));
    EXPECT_TRUE(AllEqual(s.slots.Read(), s.kept, {kKeptSlots, 2, d})) << "rows of the host that are kept";
    EXPECT_TRUE(s.out.GuardsIntact() && s.lse.GuardsIntact() && s.slots.GuardsIntact());
  }
};

TEST_F(AttendCudaTest, MatchesTheReferenceAtEverySizeAndShape) {
  SeededRng rng;
  for (const cuda::RowType type : kRowTypes) {
    for (const int32_t d : CudaHeadDims()) {
      for (const int32_t group : {1, 3, 4, 8, 13}) {
        SCOPED_TRACE(testing::Message() << NameOf(type) << ", head_dim " << d << ", group " << group);
        std::vector<Scene> scenes;  // ragged
        for (const int32_t size : {0, 1, 15, 16, 17, 130, 509}) {
          const int32_t sinks = static_cast<int32_t>(rng.Int(0, std::min(size, 5)));
          const int32_t local = static_cast<int32_t>(rng.Int(0, size)), n = sinks + local + static_cast<int32_t>(rng.Int(0, 100));
          scenes.push_back(Make(rng, type, d, group, n, sinks, local, size - sinks - std::min(local, size - sinks)));
        }
        Run(scenes, type, d, group, static_cast<int32_t>(rng.Pick(std::vector<int64_t>{0, 64, 1000, 100000})));
        for (const Scene& s : scenes) Check(s, type, d, group);
      }
    }
  }
}

TEST_F(AttendCudaTest, DenseOverARingThatHoldsEverythingAndOneThatWrapped) {
  SeededRng rng;
  for (const int32_t n : {1, 255, 1031}) {
    for (const int32_t local : {1000000, 100}) {
      std::vector<Scene> scenes;
      scenes.push_back(Make(rng, cuda::RowType::kF16, 128, 4, n, 0, local, 0));
      Run(scenes, cuda::RowType::kF16, 128, 4, n);
      Check(scenes[0], cuda::RowType::kF16, 128, 4);
    }
  }
}

// Warps take tiles of 16 in turn, a few of them ahead: ends before, at and after a tile, a round of warps, and a round of the ring.
TEST_F(AttendCudaTest, EndsAnywhereInARing) {
  SeededRng rng;
  for (const int32_t d : CudaHeadDims()) {
    std::vector<Scene> scenes;
    for (const int32_t edge : {32, 64, 128, 192, 256, 384, 768}) {
      for (const int32_t size : {edge - 1, edge, edge + 1}) scenes.push_back(Make(rng, cuda::RowType::kF16, d, 2, size, 0, size / 2, size - size / 2));
    }
    for (const int32_t max_rows : {0, 2000}) {
      Run(scenes, cuda::RowType::kF16, d, 2, max_rows);
      SCOPED_TRACE(testing::Message() << "head_dim " << d << ", max_rows " << max_rows);
      for (const Scene& s : scenes) Check(s, cuda::RowType::kF16, d, 2);
    }
  }
}

// How tasks are laid on multiprocessors depends on their number: split or whole, one block or two on each.
TEST_F(AttendCudaTest, AnyNumberOfTasks) {
  SeededRng rng;
  for (const int32_t tasks : {1, 20, 70, 140, 300}) {
    for (const int32_t group : {2, 6}) {
      SCOPED_TRACE(testing::Message() << tasks << " tasks, group " << group);
      std::vector<Scene> scenes;
      for (int32_t i = 0; i < tasks; ++i) {
        const int32_t size = std::vector<int32_t>{300, 0, 1, 33, 150}[static_cast<size_t>(i % 5)];
        scenes.push_back(Make(rng, cuda::RowType::kF16, 64, group, size, 0, size / 3, size - size / 3));
      }
      Run(scenes, cuda::RowType::kF16, 64, group, 300);
      for (const Scene& s : scenes) Check(s, cuda::RowType::kF16, 64, group);
    }
  }
}

TEST_F(AttendCudaTest, WhatLiesBeyondTheLastKeyHasNoPart) {
  SeededRng rng;
  for (const int32_t n : {1, 5, 17, 63, 200}) {
    Scene s = Make(rng, cuda::RowType::kF16, 128, 4, n, 0, n, 0);
    const size_t end = 2 * 128 * static_cast<size_t>(s.ring_row + n);
    for (size_t i = 0; i < s.rows.size(); ++i) {
      if (i >= end || i < 2 * 128 * static_cast<size_t>(s.ring_row)) s.rows[i] = 0x7e00;
    }
    s.device_rows.Write(s.rows);
    std::vector<Scene> scenes;
    scenes.push_back(std::move(s));
    Run(scenes, cuda::RowType::kF16, 128, 4, n);
    Check(scenes[0], cuda::RowType::kF16, 128, 4);
  }
}

TEST_F(AttendCudaTest, RowsOfPinnedMemoryAloneAndOneAmongOthers) {
  SeededRng rng;
  for (const cuda::RowType type : kRowTypes) {
    std::vector<Scene> scenes;
    for (const int32_t chosen : {1, 16, 100, 700}) {
      for (const int32_t period : {1, 16, 61}) {
        Scene s = Make(rng, type, 128, 4, 0, 0, 0, chosen);
        s.runs.clear();
        for (int32_t i = 0; i < chosen; ++i) {
          const bool host = i % period == 0;
          s.refs[static_cast<size_t>(i)] = static_cast<int32_t>(host ? ~rng.Int(0, kHostRows - 1) : rng.Int(0, kSlots - 1));
          const int32_t ref = s.refs[static_cast<size_t>(i)];
          s.runs.push_back({host ? s.host_rows.data() + int64_t{256} * ~ref : s.rows.data() + int64_t{256} * ref, 1});
        }
        s.device_refs.Write(s.refs);
        KeepSome(rng, type, 128, &s);
        scenes.push_back(std::move(s));
      }
    }
    Run(scenes, type, 128, 4, 700);
    for (const Scene& s : scenes) Check(s, type, 128, 4);
  }
}

TEST_F(AttendCudaTest, NothingToAttendToIsZeroAndMinusInfinity) {
  SeededRng rng;
  std::vector<Scene> scenes;
  scenes.push_back(Make(rng, cuda::RowType::kF16, 64, 3, 0, 0, 0, 0));
  for (const int32_t max_rows : {0, 100000}) {
    Run(scenes, cuda::RowType::kF16, 64, 3, max_rows);
    EXPECT_EQ(scenes[0].out.Read(), std::vector<float>(3 * 64, 0.0f));
    EXPECT_EQ(scenes[0].lse.Read(), std::vector<float>(3, -kInfinity));
  }
}

TEST_F(AttendCudaTest, LogitsOfAnySizeKeepTheirWeights) {
  SeededRng rng;
  for (const float scale : {1e-6f, 1e-3f, 30.0f, 1000.0f}) {
    Scene s = Make(rng, cuda::RowType::kF16, 128, 8, 300, 0, 300, 0);
    for (float& x : s.q) x *= scale;
    s.device_q.Write(s.q);
    std::vector<Scene> scenes;
    scenes.push_back(std::move(s));
    Run(scenes, cuda::RowType::kF16, 128, 8, 300);
    std::vector<float> lse(8), out(8 * 128);
    const AttendTask tasks[] = {{.q = scenes[0].q.data(), .runs = scenes[0].runs, .out = out.data(), .lse = lse.data()}};
    ASSERT_OK(ReferenceKernels().attend({.tasks = tasks, .group = 8, .head_dim = 128}, {}));
    // An error of 2^-21 of logits of size 10 * scale.
    const double allowed = 2e-5 * std::max(1.0, static_cast<double>(scale));
    EXPECT_TRUE(AllClose(scenes[0].lse.Read(), lse, {.absolute = allowed, .relative = 1e-5})) << scale;
    EXPECT_TRUE(AllClose(scenes[0].out.Read(), out, {.absolute = allowed, .relative = allowed}, {8, 128})) << scale;
  }
}

TEST_F(AttendCudaTest, WhatIsNoRowOrNoNumberIsNeverAnAnswer) {
  SeededRng rng;
  const auto all_nan = [](const std::vector<float>& values) {
    return std::all_of(values.begin(), values.end(), [](float x) { return std::isnan(x); });
  };
  for (const int32_t bad : {100000, ~100000, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    for (const size_t at : {size_t{0}, size_t{7}, size_t{15}, size_t{29}, size_t{16}, size_t{500}}) {
      const int32_t chosen = at < 30 ? 30 : 501, group = at < 16 ? 4 : 5;
      std::vector<Scene> scenes;
      scenes.push_back(Make(rng, cuda::RowType::kF16, 128, group, 200, 4, 50, chosen));
      scenes.push_back(Make(rng, cuda::RowType::kF16, 128, group, 200, 4, 50, chosen));
      scenes[0].refs[at] = bad;
      scenes[0].device_refs.Write(scenes[0].refs);
      Run(scenes, cuda::RowType::kF16, 128, group, 84);
      EXPECT_TRUE(all_nan(scenes[0].out.Read()) && all_nan(scenes[0].lse.Read())) << bad << " at " << at;
      Check(scenes[1], cuda::RowType::kF16, 128, group);
    }
  }
  for (const Half key : {Half{0x7c00}, Half{0xfc00}, Half{0x7e00}}) {
    for (const float q : {1.3f, -1.3f, 0.0f}) {  // the logit is then infinite of either sign, or NaN
      std::vector<Scene> scenes;
      scenes.push_back(Make(rng, cuda::RowType::kF16, 64, 2, 20, 0, 20, 0));
      scenes[0].rows[static_cast<size_t>(2 * 64 * (scenes[0].ring_row + 13 % scenes[0].ring_rows) + 5)] = key;
      scenes[0].device_rows.Write(scenes[0].rows);
      scenes[0].q[5] = scenes[0].q[64 + 5] = q;
      scenes[0].device_q.Write(scenes[0].q);
      Run(scenes, cuda::RowType::kF16, 64, 2, 20);
      EXPECT_TRUE(all_nan(scenes[0].out.Read()) && all_nan(scenes[0].lse.Read())) << key << ", " << q;
    }
  }
  std::vector<Scene> scenes;
  scenes.push_back(Make(rng, cuda::RowType::kF16, 64, 2, 20, 0, 20, 0));
  for (const int32_t count : {-1, 1}) {
    scenes[0].num_refs.Write({count});
    Run(scenes, cuda::RowType::kF16, 64, 2, 20);
    EXPECT_TRUE(all_nan(scenes[0].out.Read())) << count;
  }
}

TEST_F(AttendCudaTest, AGraphFollowsTheLengthBehindThePointer) {
  SeededRng rng;
  constexpr int32_t kDim = 128, kGroup = 4;
  Scene s = Make(rng, cuda::RowType::kF16, kDim, kGroup, 700, 0, 700, 0);
  const CudaArray<cuda::AttendTask> task(std::vector<cuda::AttendTask>{TaskOf(s, kDim)});
  cuda::AttendParams params{.tasks = task.data(), .num_tasks = 1, .max_rows = 700, .group = kGroup, .head_dim = kDim};
  const auto workspace = Workspace(cuda::AttendWorkspaceBytes(params));
  params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t run = nullptr;
  ASSERT_OK(CudaStatus(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), "begin"));
  ASSERT_OK(cuda::Attend(params, stream()));
  ASSERT_OK(CudaStatus(cudaStreamEndCapture(stream(), &graph), "end"));
  ASSERT_OK(CudaStatus(cudaGraphInstantiate(&run, graph, 0), "instantiate"));
  for (const int32_t n : {700, 1, 333}) {
    s.device_n.Write({n});
    s.runs.clear();
    for (int32_t p = 0; p < n; ++p) s.runs.push_back({s.rows.data() + int64_t{2} * kDim * (s.ring_row + p % s.ring_rows), 1});
    for (int repeat = 0; repeat < 2; ++repeat) {
      ASSERT_OK(CudaStatus(cudaGraphLaunch(run, stream()), "launch"));
      ASSERT_OK(Wait());
      Check(s, cuda::RowType::kF16, kDim, kGroup);
    }
  }
  EXPECT_OK(CudaStatus(cudaGraphExecDestroy(run), "destroy"));
  EXPECT_OK(CudaStatus(cudaGraphDestroy(graph), "destroy"));
}

TEST_F(AttendCudaTest, RefusesShapesNamingThem) {
  cuda::AttendParams params{.num_tasks = 0, .group = 4, .head_dim = 80};
  EXPECT_STATUS(StatusCode::kUnsupported, "head_dim=80", cuda::Attend(params, stream()));
  params.head_dim = 128, params.group = 0;
  EXPECT_STATUS(StatusCode::kUnsupported, "group=0", cuda::Attend(params, stream()));
  params.group = 4, params.num_tasks = -1;
  EXPECT_STATUS(StatusCode::kInvalid, "num_tasks=-1", cuda::Attend(params, stream()));
  params.num_tasks = 1;
  EXPECT_STATUS(StatusCode::kInvalid, "tasks is null", cuda::Attend(params, stream()));
  params.num_tasks = 0;
  EXPECT_OK(cuda::Attend(params, stream()));
}

}  // namespace
}  // namespace prehoc
