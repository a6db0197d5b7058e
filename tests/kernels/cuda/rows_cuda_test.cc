// append (with encode), gate and gather.
#include <cmath>

#include "kernels/code_block.h"
#include "tests/kernels/cuda/cuda_kernel_test.h"

namespace prehoc {
namespace {

class RowsCudaTest : public CudaKernelTest {};

// Tokens come in calls of random size; ring, blocks and page bounds must be those of the reference over all of them.
TEST_F(RowsCudaTest, AppendAndEncodeGiveTheBytesOfTheReference) {
  SeededRng rng;
  for (const cuda::RowType type : kRowTypes) {
    for (const int32_t d : CudaHeadDims()) {
      for (const CodeFormat format : {CodeFormat{4, 64, false}, CodeFormat{2, 16, true}, CodeFormat{8, 64, true}, CodeFormat{3, 64, true},
                                      CodeFormat{3, 16, false}, CodeFormat{4, 16, true}, CodeFormat{2, 64, false}, CodeFormat{5, 64, true}}) {
        SCOPED_TRACE(testing::Message() << NameOf(type) << ", head_dim " << d << ", bits " << format.bits << " over "
                                        << format.group_tokens);
        constexpr int32_t kTokens = 300, kMaxCount = 70;
        const int32_t ring = 192;  // wraps
        const KeyKind kind = kAllKinds[rng.Int(0, static_cast<int64_t>(std::size(kAllKinds)) - 1)];
        const std::vector<Half> rows = SharedRows(rng, type, kTokens, d, kind);
        const auto width = static_cast<size_t>(d);
        std::vector<float> k, v;
        for (size_t t = 0; t < kTokens; ++t) {
          for (size_t c = 0; c < width; ++c) {
            k.push_back(HalfToFloat(rows[2 * t * width + c])), v.push_back(HalfToFloat(rows[(2 * t + 1) * width + c]));
          }
        }
        const int32_t groups = kTokens / format.group_tokens;
        const size_t block_bytes = LayoutOf(format, d).bytes;
        const CudaArray<float> device_k(k), device_v(v);
        const CudaArray<Half> device_rows(static_cast<size_t>(ring) * 2 * width);
        const CudaArray<std::byte> blocks(static_cast<size_t>(groups) * block_bytes);
        const size_t pages = static_cast<size_t>(groups * format.group_tokens / 16);
        const CudaArray<Half> lo(pages * width), hi(pages * width);
        CudaArray<int32_t> first(1);
        CudaArray<cuda::AppendTask> task(1);
        for (int32_t at = 0; at < kTokens;) {
          const auto count = static_cast<int32_t>(std::min<int64_t>(rng.Chance(0.5) ? 1 : rng.Int(0, kMaxCount), kTokens - at));
          first.Write({at});
          task.Write({{.k = device_k.data() + int64_t{at} * d, .v = device_v.data() + int64_t{at} * d, .stride = d, .first = first.data(),
                       .rows = device_rows.data(), .ring_rows = ring, .count = count, .blocks = blocks.data(), .page_lo = lo.data(),
                       .page_hi = hi.data()}});
          ASSERT_OK(cuda::Append({.tasks = task.data(), .num_tasks = 1, .max_count = kMaxCount, .format = format, .type = type,
                                  .head_dim = d}, stream()));
          ASSERT_OK(Wait());
          at += count;
        }
        const std::vector<Half> stored = AsStored(type, rows);
        std::vector<Half> want(static_cast<size_t>(ring) * 2 * width);
        for (size_t t = kTokens - static_cast<size_t>(ring); t < kTokens; ++t) {
          std::copy_n(stored.begin() + static_cast<std::ptrdiff_t>(t * 2 * width), 2 * width,
                      want.begin() + static_cast<std::ptrdiff_t>(t % static_cast<size_t>(ring) * 2 * width));
        }
        EXPECT_TRUE(AllEqual(device_rows.Read(), want, {ring, 2, d}));
        std::vector<std::byte> want_blocks(blocks.size());
        std::vector<Half> want_lo(lo.size()), want_hi(hi.size());
        std::vector<EncodeTask> tasks;
        for (size_t g = 0; g < static_cast<size_t>(groups); ++g) {
          const size_t tokens = g * static_cast<size_t>(format.group_tokens);
          tasks.push_back({.rows = rows.data() + tokens * 2 * width, .block = want_blocks.data() + g * block_bytes,
                           .page_lo = want_lo.data() + tokens / 16 * width, .page_hi = want_hi.data() + tokens / 16 * width});
        }
        ASSERT_OK(ReferenceKernels().encode({.tasks = tasks, .format = format, .head_dim = d}, {}));
        EXPECT_EQ(blocks.Read(), want_blocks);
        EXPECT_EQ(lo.Read(), want_lo);
        EXPECT_EQ(hi.Read(), want_hi);
        EXPECT_TRUE(device_rows.GuardsIntact() && blocks.GuardsIntact() && lo.GuardsIntact() && hi.GuardsIntact());
      }
    }
  }
}

TEST_F(RowsCudaTest, AKeyThatIsNoNumberMakesItsChannelUnbounded) {
  SeededRng rng;
  constexpr int32_t kDim = 64;
  const CodeFormat format{4, 16, true};
  std::vector<Half> rows = SharedRows(rng, cuda::RowType::kF16, 16, kDim);
  rows[2 * 3 * kDim + 7] = 0x7c00;
  std::vector<float> k(16 * kDim), v(16 * kDim);
  for (size_t i = 0; i < k.size(); ++i) k[i] = HalfToFloat(rows[i / kDim * 2 * kDim + i % kDim]);
  const CudaArray<float> device_k(k), device_v(v);
  const CudaArray<Half> device_rows(32 * 2 * kDim), lo(kDim), hi(kDim);
  const size_t bytes = LayoutOf(format, kDim).bytes;
  const CudaArray<std::byte> blocks(bytes);
  const CudaArray<int32_t> first(std::vector<int32_t>{0});
  const CudaArray<cuda::AppendTask> task(std::vector<cuda::AppendTask>{
      {.k = device_k.data(), .v = device_v.data(), .stride = kDim, .first = first.data(), .rows = device_rows.data(), .ring_rows = 32,
       .count = 16, .blocks = blocks.data(), .page_lo = lo.data(), .page_hi = hi.data()}});
  ASSERT_OK(cuda::Append({.tasks = task.data(), .num_tasks = 1, .max_count = 16, .format = format, .head_dim = kDim}, stream()));
  ASSERT_OK(Wait());
  std::vector<std::byte> want(bytes);
  const EncodeTask tasks[] = {{.rows = rows.data(), .block = want.data()}};
  ASSERT_OK(ReferenceKernels().encode({.tasks = tasks, .format = format, .head_dim = kDim}, {}));
  EXPECT_EQ(blocks.Read(), want);
}

TEST_F(RowsCudaTest, AppendWithoutCodesAndTooManyTokens) {
  constexpr int32_t kDim = 64;
  const CudaArray<float> k(std::vector<float>(20 * kDim, 1.5f));
  const CudaArray<Half> rows(64 * 2 * kDim);
  const CudaArray<int32_t> first(std::vector<int32_t>{60});
  const auto task = [&](int32_t count) {
    return cuda::AppendTask{.k = k.data(), .v = k.data(), .stride = kDim, .first = first.data(), .rows = rows.data(), .ring_rows = 64,
                            .count = count};
  };
  const CudaArray<cuda::AppendTask> tasks(std::vector<cuda::AppendTask>{task(11), task(-1)});
  const std::vector<Half> before = rows.Read();
  ASSERT_OK(cuda::Append({.tasks = tasks.data(), .num_tasks = 2, .max_count = 10, .head_dim = kDim}, stream()));
  ASSERT_OK(Wait());
  EXPECT_EQ(rows.Read(), before) << "more than max_count appends nothing";
  ASSERT_OK(cuda::Append({.tasks = tasks.data(), .num_tasks = 2, .max_count = 11, .head_dim = kDim}, stream()));
  ASSERT_OK(Wait());
  const std::vector<Half> after = rows.Read();
  for (size_t slot = 0; slot < 64; ++slot) {
    const bool written = slot >= 60 || slot < 7;
    EXPECT_EQ(after[slot * 2 * kDim + 5] == FloatToHalf(1.5f), written) << slot;
  }
  EXPECT_STATUS(StatusCode::kUnsupported, "dither=1",
                cuda::Append({.num_tasks = 0, .format = {.dither = true}, .head_dim = kDim}, stream()));
  EXPECT_STATUS(StatusCode::kUnsupported, "bits=6",
                cuda::Append({.num_tasks = 0, .format = {.bits = 6}, .head_dim = kDim}, stream()));
}

TEST_F(RowsCudaTest, GateMatchesTheReferenceAndHoldsAboveTau) {
  SeededRng rng;
  constexpr float kTau = 0.8f;
  for (const int32_t d : CudaHeadDims()) {
    for (const int32_t group : {1, 4, 9}) {
      constexpr size_t kTasks = 5;
      const size_t width = static_cast<size_t>(group * d);
      const auto q = rng.Normals(kTasks * width);
      std::vector<float> anchor = q;
      for (size_t i = 0; i < anchor.size(); ++i) anchor[i] += static_cast<float>(rng.Normal() * 0.3 * static_cast<double>(i / width));
      std::fill_n(anchor.begin() + static_cast<std::ptrdiff_t>(4 * width), d, 0.0f);  // a norm of zero
      const CudaArray<float> device_q(q), device_anchor(anchor), cosine(kTasks);
      const CudaArray<uint8_t> hold(kTasks);
      std::vector<cuda::GateTask> tasks;
      std::vector<GateTask> reference;
      std::vector<float> want(kTasks);
      for (size_t t = 0; t < kTasks; ++t) {
        tasks.push_back({.q = device_q.data() + t * width, .anchor = device_anchor.data() + t * width, .cosine = cosine.data() + t,
                         .hold = hold.data() + t});
        reference.push_back({.q = q.data() + t * width, .anchor = anchor.data() + t * width, .cosine = &want[t]});
      }
      const CudaArray<cuda::GateTask> device(tasks);
      ASSERT_OK(cuda::Gate({.tasks = device.data(), .num_tasks = kTasks, .group = group, .head_dim = d, .tau = kTau}, stream()));
      ASSERT_OK(Wait());
      ASSERT_OK(ReferenceKernels().gate({.tasks = reference, .group = group, .head_dim = d}, {}));
      EXPECT_TRUE(AllClose(cosine.Read(), want, {.absolute = 1e-6}));
      for (size_t t = 0; t < kTasks; ++t) EXPECT_EQ(hold.Read()[t], want[t] > kTau ? 1 : 0) << want[t];
      EXPECT_TRUE(cosine.GuardsIntact() && hold.GuardsIntact());
    }
  }
}

TEST_F(RowsCudaTest, GatherCopiesPiecesAndRefusesThoseThatDoNotExist) {
  SeededRng rng;
  for (const int32_t piece : {16, 48, 512, 2048}) {
    for (const int32_t count : {0, 1, 7, 64, 509}) {
      const int64_t from_limit = 1000, to_limit = 700;
      std::vector<std::byte> source(static_cast<size_t>(from_limit * piece));
      for (std::byte& b : source) b = static_cast<std::byte>(rng.Int(0, 255));
      const CudaArray<std::byte> pinned(source, CudaPlace::kPinned), to(static_cast<size_t>(to_limit * piece));
      std::vector<int32_t> from(static_cast<size_t>(count)), into;
      for (int32_t i = 0; i < to_limit; ++i) into.push_back(i);
      rng.Shuffle(into);
      into.resize(from.size());
      int32_t refused = 0;
      for (size_t i = 0; i < from.size(); ++i) {
        from[i] = static_cast<int32_t>(rng.Int(0, from_limit - 1));
        if (rng.Chance(0.02)) from[i] = rng.Chance(0.5) ? -1 : static_cast<int32_t>(from_limit), ++refused;
      }
      std::vector<std::byte> want = to.Read();
      for (size_t i = 0; i < from.size(); ++i) {
        if (from[i] < 0 || from[i] >= from_limit) continue;
        std::copy_n(source.begin() + int64_t{from[i]} * piece, piece, want.begin() + int64_t{into[i]} * piece);
      }
      const CudaArray<int32_t> device_from(from), device_to(into), device_count(std::vector<int32_t>{count}),
          errors(std::vector<int32_t>{0});
      const cuda::GatherTask task{.from = pinned.data(), .to = to.data(), .from_piece = device_from.data(), .to_piece = device_to.data(),
                                  .count = device_count.data(), .from_limit = from_limit, .to_limit = to_limit, .refused = errors.data()};
      const CudaArray<cuda::GatherTask> tasks(std::vector<cuda::GatherTask>{task});
      ASSERT_OK(cuda::Gather({.tasks = tasks.data(), .num_tasks = 1, .piece_bytes = piece}, stream()));
      ASSERT_OK(Wait());
      EXPECT_EQ(to.Read(), want);
      EXPECT_EQ(errors.Read()[0], refused);
      EXPECT_TRUE(to.GuardsIntact());
    }
  }
  EXPECT_STATUS(StatusCode::kInvalid, "piece_bytes=24", cuda::Gather({.num_tasks = 0, .piece_bytes = 24}, stream()));
}

}  // namespace
}  // namespace prehoc
