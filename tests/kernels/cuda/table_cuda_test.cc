// The function table filled with CUDA against the reference table: the same tasks, rows in every kind of memory, poisoned outputs.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/cuda/device_memory.h"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/run_kernels.h"
#include "kernels/row_codec.h"
#include "tests/kernels/cuda/cuda_kernel_test.h"

namespace prehoc {
namespace {

constexpr float kPoison = -12345.0f;

std::vector<std::pair<int32_t, RowFormat>> FormatsOfHeadDims() {
  std::vector<std::pair<int32_t, RowFormat>> all;
  for (const int32_t d : CudaHeadDims()) {
    for (const RowFormat format : {RowFormat::kF16, RowFormat::kInt8, RowFormat::kE4m3}) all.emplace_back(d, format);
  }
  return all;
}

class CudaTableTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    Make({});
  }
  void Make(const cuda::DeviceKernels::Options& options) {
    auto made = cuda::DeviceKernels::Create(&memory_, options);
    ASSERT_OK(made);
    kernels_ = std::move(*made);
  }
  Launch launch() const { return {.stream = kernels_->launch_stream()}; }
  static const KernelTable& table() { return cuda::DeviceKernels::Table(); }

  // A copy in the device's memory.
  template <class T>
  T* OnDevice(const std::vector<T>& values) {
    auto buffer = memory_.Allocate(std::max<size_t>(values.size(), 1) * sizeof(T), "test");
    EXPECT_OK(buffer);
    buffers_.push_back(std::move(*buffer));
    EXPECT_OK(memory_.Write(values.data(), values.size() * sizeof(T), buffers_.back().data()));
    return buffers_.back().template as<T>();
  }
  template <class T>
  T* Pinned(const std::vector<T>& values) {
    pinned_.push_back(std::make_unique<CudaArray<T>>(values, CudaPlace::kPinned));
    return static_cast<CudaArray<T>*>(pinned_.back().get())->data();
  }
  template <class T>
  std::vector<T> Read(const T* from, size_t count) {
    std::vector<T> values(count);
    EXPECT_OK(CudaStatus(cudaDeviceSynchronize(), "wait"));
    EXPECT_OK(memory_.Read(from, count * sizeof(T), values.data()));
    return values;
  }
  // Two copies of rows on the device and in pinned memory, and runs that take turns between them; `same` has the same rows on the host.
  struct Scattered {
    std::vector<RowRun> runs, same;
  };
  Scattered Scatter(Rng& rng, const std::vector<Half>& rows, int32_t d) {
    const Half *device = OnDevice(rows), *pinned = Pinned(rows);
    Scattered out;
    for (const RowRun& run : SplitIntoRuns(rng, rows, d)) {
      out.same.push_back(run);
      out.runs.push_back({(rng.Chance(0.5) ? device : pinned) + (static_cast<const Half*>(run.rows) - rows.data()), run.count});
    }
    return out;
  }

  CudaDeviceMemory memory_{size_t{1} << 30};
  std::unique_ptr<cuda::DeviceKernels> kernels_;
  std::vector<DeviceBuffer> buffers_;
  std::vector<std::shared_ptr<void>> pinned_;
};

TEST_F(CudaTableTest, AppendWritesTheSameRowsHereAndThere) {
  Rng rng = SeededRng();
  for (const int32_t d : CudaHeadDims()) {
    for (const int32_t count : {0, 1, 3, 67}) {
      const int64_t stride = 3 * d;
      const std::vector<float> k = rng.Normals(static_cast<size_t>((count + 1) * stride)), v = rng.Normals(k.size(), 40);
      const auto row = static_cast<size_t>(2 * d);
      std::vector<Half> want(static_cast<size_t>(count) * row + row, Half{0x5a5a}), host = want;
      Half* const device = OnDevice(want);
      const auto task = [&](Half* rows) { return AppendTask{.k = k.data(), .v = v.data(), .stride = stride, .rows = rows, .count = count}; };
      const std::vector<AppendTask> one{task(want.data())}, both{task(host.data()), task(device)};
      ASSERT_OK(ReferenceKernels().append({.tasks = one, .head_dim = d}, {}));
      ASSERT_OK(table().append({.tasks = both, .head_dim = d}, launch()));
      EXPECT_EQ(host, want);
      EXPECT_EQ(Read(device, want.size()), want) << "d " << d << " count " << count;
    }
  }
}

TEST_F(CudaTableTest, EncodeWritesTheBytesOfTheReference) {
  Rng rng = SeededRng();
  for (const int32_t d : CudaHeadDims()) {
    for (const int bits : {2, 4, 8}) {
      for (const KeyKind kind : kAllKinds) {
        const CodeFormat format{.bits = bits, .group_tokens = 16, .error_norms = true};
        const std::vector<Half> rows = MakeRows(rng, 32, d, kind);
        const size_t bytes = table().code_block_bytes(format, d), row = static_cast<size_t>(2 * d);
        std::vector<std::byte> want(2 * bytes, std::byte{0xa5});
        std::byte* const device = OnDevice(want);
        const Half *here = OnDevice(rows), *pinned = Pinned(rows);
        const std::vector<EncodeTask> reference{{.rows = rows.data(), .block = want.data()},
                                                {.rows = rows.data() + 16 * row, .block = want.data() + bytes}};
        const std::vector<EncodeTask> tasks{{.rows = here, .block = device}, {.rows = pinned + 16 * row, .block = device + bytes}};
        ASSERT_OK(ReferenceKernels().encode({.tasks = reference, .format = format, .head_dim = d}, {}));
        ASSERT_OK(table().encode({.tasks = tasks, .format = format, .head_dim = d}, launch()));
        EXPECT_EQ(Read(device, want.size()), want) << "d " << d << " bits " << bits;
      }
    }
  }
}

TEST_F(CudaTableTest, ScoreAgreesFromEveryMemory) {
  Rng rng = SeededRng();
  for (const int32_t d : CudaHeadDims()) {
    for (const int32_t group : {1, 3, 8, 9}) {
      for (const int32_t count : {1, 63, 64, 65, 211}) {
        const std::vector<Half> rows = MakeRows(rng, count, d, KeyKind::kHeavyTailed);
        const Scattered s = Scatter(rng, rows, d);
        const std::vector<float> q = rng.Normals(static_cast<size_t>(group * d));
        const int64_t stride = count + 5;
        std::vector<float> want(static_cast<size_t>(group * stride), kPoison), host = want;
        float* const device = OnDevice(want);
        const auto task = [&](std::span<const RowRun> runs, float* z) { return ScoreTask{.q = q.data(), .runs = runs, .z = z, .z_stride = stride}; };
        const std::vector<ScoreTask> reference{task(s.same, want.data())}, tasks{task(s.runs, host.data()), task(s.runs, device)};
        ASSERT_OK(ReferenceKernels().score({.tasks = reference, .group = group, .head_dim = d}, {}));
        ASSERT_OK(table().score({.tasks = tasks, .group = group, .head_dim = d}, launch()));
        // A row of heavy tails has magnitudes of a few hundred.
        const Tolerance tolerance{2e-4, 1e-5};
        EXPECT_TRUE(AllClose(host, want, tolerance, {group, stride})) << "d " << d << " count " << count;
        EXPECT_TRUE(AllClose(Read(device, want.size()), want, tolerance, {group, stride}));
      }
    }
  }
}

TEST_F(CudaTableTest, ScanAndChooseAgree) {
  Rng rng = SeededRng();
  for (const int32_t d : {64, 128}) {
    for (const int32_t n : {64, 640, 4096, 4160}) {
      const int32_t group = 3, num = 2;
      const CodeFormat format{.bits = 4, .group_tokens = 64};
      const size_t bytes = table().code_block_bytes(format, d);
      std::vector<float> q = rng.Normals(static_cast<size_t>(num * group * d), 2);
      const int64_t stride = n + 16;
      std::vector<float> z(static_cast<size_t>(num * group * stride), kPoison);
      float* const device_z = OnDevice(z);
      std::vector<std::vector<std::byte>> blocks;
      std::vector<ScanTask> reference, tasks;
      for (int32_t t = 0; t < num; ++t) {
        blocks.emplace_back(static_cast<size_t>(n / 64) * bytes);
        const std::vector<Half> rows = MakeRows(rng, n, d);
        std::vector<EncodeTask> encode;
        for (int32_t g = 0; g < n / 64; ++g) encode.push_back({.rows = rows.data() + int64_t{g} * 64 * 2 * d, .block = blocks.back().data() + static_cast<size_t>(g) * bytes});
        ASSERT_OK(ReferenceKernels().encode({.tasks = encode, .format = format, .head_dim = d}, {}));
        const int64_t at = int64_t{t} * group * stride;
        reference.push_back({.q = q.data() + t * group * d, .blocks = blocks.back().data(), .groups = n / 64, .z = z.data() + at, .z_stride = stride});
        tasks.push_back({.q = q.data() + t * group * d, .blocks = OnDevice(blocks.back()), .groups = n / 64, .z = device_z + at, .z_stride = stride});
      }
      ASSERT_OK(ReferenceKernels().scan({.tasks = reference, .format = format, .group = group, .head_dim = d}, {}));
      ASSERT_OK(table().scan({.tasks = tasks, .format = format, .group = group, .head_dim = d}, launch()));
      const std::vector<float> scanned = Read(device_z, z.size());
      EXPECT_TRUE(AllClose(scanned, z, {0.02, 1e-3}, {num, group, stride}));

      // Both choose from the same logits: those of the device.
      std::vector<uint64_t> resident(static_cast<size_t>((n + 63) / 64));
      for (uint64_t& word : resident) word = rng.Next();
      std::vector<float> pooled(static_cast<size_t>(n), kPoison);
      float* const device_pooled = OnDevice(pooled);
      const int32_t k = std::min(n / 4, 300);
      struct Result {
        std::vector<int32_t> chosen;
        int32_t count = -7;
        std::vector<float> all, out;
        uint8_t met = 9;
      };
      const auto task = [&](const float* logits, Result* to, float* pool, int32_t m) {
        ChooseTask made{.z = logits, .z_stride = stride, .n = n, .sinks = 4, .lo = 4, .hi = n - 8, .k = k, .dilate_m = m, .dilate_r = 1};
        made.resident = resident.data();
        made.log_theta = -6;
        made.pooled = pool;
        made.pool_reset = true;
        to->chosen.assign(static_cast<size_t>(made.max_chosen()), -5);
        to->all.assign(static_cast<size_t>(group), kPoison);
        to->out = to->all;
        made.chosen = to->chosen.data();
        made.count = &to->count;
        made.lse_all = to->all.data();
        made.lse_out = to->out.data();
        made.met = &to->met;
        return made;
      };
      for (const int32_t m : {0, k / 3}) {
        Result want, got;
        const std::vector<ChooseTask> a{task(scanned.data(), &want, pooled.data(), m)}, b{task(device_z, &got, device_pooled, m)};
        ASSERT_OK(ReferenceKernels().choose({.tasks = a, .group = group}, {}));
        ASSERT_OK(table().choose({.tasks = b, .group = group}, launch()));
        ASSERT_EQ(got.count, want.count) << "n " << n << " m " << m;
        const std::vector<int32_t> x(want.chosen.begin(), want.chosen.begin() + want.count), y(got.chosen.begin(), got.chosen.begin() + got.count);
        std::vector<int32_t> differ;
        std::set_symmetric_difference(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(differ));
        EXPECT_LE(differ.size(), 2u) << "more than a tie, n " << n << " m " << m;
        EXPECT_TRUE(AllClose(got.all, want.all, {1e-4, 1e-5}));
        EXPECT_TRUE(AllClose(got.out, want.out, {1e-3, 1e-4}));
        EXPECT_EQ(got.met, 1);
        EXPECT_TRUE(AllClose(Read(device_pooled, pooled.size()), pooled, {1e-4, 1e-5}));
      }
    }
  }
}

TEST_F(CudaTableTest, AttendAgreesFromEveryMemory) {
  Rng rng = SeededRng();
  for (const int32_t d : CudaHeadDims()) {
    for (const int32_t count : {0, 1, 17, 300, 2100}) {
      const int32_t group = 3;
      const std::vector<Half> rows = MakeRows(rng, count, d), other = MakeRows(rng, 40, d);
      const Scattered s = Scatter(rng, rows, d), t = Scatter(rng, other, d);
      const std::vector<float> q = rng.Normals(static_cast<size_t>(2 * group * d));
      std::vector<float> want(q.size(), kPoison), got = want, want_lse(2 * group, kPoison), got_lse = want_lse;
      const auto tasks = [&](const std::vector<RowRun>& first, const std::vector<RowRun>& second, std::vector<float>& out, std::vector<float>& lse) {
        return std::vector<AttendTask>{{.q = q.data(), .runs = first, .out = out.data(), .lse = lse.data()},
                                       {.q = q.data() + group * d, .runs = second, .out = out.data() + group * d, .lse = lse.data() + group}};
      };
      ASSERT_OK(ReferenceKernels().attend({.tasks = tasks(s.same, t.same, want, want_lse), .group = group, .head_dim = d}, {}));
      ASSERT_OK(table().attend({.tasks = tasks(s.runs, t.runs, got, got_lse), .group = group, .head_dim = d}, launch()));
      EXPECT_TRUE(AllClose(got, want, {2e-5, 1e-4}, {2, group, d})) << "d " << d << " count " << count;
      EXPECT_TRUE(AllClose(got_lse, want_lse, {2e-5, 1e-5}));
    }
  }
}

TEST_F(CudaTableTest, PrefillAgreesWithWindowsAndSinks) {
  for (const PromptPrecision precision : {PromptPrecision::kSplit, PromptPrecision::kHalf}) {
    Rng rng = SeededRng();
    Make({.prompt_precision = precision});
    // Logits of up to 256 normal products are some 1e-5 off, and a window of few keys weighs each; half: queries and weights are 2^-12 off.
    const Tolerance tolerance = precision == PromptPrecision::kHalf ? Tolerance{3e-3, 1e-3} : Tolerance{1e-4, 1e-4};
    for (const int32_t d : CudaHeadDims()) {
      for (const int32_t first : {0, 1, 130, 400}) {
        for (const int32_t queries : {1, 31, 64, 65, 140}) {
          const int32_t group = 2, heads = 4;
          const std::vector<Half> rows = MakeRows(rng, first + queries, d);
          const Scattered s = Scatter(rng, rows, d);
          const std::vector<float> q = rng.Normals(static_cast<size_t>(queries * heads * d));
          std::vector<int32_t> start;
          for (int32_t t = 0; t < queries; ++t) start.push_back(static_cast<int32_t>(rng.Int(0, first + t)));
          for (const bool windowed : {false, true}) {
            std::vector<float> want(q.size(), kPoison), got = want;
            const auto params = [&](const std::vector<RowRun>& runs, std::vector<float>& out, std::vector<PrefillTask>* tasks) {
              for (int32_t h = 0; h < heads / group; ++h) {
                tasks->push_back({.q = q.data() + h * group * d, .q_stride = heads * d, .out = out.data() + h * group * d, .out_stride = heads * d,
                                  .runs = runs, .start = windowed ? start.data() : nullptr});
              }
              return PrefillParams{.tasks = *tasks, .queries = queries, .first = first, .sinks = windowed ? std::min(3, first + 1) : 0,
                                   .group = group, .head_dim = d};
            };
            std::vector<PrefillTask> a, b;
            const PrefillParams of_reference = params(s.same, want, &a), of_device = params(s.runs, got, &b);
            ASSERT_OK(ReferenceKernels().prefill(of_reference, {}));
            ASSERT_OK(table().prefill(of_device, launch()));
            EXPECT_TRUE(AllClose(got, want, tolerance, {queries, heads, d}))
                << "d " << d << " first " << first << " windowed " << windowed << ' ' << PromptPrecisionName(precision);
          }
        }
      }
    }
  }
}

// K, V, queries and outputs on the device; rows arrive in pinned memory behind the calls, and are read meanwhile.
TEST_F(CudaTableTest, PrefillOnTheDeviceIsThatOfTheHost) {
  Rng rng = SeededRng();
  const int32_t heads = 4, kv_heads = 2, group = heads / kv_heads, block = 64;
  for (const auto& [d, rows_of] : FormatsOfHeadDims()) {
    const CodeFormat format{.bits = 4, .group_tokens = 16};
    const size_t row = static_cast<size_t>(2 * d), bytes = RowBytes(rows_of, d), code_bytes = table().code_block_bytes(format, d);
    for (const auto& [first, count] : {std::pair{0, 200}, {64, 150}, {130, 70}, {100, 1}}) {
      const int32_t total = first + count, blocks = (total + block - 1) / block, codes = total / 16;
      const int64_t kv = int64_t{kv_heads} * d, all = int64_t{heads} * d;
      const std::vector<float> k = rng.Normals(static_cast<size_t>(total * kv)), v = rng.Normals(k.size()), q = rng.Normals(static_cast<size_t>(count * all));
      const float *device_k = OnDevice(k), *device_v = OnDevice(v), *device_q = OnDevice(q);
      // Blocks of all heads, as the host tier has them.
      std::vector<std::byte> want(static_cast<size_t>(blocks * kv_heads * block) * bytes, std::byte{0x5a});
      std::byte* const host = Pinned(want);
      Half* const ring = OnDevice(std::vector<Half>(static_cast<size_t>(kv_heads * total) * row, Half{0x5a5a}));
      std::byte* const code = OnDevice(std::vector<std::byte>(static_cast<size_t>(kv_heads * codes) * code_bytes));
      const auto row_at = [&, bytes = bytes](std::byte* base, int32_t h, int32_t p) {
        return base + (static_cast<size_t>((p / block * kv_heads + h) * block + p % block)) * bytes;
      };
      const auto append = [&, d = d](std::byte* base, const float* from_k, const float* from_v, int32_t begin, int32_t end, bool ring_too) {
        std::vector<AppendTask> tasks;
        for (int32_t at = begin; at < end;) {
          const int32_t run = std::min((at / block + 1) * block, end) - at;
          for (int32_t h = 0; h < kv_heads; ++h) {
            tasks.push_back({.k = from_k + at * kv + h * d, .v = from_v + at * kv + h * d, .stride = kv, .rows = row_at(base, h, at), .count = run});
            if (ring_too) tasks.push_back(tasks.back()), tasks.back().rows = ring + static_cast<size_t>(h * total + at) * row, tasks.back().widened = true;
          }
          at += run;
        }
        return tasks;
      };
      const auto runs = [&, rows_of = rows_of](std::byte* base, int32_t end) {
        std::vector<std::vector<RowRun>> of_heads(kv_heads);
        for (int32_t h = 0; h < kv_heads; ++h) {
          for (int32_t at = 0; at < end; at += block) of_heads[static_cast<size_t>(h)].push_back({row_at(base, h, at), std::min(block, end - at), rows_of});
        }
        return of_heads;
      };
      const auto prefill = [&, d = d](const std::vector<std::vector<RowRun>>& of_heads, const float* from, float* to, std::vector<PrefillTask>* tasks) {
        for (int32_t h = 0; h < kv_heads; ++h) {
          tasks->push_back({.q = from + h * group * d, .q_stride = all, .out = to + h * group * d, .out_stride = all, .runs = of_heads[static_cast<size_t>(h)]});
        }
        return PrefillParams{.tasks = *tasks, .queries = count, .first = first, .group = group, .head_dim = d};
      };
      ASSERT_OK(ReferenceKernels().append({.tasks = append(want.data(), k.data(), v.data(), 0, total, false), .head_dim = d, .format = rows_of}, {}));
      std::vector<float> attended(q.size(), kPoison);
      std::vector<PrefillTask> reference;
      const auto of_want = runs(want.data(), total);
      ASSERT_OK(ReferenceKernels().prefill(prefill(of_want, q.data(), attended.data(), &reference), {}));

      for (const bool ahead : {false, true}) {
        // The earlier rows have arrived, those of this piece are under way.
        std::vector<AppendTask> earlier = append(host, device_k, device_v, 0, first, true);
        ASSERT_OK(table().append({.tasks = earlier, .head_dim = d, .format = rows_of, .on_device = true}, launch()));
        ASSERT_OK(table().settle({}, launch()));
        float* const out = OnDevice(std::vector<float>(q.size(), kPoison));
        if (ahead && first > 0) {
          const auto of_heads = runs(host, first);
          const std::vector<std::span<const RowRun>> tasks(of_heads.begin(), of_heads.end());
          ASSERT_OK(table().read_ahead({.tasks = tasks, .rows = first, .total = total, .head_dim = d}, launch()));
        }
        ASSERT_OK(table().append({.tasks = append(host, device_k, device_v, first, total, true), .head_dim = d, .format = rows_of, .on_device = true}, launch()));
        std::vector<EncodeTask> encode;
        for (int32_t h = 0; h < kv_heads; ++h) {
          for (int32_t g = first / 16; g < codes; ++g) encode.push_back({.rows = row_at(host, h, g * 16), .block = code + static_cast<size_t>(h * codes + g) * code_bytes});
        }
        ASSERT_OK(table().encode({.tasks = encode, .format = format, .head_dim = d, .rows = rows_of}, launch()));
        std::vector<PrefillTask> tasks;
        const auto of_host = runs(host, total);
        PrefillParams params = prefill(of_host, device_q, out, &tasks);
        params.on_device = true;
        ASSERT_OK(table().prefill(params, launch()));
        ASSERT_OK(table().settle({.results = true, .rows_but = 1}, launch()));
        EXPECT_TRUE(AllClose(Read(out, q.size()), attended, {1e-4, 1e-4}, {count, heads, d})) << "d " << d << ' ' << RowFormatName(rows_of) << " first " << first << " ahead " << ahead;
        ASSERT_OK(table().settle({}, launch()));
        EXPECT_EQ(std::vector<std::byte>(host, host + want.size()), want) << "d " << d << " first " << first;
        for (int32_t h = 0; h < kv_heads; ++h) {
          const std::vector<Half> here = Read(ring + static_cast<size_t>(h * total) * row, static_cast<size_t>(total) * row);
          for (int32_t p = 0; p < total; ++p) {
            std::vector<Half> wide(row);
            WidenRow(row_at(want.data(), h, p), rows_of, d, wide.data());
            ASSERT_TRUE(std::equal(wide.begin(), wide.end(), here.data() + static_cast<size_t>(p) * row)) << "position " << p;
          }
          for (int32_t g = first / 16; g < codes; ++g) {
            std::vector<std::byte> wanted(code_bytes);
            const std::vector<EncodeTask> one{{.rows = row_at(want.data(), h, g * 16), .block = wanted.data()}};
            ASSERT_OK(ReferenceKernels().encode({.tasks = one, .format = format, .head_dim = d, .rows = rows_of}, {}));
            ASSERT_EQ(Read(code + static_cast<size_t>(h * codes + g) * code_bytes, code_bytes), wanted) << "group " << g;
          }
        }
        std::fill_n(host, want.size(), std::byte{0x5a});
      }
    }
  }
}

// What a query does not see, or gives no weight, cannot spoil its output; what it sees can.
TEST_F(CudaTableTest, PrefillTakesInfiniteRowsAsTheReference) {
  Rng rng = SeededRng();
  const int32_t queries = 150, group = 2;
  for (const int32_t d : CudaHeadDims()) {
    for (const bool key : {false, true}) {
      std::vector<Half> rows = MakeRows(rng, queries, d);
      rows[static_cast<size_t>(100 * 2 * d + (key ? 3 : d + 3))] = 0x7c00;  // +inf in row 100
      const std::vector<RowRun> same{{rows.data(), queries}};
      const Scattered s = Scatter(rng, rows, d);
      const std::vector<float> q = rng.Normals(static_cast<size_t>(queries * group * d));
      std::vector<float> want(q.size(), kPoison), got = want;
      const auto task = [&](const std::vector<RowRun>& runs, std::vector<float>& out) {
        return std::vector<PrefillTask>{{.q = q.data(), .q_stride = group * d, .out = out.data(), .out_stride = group * d, .runs = runs}};
      };
      const auto a = task(same, want), b = task(s.runs, got);
      ASSERT_OK(ReferenceKernels().prefill({.tasks = a, .queries = queries, .group = group, .head_dim = d}, {}));
      ASSERT_OK(table().prefill({.tasks = b, .queries = queries, .group = group, .head_dim = d}, launch()));
      const auto before = static_cast<size_t>(100 * group * d);
      EXPECT_TRUE(AllClose(std::vector<float>(got.begin(), got.begin() + before), std::vector<float>(want.begin(), want.begin() + before), {1e-4, 1e-4}));
      for (size_t i = before; i < got.size(); ++i) {
        ASSERT_EQ(std::isnan(got[i]), std::isnan(want[i])) << "d " << d << " key " << key << " at " << i;
        ASSERT_EQ(std::isinf(got[i]), std::isinf(want[i])) << "d " << d << " key " << key << " at " << i;
      }
    }
  }
}

TEST_F(CudaTableTest, GatherAgrees) {
  Rng rng = SeededRng();
  const int32_t d = 96, count = 77;
  const std::vector<Half> rows = MakeRows(rng, count, d);
  const Half *device = OnDevice(rows), *pinned = Pinned(rows);
  std::vector<Half> want(rows.size(), Half{0x5a5a});
  Half* const to = OnDevice(want);
  std::vector<RowCopy> copies;
  for (int32_t i = 0; i < count; i += 2) {
    const int64_t from = int64_t{count - 1 - i} * 2 * d, into = int64_t{i} * 2 * d;
    copies.push_back({(i % 4 == 0 ? device : pinned) + from, to + into});
    std::copy_n(rows.begin() + from, 2 * d, want.begin() + into);
  }
  ASSERT_OK(table().gather({.rows = copies, .head_dim = d}, launch()));
  EXPECT_EQ(Read(to, want.size()), want);
}

// More entries than a launch takes, of many sizes, none at all among them; nothing beside them is written.
TEST_F(CudaTableTest, CopiesEvenPieces) {
  Rng rng = SeededRng();
  std::vector<Half> source(1 << 20), want(1 << 20, Half{0x5a5a});
  for (Half& x : source) x = static_cast<Half>(rng.Int(0, 65535));
  const auto* const from = reinterpret_cast<const std::byte*>(OnDevice(source));
  Half* const to = OnDevice(want);
  std::vector<cuda::EvenPieces> pieces;
  for (int64_t i = 0, at = 0; i < 150; ++i) {
    const int64_t width = 16 * rng.Int(0, 100), height = rng.Int(0, 4), pitch = width + 16 * rng.Int(0, 2);
    pieces.push_back({from + at, reinterpret_cast<std::byte*>(to) + at + 32, pitch, pitch, width, static_cast<int32_t>(height)});
    for (int64_t h = 0; h < height; ++h) {
      const auto first = static_cast<std::ptrdiff_t>((at + h * pitch) / 2);
      std::copy_n(source.begin() + first, width / 2, want.begin() + first + 16);
    }
    at += height * pitch;
  }
  ASSERT_OK(cuda::CopyPieces(pieces, nullptr));
  EXPECT_EQ(Read(to, want.size()), want);
}

TEST_F(CudaTableTest, RanksAsTheReferenceDoes) {
  Rng rng = SeededRng();
  enum Scores { kNormal, kFew, kOdd, kNothing };  // few different ones, so that they tie; some that are no numbers; none at all
  for (const int32_t n : {1, 63, 500, 5000, 70000}) {
    for (const Scores of : {kNormal, kFew, kOdd, kNothing}) {
      std::vector<float> scores = rng.Normals(static_cast<size_t>(n));
      for (float& score : scores) {
        if (of == kFew) score = std::floor(score * 2);
        if (of == kOdd && rng.Chance(0.2)) score = rng.Chance(0.3) ? NAN : rng.Chance(0.5) ? INFINITY : -INFINITY;
        if (of == kNothing) score = -INFINITY;
      }
      const float* const here = OnDevice(scores);
      for (const auto& [lo, hi, k] : {std::tuple{0, n, n / 8}, {n / 3, n, n}, {n / 4, n - n / 5, 20}, {n / 2, n / 2, 5}, {0, n, 0}}) {
        std::vector<int32_t> a(static_cast<size_t>(n), -1), b = a, c = a, d2 = a;
        int32_t counts[4] = {-1, -1, -1, -1};
        const auto task = [&, lo = lo, hi = hi](const float* score, int32_t most, std::vector<int32_t>& chosen, int32_t* count) {
          return TopKTask{.score = score, .lo = lo, .hi = hi, .k = most, .chosen = chosen.data(), .count = count};
        };
        const std::vector<TopKTask> want{task(scores.data(), k, a, &counts[0]), task(scores.data(), k / 2, b, &counts[1])};
        const std::vector<TopKTask> got{task(here, k, c, &counts[2]), task(here, k / 2, d2, &counts[3])};
        ASSERT_OK(ReferenceKernels().top_k({.tasks = want}, {}));
        ASSERT_OK(table().top_k({.tasks = got}, launch()));
        EXPECT_EQ(counts[2], counts[0]) << "n " << n << " scores " << of << " [" << lo << ", " << hi << ") k " << k;
        EXPECT_EQ(counts[3], counts[1]);
        EXPECT_EQ(c, a) << "n " << n << " scores " << of << " [" << lo << ", " << hi << ") k " << k;
        EXPECT_EQ(d2, b) << "n " << n << " scores " << of << " [" << lo << ", " << hi << ") k " << k;
        // Host memory in one of the tasks: all go the other way.
        std::vector<int32_t> e(static_cast<size_t>(n), -1), f = e;
        const std::vector<TopKTask> mixed{task(here, k, e, &counts[2]), task(scores.data(), k / 2, f, &counts[3])};
        ASSERT_OK(table().top_k({.tasks = mixed}, launch()));
        EXPECT_EQ(e, a);
        EXPECT_EQ(f, b);
      }
    }
  }
}

// Rows of 8 bits in pinned memory, fp16 rows on the device: what every entry gives is what the reference gives for the fp16 rows.
TEST_F(CudaTableTest, RowsOfOtherFormatsAreTheRowsThatTheyStandFor) {
  Rng rng = SeededRng();
  for (const RowFormat format : {RowFormat::kInt8, RowFormat::kE4m3}) {
    for (const int32_t d : CudaHeadDims()) {
      SCOPED_TRACE(std::string(RowFormatName(format)) + ", head_dim " + std::to_string(d));
      constexpr int32_t kCount = 150, kGroup = 3;
      const auto width = static_cast<size_t>(2 * d);
      const size_t bytes = RowBytes(format, d);
      std::vector<float> k = rng.Normals(static_cast<size_t>(kCount * d)), v = rng.Normals(k.size());
      std::vector<Half> wide(kCount * width);
      std::vector<std::byte> stored(kCount * bytes);
      const auto append = [&](void* narrow, void* wide_rows) {
        return std::vector<AppendTask>{{.k = k.data(), .v = v.data(), .stride = d, .rows = narrow, .count = kCount},
                                       {.k = k.data(), .v = v.data(), .stride = d, .rows = wide_rows, .count = kCount, .widened = true}};
      };
      const auto want_tasks = append(stored.data(), wide.data());
      ASSERT_OK(ReferenceKernels().append({.tasks = want_tasks, .head_dim = d, .format = format}, {}));
      std::byte* const stored_here = OnDevice(std::vector<std::byte>(stored.size()));
      Half* const wide_here = OnDevice(std::vector<Half>(wide.size()));
      const auto tasks_here = append(stored_here, wide_here);
      ASSERT_OK(table().append({.tasks = tasks_here, .head_dim = d, .format = format}, launch()));
      EXPECT_EQ(Read(stored_here, stored.size()), stored);
      EXPECT_EQ(Read(wide_here, wide.size()), wide);

      // Runs that take turns between the memories.
      const std::byte* const pinned = Pinned(stored);
      std::vector<RowRun> runs, of_host, same;
      for (const RowRun& run : SplitIntoRuns(rng, wide, d)) {
        const auto at = run.rows == nullptr ? 0 : static_cast<size_t>(static_cast<const Half*>(run.rows) - wide.data()) / width;
        same.push_back(run);
        of_host.push_back({pinned + at * bytes, run.count, format});
        runs.push_back(rng.Chance(0.5) ? of_host.back() : RowRun{wide_here + at * width, run.count});
      }
      const std::vector<float> q = rng.Normals(static_cast<size_t>(kCount * kGroup * d));
      std::vector<float> z(kGroup * kCount, kPoison), want_z = z;
      const auto score = [&](const std::vector<RowRun>& of, std::vector<float>& to) {
        return std::vector<ScoreTask>{{.q = q.data(), .runs = of, .z = to.data(), .z_stride = kCount}};
      };
      const auto score_want = score(same, want_z), score_got = score(runs, z);
      ASSERT_OK(ReferenceKernels().score({.tasks = score_want, .group = kGroup, .head_dim = d}, {}));
      ASSERT_OK(table().score({.tasks = score_got, .group = kGroup, .head_dim = d}, launch()));
      EXPECT_TRUE(AllClose(z, want_z, {2e-4, 1e-5}, {kGroup, kCount}));

      std::vector<float> out(static_cast<size_t>(kGroup * d), kPoison), want = out, lse(kGroup, kPoison), want_lse = lse;
      const auto attend = [&](const std::vector<RowRun>& of, std::vector<float>& to, std::vector<float>& to_lse) {
        return std::vector<AttendTask>{{.q = q.data(), .runs = of, .out = to.data(), .lse = to_lse.data()}};
      };
      const auto attend_want = attend(same, want, want_lse);
      ASSERT_OK(ReferenceKernels().attend({.tasks = attend_want, .group = kGroup, .head_dim = d}, {}));
      for (const auto* of : {&runs, &of_host}) {
        const auto attend_got = attend(*of, out, lse);
        ASSERT_OK(table().attend({.tasks = attend_got, .group = kGroup, .head_dim = d}, launch()));
        EXPECT_TRUE(AllClose(out, want, {1e-4, 1e-4}, {kGroup, d}));
        EXPECT_TRUE(AllClose(lse, want_lse, {1e-4, 1e-5}));
      }

      std::vector<float> seen(q.size(), kPoison), want_seen = seen;
      const auto prefill = [&](const std::vector<RowRun>& of, std::vector<float>& to) {
        return std::vector<PrefillTask>{{.q = q.data(), .q_stride = kGroup * d, .out = to.data(), .out_stride = kGroup * d, .runs = of}};
      };
      const auto prefill_want = prefill(same, want_seen), prefill_got = prefill(of_host, seen);
      ASSERT_OK(ReferenceKernels().prefill({.tasks = prefill_want, .queries = kCount, .group = kGroup, .head_dim = d}, {}));
      ASSERT_OK(table().prefill({.tasks = prefill_got, .queries = kCount, .group = kGroup, .head_dim = d}, launch()));
      EXPECT_TRUE(AllClose(seen, want_seen, {1e-4, 1e-4}, {kCount, kGroup, d}));

      std::vector<Half> slots(wide.size(), Half{0x5a5a});
      Half* const to = OnDevice(slots);
      std::vector<RowCopy> copies;
      for (size_t i = 0; i < kCount; i += 2) {
        const size_t from = kCount - 1 - i;
        copies.push_back({(i % 4 == 0 ? pinned : stored_here) + from * bytes, to + i * width});
        std::copy_n(wide.begin() + static_cast<std::ptrdiff_t>(from * width), width, slots.begin() + static_cast<std::ptrdiff_t>(i * width));
      }
      ASSERT_OK(table().gather({.rows = copies, .head_dim = d, .format = format}, launch()));
      EXPECT_EQ(Read(to, slots.size()), slots);

      const CodeFormat codes{.bits = 4, .group_tokens = 64, .error_norms = true};
      std::vector<std::byte> block(table().code_block_bytes(codes, d));
      std::byte* const block_here = OnDevice(block);
      const std::vector<EncodeTask> encode_want{{.rows = wide.data() + 7 * width, .block = block.data()}}, encode_got{{.rows = pinned + 7 * bytes, .block = block_here}};
      ASSERT_OK(ReferenceKernels().encode({.tasks = encode_want, .format = codes, .head_dim = d}, {}));
      ASSERT_OK(table().encode({.tasks = encode_got, .format = codes, .head_dim = d, .rows = format}, launch()));
      EXPECT_EQ(Read(block_here, block.size()), block);
    }
  }
}

TEST_F(CudaTableTest, RefusesWhatItDoesNotOfferByName) {
  const std::vector<float> scores(64, 1.0f);
  const float* const z = OnDevice(scores);
  std::vector<int32_t> chosen(64);
  std::vector<float> lse(2);
  int32_t count = -3;
  const auto refusal = [&](const auto& change) {
    ChooseTask task{.z = z, .z_stride = 64, .n = 64, .hi = 64, .k = 2, .cap = 64, .chosen = chosen.data(), .count = &count, .lse_all = lse.data(),
                    .lse_out = lse.data() + 1};
    change(task);
    return table().choose({.tasks = {&task, 1}, .group = 1}, launch());
  };
  EXPECT_OK(refusal([](ChooseTask&) {}));
  EXPECT_EQ(count, 2);
  const Status drop = refusal([](ChooseTask& t) { t.target_drop = 0.1f; });
  EXPECT_EQ(drop.code(), StatusCode::kUnsupported);
  EXPECT_NE(drop.message().find("target_drop"), std::string::npos) << drop;
  EXPECT_EQ(refusal([](ChooseTask& t) { t.exact_budget = true; }).code(), StatusCode::kUnsupported);
  EXPECT_EQ(refusal([&](ChooseTask& t) { t.z = scores.data(); }).code(), StatusCode::kInvalid) << "logits in pageable memory";
  EXPECT_EQ(table().score_pages({}, launch()).code(), StatusCode::kUnsupported);
  EXPECT_EQ(table().code_block_bytes({.bits = 3}, 64), 0u);
  EXPECT_EQ(table().code_block_bytes({.bits = 4, .dither = true}, 64), 0u);
  EXPECT_EQ(table().append({}, {}).code(), StatusCode::kInvalid) << "without a stream";
  // Rows that no kernel can read never reach one.
  const std::vector<Half> pageable(64 * 2 * 64);
  const std::vector<RowRun> runs{{pageable.data(), 4}};
  const std::vector<float> q(64);
  std::vector<float> out(64);
  const AttendTask attend{.q = q.data(), .runs = runs, .out = out.data(), .lse = lse.data()};
  EXPECT_EQ(table().attend({.tasks = {&attend, 1}, .group = 1, .head_dim = 64}, launch()).code(), StatusCode::kInvalid);
  EXPECT_EQ(table().attend({.tasks = {}, .group = 1, .head_dim = 80}, launch()).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace prehoc
