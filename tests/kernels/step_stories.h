// What every backend of the step kernels must do, told once (story_world.h says what WORLD brings). Expectations are made here, from
// the rows, sets and maps of each story, not from another backend.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/row_codec.h"
#include "kernels/step_kernels.h"
#include "tests/kernels/choose_model.h"
#include "tests/kernels/kernel_test_util.h"
#include "tests/kernels/residency_stories.h"
#include "tests/kernels/story_world.h"

namespace prehoc {

// Tokens come in calls of random size: ring, codes and host memory have what was appended, and nothing else.
template <class World>
void AppendFillsRingCodesAndHostMemory(World world) {
  SeededRng rng;
  constexpr int32_t kTokens = 300, kMaxCount = 70, kRing = 192, kRow = 2 * kStoryDim;
  const CodeFormat format{4, 64, false};
  const std::vector<Half> rows = MakeRows(rng, kTokens, kStoryDim);
  const StoryChunks chunks(rng, kTokens, 0.3);
  std::vector<float> k, v;
  for (size_t i = 0; i < rows.size(); ++i) (i % kRow < kStoryDim ? k : v).push_back(HalfToFloat(rows[i]));
  const Of<World, float> keys(k), values(v);
  const Of<World, int32_t> chunk_row(chunks.first_row);
  const size_t block_bytes = LayoutOf(format, kStoryDim).bytes;
  Of<World, Half> ring(size_t{kRing} * kRow), host(static_cast<size_t>(chunks.rows()) * kRow);
  Of<World, std::byte> blocks(kTokens / 64 * block_bytes);
  Of<World, int32_t> first(1);
  Of<World, step::AppendTask> task(1);
  std::vector<Half> want_host = host.Read();
  const int32_t host_limit = chunks.rows() - 100;  // rows behind it are not touched
  for (int32_t at = 0; at < kTokens;) {
    const auto count = static_cast<int32_t>(std::min<int64_t>(rng.Chance(0.5) ? 1 : rng.Int(0, kMaxCount), kTokens - at));
    first.Write({at});
    task.Write({{.k = keys.data() + int64_t{at} * kStoryDim, .v = values.data() + int64_t{at} * kStoryDim, .stride = kStoryDim, .first = first.data(),
                 .rows = ring.data(), .ring_rows = kRing, .count = count, .blocks = blocks.data(), .host_rows = host.data(),
                 .host_limit = host_limit, .host = chunks.Table(chunk_row.data())}});
    world.Run(world.kernels().append({.tasks = task.data(), .num_tasks = 1, .max_count = kMaxCount, .format = format, .head_dim = kStoryDim},
                                     world.stream()));
    at += count;
  }
  std::vector<Half> want_ring(ring.size());
  std::vector<std::byte> want_blocks(blocks.size());
  std::vector<EncodeTask> encode;
  for (int32_t p = 0; p < kTokens; ++p) {
    const Half* row = rows.data() + int64_t{p} * kRow;
    if (p >= kTokens - kRing) std::copy_n(row, kRow, want_ring.begin() + p % kRing * kRow);
    if (chunks.Has(p) && chunks.RowOf(p) < host_limit) std::copy_n(row, kRow, want_host.begin() + int64_t{chunks.RowOf(p)} * kRow);
    if ((p + 1) % 64 == 0) encode.push_back({.rows = row - 63 * kRow, .block = want_blocks.data() + static_cast<size_t>(p / 64) * block_bytes});
  }
  ASSERT_OK(ReferenceKernels().encode({.tasks = encode, .format = format, .head_dim = kStoryDim}, {}));
  EXPECT_TRUE(AllEqual(ring.Read(), want_ring, {kRing, 2, kStoryDim}));
  EXPECT_TRUE(AllEqual(host.Read(), want_host, {chunks.rows(), 2, kStoryDim})) << "host memory";
  EXPECT_EQ(blocks.Read(), want_blocks);
  EXPECT_TRUE(ring.GuardsIntact() && host.GuardsIntact() && blocks.GuardsIntact());

  first.Write({5});
  world.Run(world.kernels().append({.tasks = task.data(), .num_tasks = 1, .max_count = 0, .format = format, .head_dim = kStoryDim}, world.stream()));
  EXPECT_TRUE(AllEqual(ring.Read(), want_ring, {kRing, 2, kStoryDim})) << "more than max_count appends nothing";
}

template <class World>
void GateHoldsNearItsAnchorUntilTooOld(World world) {
  SeededRng rng;
  constexpr int32_t kGroup = 3;
  const std::vector<float> anchor = rng.Normals(kGroup * kStoryDim);
  std::vector<float> q = anchor, far = anchor;
  for (float& x : q) x = 2 * x + 0.01f;
  for (int32_t c = 0; c < kStoryDim; ++c) far[static_cast<size_t>(kStoryDim + c)] *= -1;  // one head of three
  const Of<World, float> anchors(anchor), near_q(q), far_q(far);
  Of<World, float> cosine(3);
  Of<World, uint8_t> hold(3);
  const Of<World, int32_t> age(std::vector<int32_t>{6, 7, 0});
  const Of<World, step::GateTask> tasks(std::vector<step::GateTask>{
      {.q = near_q.data(), .anchor = anchors.data(), .cosine = cosine.data(), .hold = hold.data(), .age = age.data()},
      {.q = near_q.data(), .anchor = anchors.data(), .cosine = cosine.data() + 1, .hold = hold.data() + 1, .age = age.data() + 1},
      {.q = far_q.data(), .anchor = anchors.data(), .cosine = cosine.data() + 2, .hold = hold.data() + 2}});
  world.Run(world.kernels().gate({.tasks = tasks.data(), .num_tasks = 3, .group = kGroup, .head_dim = kStoryDim, .tau = 0.8f, .max_age = 7},
                                 world.stream()));
  EXPECT_GT(cosine.Read()[0], 0.99f);
  EXPECT_NEAR(cosine.Read()[2], -1, 1e-6);
  EXPECT_EQ(hold.Read(), (std::vector<uint8_t>{1, 0, 0})) << "near and young, too old, turned away";
  EXPECT_TRUE(hold.GuardsIntact() && cosine.GuardsIntact());
}

// One head's rows: codes of all whole groups, and the others in a ring.
template <class World>
struct StoryCodes {
  StoryCodes(Rng& rng, int32_t positions, int32_t group, CodeFormat the_format)
      : n(positions), format(the_format), q(rng.Normals(static_cast<size_t>(group * kStoryDim))),
        groups(positions / format.group_tokens), host_blocks(static_cast<size_t>(groups) * LayoutOf(format, kStoryDim).bytes) {
    for (const float x : rng.Normals(static_cast<size_t>(n) * 2 * kStoryDim)) rows.push_back(FloatToHalf(x));
    const size_t bytes = LayoutOf(format, kStoryDim).bytes;
    std::vector<EncodeTask> tasks;
    for (int32_t g = 0; g < groups; ++g) {
      tasks.push_back({.rows = rows.data() + int64_t{2} * g * format.group_tokens * kStoryDim,
                       .block = host_blocks.data() + static_cast<size_t>(g) * bytes});
    }
    EXPECT_OK(ReferenceKernels().encode({.tasks = tasks, .format = format, .head_dim = kStoryDim}, {}));
    std::vector<Half> in_ring(static_cast<size_t>(ring_rows() * 2 * kStoryDim), 0x7e00);  // NaN where nothing is to be read
    for (int32_t p = groups * format.group_tokens; p < n; ++p) {
      std::copy_n(rows.begin() + int64_t{2} * p * kStoryDim, 2 * kStoryDim, in_ring.begin() + int64_t{2} * (p % ring_rows()) * kStoryDim);
    }
    ring = Array<Half>(in_ring), blocks = Array<std::byte>(host_blocks), query = Array<float>(q), length = Array<int32_t>(std::vector<int32_t>{n});
  }
  int32_t ring_rows() const { return 2 * format.group_tokens; }
  step::ScanSource Source() const {
    return {.q = query.data(), .blocks = blocks.data(), .rows = ring.data(), .ring_rows = ring_rows(), .n = length.data()};
  }
  // As the reference has them from the codes; exact behind them. [group, n]
  std::vector<float> Logits(int32_t group) const {
    std::vector<float> z(static_cast<size_t>(group) * static_cast<size_t>(n));
    const ScanTask scan[] = {{.q = q.data(), .blocks = host_blocks.data(), .groups = groups, .z = z.data(), .z_stride = n}};
    EXPECT_OK(ReferenceKernels().scan({.tasks = scan, .format = format, .group = group, .head_dim = kStoryDim}, {}));
    for (int32_t h = 0; h < group; ++h) {
      for (int32_t p = groups * format.group_tokens; p < n; ++p) {
        z[static_cast<size_t>(h) * static_cast<size_t>(n) + static_cast<size_t>(p)] =
            static_cast<float>(NaiveLogit(q.data() + int64_t{h} * kStoryDim, rows.data() + int64_t{2} * p * kStoryDim, kStoryDim));
      }
    }
    return z;
  }

  template <class T>
  using Array = Of<World, T>;
  int32_t n;
  CodeFormat format;
  std::vector<Half> rows;
  std::vector<float> q;
  int32_t groups;
  std::vector<std::byte> host_blocks;
  Array<Half> ring{0};
  Array<std::byte> blocks{0};
  Array<float> query{0};
  Array<int32_t> length{0};
};

template <class World>
struct StoryChoice {
  StoryChoice(int32_t room, int32_t group, int32_t n)
      : chosen(static_cast<size_t>(room)), count(1), lse_all(std::vector<float>(static_cast<size_t>(group), 0.5f)),
        lse_out(static_cast<size_t>(group)), pooled(std::vector<float>(static_cast<size_t>(n), -20.0f)) {}
  step::ChooseRule Into(step::ChooseRule rule) const {
    rule.room = static_cast<int32_t>(chosen.size()), rule.chosen = chosen.data(), rule.count = count.data();
    rule.lse_all = lse_all.data(), rule.lse_out = lse_out.data(), rule.pooled = pooled.data();
    return rule;
  }
  bool GuardsIntact() const {
    return chosen.GuardsIntact() && count.GuardsIntact() && lse_all.GuardsIntact() && lse_out.GuardsIntact() && pooled.GuardsIntact();
  }
  Of<World, int32_t> chosen, count;
  Of<World, float> lse_all, lse_out, pooled;
};

template <class World>
void RunSelect(World world, step::SelectParams params) {
  const auto workspace = StoryWorkspace<World>(world.kernels().select_workspace(params));
  params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  world.Run(world.kernels().select(params, world.stream()));
  EXPECT_TRUE(workspace.GuardsIntact());
}

// `chosen` are the k best of `task` as far as logits that are off by `slack` can tell, and lse and pooled scores go with them.
template <class World>
void ExpectChoice(const StoryChoice<World>& got, const ChooseTask& task, int32_t group, double slack) {
  const ChooseModel model = RunChooseModel(task, group);
  ASSERT_EQ(got.count.Read()[0], static_cast<int32_t>(model.chosen.size()));
  std::vector<int32_t> chosen = got.chosen.Read();
  chosen.resize(model.chosen.size());
  EXPECT_TRUE(std::is_sorted(chosen.begin(), chosen.end()) && std::adjacent_find(chosen.begin(), chosen.end()) == chosen.end());
  double least = std::numeric_limits<double>::infinity();
  for (const int32_t p : model.chosen) least = std::min(least, model.score[static_cast<size_t>(p)]);
  for (const int32_t p : chosen) {
    ASSERT_TRUE(p >= task.lo && p < task.hi) << p;
    EXPECT_GE(model.score[static_cast<size_t>(p)], least - slack) << "position " << p;
  }
  std::vector<double> outside;
  for (int32_t h = 0; h < group; ++h) outside.push_back(MassOf(task, h, chosen, false, 0));
  EXPECT_TRUE(AllClose(got.lse_all.Read(), model.lse_all, {slack})) << "lse_all";
  EXPECT_TRUE(AllClose(got.lse_out.Read(), outside, {2 * slack})) << "lse_out";
}

template <class World>
void SelectChoosesByCodesAndTheTail(World world) {
  SeededRng rng;
  constexpr int32_t kGroup = 4;
  const double slack = 0.04;  // what a device's product may add to logits of these codes
  for (const int32_t n : {1, 40, 64, 100, 700, 2010}) {
    for (const bool levels : {false, true}) {
      SCOPED_TRACE(testing::Message() << "n " << n << ", pooled " << (levels ? "above a level" : "scores"));
      const StoryCodes<World> codes(rng, n, kGroup, {4, 64, false});
      const std::vector<float> z = codes.Logits(kGroup);
      const step::ChooseRule rule{.sinks = 4, .local = 8, .window = 1500, .k = n / 10 + 1};
      StoryChoice<World> choice(rule.k, kGroup, n);
      step::ChooseRule into = choice.Into(rule);
      if (levels) into.pool_level = into.lse_all;  // the last call's
      const Of<World, step::SelectTask> task(std::vector<step::SelectTask>{{codes.Source(), into}});
      RunSelect(world, {.tasks = task.data(), .num_tasks = 1, .max_n = n, .format = codes.format, .group = kGroup, .head_dim = kStoryDim});
      const int32_t sinks = std::min(4, n), hi = std::max(sinks, n - 8), lo = std::min(hi, std::max(sinks, n - 1500));
      const ChooseTask host{.z = z.data(), .z_stride = n, .n = n, .sinks = sinks, .lo = lo, .hi = hi, .k = rule.k};
      ExpectChoice(choice, host, kGroup, slack);
      const ChooseModel model = RunChooseModel(host, kGroup);
      for (int32_t p = 0; p < n; ++p) {
        double want = levels ? -20 : model.score[static_cast<size_t>(p)];
        for (int32_t h = 0; levels && h < kGroup; ++h) want = std::max(want, static_cast<double>(z[static_cast<size_t>(h * n + p)]) - 0.5);
        ASSERT_NEAR(choice.pooled.Read()[static_cast<size_t>(p)], p >= lo && p < hi ? std::max(-20.0, want) : -20.0, slack) << "pooled " << p;
      }
      EXPECT_TRUE(choice.GuardsIntact());
    }
  }
}

template <class World>
void SelectHoldsAndRefuses(World world) {
  SeededRng rng;
  constexpr int32_t kN = 200, kGroup = 2;
  const StoryCodes<World> codes(rng, kN, kGroup, {4, 64, false});
  const Of<World, uint8_t> hold(std::vector<uint8_t>{1, 0});
  StoryChoice<World> held(10, kGroup, kN), free(10, kGroup, kN), small(9, kGroup, kN);
  const step::ChooseRule rule{.sinks = 4, .local = 8, .k = 10};
  std::vector<step::SelectTask> tasks{{codes.Source(), held.Into(rule)}, {codes.Source(), free.Into(rule)}, {codes.Source(), small.Into(rule)}};
  tasks[0].rule.hold = hold.data(), tasks[1].rule.hold = hold.data() + 1;
  const Of<World, step::SelectTask> device(tasks);
  step::SelectParams params{.tasks = device.data(), .num_tasks = 3, .max_n = kN, .format = codes.format, .group = kGroup, .head_dim = kStoryDim};
  const std::vector<int32_t> before = held.chosen.Read();
  RunSelect(world, params);
  EXPECT_EQ(held.chosen.Read(), before) << "a held choice stands";
  EXPECT_EQ(held.lse_all.Read(), std::vector<float>(kGroup, 0.5f));
  EXPECT_EQ(held.pooled.Read(), std::vector<float>(kN, -20.0f));
  EXPECT_EQ(free.count.Read()[0], 10);
  EXPECT_EQ(small.count.Read()[0], -1) << "there was no room";
  EXPECT_EQ(small.lse_all.Read(), free.lse_all.Read());
  params.max_n = kN - 1;
  RunSelect(world, params);
  EXPECT_EQ(free.count.Read()[0], -1) << "more positions than max_n";
  EXPECT_TRUE(std::isnan(free.lse_all.Read()[1]) && std::isnan(free.lse_out.Read()[1]));
  EXPECT_EQ(held.chosen.Read(), before);
  EXPECT_TRUE(held.GuardsIntact() && free.GuardsIntact() && small.GuardsIntact());
}

template <class World>
void ChooseFromLogitsDilates(World world) {
  constexpr int32_t kN = 100;
  std::vector<float> z(kN, 0.0f);
  z[50] = 9, z[20] = 8, z[70] = 7, z[3] = 99, z[97] = 99;
  const Of<World, float> logits(z);
  const Of<World, int32_t> n(std::vector<int32_t>{kN});
  StoryChoice<World> choice(9, 1, kN);
  const Of<World, step::ChooseTask> task(std::vector<step::ChooseTask>{
      {.z = logits.data(), .z_stride = kN, .n = n.data(), .rule = choice.Into({.sinks = 4, .local = 4, .k = 3, .dilate_m = 2, .dilate_r = 1})}});
  step::ChooseParams params{.tasks = task.data(), .num_tasks = 1, .max_n = kN, .group = 1, .dilate = true};
  const auto workspace = StoryWorkspace<World>(world.kernels().choose_workspace(params));
  params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  world.Run(world.kernels().choose(params, world.stream()));
  std::vector<int32_t> chosen = choice.chosen.Read();
  ASSERT_EQ(choice.count.Read()[0], 7);
  chosen.resize(7);
  EXPECT_EQ(chosen, (std::vector<int32_t>{19, 20, 21, 49, 50, 51, 70}));
  EXPECT_TRUE(choice.GuardsIntact());
}

// Sinks, chosen rows of slots and of the host, and the window in a ring: softmax over all of them; NaN where one does not exist.
template <class World>
void AttendSeesRowsOfBothMemories(World world) {
  SeededRng rng;
  constexpr int32_t kRows = 100, kHost = 50, kGroup = 3, kN = 37, kSinks = 4, kLocal = 10, kRing = 16, kRingRow = 60, kSinkRow = 2;
  std::vector<Half> rows = MakeRows(rng, kRows + kHost, kStoryDim);
  const size_t device_halves = size_t{kRows} * 2 * kStoryDim;
  Of<World, Half> device(std::vector<Half>(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(device_halves))),
      host(std::vector<Half>(rows.begin() + static_cast<std::ptrdiff_t>(device_halves), rows.end()), World::kHostMemory);
  const std::vector<float> query = rng.Normals(kGroup * kStoryDim);
  const Of<World, float> q(query);
  Of<World, float> out(query.size()), lse(kGroup);
  Of<World, int32_t> n(std::vector<int32_t>{kN}), num(1), refs(4);
  Of<World, step::AttendTask> task(std::vector<step::AttendTask>{
      {.q = q.data(), .out = out.data(), .lse = lse.data(), .rows = device.data(), .row_limit = kRows, .sink_row = kSinkRow, .ring_row = kRingRow,
       .ring_rows = kRing, .sinks = kSinks, .local = kLocal, .n = n.data(), .refs = refs.data(), .num_refs = num.data(), .refs_room = 4,
       .host_rows = host.data(), .host_limit = kHost}});
  const auto attend = [&] {
    step::AttendParams params{.tasks = task.data(), .num_tasks = 1, .max_rows = 20, .group = kGroup, .head_dim = kStoryDim};
    const auto workspace = StoryWorkspace<World>(world.kernels().attend_workspace(params));
    params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
    world.Run(world.kernels().attend(params, world.stream()));
    EXPECT_TRUE(out.GuardsIntact() && lse.GuardsIntact() && workspace.GuardsIntact());
  };
  const auto expect = [&](const std::vector<int32_t>& attended, const char* what) {
    for (int32_t h = 0; h < kGroup; ++h) {
      std::vector<double> z, want(kStoryDim, 0);
      for (const int32_t r : attended) z.push_back(NaiveLogit(query.data() + h * kStoryDim, rows.data() + int64_t{2} * r * kStoryDim, kStoryDim));
      const double all = NaiveLse(z);
      for (size_t i = 0; i < z.size(); ++i) {
        for (int32_t c = 0; c < kStoryDim; ++c) {
          want[static_cast<size_t>(c)] += std::exp(z[i] - all) * HalfToFloat(rows[static_cast<size_t>((2 * attended[i] + 1) * kStoryDim + c)]);
        }
      }
      EXPECT_NEAR(lse.Read()[static_cast<size_t>(h)], all, 1e-4 * (1 + std::abs(all))) << what << ", head " << h;
      const std::vector<float> got = out.Read();
      const std::vector<float> of_head(got.begin() + h * kStoryDim, got.begin() + (h + 1) * kStoryDim);
      EXPECT_TRUE(AllClose(of_head, want, {1e-3, 1e-3})) << what << ", head " << h;
    }
  };
  const auto expect_nan = [&](const char* what) {
    for (const float x : out.Read()) ASSERT_TRUE(std::isnan(x)) << what;
    for (const float x : lse.Read()) ASSERT_TRUE(std::isnan(x)) << what;
  };
  std::vector<int32_t> kept;
  for (int32_t p = 0; p < kSinks; ++p) kept.push_back(kSinkRow + p);
  for (int32_t p = kN - kLocal; p < kN; ++p) kept.push_back(kRingRow + p % kRing);
  refs.Write({90, ~7, ~49, 91}), num.Write({4});
  attend();
  std::vector<int32_t> all = kept;
  all.insert(all.end(), {90, kRows + 7, kRows + 49, 91});
  expect(all, "all kinds of rows");
  num.Write({0});
  attend();
  expect(kept, "nothing chosen");
  for (const int32_t ref : {kRows, ~kHost, kNoRow, std::numeric_limits<int32_t>::min()}) {
    refs.Write({90, ref, 91, 92}), num.Write({1});
    attend();
    kept.push_back(90), expect(kept, "refs behind the count are not looked at"), kept.pop_back();
    num.Write({2});
    attend();
    expect_nan("a row that does not exist");
  }
  refs.Write({90, 91, 92, 93});
  for (const int32_t count : {-1, 5}) {
    num.Write({count});
    attend();
    expect_nan("a number of refs that is none");
  }
  num.Write({1});
  rows[size_t{90} * 2 * kStoryDim + 3] = 0xfc00;
  device.Write(std::vector<Half>(rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(device_halves)));
  attend();
  expect_nan("a key that is not finite");
  n.Write({0}), num.Write({0});
  attend();
  EXPECT_EQ(out.Read(), std::vector<float>(query.size(), 0.0f)) << "no row at all";
  EXPECT_EQ(lse.Read()[0], -std::numeric_limits<float>::infinity());
}

// Rows of 8 bits in host memory: append writes them, gather and attend take them for the fp16 rows that they stand for, which the ring has.
template <class World>
void HostRowsOfOtherFormatsAreTheRowsOfTheDevice(World world) {
  SeededRng rng;
  constexpr int32_t kTokens = 100, kRing = 192, kGroup = 3, kRow = 2 * kStoryDim;
  const CodeFormat format{4, 64, false};
  for (const RowFormat rows_of : {RowFormat::kInt8, RowFormat::kE4m3}) {
    const std::string name(RowFormatName(rows_of));
    const size_t bytes = RowBytes(rows_of, kStoryDim);
    const StoryChunks chunks(rng, kTokens, 0);
    std::vector<Half> want(size_t{kTokens} * kRow);
    std::vector<std::byte> want_host(static_cast<size_t>(chunks.rows()) * bytes);
    std::vector<float> k, v;
    for (int32_t p = 0; p < kTokens; ++p) {
      std::vector<Half> row;
      for (const float x : rng.Normals(kRow)) row.push_back(FloatToHalf(x));
      for (int32_t c = 0; c < kRow; ++c) (c < kStoryDim ? k : v).push_back(HalfToFloat(row[static_cast<size_t>(c)]));
      std::byte* const stored = want_host.data() + static_cast<size_t>(chunks.RowOf(p)) * bytes;
      NarrowRow(row.data(), rows_of, kStoryDim, stored);
      WidenRow(stored, rows_of, kStoryDim, want.data() + int64_t{p} * kRow);
    }
    const Of<World, float> keys(k), values(v);
    const Of<World, int32_t> chunk_row(chunks.first_row);
    Of<World, Half> ring(size_t{kRing} * kRow);
    Of<World, std::byte> host(want_host.size(), World::kHostMemory), blocks(LayoutOf(format, kStoryDim).bytes);
    const Of<World, int32_t> first(std::vector<int32_t>{0});
    const Of<World, step::AppendTask> append(std::vector<step::AppendTask>{
        {.k = keys.data(), .v = values.data(), .stride = kStoryDim, .first = first.data(), .rows = ring.data(), .ring_rows = kRing, .count = kTokens,
         .blocks = blocks.data(), .host_rows = host.data(), .host_limit = chunks.rows(), .host = chunks.Table(chunk_row.data())}});
    world.Run(world.kernels().append({.tasks = append.data(), .num_tasks = 1, .max_count = kTokens, .format = format, .head_dim = kStoryDim,
                                      .host_format = rows_of}, world.stream()));
    const std::vector<Half> in_ring = ring.Read();
    EXPECT_TRUE(AllEqual(std::span(in_ring).first(want.size()), want, {kTokens, 2, kStoryDim})) << name;
    const std::vector<std::byte> written = host.Read();
    for (int32_t p = 0; p < kTokens; ++p) {
      const auto at = static_cast<std::ptrdiff_t>(static_cast<size_t>(chunks.RowOf(p)) * bytes);
      ASSERT_TRUE(std::equal(written.begin() + at, written.begin() + at + static_cast<std::ptrdiff_t>(bytes), want_host.begin() + at)) << name << ", position " << p;
    }
    std::vector<std::byte> want_block(blocks.size());
    const EncodeTask encode[] = {{.rows = want.data(), .block = want_block.data()}};
    ASSERT_OK(ReferenceKernels().encode({.tasks = encode, .format = format, .head_dim = kStoryDim}, {}));
    EXPECT_EQ(blocks.Read(), want_block) << name << ": codes of what the rows stand for";

    // To slots.
    constexpr int32_t kSlots = 40;
    std::vector<int32_t> from, to;
    std::vector<Half> slots_want(size_t{kSlots} * kRow);
    for (int32_t i = 0; i < kSlots; ++i) {
      const auto p = static_cast<int32_t>(rng.Int(0, kTokens - 1));
      from.push_back(chunks.RowOf(p)), to.push_back(kSlots - 1 - i);
      std::copy_n(want.begin() + int64_t{p} * kRow, kRow, slots_want.begin() + int64_t{kSlots - 1 - i} * kRow);
    }
    Of<World, Half> slots(slots_want.size());
    const Of<World, int32_t> from_piece(from), to_piece(to), count(std::vector<int32_t>{kSlots});
    const Of<World, step::GatherTask> gather(std::vector<step::GatherTask>{
        {.from = host.data(), .to = reinterpret_cast<std::byte*>(slots.data()), .from_piece = from_piece.data(), .to_piece = to_piece.data(),
         .count = count.data(), .from_limit = chunks.rows(), .to_limit = kSlots}});
    world.Run(world.kernels().gather({.tasks = gather.data(), .num_tasks = 1, .piece_bytes = static_cast<int32_t>(bytes), .rows = rows_of,
                                      .head_dim = kStoryDim}, world.stream()));
    EXPECT_TRUE(AllEqual(slots.Read(), slots_want, {kSlots, 2, kStoryDim})) << name;

    // Where they lie, beside rows of the device.
    const Of<World, float> q(rng.Normals(kGroup * kStoryDim));
    const Of<World, int32_t> n(std::vector<int32_t>{kTokens}), num(std::vector<int32_t>{3});
    std::vector<float> out[2];
    for (const bool stored : {false, true}) {
      std::vector<int32_t> refs;
      for (const int32_t p : {40, 41, 77}) refs.push_back(stored ? ~chunks.RowOf(p) : p);
      refs.push_back(0);
      const Of<World, int32_t> ref(refs);
      Of<World, float> got(q.size());
      const Of<World, step::AttendTask> attend(std::vector<step::AttendTask>{
          {.q = q.data(), .out = got.data(), .rows = ring.data(), .row_limit = kTokens, .ring_rows = kRing, .sinks = 4, .local = 10, .n = n.data(),
           .refs = ref.data(), .num_refs = num.data(), .refs_room = 3, .host_rows = host.data(), .host_limit = chunks.rows()}});
      step::AttendParams params{.tasks = attend.data(), .num_tasks = 1, .max_rows = 20, .host_format = rows_of, .group = kGroup, .head_dim = kStoryDim};
      const auto workspace = StoryWorkspace<World>(world.kernels().attend_workspace(params));
      params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
      world.Run(world.kernels().attend(params, world.stream()));
      out[stored] = got.Read();
    }
    EXPECT_EQ(out[1], out[0]) << name;
    EXPECT_TRUE(std::all_of(out[0].begin(), out[0].end(), [](float x) { return std::isfinite(x); }));
  }
}

template <class World>
void GatherCopiesAndRefuses(World world) {
  constexpr int32_t kPiece = 48;
  std::vector<std::byte> source(10 * kPiece);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 7 % 251);
  const Of<World, std::byte> from(source, World::kHostMemory);
  Of<World, std::byte> to(size_t{5} * kPiece);
  const Of<World, int32_t> pieces(std::vector<int32_t>{9, 10, 3, -1, 2}), places(std::vector<int32_t>{0, 1, 4, 2, 5}), count(std::vector<int32_t>{5});
  Of<World, int32_t> refused(std::vector<int32_t>{100});
  const Of<World, step::GatherTask> task(std::vector<step::GatherTask>{
      {.from = from.data(), .to = to.data(), .from_piece = pieces.data(), .to_piece = places.data(), .count = count.data(), .from_limit = 10,
       .to_limit = 5, .refused = refused.data()}});
  std::vector<std::byte> want = to.Read();
  std::copy_n(source.begin() + 9 * kPiece, kPiece, want.begin());
  std::copy_n(source.begin() + 3 * kPiece, kPiece, want.begin() + 4 * kPiece);
  world.Run(world.kernels().gather({.tasks = task.data(), .num_tasks = 1, .piece_bytes = kPiece}, world.stream()));
  EXPECT_EQ(to.Read(), want);
  EXPECT_EQ(refused.Read()[0], 103);
  EXPECT_TRUE(to.GuardsIntact());
}

// Gates with append or select and resolve with select give what their own calls give, over steps in which some heads hold.
template <class World>
struct StoryUnits {
  template <class T>
  using Array = Of<World, T>;
  static constexpr int32_t kGroup = 4, kRing = 64, kSlots = 200;

  StoryUnits(const StoryCodes<World>& codes, const StoryChunks& chunks, int32_t the_tasks, int32_t k, const std::vector<int16_t>& where)
      : tasks(the_tasks), q(Floats()), anchor(std::vector<float>(q.size(), 1.0f)), hold(Tasks()), chunk_row(chunks.first_row),
        age(std::vector<int32_t>(Tasks(), 100)), num_refs(Tasks()), far(std::vector<int32_t>(Tasks(), 0)), refs(Tasks() * static_cast<size_t>(k)),
        misses(std::vector<int64_t>(Tasks(), 0)), slot_of(where), owner(std::vector<int32_t>(kSlots, -1)),
        resident(std::vector<uint64_t>(Tasks() * Words(codes.n), 0)), gates(Tasks()), selects(Tasks()), resolves(Tasks()) {
    std::vector<uint64_t> bits = resident.Read();
    for (int32_t t = 0; t < tasks; ++t) {
      for (int32_t p = 0; p < codes.n; ++p) {
        const bool in = where[static_cast<size_t>(p)] >= 0 || (p < codes.n - 1 && p >= codes.n - kRing);
        if (in) bits[static_cast<size_t>(t) * Words(codes.n) + static_cast<size_t>(p / 64)] |= uint64_t{1} << (p % 64);
      }
    }
    resident.Write(bits);
    std::vector<step::GateTask> gate;
    std::vector<step::SelectTask> select;
    std::vector<step::ResolveTask> resolve;
    for (int32_t t = 0; t < tasks; ++t) {
      const int64_t floats = int64_t{t} * kGroup * kStoryDim;
      uint64_t* const own_bits = resident.data() + static_cast<size_t>(t) * Words(codes.n);
      choices.emplace_back(k, kGroup, codes.n);
      gate.push_back({.q = q.data() + floats, .anchor = anchor.data() + floats, .hold = hold.data() + t, .age = age.data() + t});
      step::ScanSource source = codes.Source();
      source.q = q.data() + floats;
      step::ChooseRule rule = choices.back().Into({.sinks = 4, .local = 8, .k = k, .resident = own_bits, .log_theta = -12, .hold = hold.data() + t});
      rule.pool_level = rule.lse_all;
      if (t == 1) rule.room = k / 2;  // never enough: the choice is none, and so are the rows
      select.push_back({source, rule});
      resolve.push_back({.at = {slot_of.data(), owner.data(), own_bits, kSlots, codes.n}, .chosen = rule.chosen, .count = rule.count,
                         .room = rule.room, .n = codes.length.data(), .slot_row = 100, .ring_row = 20, .ring_rows = kRing, .refs = refs.data() + int64_t{t} * k,
                         .num_refs = num_refs.data() + t, .misses = misses.data() + t, .far = far.data() + t, .host = chunks.Table(chunk_row.data()),
                         .hold = hold.data() + t, .q = q.data() + floats, .anchor = anchor.data() + floats, .age = age.data() + t});
    }
    gates.Write(gate), selects.Write(select), resolves.Write(resolve);
  }
  size_t Tasks() const { return static_cast<size_t>(tasks); }
  size_t Floats() const { return Tasks() * kGroup * kStoryDim; }
  static size_t Words(int32_t n) { return static_cast<size_t>((n + 63) / 64); }
  bool GuardsIntact() const {
    return anchor.GuardsIntact() && hold.GuardsIntact() && age.GuardsIntact() && num_refs.GuardsIntact() && far.GuardsIntact() &&
           refs.GuardsIntact() && misses.GuardsIntact() && resident.GuardsIntact() &&
           std::all_of(choices.begin(), choices.end(), [](const auto& choice) { return choice.GuardsIntact(); });
  }

  int32_t tasks;
  Array<float> q, anchor;
  Array<uint8_t> hold;
  Array<int32_t> chunk_row, age, num_refs, far, refs;
  Array<int64_t> misses;
  Array<int16_t> slot_of;
  Array<int32_t> owner;
  Array<uint64_t> resident;
  Array<step::GateTask> gates;
  Array<step::SelectTask> selects;
  Array<step::ResolveTask> resolves;
  std::vector<StoryChoice<World>> choices;
};

template <class World>
void FusedStepsAreThoseOfSeparateCalls(World world) {
  struct Case {
    int32_t n, tasks, k;
    step::SelectBy by;
    bool gated;
    bool gates_within = false;
  };
  SeededRng rng;
  for (const Case& c : {Case{300, 5, 30, step::SelectBy::kAny, false}, Case{300, 5, 30, step::SelectBy::kAny, true},
                        Case{3000, 8, 150, step::SelectBy::kLogits, true}, Case{20'000, 70, 500, step::SelectBy::kBars, true},
                        Case{20'000, 70, 500, step::SelectBy::kBars, false}, Case{500, 150, 40, step::SelectBy::kLogits, true},
                        Case{17'000, 8, 300, step::SelectBy::kBars, true}, Case{400, 600, 20, step::SelectBy::kAny, true},
                        Case{900, 150, 120, step::SelectBy::kAny, false, true}, Case{700, 600, 90, step::SelectBy::kAny, true, true},
                        Case{3000, 8, 150, step::SelectBy::kAny, true, true}}) {
    const int32_t tasks = std::min(c.tasks, World::kMostTasks);
    SCOPED_TRACE(testing::Message() << "n " << c.n << ", tasks " << tasks << ", by " << static_cast<int>(c.by) << (c.gated ? ", gated" : ""));
    const StoryCodes<World> codes(rng, c.n, StoryUnits<World>::kGroup, {4, 64, false});
    const StoryChunks chunks(rng, c.n, 0.1);
    std::vector<int16_t> where(static_cast<size_t>(c.n), -1);
    for (int16_t slot = 0; slot < StoryUnits<World>::kSlots; ++slot) where[static_cast<size_t>(rng.Int(0, c.n - 1))] = slot;
    StoryUnits<World> apart(codes, chunks, tasks, c.k, where), fused(codes, chunks, tasks, c.k, where);
    const step::GateParams gate{.num_tasks = tasks, .group = StoryUnits<World>::kGroup, .head_dim = kStoryDim, .tau = 0.8f, .max_age = 3};
    const step::SelectParams select{.num_tasks = tasks, .max_n = c.n, .format = codes.format, .group = StoryUnits<World>::kGroup,
                                    .head_dim = kStoryDim, .by = c.by, .gated = c.gated};
    std::vector<float> q = rng.Normals(apart.q.size());
    size_t held = 0, asked = 0;
    for (int step = 0; step < 5; ++step) {
      const auto moved = rng.Normals(q.size());
      const size_t width = StoryUnits<World>::kGroup * kStoryDim;
      for (size_t i = 0; step > 0 && i < q.size(); ++i) q[i] = i / width % 3 == 0 ? moved[i] : q[i] + 0.1f * moved[i];  // a third turns
      apart.q.Write(q), fused.q.Write(q);
      step::GateParams gates = gate;
      step::SelectParams selects = select;
      gates.tasks = apart.gates.data(), selects.tasks = apart.selects.data();
      world.Run(world.kernels().gate(gates, world.stream()));
      RunSelect(world, selects);
      world.Run(world.kernels().resolve({.tasks = apart.resolves.data(), .num_tasks = tasks, .group = gate.group, .head_dim = kStoryDim},
                                        world.stream()));
      gates.tasks = fused.gates.data(), selects.tasks = fused.selects.data(), selects.resolves = fused.resolves.data();
      if (c.gates_within) {
        selects.gate = gates;
      } else {
        world.Run(world.kernels().append({.format = codes.format, .head_dim = kStoryDim, .gate = gates}, world.stream()));
      }
      RunSelect(world, selects);
      for (const uint8_t hold : fused.hold.Read()) held += hold, ++asked;
      ASSERT_EQ(fused.hold.Read(), apart.hold.Read()) << "step " << step;
      ASSERT_EQ(fused.num_refs.Read(), apart.num_refs.Read()) << "step " << step;
      ASSERT_EQ(fused.refs.Read(), apart.refs.Read()) << "step " << step;
      EXPECT_EQ(fused.misses.Read(), apart.misses.Read()) << "step " << step;
      EXPECT_EQ(fused.far.Read(), apart.far.Read()) << "step " << step;
      EXPECT_EQ(fused.age.Read(), apart.age.Read()) << "step " << step;
      EXPECT_EQ(fused.anchor.Read(), apart.anchor.Read()) << "step " << step;
      EXPECT_EQ(fused.resident.Read(), apart.resident.Read()) << "step " << step;
      for (size_t t = 0; t < fused.choices.size(); ++t) {
        const StoryChoice<World>&a = apart.choices[t], &b = fused.choices[t];
        ASSERT_EQ(b.count.Read(), a.count.Read()) << "step " << step << ", task " << t;
        ASSERT_EQ(b.chosen.Read(), a.chosen.Read()) << "step " << step << ", task " << t;
        ASSERT_TRUE(AllClose(b.lse_all.Read(), a.lse_all.Read(), {1e-5, 1e-6}) && AllClose(b.lse_out.Read(), a.lse_out.Read(), {1e-4, 1e-5})) << t;
        ASSERT_TRUE(AllClose(b.pooled.Read(), a.pooled.Read(), {1e-5, 1e-6})) << "step " << step << ", task " << t;
      }
    }
    EXPECT_TRUE(held > 0 && held < asked) << "all hold or none: " << held << " of " << asked;
    EXPECT_GT(apart.misses.Read()[0], 0) << "nothing was missed";
    EXPECT_GT(apart.far.Read()[0], 0) << "nothing was far";
    EXPECT_EQ(fused.num_refs.Read()[1], -1) << "no room";
    EXPECT_TRUE(fused.GuardsIntact() && apart.GuardsIntact());
  }
}

// Without slots nothing of the state need be there, and lists that are empty are left alone.
template <class World>
void AStateWithoutSlotsIsNone(World world) {
  Of<World, int32_t> n(std::vector<int32_t>{100}), count(std::vector<int32_t>{2}), refs(2), num(1), zero(std::vector<int32_t>{0}), fetched(1);
  const Of<World, int32_t> chosen(std::vector<int32_t>{10, 90});
  const Of<World, step::ResolveTask> task(std::vector<step::ResolveTask>{
      {.at = {.max_n = 100}, .chosen = chosen.data(), .count = count.data(), .room = 2, .n = n.data(), .ring_row = 7, .ring_rows = 16,
       .refs = refs.data(), .num_refs = num.data()}});
  world.Run(world.kernels().resolve({.tasks = task.data(), .num_tasks = 1, .group = 1, .head_dim = kStoryDim}, world.stream()));
  EXPECT_EQ(refs.Read(), (std::vector<int32_t>{~10, 7 + 90 % 16}));
  // Where positions are rows nothing is looked up, and a query still becomes the anchor.
  const Of<World, float> q(std::vector<float>(kStoryDim, 2.0f)), anchor(kStoryDim);
  const Of<World, int32_t> age(std::vector<int32_t>{9});
  const Of<World, step::ResolveTask> rows(std::vector<step::ResolveTask>{
      {.at = {.max_n = 100}, .chosen = chosen.data(), .count = count.data(), .room = 2, .n = n.data(), .q = q.data(), .anchor = anchor.data(), .age = age.data()}});
  world.Run(world.kernels().resolve({.tasks = rows.data(), .num_tasks = 1, .group = 1, .head_dim = kStoryDim}, world.stream()));
  EXPECT_EQ(anchor.Read(), q.Read());
  EXPECT_EQ(age.Read()[0], 0);
  const Of<World, step::RefreshTask> none(std::vector<step::RefreshTask>{{.wanted_count = zero.data(), .count = fetched.data()}});
  world.Run(world.kernels().refresh({.tasks = none.data(), .num_tasks = 1, .max_n = 100}, world.stream()));
  EXPECT_EQ(fetched.Read()[0], 0);
  world.Run(world.kernels().land({.tasks = none.data(), .num_tasks = 1, .max_n = 100}, world.stream()));
  const Of<World, step::AdoptTask> nobody(std::vector<step::AdoptTask>{{}});
  world.Run(world.kernels().adopt({.tasks = nobody.data(), .num_tasks = 1}, world.stream()));
  StoryChoice<World> choice(1, 1, 1);
  const Of<World, step::ChooseTask> nothing(std::vector<step::ChooseTask>{{.n = zero.data(), .rule = choice.Into({.sinks = 2, .k = 1})}});
  step::ChooseParams params{.num_tasks = 1, .max_n = 100, .group = 1, .rule = GroupRule::kMaxLogit};
  const auto workspace = StoryWorkspace<World>(world.kernels().choose_workspace(params));  // tasks need not be there yet
  params.tasks = nothing.data(), params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
  world.Run(world.kernels().choose(params, world.stream()));
  EXPECT_EQ(choice.count.Read()[0], 0);
  EXPECT_OK(world.kernels().select_workspace({.num_tasks = 8, .max_n = 100, .group = 1, .head_dim = kStoryDim}));
  EXPECT_OK(world.kernels().attend_workspace({.num_tasks = 8, .max_rows = 100, .group = 1, .head_dim = kStoryDim}));
}

template <class World>
void StepCallsThatAreRefused(World world) {
  const step::StepKernels& k = world.kernels();
  void* const stream = world.stream();
  EXPECT_STATUS(StatusCode::kUnsupported, "dither=1", k.append({.format = {.dither = true}, .head_dim = 64}, stream));
  EXPECT_STATUS(StatusCode::kUnsupported, "bits=6", k.append({.format = {.bits = 6}, .head_dim = 64}, stream));
  EXPECT_STATUS(StatusCode::kUnsupported, "head_dim=20", k.gate({.group = 1, .head_dim = 20}, stream));
  EXPECT_STATUS(StatusCode::kUnsupported, "group=0", k.select({.group = 0, .head_dim = 64}, stream));
  EXPECT_STATUS(StatusCode::kInvalid, "tasks is null", k.resolve({.num_tasks = 1, .group = 1, .head_dim = 64}, stream));
  EXPECT_STATUS(StatusCode::kInvalid, "max_n=-1", k.choose({.max_n = -1, .group = 1}, stream));
  EXPECT_STATUS(StatusCode::kInvalid, "num_tasks=-1", k.land({.num_tasks = -1}, stream));
  EXPECT_STATUS(StatusCode::kInvalid, "tasks is null", k.adopt({.num_tasks = 1}, stream));
  EXPECT_STATUS(StatusCode::kInvalid, "piece_bytes=24", k.gather({.piece_bytes = 24}, stream));
  EXPECT_STATUS(StatusCode::kInvalid, "max_rows=-1", k.attend({.max_rows = -1, .group = 1, .head_dim = 64}, stream));
}

// Each story as a test of SUITE, whose world() brings the backend.
#define PREHOC_STEP_STORY(SUITE, STORY) \
  TEST_F(SUITE, STORY) { STORY(world()); }
#define PREHOC_STEP_STORIES(SUITE)                              \
  PREHOC_STEP_STORY(SUITE, AppendFillsRingCodesAndHostMemory)   \
  PREHOC_STEP_STORY(SUITE, GateHoldsNearItsAnchorUntilTooOld)   \
  PREHOC_STEP_STORY(SUITE, SelectChoosesByCodesAndTheTail)      \
  PREHOC_STEP_STORY(SUITE, SelectHoldsAndRefuses)               \
  PREHOC_STEP_STORY(SUITE, ChooseFromLogitsDilates)             \
  PREHOC_STEP_STORY(SUITE, ResolveFindsEachRowWhereItIs)        \
  PREHOC_STEP_STORY(SUITE, ResidencyFollowsAModel)              \
  PREHOC_STEP_STORY(SUITE, RefreshTakesNoMoreThanThereIs)       \
  PREHOC_STEP_STORY(SUITE, RowsReadWithinAStepStay)             \
  PREHOC_STEP_STORY(SUITE, AdoptLeavesWhatHasComeAndWhatIsComing) \
  PREHOC_STEP_STORY(SUITE, AttendSeesRowsOfBothMemories)        \
  PREHOC_STEP_STORY(SUITE, GatherCopiesAndRefuses)              \
  PREHOC_STEP_STORY(SUITE, HostRowsOfOtherFormatsAreTheRowsOfTheDevice) \
  PREHOC_STEP_STORY(SUITE, FusedStepsAreThoseOfSeparateCalls)   \
  PREHOC_STEP_STORY(SUITE, AStateWithoutSlotsIsNone)            \
  PREHOC_STEP_STORY(SUITE, StepCallsThatAreRefused)

}  // namespace prehoc
