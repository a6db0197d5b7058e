// scan, choose and select: logits and bounds against exact ones, choices against the model of choose.
#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "kernels/code_block.h"
#include "tests/kernels/choose_model.h"
#include "tests/kernels/cuda/cuda_kernel_test.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Rows of one KV head with their codes, on both sides.
struct CodedRows {
  CodedRows(Rng& rng, cuda::RowType type, int32_t tokens, int32_t d, CodeFormat the_format, KeyKind kind)
      : n(tokens), dim(d), format(the_format), rows(SharedRows(rng, type, tokens, d, kind)), q({}) {
    groups = n / format.group_tokens;
    const size_t bytes = LayoutOf(format, d).bytes;
    blocks.resize(static_cast<size_t>(groups) * bytes);
    std::vector<EncodeTask> tasks;
    for (int32_t g = 0; g < groups; ++g) {
      tasks.push_back({.rows = rows.data() + int64_t{2} * g * format.group_tokens * d, .block = blocks.data() + static_cast<size_t>(g) * bytes});
    }
    EXPECT_OK(ReferenceKernels().encode({.tasks = tasks, .format = format, .head_dim = d}, {}));
    // The ring holds the last group and what follows; positions before are poison there.
    ring_rows = 2 * format.group_tokens;
    std::vector<Half> ring(static_cast<size_t>(ring_rows * 2 * d), 0x7e00);
    const std::vector<Half> stored = AsStored(type, rows);
    for (int32_t p = std::max(0, n - ring_rows); p < n; ++p) {
      std::copy_n(stored.begin() + int64_t{2} * p * d, 2 * d, ring.begin() + int64_t{2} * (p % ring_rows) * d);
    }
    device_ring = CudaArray<Half>(ring);
    device_blocks = CudaArray<std::byte>(blocks);
    device_n = CudaArray<int32_t>(std::vector<int32_t>{n});
  }
  void SetQuery(std::vector<float> values) {
    q = std::move(values);
    device_q = CudaArray<float>(q);
  }
  cuda::ScanSource Source() const {
    return {.q = device_q.data(), .blocks = device_blocks.data(), .rows = device_ring.data(), .ring_rows = ring_rows, .n = device_n.data()};
  }

  int32_t n, dim, groups, ring_rows;
  CodeFormat format;
  std::vector<Half> rows;
  std::vector<std::byte> blocks;
  std::vector<float> q;
  CudaArray<Half> device_ring{0};
  CudaArray<std::byte> device_blocks{0};
  CudaArray<int32_t> device_n{0};
  CudaArray<float> device_q{0};
};

class SelectCudaTest : public CudaKernelTest {
 protected:
  void CheckScan(const CodedRows& coded, cuda::RowType type, int32_t group, bool with_error) {
    const int64_t stride = (coded.n + 3) / 4 * 4 + 4;
    const CudaArray<float> z(static_cast<size_t>(group * stride)), err(static_cast<size_t>(group * stride));
    const CudaArray<cuda::ScanTask> task(std::vector<cuda::ScanTask>{
        {.source = coded.Source(), .z = z.data(), .err = with_error ? err.data() : nullptr, .z_stride = stride}});
    ASSERT_OK(cuda::Scan({.tasks = task.data(), .num_tasks = 1, .max_n = coded.n + 100, .format = coded.format, .type = type,
                          .group = group, .head_dim = coded.dim}, stream()));
    ASSERT_OK(Wait());
    EXPECT_TRUE(z.GuardsIntact() && err.GuardsIntact());
    std::vector<float> want_z(static_cast<size_t>(group * stride)), want_err(want_z.size());
    const ScanTask tasks[] = {{.q = coded.q.data(), .blocks = coded.blocks.data(), .groups = coded.groups, .z = want_z.data(),
                               .err = want_err.data(), .z_stride = stride}};
    ASSERT_OK(ReferenceKernels().scan({.tasks = tasks, .format = coded.format, .group = group, .head_dim = coded.dim}, {}));
    const std::vector<float> got_z = z.Read(), got_err = err.Read();
    const int32_t d = coded.dim, in_codes = coded.groups * coded.format.group_tokens;
    for (int32_t h = 0; h < group; ++h) {
      const float* q = coded.q.data() + int64_t{h} * d;
      float most = 0;
      for (int32_t c = 0; c < d; ++c) most = std::max(most, std::abs(q[c]));
      for (int32_t i = 0; i < coded.n; ++i) {
        const auto at = static_cast<size_t>(h * stride + i);
        const Half* k = coded.rows.data() + int64_t{2} * i * d;
        const double exact = NaiveLogit(q, k, d);
        const double code_error = i < in_codes ? static_cast<double>(want_err[at]) : 0;
        // What the contract adds for arithmetic, and the grain of subnormals.
        const double slack = Arithmetic(coded, q, i) + 0x1p-14 * NaiveMagnitude(q, k, d) + std::sqrt(d) * 0x1p-12 * static_cast<double>(most);
        if (i < in_codes) {
          ASSERT_NEAR(got_z[at], want_z[at], slack) << "head " << h << ", position " << i << ", exact " << exact;
        } else {
          ASSERT_NEAR(got_z[at], exact, slack) << "head " << h << ", position " << i << " (not coded)";
        }
        if (!with_error) continue;
        ASSERT_LE(std::abs(exact - static_cast<double>(got_z[at])), static_cast<double>(got_err[at])) << "head " << h << ", position " << i;
        if (coded.format.bits == 4) {
          ASSERT_LE(got_err[at], 1.02 * code_error + 4 * slack) << "head " << h << ", position " << i;
        }
      }
      for (int32_t i = coded.n; i < stride; ++i) {  // poison
        ASSERT_EQ(got_z[static_cast<size_t>(h * stride + i)], z_poison_) << i;
      }
    }
  }

  // 2^-7 SUM |q| step + 2^-14 SUM |q| (|lo| + levels step), over sqrt(d), of the block of position i; 0 if it has none.
  static double Arithmetic(const CodedRows& coded, const float* q, int32_t i) {
    const int32_t block = i / coded.format.group_tokens;
    if (block >= coded.groups) return 0;
    const CodeBlockLayout layout = LayoutOf(coded.format, coded.dim);
    const std::byte* at = coded.blocks.data() + static_cast<size_t>(block) * layout.bytes;
    const auto half = [](const std::byte* p, int32_t c) { return HalfToFloat(reinterpret_cast<const Half*>(p)[c]); };
    double steps = 0, sizes = 0;
    for (int32_t c = 0; c < coded.dim; ++c) {
      const double weight = std::abs(static_cast<double>(q[c])), step = half(at + layout.step, c);
      steps += weight * step;
      sizes += weight * (std::abs(static_cast<double>(half(at, c))) + ((1 << coded.format.bits) - 1) * step);
    }
    return (0x1p-7 * steps + 0x1p-14 * sizes) / std::sqrt(coded.dim);
  }

  struct Outcome {
    std::vector<int32_t> chosen;
    int32_t count = 0;
    std::vector<float> lse_all, lse_out, pooled;
  };
  // A rule with device arrays for its results.
  struct Results {
    Results(int32_t room, int32_t group, int32_t n)
        : chosen(static_cast<size_t>(room)), count(1), all(static_cast<size_t>(group)), out(static_cast<size_t>(group)),
          pooled(std::vector<float>(static_cast<size_t>(n), -20.0f)) {}
    cuda::ChooseRule Into(cuda::ChooseRule rule) const {
      rule.room = static_cast<int32_t>(chosen.size());
      rule.chosen = chosen.data(), rule.count = count.data(), rule.lse_all = all.data(), rule.lse_out = out.data();
      rule.pooled = pooled.data();
      return rule;
    }
    Outcome Read() const {
      EXPECT_TRUE(chosen.GuardsIntact() && count.GuardsIntact() && all.GuardsIntact() && out.GuardsIntact() && pooled.GuardsIntact());
      Outcome o{.chosen = chosen.Read(), .count = count.Read()[0], .lse_all = all.Read(), .lse_out = out.Read(), .pooled = pooled.Read()};
      EXPECT_LE(o.count, static_cast<int32_t>(o.chosen.size()));
      o.chosen.resize(static_cast<size_t>(std::max(0, o.count)));
      return o;
    }
    CudaArray<int32_t> chosen, count;
    CudaArray<float> all, out, pooled;
  };

  // As the CPU's table says it.
  static ChooseTask HostTask(const std::vector<float>& z, int32_t n, int64_t stride, const cuda::ChooseRule& rule, const uint64_t* resident,
                             GroupRule group_rule) {
    const int32_t sinks = std::min(rule.sinks, n);
    const int32_t hi = std::max(sinks, n - rule.local), lo = std::min(hi, std::max(sinks, n - rule.window));
    return {.z = z.data(), .z_stride = stride, .n = n, .sinks = sinks, .lo = lo, .hi = hi, .k = rule.k, .dilate_m = rule.dilate_m,
            .dilate_r = rule.dilate_r, .resident = resident, .log_theta = rule.log_theta, .rule = group_rule};
  }

  // `exact`: no two scores are closer than fp32 can tell, or they are equal.
  static void CheckChoice(const Outcome& got, const ChooseTask& task, int32_t group, bool exact) {
    const ChooseModel model = RunChooseModel(task, group);
    ASSERT_TRUE(std::is_sorted(got.chosen.begin(), got.chosen.end()));
    if (exact) {
      ASSERT_EQ(got.chosen, model.chosen);
    } else {
      ASSERT_EQ(got.chosen.size(), model.chosen.size());
      double least = 1e300;
      for (const int32_t p : model.chosen) least = std::min(least, model.score[static_cast<size_t>(p)]);
      for (const int32_t p : got.chosen) {
        ASSERT_GE(model.score[static_cast<size_t>(p)], least - 1e-5 * (1 + std::abs(least))) << "position " << p;
        ASSERT_TRUE(p >= task.lo && p < task.hi);
      }
      ASSERT_TRUE(std::adjacent_find(got.chosen.begin(), got.chosen.end()) == got.chosen.end()) << "chosen twice";
    }
    for (int32_t h = 0; h < group; ++h) {
      const double all = model.lse_all[static_cast<size_t>(h)], out = MassOf(task, h, got.chosen, false, 0);
      for (const auto& [value, want] : {std::pair{got.lse_all, all}, std::pair{got.lse_out, out}}) {
        const float x = value[static_cast<size_t>(h)];
        if (std::isinf(want)) {
          ASSERT_EQ(x, want);
        } else {
          ASSERT_NEAR(x, want, 1e-4 + 1e-6 * std::abs(want));
        }
      }
    }
    for (int32_t p = 0; p < task.n; ++p) {
      const double want = p >= task.lo && p < task.hi ? std::max(-20.0, model.score[static_cast<size_t>(p)]) : -20.0;
      ASSERT_NEAR(got.pooled[static_cast<size_t>(p)], want, 1e-4 + 1e-6 * std::abs(want)) << p;
    }
  }

  Outcome RunChoose(const std::vector<float>& z, int32_t n, int32_t group, cuda::ChooseRule rule, int32_t room,
                    GroupRule group_rule = GroupRule::kMaxWeight, int32_t max_n = -1) {
    const CudaArray<float> device_z(z);
    const CudaArray<int32_t> device_n(std::vector<int32_t>{n});
    const Results results(room, group, std::max(n, 0));
    const CudaArray<cuda::ChooseTask> task(std::vector<cuda::ChooseTask>{
        {.z = device_z.data(), .z_stride = n, .n = device_n.data(), .rule = results.Into(rule)}});
    cuda::ChooseParams params{.tasks = task.data(), .num_tasks = 1, .max_n = max_n < 0 ? n : max_n, .group = group, .rule = group_rule,
                              .dilate = rule.dilate_m > 0};
    const auto workspace = Workspace(cuda::ChooseWorkspaceBytes(params));
    params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
    // Twice: the workspace is left ready for the next call.
    for (int i = 0; i < 2; ++i) {
      EXPECT_OK(cuda::Choose(params, stream()));
      EXPECT_OK(Wait());
    }
    EXPECT_TRUE(workspace.GuardsIntact());
    return results.Read();
  }

  const float z_poison_ = std::bit_cast<float>(0xa5a5a5a5u);
};

TEST_F(SelectCudaTest, ScanIsCloseAndItsBoundHolds) {
  SeededRng rng;
  for (const int32_t d : CudaHeadDims()) {
    for (const int32_t bits : {2, 4, 8}) {
      for (const int32_t group_tokens : {16, 64}) {
        for (const cuda::RowType type : kRowTypes) {
          const KeyKind kind = kAllKinds[rng.Int(0, static_cast<int64_t>(std::size(kAllKinds)) - 1)];
          const int32_t group = static_cast<int32_t>(rng.Pick(std::vector<int64_t>{1, 3, 4, 8, 11}));
          const auto n = static_cast<int32_t>(rng.Pick(std::vector<int64_t>{1, 63, 64, 65, 128, 333}));
          SCOPED_TRACE(testing::Message() << NameOf(type) << ", head_dim " << d << ", bits " << bits << " over " << group_tokens
                                          << ", group " << group << ", n " << n << ", keys " << static_cast<int>(kind));
          CodedRows coded(rng, type, n, d, {bits, group_tokens, rng.Chance(0.5)}, kind);
          coded.SetQuery(rng.Normals(static_cast<size_t>(group * d), rng.Chance(0.3) ? 30 : 1));
          CheckScan(coded, type, group, true);
          CheckScan(coded, type, group, false);
        }
      }
    }
  }
}

TEST_F(SelectCudaTest, EveryKindOfKeysAtTheMainFormat) {
  SeededRng rng;
  for (const KeyKind kind : kAllKinds) {
    SCOPED_TRACE(static_cast<int>(kind));
    CodedRows coded(rng, cuda::RowType::kF16, 200, 128, {4, 64, false}, kind);
    coded.SetQuery(rng.Normals(4 * 128));
    CheckScan(coded, cuda::RowType::kF16, 4, true);
  }
}

TEST_F(SelectCudaTest, AChannelWithoutABoundIsLeftOutAndSaysSo) {
  SeededRng rng;
  CodedRows coded(rng, cuda::RowType::kF16, 128, 64, {4, 64, false}, KeyKind::kNormal);
  coded.rows[2 * 64 * 70 + 9] = 0x7c00;
  const EncodeTask encode[] = {{.rows = coded.rows.data() + 2 * 64 * 64, .block = coded.blocks.data() + LayoutOf(coded.format, 64).bytes}};
  ASSERT_OK(ReferenceKernels().encode({.tasks = encode, .format = coded.format, .head_dim = 64}, {}));
  coded.device_blocks.Write(coded.blocks);
  coded.SetQuery(rng.Normals(2 * 64));
  const CudaArray<float> z(256), err(256);
  const CudaArray<cuda::ScanTask> task(std::vector<cuda::ScanTask>{{.source = coded.Source(), .z = z.data(), .err = err.data(), .z_stride = 128}});
  ASSERT_OK(cuda::Scan({.tasks = task.data(), .num_tasks = 1, .max_n = 128, .format = coded.format, .group = 2, .head_dim = 64}, stream()));
  ASSERT_OK(Wait());
  std::vector<float> want(256);
  const ScanTask tasks[] = {{.q = coded.q.data(), .blocks = coded.blocks.data(), .groups = 2, .z = want.data(), .z_stride = 128}};
  ASSERT_OK(ReferenceKernels().scan({.tasks = tasks, .format = coded.format, .group = 2, .head_dim = 64}, {}));
  EXPECT_TRUE(AllClose(z.Read(), want, {.absolute = 1e-3}));
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(std::isinf(err.Read()[i]), i % 128 >= 64) << i;
}

TEST_F(SelectCudaTest, LengthsOutsideAreRefused) {
  SeededRng rng;
  CodedRows coded(rng, cuda::RowType::kF16, 128, 64, {4, 64, false}, KeyKind::kNormal);
  coded.SetQuery(rng.Normals(64));
  for (const int32_t n : {-1, 129}) {
    coded.device_n.Write({n});
    const CudaArray<float> z(128);
    const CudaArray<cuda::ScanTask> task(std::vector<cuda::ScanTask>{{.source = coded.Source(), .z = z.data(), .z_stride = 128}});
    ASSERT_OK(cuda::Scan({.tasks = task.data(), .num_tasks = 1, .max_n = 128, .format = coded.format, .group = 1, .head_dim = 64}, stream()));
    ASSERT_OK(Wait());
    EXPECT_TRUE(std::isnan(z.Read()[0]));
    EXPECT_EQ(z.Read()[1], z_poison_);
  }
  EXPECT_EQ(RunChoose(std::vector<float>(10), 10, 1, {.k = 2}, 2, GroupRule::kMaxWeight, 9).count, -1);
  EXPECT_EQ(RunChoose(std::vector<float>(10), 10, 1, {.k = 3}, 2).count, -1) << "no room";
  EXPECT_STATUS(StatusCode::kUnsupported, "dither=1",
                cuda::Scan({.num_tasks = 0, .format = {.dither = true}, .group = 1, .head_dim = 64}, stream()));
  EXPECT_STATUS(StatusCode::kUnsupported, "dither=1",
                cuda::Select({.num_tasks = 0, .format = {.dither = true}, .group = 1, .head_dim = 64}, stream()));
  EXPECT_STATUS(StatusCode::kUnsupported, "bits=3", cuda::Scan({.num_tasks = 0, .format = {3, 64}, .group = 1, .head_dim = 64}, stream()));
}

// Logits of a sixteenth: scores are equal or far apart, so that the model's choice is the only right one.
std::vector<float> CoarseLogits(Rng& rng, size_t count, double scale) {
  std::vector<float> z(count);
  for (float& x : z) x = static_cast<float>(std::round(16 * scale * rng.Normal()) / 16);
  return z;
}

TEST_F(SelectCudaTest, ChoosesAsTheModelOnOneHead) {
  SeededRng rng;
  for (const int32_t n : {0, 1, 2, 31, 64, 65, 511, 513, 2000, 5000}) {
    for (const double scale : {0.0, 0.02, 2.0, 60.0}) {  // all equal; a few values; usual; far below the bins
      for (int i = 0; i < 3; ++i) {
        const auto z = CoarseLogits(rng, static_cast<size_t>(n), scale);
        cuda::ChooseRule rule{.sinks = static_cast<int32_t>(rng.Int(0, 8)), .local = static_cast<int32_t>(rng.Int(0, 40)),
                              .k = static_cast<int32_t>(rng.Pick(std::vector<int64_t>{0, 1, 17, n / 3, n, n + 5}))};
        if (rng.Chance(0.3)) rule.window = static_cast<int32_t>(rng.Int(0, n));
        SCOPED_TRACE(testing::Message() << "n " << n << ", scale " << scale << ", k " << rule.k << ", sinks " << rule.sinks << ", local "
                                        << rule.local << ", window " << rule.window);
        const GroupRule group_rule = i == 2 ? GroupRule::kMaxLogit : GroupRule::kMaxWeight;
        const Outcome got = RunChoose(z, n, 1, rule, std::max(n, 1), group_rule);
        CheckChoice(got, HostTask(z, n, n, rule, nullptr, group_rule), 1, true);
      }
    }
  }
}

TEST_F(SelectCudaTest, GroupsDecideTogether) {
  SeededRng rng;
  for (const GroupRule group_rule : {GroupRule::kMaxWeight, GroupRule::kMeanWeight, GroupRule::kMaxLogit}) {
    for (const int32_t group : {2, 4, 9}) {
      for (const int32_t n : {100, 3000}) {
        const auto z = CoarseLogits(rng, static_cast<size_t>(group * n), 2);
        const cuda::ChooseRule rule{.sinks = 4, .local = 16, .k = n / 7};
        SCOPED_TRACE(testing::Message() << "rule " << static_cast<int>(group_rule) << ", group " << group << ", n " << n);
        const Outcome got = RunChoose(z, n, group, rule, n, group_rule);
        CheckChoice(got, HostTask(z, n, n, rule, nullptr, group_rule), group, group_rule == GroupRule::kMaxLogit);
      }
    }
  }
}

TEST_F(SelectCudaTest, DilationAndResidents) {
  SeededRng rng;
  for (const int32_t n : {50, 700, 4000}) {
    for (int i = 0; i < 6; ++i) {
      const auto z = CoarseLogits(rng, static_cast<size_t>(n), 2);
      std::vector<uint64_t> resident(static_cast<size_t>(n / 64 + 1));
      for (uint64_t& word : resident) word = rng.Next() & rng.Next();
      const CudaArray<uint64_t> device(resident);
      cuda::ChooseRule rule{.sinks = 4, .local = 10, .k = n / 8, .dilate_m = i % 3 == 0 ? 0 : n / 20 + 1, .dilate_r = static_cast<int32_t>(rng.Int(0, 40))};
      const bool only = i % 2 == 1;
      if (only) rule.resident = device.data(), rule.log_theta = -7.03125f;
      SCOPED_TRACE(testing::Message() << "n " << n << ", m " << rule.dilate_m << ", r " << rule.dilate_r << (only ? ", residents" : ""));
      const Outcome got = RunChoose(z, n, 1, rule, n, GroupRule::kMaxLogit);
      CheckChoice(got, HostTask(z, n, n, rule, only ? resident.data() : nullptr, GroupRule::kMaxLogit), 1, true);
    }
  }
}

TEST_F(SelectCudaTest, InfinitiesAndNan) {
  std::vector<float> z(100, 1.0f);
  z[10] = -kInfinity, z[20] = 3;
  Outcome got = RunChoose(z, 100, 1, {.k = 99}, 100);
  EXPECT_EQ(got.count, 99);
  EXPECT_TRUE(std::find(got.chosen.begin(), got.chosen.end(), 10) == got.chosen.end()) << "-inf ranks last";
  z[30] = kInfinity;
  got = RunChoose(z, 100, 1, {.k = 1}, 100);
  EXPECT_EQ(got.chosen, std::vector<int32_t>{30});
  EXPECT_EQ(got.lse_all[0], kInfinity);
  z[30] = 1, z[40] = kNan;
  got = RunChoose(z, 100, 1, {.k = 5}, 100);
  EXPECT_TRUE(std::isnan(got.lse_all[0]));
  EXPECT_TRUE(std::isnan(got.lse_out[0])) << "no finite mass is claimed beside a NaN that is not kept";
  got = RunChoose(std::vector<float>(100, -kInfinity), 100, 1, {.k = 2}, 100);
  EXPECT_EQ(got.chosen, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(got.lse_all[0], -kInfinity);
}

TEST_F(SelectCudaTest, AHeldChoiceStands) {
  const CudaArray<uint8_t> hold(std::vector<uint8_t>{1});
  const Results before(4, 1, 100);
  const std::vector<float> z(100);
  const Outcome got = RunChoose(z, 100, 1, {.k = 3, .hold = hold.data()}, 4);
  EXPECT_EQ(got.lse_all[0], z_poison_);
  EXPECT_EQ(got.pooled, std::vector<float>(100, -20.0f));
}

// The fused kernel must choose what the two kernels choose; tasks are ragged, and more than teams.
TEST_F(SelectCudaTest, SelectIsScanThenChoose) {
  SeededRng rng;
  for (const int32_t d : CudaHeadDims()) {
    for (const int32_t bits : {2, 4, 8}) {
      const cuda::RowType type = kRowTypes[rng.Int(0, 1)];
      const int32_t group = static_cast<int32_t>(rng.Pick(std::vector<int64_t>{1, 4, 10})), max_n = 3000;
      SCOPED_TRACE(testing::Message() << NameOf(type) << ", head_dim " << d << ", bits " << bits << ", group " << group);
      const CodeFormat format{bits, bits == 2 ? 16 : 64, false};
      std::vector<CodedRows> coded;
      std::vector<Results> results;
      std::vector<cuda::SelectTask> tasks;
      std::vector<cuda::ScanTask> scans;
      std::vector<CudaArray<float>> z;
      const cuda::ChooseRule rule{.sinks = 4, .local = 30, .k = 200};
      constexpr int64_t kStride = 3008;
      for (const int32_t n : {0, 1, 63, 64, 300, 1000, 2999, 3000}) {
        coded.emplace_back(rng, type, n, d, format, KeyKind::kNormal);
        coded.back().SetQuery(rng.Normals(static_cast<size_t>(group * d)));
        results.emplace_back(200, group, max_n);
        z.emplace_back(static_cast<size_t>(group * kStride));
        tasks.push_back({.source = coded.back().Source(), .rule = results.back().Into(rule)});
        scans.push_back({.source = coded.back().Source(), .z = z.back().data(), .z_stride = kStride});
      }
      const CudaArray<cuda::SelectTask> device(tasks);
      const CudaArray<cuda::ScanTask> device_scans(scans);
      const auto count = static_cast<int32_t>(tasks.size());
      cuda::SelectParams params{.tasks = device.data(), .num_tasks = count, .max_n = max_n, .format = format, .type = type, .group = group,
                                .head_dim = d};
      const auto workspace = Workspace(cuda::SelectWorkspaceBytes(params));
      params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
      ASSERT_OK(cuda::Scan({.tasks = device_scans.data(), .num_tasks = count, .max_n = max_n, .format = format, .type = type,
                            .group = group, .head_dim = d}, stream()));
      for (int i = 0; i < 2; ++i) ASSERT_OK(cuda::Select(params, stream()));
      ASSERT_OK(Wait());
      EXPECT_TRUE(workspace.GuardsIntact());
      for (size_t t = 0; t < tasks.size(); ++t) {
        SCOPED_TRACE(testing::Message() << "n " << coded[t].n);
        const std::vector<float> logits = z[t].Read();
        CheckChoice(results[t].Read(), HostTask(logits, coded[t].n, kStride, rule, nullptr, GroupRule::kMaxWeight), group, false);
      }
    }
  }
}

// More tasks than multiprocessors, and short ones: each has a small block. Ragged lengths, all rules, dilation, residents, windows; all logits equal,
// and logits that leave the bins.
TEST_F(SelectCudaTest, ManyShortTasksChooseAsTheModel) {
  SeededRng rng;
  constexpr int32_t kMaxN = 2500, kCopies = 40;  // of each length: more tasks than any device has multiprocessors
  constexpr int64_t kStride = 2504;
  struct Case {
    cuda::ChooseRule rule;
    GroupRule group_rule = GroupRule::kMaxWeight;
    int32_t group = 1;
    double scale = 1;
    bool filters = false;
  };
  const Case cases[] = {{.rule = {.sinks = 4, .local = 30, .k = 200}},
                        {.rule = {.sinks = 4, .local = 30, .k = 900}, .group_rule = GroupRule::kMaxLogit, .group = 2},
                        {.rule = {.sinks = 4, .local = 30, .k = 100}, .group_rule = GroupRule::kMeanWeight, .group = 2},
                        {.rule = {.sinks = 8, .local = 64, .k = 100, .dilate_m = 40, .dilate_r = 2}},
                        {.rule = {.sinks = 8, .local = 64, .window = 700, .k = 60}, .group = 2},
                        {.rule = {.sinks = 0, .local = 0, .k = 333, .log_theta = -6}, .filters = true},
                        {.rule = {.sinks = 4, .local = 30, .k = 200}, .scale = 0},
                        {.rule = {.sinks = 4, .local = 30, .k = 200}, .scale = 10}};
  for (const Case& c : cases) {
    const int32_t d = static_cast<int32_t>(rng.Pick(std::vector<int64_t>{64, 96, 128, 256})), bits = static_cast<int32_t>(rng.Pick(std::vector<int64_t>{2, 4, 8}));
    const cuda::RowType type = kRowTypes[rng.Int(0, 1)];
    SCOPED_TRACE(testing::Message() << "case " << &c - cases << ", " << NameOf(type) << ", head_dim " << d << ", bits " << bits);
    const CodeFormat format{bits, 64, false};
    std::vector<uint64_t> resident(kMaxN / 64 + 1);
    for (uint64_t& word : resident) word = rng.Next() & rng.Next();
    const CudaArray<uint64_t> device_resident(resident);
    std::vector<CodedRows> coded;
    std::vector<CudaArray<float>> z;
    std::vector<Results> results;
    std::vector<cuda::SelectTask> tasks;
    std::vector<cuda::ScanTask> scans;
    for (const int32_t n : {0, 1, 63, 65, 640, 2047, kMaxN}) {
      coded.emplace_back(rng, type, n, d, format, KeyKind::kNormal);
      coded.back().SetQuery(rng.Normals(static_cast<size_t>(c.group * d), c.scale));
      z.emplace_back(static_cast<size_t>(c.group * kStride));
      scans.push_back({.source = coded.back().Source(), .z = z.back().data(), .z_stride = kStride});
    }
    const int32_t room = c.rule.k * (c.rule.dilate_m > 0 ? 3 : 1);
    for (size_t t = 0; t < kCopies * coded.size(); ++t) {
      results.emplace_back(room, c.group, kMaxN);
      tasks.push_back({.source = coded[t % coded.size()].Source(), .rule = results.back().Into(c.rule)});
      if (c.filters) tasks.back().rule.resident = device_resident.data();
    }
    const CudaArray<cuda::SelectTask> device(tasks);
    const CudaArray<cuda::ScanTask> device_scans(scans);
    cuda::SelectParams params{.tasks = device.data(), .num_tasks = static_cast<int32_t>(tasks.size()), .max_n = kMaxN, .format = format, .type = type,
                              .group = c.group, .head_dim = d, .rule = c.group_rule, .dilate = c.rule.dilate_m > 0};
    const auto workspace = Workspace(cuda::SelectWorkspaceBytes(params));
    params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
    ASSERT_OK(cuda::Scan({.tasks = device_scans.data(), .num_tasks = static_cast<int32_t>(scans.size()), .max_n = kMaxN, .format = format, .type = type,
                          .group = c.group, .head_dim = d}, stream()));
    for (int i = 0; i < 2; ++i) ASSERT_OK(cuda::Select(params, stream()));
    ASSERT_OK(Wait());
    EXPECT_TRUE(workspace.GuardsIntact());
    for (size_t t = 0; t < tasks.size(); ++t) {
      SCOPED_TRACE(testing::Message() << "task " << t << ", n " << coded[t % coded.size()].n);
      const Outcome got = results[t].Read();
      if (t >= coded.size()) {
        ASSERT_EQ(got.chosen, results[t % coded.size()].Read().chosen);
        continue;
      }
      CheckChoice(got, HostTask(z[t].Read(), coded[t].n, kStride, c.rule, c.filters ? resident.data() : nullptr, c.group_rule), c.group, false);
      if (HasFatalFailure()) return;
    }
    // The same from logits in memory.
    std::vector<cuda::ChooseTask> chooses;
    for (size_t t = 0; t < tasks.size(); ++t) {
      chooses.push_back({.z = z[t % coded.size()].data(), .z_stride = kStride, .n = tasks[t].source.n, .rule = tasks[t].rule});
    }
    const CudaArray<cuda::ChooseTask> device_chooses(chooses);
    cuda::ChooseParams choose{.tasks = device_chooses.data(), .num_tasks = params.num_tasks, .max_n = kMaxN, .group = c.group, .rule = c.group_rule,
                              .dilate = params.dilate};
    const auto choose_workspace = Workspace(cuda::ChooseWorkspaceBytes(choose));
    choose.workspace = choose_workspace.data(), choose.workspace_bytes = choose_workspace.size();
    for (int i = 0; i < 2; ++i) ASSERT_OK(cuda::Choose(choose, stream()));
    ASSERT_OK(Wait());
    EXPECT_TRUE(choose_workspace.GuardsIntact());
    for (size_t t = 0; t < tasks.size(); ++t) {
      SCOPED_TRACE(testing::Message() << "choose, task " << t << ", n " << coded[t % coded.size()].n);
      CheckChoice(results[t].Read(), HostTask(z[t % coded.size()].Read(), coded[t % coded.size()].n, kStride, c.rule, c.filters ? resident.data() : nullptr,
                                              c.group_rule), c.group, false);
      if (HasFatalFailure()) return;
    }
  }
}

// More positions than shared memory holds, and more tasks than teams.
TEST_F(SelectCudaTest, LongContextsAndManyTasks) {
  SeededRng rng;
  const CodeFormat format{4, 64, false};
  for (const auto& [n, tasks_wanted] : {std::pair{200'000, 70}, std::pair{30'000, 150}, std::pair{1000, 300}}) {
    constexpr int32_t kDim = 64, kGroup = 4;
    CodedRows coded(rng, cuda::RowType::kF16, n, kDim, format, KeyKind::kNormal);
    coded.SetQuery(rng.Normals(kGroup * kDim));
    const int64_t stride = (n + 3) / 4 * 4;
    const CudaArray<float> z(static_cast<size_t>(kGroup * stride));
    const CudaArray<cuda::ScanTask> scan(std::vector<cuda::ScanTask>{{.source = coded.Source(), .z = z.data(), .z_stride = stride}});
    ASSERT_OK(cuda::Scan({.tasks = scan.data(), .num_tasks = 1, .max_n = n, .format = format, .group = kGroup, .head_dim = kDim}, stream()));
    const cuda::ChooseRule rule{.sinks = 8, .local = 32, .k = 500};
    std::vector<Results> results;
    std::vector<cuda::SelectTask> tasks;
    for (int t = 0; t < tasks_wanted; ++t) {
      results.emplace_back(500, kGroup, n);
      tasks.push_back({.source = coded.Source(), .rule = results.back().Into(rule)});
    }
    const CudaArray<cuda::SelectTask> device(tasks);
    cuda::SelectParams params{.tasks = device.data(), .num_tasks = tasks_wanted, .max_n = n, .format = format, .group = kGroup, .head_dim = kDim};
    const auto workspace = Workspace(cuda::SelectWorkspaceBytes(params));
    params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
    ASSERT_OK(cuda::Select(params, stream()));
    ASSERT_OK(Wait());
    const std::vector<float> logits = z.Read();
    CheckChoice(results.front().Read(), HostTask(logits, n, stride, rule, nullptr, GroupRule::kMaxWeight), kGroup, false);
    const Outcome first = results.front().Read();
    for (const Results& other : results) ASSERT_EQ(other.Read().chosen, first.chosen);

    // The same from logits in memory.
    std::vector<cuda::ChooseTask> chooses;
    for (int t = 0; t < tasks_wanted; ++t) {
      chooses.push_back({.z = z.data(), .z_stride = stride, .n = coded.Source().n, .rule = results[static_cast<size_t>(t)].Into(rule)});
    }
    const CudaArray<cuda::ChooseTask> device_chooses(chooses);
    cuda::ChooseParams choose{.tasks = device_chooses.data(), .num_tasks = tasks_wanted, .max_n = n, .group = kGroup};
    const auto choose_workspace = Workspace(cuda::ChooseWorkspaceBytes(choose));
    choose.workspace = choose_workspace.data(), choose.workspace_bytes = choose_workspace.size();
    ASSERT_OK(cuda::Choose(choose, stream()));
    ASSERT_OK(Wait());
    for (const Results& other : results) ASSERT_EQ(other.Read().chosen, first.chosen);
  }
}

// Selecting without keeping logits must choose what choosing among all logits does: with few blocks to a task and with many, lengths that end
// inside a code block, windows, residents; and it must notice when its sample misleads it.
class SelectByBarsCudaTest : public SelectCudaTest {
 protected:
  struct Case {
    int32_t n, tasks, group, k;
    int bits = 4;
    bool filters = false;
    int32_t window = 0x7fffffff;
    GroupRule rule = GroupRule::kMaxWeight;
    float log_theta = -5;
  };
  // Selects for `c.tasks` equal tasks; the number that were scanned again.
  int32_t Run(Rng& rng, const CodedRows& coded, const Case& c) {
    const int64_t stride = (coded.n + 3) / 4 * 4;
    const CudaArray<float> z(static_cast<size_t>(c.group * stride));
    const CudaArray<cuda::ScanTask> scan(std::vector<cuda::ScanTask>{{.source = coded.Source(), .z = z.data(), .z_stride = stride}});
    EXPECT_OK(cuda::Scan({.tasks = scan.data(), .num_tasks = 1, .max_n = coded.n, .format = coded.format, .group = c.group, .head_dim = coded.dim}, stream()));
    std::vector<uint64_t> resident(static_cast<size_t>(coded.n / 64 + 1));
    for (uint64_t& word : resident) word = rng.Next() & rng.Next();
    const CudaArray<uint64_t> device_resident(resident);
    std::vector<float> level = rng.Normals(static_cast<size_t>(c.group), 3);
    level[0] = kNan;  // counts as 0
    cuda::ChooseRule rule{.sinks = 8, .local = 32, .window = c.window, .k = c.k};
    if (c.filters) rule.resident = device_resident.data(), rule.log_theta = c.log_theta;
    std::vector<Results> results;
    std::vector<cuda::SelectTask> tasks;
    for (int t = 0; t < c.tasks; ++t) {
      results.emplace_back(c.k, c.group, coded.n);
      results.back().all.Write(level);
      tasks.push_back({.source = coded.Source(), .rule = results.back().Into(rule)});
      tasks.back().rule.pool_level = tasks.back().rule.lse_all;
    }
    const CudaArray<cuda::SelectTask> device(tasks);
    const CudaArray<int32_t> restarts(std::vector<int32_t>{0});
    cuda::SelectParams params{.tasks = device.data(), .num_tasks = c.tasks, .max_n = coded.n + 1000, .format = coded.format, .group = c.group,
                              .head_dim = coded.dim, .rule = c.rule, .by = cuda::SelectBy::kBars, .restarts = restarts.data()};
    const auto workspace = Workspace(cuda::SelectWorkspaceBytes(params));
    params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
    EXPECT_OK(cuda::Select(params, stream()));
    EXPECT_OK(Wait());
    EXPECT_TRUE(workspace.GuardsIntact());
    const std::vector<float> logits = z.Read();
    const ChooseTask host = HostTask(logits, coded.n, stride, rule, c.filters ? resident.data() : nullptr, c.rule);
    Outcome first = results.front().Read();
    for (int32_t p = 0; p < coded.n; ++p) {
      double want = -20;
      for (int32_t h = 0; h < c.group && p >= host.lo && p < host.hi; ++h) {
        want = std::max(want, static_cast<double>(logits[static_cast<size_t>(h * stride + p)]) - (h == 0 ? 0 : static_cast<double>(level[static_cast<size_t>(h)])));
      }
      EXPECT_NEAR(first.pooled[static_cast<size_t>(p)], want, 1e-4 + 4e-6 * std::abs(want)) << p;  // two kernels, whose sums round apart
      if (testing::Test::HasFailure()) return -1;
    }
    for (const Results& other : results) {
      const Outcome o = other.Read();
      EXPECT_EQ(o.chosen, first.chosen);
      EXPECT_EQ(o.pooled, first.pooled);
      EXPECT_TRUE(AllClose(o.lse_all, first.lse_all, {1e-5, 1e-6}) && AllClose(o.lse_out, first.lse_out, {1e-4, 1e-5}));
    }
    // The model pools scores: what this one pools is checked.
    const ChooseModel model = RunChooseModel(host, c.group);
    for (int32_t p = 0; p < coded.n; ++p) {
      first.pooled[static_cast<size_t>(p)] = p >= host.lo && p < host.hi ? static_cast<float>(std::max(-20.0, model.score[static_cast<size_t>(p)])) : -20.0f;
    }
    CheckChoice(first, host, c.group, false);
    // Ready for the next call, which must not depend on what this one left.
    for (Results& r : results) r.all.Write(level);
    EXPECT_OK(cuda::Select(params, stream()));
    EXPECT_OK(Wait());
    for (const Results& other : results) EXPECT_EQ(other.Read().chosen, first.chosen);
    return restarts.Read()[0];
  }
};

TEST_F(SelectByBarsCudaTest, ChooseAsAllLogitsWould) {
  SeededRng rng;
  for (const Case& c : {Case{.n = 20'000, .tasks = 70, .group = 4, .k = 500}, Case{.n = 20'037, .tasks = 70, .group = 3, .k = 800, .filters = true},
                        Case{.n = 60'000, .tasks = 70, .group = 1, .k = 64, .bits = 2}, Case{.n = 30'000, .tasks = 40, .group = 4, .k = 700, .filters = true},
                        Case{.n = 40'063, .tasks = 40, .group = 4, .k = 300, .bits = 8, .window = 30'000}, Case{.n = 17'001, .tasks = 150, .group = 4, .k = 200},
                        Case{.n = 33'000, .tasks = 40, .group = 4, .k = 1300, .rule = GroupRule::kMaxLogit}, Case{.n = 230'000, .tasks = 8, .group = 4, .k = 2048}}) {
    SCOPED_TRACE(testing::Message() << "n " << c.n << ", tasks " << c.tasks << ", group " << c.group << ", k " << c.k << ", bits " << c.bits);
    CodedRows coded(rng, cuda::RowType::kF16, c.n, c.n > 100'000 ? 64 : 128, {c.bits, 64, false}, KeyKind::kNormal);
    coded.SetQuery(rng.Normals(static_cast<size_t>(c.group * coded.dim), 2));
    EXPECT_EQ(Run(rng, coded, c), 0) << "tasks were scanned again";
    if (HasFailure()) return;
  }
}

TEST_F(SelectByBarsCudaTest, ThetaIsALogitWhereScoresAre) {
  SeededRng rng;
  CodedRows coded(rng, cuda::RowType::kF16, 20'000, 64, {4, 64, false}, KeyKind::kNormal);
  coded.SetQuery(rng.Normals(4 * 64, 2));
  for (const float log_theta : {-20.0f, 0.0f, 5.0f, 20.0f}) {  // what is eligible may be too much to list
    Run(rng, coded, {.n = 20'000, .tasks = 70, .group = 4, .k = 300, .filters = true, .rule = GroupRule::kMaxLogit, .log_theta = log_theta});
  }
}

TEST_F(SelectByBarsCudaTest, StartAnewWhereTheSampleMisleads) {
  SeededRng rng;
  constexpr int32_t kDim = 64;
  const std::vector<float> q = rng.Normals(4 * kDim);
  const auto coded_of = [&](int32_t n, auto&& scale_of) {  // keys near scale * q
    CodedRows coded(rng, cuda::RowType::kF16, n, kDim, {4, 64, false}, KeyKind::kNormal);
    for (int32_t p = 0; p < n; ++p) {
      for (int32_t i = 0; i < kDim; ++i) {
        Half& k = coded.rows[size_t(2) * size_t(p) * kDim + size_t(i)];
        k = FloatToHalf(HalfToFloat(k) * 0.5f + scale_of(p) * q[size_t(i)]);
      }
    }
    std::vector<EncodeTask> tasks;
    const size_t bytes = LayoutOf(coded.format, kDim).bytes;
    for (int32_t g = 0; g < coded.groups; ++g) {
      tasks.push_back({.rows = coded.rows.data() + int64_t{2} * g * 64 * kDim, .block = coded.blocks.data() + size_t(g) * bytes});
    }
    EXPECT_OK(ReferenceKernels().encode({.tasks = tasks, .format = coded.format, .head_dim = kDim}, {}));
    coded.device_blocks = CudaArray<std::byte>(coded.blocks);
    coded.SetQuery(q);
    return coded;
  };
  // Blocks have all of a task. A warp has 16 code blocks, of which the first two are its sample; or 36, and four.
  const Case c{.n = 16'384, .tasks = 70, .group = 4, .k = 600}, longer{.n = 36'864, .tasks = 70, .group = 4, .k = 600};
  EXPECT_EQ(Run(rng, coded_of(c.n, [](int32_t) { return 0.0f; }), c), 0);
  EXPECT_EQ(Run(rng, coded_of(c.n, [](int32_t p) { return p / 64 % 16 < 2 && p % 5 == 0 ? 0.5f : 0.0f; }), c), 2 * c.tasks) << "all that is large was sampled";
  EXPECT_EQ(Run(rng, coded_of(longer.n, [](int32_t p) { return p / 64 % 36 < 4 ? 0.0f : 0.5f; }), longer), 2 * c.tasks) << "nothing was: the lists are full";
}

TEST_F(SelectByBarsCudaTest, StartAnewWhereThereIsNoBar) {
  SeededRng rng;
  const Case c{.n = 17'000, .tasks = 70, .group = 4, .k = 100};
  CodedRows coded(rng, cuda::RowType::kF16, c.n, 64, {4, 64, false}, KeyKind::kNormal);
  coded.SetQuery(std::vector<float>(4 * 64, 0.0f));
  EXPECT_EQ(Run(rng, coded, c), 2 * c.tasks) << "all logits are the same";
  coded.SetQuery(rng.Normals(4 * 64, 300));
  Run(rng, coded, c);  // far outside of the bins
}

// Where some tasks hold, the blocks of a launch are divided among the others: the same choices, and nothing of those that hold is touched.
TEST_F(SelectByBarsCudaTest, BlocksOfTasksThatHoldWorkForOthers) {
  SeededRng rng;
  for (const auto& [n, tasks_wanted, by] : {std::tuple{3000, 8, cuda::SelectBy::kAny}, std::tuple{40'000, 8, cuda::SelectBy::kBars},
                                            std::tuple{20'000, 70, cuda::SelectBy::kBars}, std::tuple{500, 150, cuda::SelectBy::kAny}}) {
    for (const double held : {0.0, 0.5, 0.9, 1.0}) {
      SCOPED_TRACE(testing::Message() << "n " << n << ", tasks " << tasks_wanted << ", held " << held);
      constexpr int32_t kDim = 64, kGroup = 4;
      CodedRows coded(rng, cuda::RowType::kF16, n, kDim, {4, 64, false}, KeyKind::kNormal);
      coded.SetQuery(rng.Normals(kGroup * kDim));
      const cuda::ChooseRule rule{.sinks = 8, .local = 32, .k = n / 40};
      std::vector<uint8_t> holds;
      for (int t = 0; t < tasks_wanted; ++t) holds.push_back(rng.Chance(held) ? 1 : 0);
      const CudaArray<uint8_t> device_holds(holds);
      std::vector<Results> results;
      std::vector<cuda::SelectTask> tasks;
      for (int t = 0; t < tasks_wanted; ++t) {
        results.emplace_back(rule.k, kGroup, n);
        tasks.push_back({.source = coded.Source(), .rule = results.back().Into(rule)});
        tasks.back().rule.pool_level = tasks.back().rule.lse_all;
        tasks.back().rule.hold = device_holds.data() + t;
      }
      const CudaArray<cuda::SelectTask> device(tasks);
      cuda::SelectParams params{.tasks = device.data(), .num_tasks = tasks_wanted, .max_n = n, .format = coded.format, .group = kGroup, .head_dim = kDim,
                                .by = by, .gated = true};
      const auto workspace = Workspace(cuda::SelectWorkspaceBytes(params));
      params.workspace = workspace.data(), params.workspace_bytes = workspace.size();
      for (int i = 0; i < 2; ++i) ASSERT_OK(cuda::Select(params, stream()));
      ASSERT_OK(Wait());
      EXPECT_TRUE(workspace.GuardsIntact());
      const int64_t stride = (n + 3) / 4 * 4;
      const CudaArray<float> z(static_cast<size_t>(kGroup * stride));
      const CudaArray<cuda::ScanTask> scan(std::vector<cuda::ScanTask>{{.source = coded.Source(), .z = z.data(), .z_stride = stride}});
      ASSERT_OK(cuda::Scan({.tasks = scan.data(), .num_tasks = 1, .max_n = n, .format = coded.format, .group = kGroup, .head_dim = kDim}, stream()));
      ASSERT_OK(Wait());
      const std::vector<float> logits = z.Read();
      const ChooseModel model = RunChooseModel(HostTask(logits, n, stride, rule, nullptr, GroupRule::kMaxWeight), kGroup);
      for (size_t t = 0; t < tasks.size(); ++t) {
        if (holds[t] != 0) {
          EXPECT_EQ(results[t].all.Read()[0], z_poison_) << t;
          EXPECT_EQ(results[t].pooled.Read(), std::vector<float>(static_cast<size_t>(n), -20.0f)) << t;
          continue;
        }
        const Outcome o = results[t].Read();
        EXPECT_EQ(o.chosen.size(), model.chosen.size()) << t;
        double least = 1e300;
        for (const int32_t p : model.chosen) least = std::min(least, model.score[static_cast<size_t>(p)]);
        for (const int32_t p : o.chosen) EXPECT_GE(model.score[static_cast<size_t>(p)], least - 1e-5 * (1 + std::abs(least))) << t;
      }
    }
  }
}

}  // namespace
}  // namespace prehoc
