// Rows as they are stored: what the formats mean, and that every entry takes them for the fp16 rows that they stand for.
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/row_codec.h"
#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr RowFormat kNarrowFormats[] = {RowFormat::kInt8, RowFormat::kE4m3};

// An e4m3 code by the definition of the format (OCP 8-bit floating point, E4M3): sign, 4 bits of exponent with bias 7, 3 of mantissa.
double ValueOf(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = (code & 0x7f) == 0x7f ? kNan : exponent == 0 ? mantissa / 8.0 * std::exp2(-6) : (1 + mantissa / 8.0) * std::exp2(exponent - 7);
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

TEST(RowCodecTest, E4m3HasTheValuesOfItsDefinition) {
  for (int code = 0; code < 256; ++code) {
    const float value = HalfToFloat(E4m3ToHalf(static_cast<uint8_t>(code)));
    const double want = ValueOf(code);
    ASSERT_EQ(std::isnan(value), std::isnan(want)) << code;
    if (std::isnan(want)) continue;
    EXPECT_EQ(value, want) << code;
    EXPECT_EQ(std::signbit(value), code >= 128) << code;
    EXPECT_EQ(HalfToE4m3(E4m3ToHalf(static_cast<uint8_t>(code))), code);
  }
}

TEST(RowCodecTest, E4m3IsTheNearestValueAndNanBeyondTheLargest) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const float x = HalfToFloat(static_cast<Half>(bits));
    const int code = HalfToE4m3(static_cast<Half>(bits));
    if (std::isnan(x) || std::abs(x) > 464) {
      ASSERT_EQ(code & 0x7f, 0x7f) << x;
      continue;
    }
    ASSERT_NE(code & 0x7f, 0x7f) << x;
    const double error = std::abs(ValueOf(code) - x);
    for (const int other : {code - 1, code + 1}) {
      if (other < (code & 0x80) || (other & 0x7f) == 0x7f || other > (code & 0x80) + 0x7e) continue;
      const double of_other = std::abs(ValueOf(other) - x);
      ASSERT_TRUE(error < of_other || (error == of_other && code % 2 == 0)) << x << " became " << code;
    }
  }
}

TEST(RowCodecTest, Int8IsWithinHalfAStepOfItsScale) {
  SeededRng rng;
  for (const int32_t d : HeadDims()) {
    for (const KeyKind kind : kAllKinds) {
      const auto rows = MakeRows(rng, 20, d, kind);
      for (size_t t = 0; t < 20; ++t) {
        const Half* row = rows.data() + t * static_cast<size_t>(2 * d);
        Guarded<std::byte> stored(RowBytes(RowFormat::kInt8, d));
        Guarded<Half> back(static_cast<size_t>(2 * d));
        NarrowRow(row, RowFormat::kInt8, d, stored.data());
        WidenRow(stored.data(), RowFormat::kInt8, d, back.data());
        EXPECT_TRUE(stored.GuardsIntact() && back.GuardsIntact());
        for (int32_t begin = 0; begin < 2 * d;) {
          const int32_t end = std::min(begin + kScaledChannels, begin < d ? d : 2 * d);
          double most = 0;
          for (int32_t c = begin; c < end; ++c) most = std::max<double>(most, std::abs(HalfToFloat(row[c])));
          // The least fp16 that 127 of reach the largest channel.
          const double step = HalfToFloat(FloatToHalfUp(static_cast<float>(most / 127)));
          ASSERT_GE(step * 127 * (1 + 1e-6), most);
          const double reach = most > 126.5 * step && 127 * step >= 65520 ? step : step / 2;  // where fp16 has no 127 steps
          for (int32_t c = begin; c < end; ++c) {
            const double x = HalfToFloat(row[c]), value = HalfToFloat(back[static_cast<size_t>(c)]);
            ASSERT_TRUE(std::isfinite(value));
            ASSERT_LE(std::abs(value - x), reach * (1 + 1e-6) + std::abs(value) * 0x1p-11 + 0x1p-25)
                << "channel " << c << " of " << d << ", kind " << static_cast<int>(kind) << ", step " << step;
          }
          begin = end;
        }
      }
    }
  }
}

TEST(RowCodecTest, WhatIsNotFiniteShowsInItsScaleAndNowhereElse) {
  constexpr int32_t kDim = 64;
  for (const float odd : {kInfinity, -kInfinity, kNan}) {
    std::vector<Half> row(2 * kDim, FloatToHalf(1.5f)), back(row.size());
    row[kDim + 40] = FloatToHalf(odd);
    std::vector<std::byte> stored(RowBytes(RowFormat::kInt8, kDim));
    NarrowRow(row.data(), RowFormat::kInt8, kDim, stored.data());
    WidenRow(stored.data(), RowFormat::kInt8, kDim, back.data());
    for (size_t c = 0; c < back.size(); ++c) EXPECT_EQ(std::isnan(HalfToFloat(back[c])), c >= kDim + 32) << c;
    NarrowRow(row.data(), RowFormat::kE4m3, kDim, stored.data());
    WidenRow(stored.data(), RowFormat::kE4m3, kDim, back.data());
    for (size_t c = 0; c < back.size(); ++c) EXPECT_EQ(std::isnan(HalfToFloat(back[c])), c == kDim + 40) << c;
  }
}

// Rows of a format, one after another, and the fp16 rows that they stand for.
struct StoredRows {
  StoredRows(const std::vector<Half>& rows, RowFormat of_format, int32_t d) : format(of_format), bytes(RowBytes(format, d)), wide(rows.size()) {
    const size_t width = static_cast<size_t>(2 * d), count = rows.size() / width;
    stored.resize(count * bytes);
    for (size_t i = 0; i < count; ++i) {
      NarrowRow(rows.data() + i * width, format, d, stored.data() + i * bytes);
      WidenRow(stored.data() + i * bytes, format, d, wide.data() + i * width);
    }
  }
  // Runs of `wide` as runs of stored rows, but for some that stay.
  std::vector<RowRun> Runs(Rng& rng, const std::vector<RowRun>& of_wide, int32_t d) const {
    std::vector<RowRun> runs = of_wide;
    for (RowRun& run : runs) {
      if (run.rows == nullptr || rng.Chance(0.2)) continue;
      const auto at = static_cast<size_t>(static_cast<const Half*>(run.rows) - wide.data()) / static_cast<size_t>(2 * d);
      run = {stored.data() + at * bytes, run.count, format};
    }
    return runs;
  }

  RowFormat format;
  size_t bytes;
  std::vector<std::byte> stored;
  std::vector<Half> wide;
};

// NaN too: some keys are beyond what e4m3 has.
bool SameBits(std::span<const float> a, std::span<const float> b) { return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0; }

class StoredRowsTest : public KernelTest {};
PREHOC_INSTANTIATE_KERNELS(StoredRowsTest);

TEST_P(StoredRowsTest, AppendWritesThemOrWhatTheyStandFor) {
  SeededRng rng;
  for (const RowFormat format : kNarrowFormats) {
    for (const int32_t d : Dims()) {
      for (const KeyKind kind : kAllKinds) {
        constexpr int32_t kCount = 17;
        const auto rows = MakeRows(rng, kCount, d, kind);
        const int64_t stride = d + 5;
        std::vector<float> k(static_cast<size_t>(kCount * stride)), v(k.size());
        for (int64_t t = 0; t < kCount; ++t) {
          for (int64_t c = 0; c < d; ++c) {
            k[static_cast<size_t>(t * stride + c)] = HalfToFloat(rows[static_cast<size_t>(2 * t * d + c)]);
            v[static_cast<size_t>(t * stride + c)] = HalfToFloat(rows[static_cast<size_t>((2 * t + 1) * d + c)]);
          }
        }
        if (kind == KeyKind::kMixed) k[3] = kInfinity, v[static_cast<size_t>(stride + 1)] = kNan;
        std::vector<Half> halves;
        for (int64_t t = 0; t < kCount; ++t) {
          for (const auto* x : {&k, &v}) {
            for (int64_t c = 0; c < d; ++c) halves.push_back(FloatToHalf((*x)[static_cast<size_t>(t * stride + c)]));
          }
        }
        const StoredRows want(halves, format, d);
        Guarded<std::byte> stored(want.stored.size());
        Guarded<Half> wide(want.wide.size());
        const AppendTask tasks[] = {{.k = k.data(), .v = v.data(), .stride = stride, .rows = stored.data(), .count = kCount},
                                    {.k = k.data(), .v = v.data(), .stride = stride, .rows = wide.data(), .count = kCount, .widened = true}};
        ASSERT_OK(kernels().append({.tasks = tasks, .head_dim = d, .format = format}, launch()));
        EXPECT_TRUE(stored.GuardsIntact() && wide.GuardsIntact());
        for (size_t i = 0; i < want.stored.size(); ++i) {
          ASSERT_EQ(stored[i], want.stored[i]) << "byte " << i % want.bytes << " of row " << i / want.bytes << ", head_dim " << d << ", kind "
                                               << static_cast<int>(kind);
        }
        EXPECT_EQ(std::memcmp(wide.data(), want.wide.data(), want.wide.size() * sizeof(Half)), 0) << RowFormatName(format) << ", head_dim " << d;
      }
    }
  }
}

TEST_P(StoredRowsTest, EveryEntryTakesThemForTheRowsThatTheyStandFor) {
  SeededRng rng;
  for (const RowFormat format : kNarrowFormats) {
    for (const int32_t d : Dims()) {
      for (const int32_t count : {1, 63, 64, 65, 130, 600}) {
        if (count == 600 && d != 64) continue;
        SCOPED_TRACE(std::string(RowFormatName(format)) + ", head_dim " + std::to_string(d) + ", rows " + std::to_string(count));
        const int32_t group = rng.Pick(Groups());
        const auto width = static_cast<size_t>(2 * d), queries = static_cast<size_t>(group * d);
        const StoredRows rows(MakeRows(rng, count, d), format, d);
        const auto wide_runs = SplitIntoRuns(rng, rows.wide, d);
        const auto runs = rows.Runs(rng, wide_runs, d);
        const auto q = rng.Normals(queries, 2);

        Guarded<float> z(static_cast<size_t>(group * count)), want_z(z.size());
        const auto score = [&](const std::vector<RowRun>& of, float* to) {
          const ScoreTask task{.q = q.data(), .runs = of, .z = to, .z_stride = count};
          return kernels().score({.tasks = {&task, 1}, .group = group, .head_dim = d}, launch());
        };
        ASSERT_OK(score(wide_runs, want_z.data()));
        ASSERT_OK(score(runs, z.data()));
        EXPECT_TRUE(SameBits(z.span(), want_z.span()));

        std::vector<float> out[2], lse[2];
        for (const int stored : {0, 1}) {
          out[stored].resize(queries), lse[stored].resize(static_cast<size_t>(group));
          const AttendTask task{.q = q.data(), .runs = stored == 1 ? runs : wide_runs, .out = out[stored].data(), .lse = lse[stored].data()};
          ASSERT_OK(kernels().attend({.tasks = {&task, 1}, .group = group, .head_dim = d}, launch()));
        }
        EXPECT_TRUE(SameBits(out[1], out[0]));
        EXPECT_TRUE(SameBits(lse[1], lse[0]));

        const int32_t last = std::min(count, 50);
        const auto prompt = rng.Normals(static_cast<size_t>(last) * queries, 2);
        std::vector<float> seen[2];
        for (const int stored : {0, 1}) {
          seen[stored].resize(prompt.size());
          const PrefillTask task{.q = prompt.data(), .q_stride = group * d, .out = seen[stored].data(), .out_stride = group * d,
                                 .runs = stored == 1 ? runs : wide_runs};
          ASSERT_OK(kernels().prefill({.tasks = {&task, 1}, .queries = last, .first = count - last, .group = group, .head_dim = d}, launch()));
        }
        EXPECT_TRUE(SameBits(seen[1], seen[0]));

        Guarded<Half> slots(rows.wide.size());
        std::vector<RowCopy> copies;
        std::vector<Half> want;
        for (int32_t i = 0; i < count; ++i) {
          const auto from = static_cast<size_t>(rng.Int(0, count - 1));
          copies.push_back({.from = rows.stored.data() + from * rows.bytes, .to = slots.data() + static_cast<size_t>(i) * width});
          want.insert(want.end(), rows.wide.begin() + static_cast<long>(from * width), rows.wide.begin() + static_cast<long>((from + 1) * width));
        }
        ASSERT_OK(kernels().gather({.rows = copies, .head_dim = d, .format = format}, launch()));
        EXPECT_TRUE(AllEqual(slots.span(), want, {count, 2, d}));
        EXPECT_TRUE(slots.GuardsIntact());
      }
    }
  }
}

TEST_P(StoredRowsTest, CodesAndPageBoundsAreThoseOfTheRowsThatTheyStandFor) {
  SeededRng rng;
  for (const RowFormat format : kNarrowFormats) {
    for (const int32_t d : Dims()) {
      for (const CodeFormat codes : {CodeFormat{}, CodeFormat{.bits = 2, .group_tokens = 16}, CodeFormat{.error_norms = true, .dither = true}}) {
        const StoredRows rows(MakeRows(rng, codes.group_tokens, d), format, d);
        const size_t bytes = kernels().code_block_bytes(codes, d), bounds = static_cast<size_t>(codes.group_tokens / 16 * d);
        std::vector<std::byte> block[2];
        std::vector<Half> lo[2], hi[2];
        for (const size_t stored : {size_t{0}, size_t{1}}) {
          block[stored].resize(bytes), lo[stored].resize(bounds), hi[stored].resize(bounds);
          const EncodeTask task{.rows = stored == 1 ? static_cast<const void*>(rows.stored.data()) : rows.wide.data(), .block = block[stored].data(),
                                .page_lo = lo[stored].data(), .page_hi = hi[stored].data(), .seed = 5};
          ASSERT_OK(kernels().encode({.tasks = {&task, 1}, .format = codes, .head_dim = d, .rows = stored == 1 ? format : RowFormat::kF16}, launch()));
        }
        EXPECT_EQ(block[1], block[0]) << RowFormatName(format) << ", head_dim " << d;
        EXPECT_EQ(lo[1], lo[0]);
        EXPECT_EQ(hi[1], hi[0]);
      }
    }
  }
}

TEST_P(StoredRowsTest, AFormatThatIsNoneIsRefusedByName) {
  constexpr auto kNone = static_cast<RowFormat>(9);
  std::vector<Half> row(32);
  std::vector<float> x(64);
  std::vector<std::byte> block(4096);
  const RowRun runs[] = {{row.data(), 1, kNone}};
  const ScoreTask score{.q = x.data(), .runs = runs, .z = x.data() + 16, .z_stride = 1};
  EXPECT_STATUS(StatusCode::kInvalid, "runs[0].format=9", kernels().score({.tasks = {&score, 1}, .group = 1, .head_dim = 16}, launch()));
  const AttendTask attend{.q = x.data(), .runs = runs, .out = x.data() + 16, .lse = x.data() + 32};
  EXPECT_STATUS(StatusCode::kInvalid, "runs[0].format=9", kernels().attend({.tasks = {&attend, 1}, .group = 1, .head_dim = 16}, launch()));
  const AppendTask append{.k = x.data(), .v = x.data(), .stride = 16, .rows = row.data(), .count = 1};
  EXPECT_STATUS(StatusCode::kInvalid, "format=9", kernels().append({.tasks = {&append, 1}, .head_dim = 16, .format = kNone}, launch()));
  const RowCopy copy{.from = row.data(), .to = row.data()};
  EXPECT_STATUS(StatusCode::kInvalid, "format=9", kernels().gather({.rows = {&copy, 1}, .head_dim = 16, .format = kNone}, launch()));
  const EncodeTask encode{.rows = row.data(), .block = block.data()};
  EXPECT_STATUS(StatusCode::kInvalid, "rows=9", kernels().encode({.tasks = {&encode, 1}, .head_dim = 16, .rows = kNone}, launch()));
}

}  // namespace
}  // namespace prehoc
