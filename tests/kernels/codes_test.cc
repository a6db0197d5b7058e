// encode and scan: the block as code_block.h describes it, decoded here a second time; and bounds that hold.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/code_block.h"
#include "tests/kernels/kernel_test_util.h"

namespace prehoc {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What code_block.h says, read backwards: every byte of every plane is visited and its fields handed out.
struct Decoded {
  std::vector<double> lo, step, norm;
  std::vector<double> shift;           // [channel], 0 if not dithered
  std::vector<std::vector<int>> code;  // [token][channel]
  double At(size_t t, size_t c) const { return lo[c] + (code[t][c] - shift[c]) * step[c]; }
};

void AddPlanes(const std::byte* planes, size_t count, int width, int weight, size_t first_token, Decoded* out) {
  const size_t quads = static_cast<size_t>(8 / width);
  for (size_t plane = 0; plane < count; ++plane) {
    for (size_t byte = 0; byte < 64; ++byte) {
      int bits = std::to_integer<int>(planes[plane * 64 + byte]);
      for (size_t field = 0; field < quads; ++field, bits >>= width) {
        const size_t channel = (plane * quads + field) * 4 + byte % 4;
        const int value = bits & ((1 << width) - 1);
        if (channel < out->lo.size()) {
          out->code[first_token + byte / 4][channel] += value * weight;
        } else {
          EXPECT_EQ(value, 0) << "unused bits must be zero";
        }
      }
    }
  }
}

constexpr uint64_t kSeed = 0x5eed;  // of all blocks here

// Block `index` of those that were encoded together.
Decoded Decode(const std::byte* block, const CodeFormat& format, int32_t head_dim, size_t index = 0) {
  const auto d = static_cast<size_t>(head_dim), tokens = static_cast<size_t>(format.group_tokens);
  Decoded out;
  const auto halves = [&](size_t count) {
    std::vector<double> values;
    for (size_t i = 0; i < count; ++i, block += 2) {
      Half h;
      std::memcpy(&h, block, 2);
      values.push_back(HalfToFloat(h));
    }
    return values;
  };
  out.lo = halves(d);
  out.step = halves(d);
  if (format.error_norms) out.norm = halves(tokens);
  for (int32_t c = 0; c < head_dim; ++c) {
    out.shift.push_back(format.dither ? CodeShift(CodeBlockSeed(kSeed, static_cast<int64_t>(index)), c) : 0);
  }
  out.code.assign(tokens, std::vector<int>(d, 0));
  for (size_t token = 0; token < tokens; token += 16) {
    const bool high_bits = format.bits == 3 || format.bits == 5;
    const int low_bits = high_bits ? format.bits - 1 : format.bits;
    const size_t planes = d * static_cast<size_t>(low_bits) / 32;
    AddPlanes(block, planes, low_bits, 1, token, &out);
    block += planes * 64;
    if (!high_bits) continue;
    AddPlanes(block, (d + 31) / 32, 1, 1 << low_bits, token, &out);
    block += (d + 31) / 32 * 64;
  }
  return out;
}

std::vector<CodeFormat> AllFormats() {
  std::vector<CodeFormat> formats;
  for (const int32_t bits : {2, 3, 4, 5, 8}) {
    for (const int32_t tokens : {16, 64}) {
      for (const bool norms : {false, true}) {
        for (const bool dither : {false, true}) formats.push_back({bits, tokens, norms, dither});
      }
    }
  }
  return formats;
}

std::string Describe(const CodeFormat& format, int32_t head_dim, KeyKind kind) {
  return std::to_string(format.bits) + " bits over " + std::to_string(format.group_tokens) +
         (format.error_norms ? " with norms" : "") + (format.dither ? ", dithered" : "") + ", head_dim " + std::to_string(head_dim) + ", keys of kind " +
         std::to_string(static_cast<int>(kind));
}

class CodesTest : public KernelTest {
 protected:
  // Blocks of `rows`; the guards of the output are checked.
  std::vector<std::byte> Encode(const std::vector<Half>& rows, const CodeFormat& format, int32_t d,
                                const KernelTable& by, std::vector<Half>* page_lo = nullptr,
                                std::vector<Half>* page_hi = nullptr) {
    const size_t block_bytes = by.code_block_bytes(format, d);
    const size_t row = static_cast<size_t>(2 * d), tokens = static_cast<size_t>(format.group_tokens);
    const size_t groups = rows.size() / row / tokens;
    const size_t bounds = groups * tokens / 16 * static_cast<size_t>(d);
    Guarded<std::byte> blocks(groups * block_bytes);
    Guarded<Half> lo(bounds), hi(bounds);
    std::vector<EncodeTask> tasks;
    for (size_t g = 0; g < groups; ++g) {
      EncodeTask task{.rows = rows.data() + g * tokens * row, .block = blocks.data() + g * block_bytes};
      task.seed = CodeBlockSeed(kSeed, static_cast<int64_t>(g));
      if (page_lo != nullptr) {
        task.page_lo = lo.data() + g * (bounds / groups);
        task.page_hi = hi.data() + g * (bounds / groups);
      }
      tasks.push_back(task);
    }
    EXPECT_OK(by.encode({.tasks = tasks, .format = format, .head_dim = d}, launch()));
    EXPECT_TRUE(blocks.GuardsIntact());
    EXPECT_TRUE(lo.GuardsIntact());
    EXPECT_TRUE(hi.GuardsIntact());
    if (page_lo != nullptr) {
      page_lo->assign(lo.span().begin(), lo.span().end());
      page_hi->assign(hi.span().begin(), hi.span().end());
    }
    return {blocks.span().begin(), blocks.span().end()};
  }
};
PREHOC_INSTANTIATE_KERNELS(CodesTest);

TEST_P(CodesTest, BlockBytesAreTheLayout) {
  EXPECT_EQ(kernels().code_block_bytes({4, 64, false}, 64), 2 * 2 * 64 + 64 * 64 / 2u);
  EXPECT_EQ(kernels().code_block_bytes({4, 16, true}, 128), 2 * 2 * 128 + 2 * 16 + 16 * 128 / 2u);
  EXPECT_EQ(kernels().code_block_bytes({2, 16, false}, 48), 2 * 2 * 48 + 16 * 48 / 4u);
  EXPECT_EQ(kernels().code_block_bytes({3, 16, false}, 48), 2 * 2 * 48 + 16 * 48 / 4 + 16 * 64 / 8u);
  EXPECT_EQ(kernels().code_block_bytes({5, 64, false}, 48), 2 * 2 * 48 + 64 * 48 / 2 + 64 * 64 / 8u);
  EXPECT_EQ(kernels().code_block_bytes({8, 64, true}, 256), 2 * 2 * 256 + 2 * 64 + 64 * 256u);
  for (const CodeFormat& bad : {CodeFormat{6, 64, false}, CodeFormat{0, 64, false}, CodeFormat{4, 32, false}}) {
    EXPECT_EQ(kernels().code_block_bytes(bad, 64), 0u);
  }
  for (const int32_t d : {0, 8, 72, 272, -16}) EXPECT_EQ(kernels().code_block_bytes({}, d), 0u) << d;
}

TEST_P(CodesTest, EveryKeyIsWithinHalfAStepOfItsCode) {
  SeededRng rng;
  for (const CodeFormat& format : AllFormats()) {
    const auto tokens = static_cast<size_t>(format.group_tokens);
    for (const int32_t d : Dims()) {
      for (const KeyKind kind : kAllKinds) {
        SCOPED_TRACE(Describe(format, d, kind));
        const auto rows = MakeRows(rng, 2 * format.group_tokens, d, kind);
        std::vector<Half> page_lo, page_hi;
        const auto blocks = Encode(rows, format, d, kernels(), &page_lo, &page_hi);
        const size_t block_bytes = blocks.size() / 2;
        for (size_t g = 0; g < 2; ++g) {
          const Decoded block = Decode(blocks.data() + g * block_bytes, format, d, g);
          // Dithered, the sum of quotient and shift is rounded once.
          const double half = format.dither ? 0.5 + 0x1p-43 : 0.5;
          for (size_t t = 0; t < tokens; ++t) {
            long double squares = 0;
            for (size_t c = 0; c < static_cast<size_t>(d); ++c) {
              const double k = HalfToFloat(rows[(g * tokens + t) * 2 * static_cast<size_t>(d) + c]);
              const double off = std::abs(k - block.At(t, c));
              ASSERT_LE(off, block.step[c] * half) << "token " << t << ", channel " << c << ", key " << k;
              squares += static_cast<long double>(off) * off;
              if (kind == KeyKind::kConstant) {
                ASSERT_EQ(block.step[c], 0);
                ASSERT_EQ(block.lo[c], k);
              }
              ASSERT_TRUE(std::isfinite(block.step[c]));
              const size_t bound = ((g * tokens + t) / 16) * static_cast<size_t>(d) + c;
              ASSERT_LE(HalfToFloat(page_lo[bound]), k);
              ASSERT_GE(HalfToFloat(page_hi[bound]), k);
            }
            if (!format.error_norms) continue;
            const long double norm = std::sqrt(squares);
            ASSERT_GE(block.norm[t], norm * (1 - 1e-17L)) << "token " << t;
            if (norm < 60000) {
              ASSERT_LE(block.norm[t], norm * (1 + 0x1p-9) + 0x1p-24) << "token " << t;
            }
          }
        }
      }
    }
  }
}

TEST_P(CodesTest, StepsAreNoWiderThanTheyMustBeAndPageBoundsAreTight) {
  SeededRng rng;
  for (const CodeFormat& format : AllFormats()) {
    const int32_t d = 64;
    const auto tokens = static_cast<size_t>(format.group_tokens);
    const double levels = (1 << format.bits) - 1;
    const auto rows = MakeRows(rng, format.group_tokens, d);
    std::vector<Half> page_lo, page_hi;
    const Decoded block = Decode(Encode(rows, format, d, kernels(), &page_lo, &page_hi).data(), format, d);
    for (size_t c = 0; c < 64; ++c) {
      std::vector<float> k;
      for (size_t t = 0; t < tokens; ++t) k.push_back(HalfToFloat(rows[t * 128 + c]));
      const auto [least, most] = std::minmax_element(k.begin(), k.end());
      ASSERT_LE(block.step[c], (static_cast<double>(*most) - *least) / levels * (1 + 0x1p-10));
      for (size_t p = 0; p < tokens / 16; ++p) {
        const auto [lo, hi] = std::minmax_element(k.begin() + static_cast<long>(16 * p), k.begin() + static_cast<long>(16 * p + 16));
        ASSERT_EQ(HalfToFloat(page_lo[p * 64 + c]), *lo);
        ASSERT_EQ(HalfToFloat(page_hi[p * 64 + c]), *hi);
      }
    }
  }
}

TEST_P(CodesTest, RangesThatOverflowFp16AreStillCoded) {
  for (const CodeFormat& format : AllFormats()) {
    std::vector<Half> rows(static_cast<size_t>(format.group_tokens) * 32, 0);
    rows[0] = 0x7bff;   // 65504
    rows[32] = 0xfbff;  // -65504: the range is 131008
    const Decoded block = Decode(Encode(rows, format, 16, kernels()).data(), format, 16);
    EXPECT_EQ(block.lo[0], -65504);
    EXPECT_NEAR(block.step[0], 131008.0 / ((1 << format.bits) - 1), block.step[0] * 0x1p-11);
    EXPECT_LE(std::abs(block.At(0, 0) - 65504), block.step[0] / 2);
    EXPECT_NEAR(block.At(1, 0), -65504, format.dither ? block.step[0] / 2 : 0);
  }
}

TEST_P(CodesTest, TheSameBytesFromEveryTable) {
  SeededRng rng;
  for (const CodeFormat& format : AllFormats()) {
    for (const int32_t d : Dims()) {
      for (const KeyKind kind : kAllKinds) {
        SCOPED_TRACE(Describe(format, d, kind));
        auto rows = MakeRows(rng, 2 * format.group_tokens, d, kind);
        if (rng.Chance(0.3)) rows[static_cast<size_t>(rng.Int(0, d - 1))] = rng.Chance(0.5) ? 0x7c00 : 0x7e01;
        std::vector<Half> lo, hi, want_lo, want_hi;
        const auto got = Encode(rows, format, d, kernels(), &lo, &hi);
        const auto want = Encode(rows, format, d, ReferenceKernels(), &want_lo, &want_hi);
        for (size_t i = 0; i < want.size(); ++i) {
          ASSERT_EQ(std::to_integer<int>(got[i]), std::to_integer<int>(want[i])) << "byte " << i;
        }
        EXPECT_EQ(lo, want_lo);
        EXPECT_EQ(hi, want_hi);
      }
    }
  }
}

TEST_P(CodesTest, NoFiniteBoundOverAKeyThatIsNotFinite) {
  SeededRng rng;
  for (const CodeFormat& format : AllFormats()) {
    for (const int32_t d : {16, 64, 80}) {
      for (const Half odd : {Half{0x7c00}, Half{0xfc00}, Half{0x7e00}, Half{0xffff}}) {
        const int32_t groups = 3, group = 2, tokens = format.group_tokens;
        auto rows = MakeRows(rng, groups * tokens, d);
        const auto token = static_cast<int32_t>(rng.Int(tokens, 2 * tokens - 1));
        const auto channel = static_cast<size_t>(rng.Int(0, d - 1));
        rows[static_cast<size_t>(token * 2 * d) + channel] = odd;
        std::vector<Half> lo, hi;
        const auto blocks = Encode(rows, format, d, kernels(), &lo, &hi);
        const size_t page = static_cast<size_t>(token / 16 * d) + channel;
        const float k = HalfToFloat(odd);
        if (!(k > 0)) {
          EXPECT_EQ(lo[page], 0xfc00);
        }
        if (!(k < 0)) {
          EXPECT_EQ(hi[page], 0x7c00);
        }

        auto q = rng.Normals(static_cast<size_t>(group * d));
        q[channel] = 0;  // the product with the odd channel must not be lost
        Guarded<float> z(static_cast<size_t>(group * groups * tokens)), err(z.size());
        const ScanTask tasks[] = {{.q = q.data(), .blocks = blocks.data(), .groups = groups, .z = z.data(), .err = err.data(),
                                   .z_stride = groups * tokens, .seed = kSeed}};
        ASSERT_OK(kernels().scan({.tasks = tasks, .format = format, .group = group, .head_dim = d}, launch()));
        for (int32_t h = 0; h < group; ++h) {
          for (int32_t i = 0; i < groups * tokens; ++i) {
            const auto at = static_cast<size_t>(h * groups * tokens + i);
            const bool in_odd_group = i / tokens == 1;
            ASSERT_TRUE(std::isfinite(z[at])) << "the other channels still order the group";
            ASSERT_EQ(err[at] == kInfinity, in_odd_group) << err[at] << ", head " << h << ", token " << i;
          }
        }
      }
    }
  }
}

TEST_P(CodesTest, QueriesThatAreNotFiniteOrOverflowProveNothing) {
  const CodeFormat format{4, 16, true};
  SeededRng rng;
  const auto rows = MakeRows(rng, 16, 16);
  const auto blocks = Encode(rows, format, 16, kernels());
  for (const float odd : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN(), 3e38f}) {
    auto q = std::vector<float>(16, odd == 3e38f ? odd : 1.0f);
    q[5] = odd;
    Guarded<float> z(16), err(16);
    const ScanTask tasks[] = {
        {.q = q.data(), .blocks = blocks.data(), .groups = 1, .z = z.data(), .err = err.data(), .z_stride = 16}};
    ASSERT_OK(kernels().scan({.tasks = tasks, .format = format, .group = 1, .head_dim = 16}, launch()));
    for (size_t t = 0; t < 16; ++t) {
      ASSERT_FALSE(std::isnan(err[t]));
      const double exact = NaiveLogit(q.data(), rows.data() + t * 32, 16);
      if (!std::isfinite(z[t]) || !std::isfinite(exact)) {
        ASSERT_EQ(err[t], kInfinity) << "token " << t << ", z " << z[t];
      } else {
        ASSERT_LE(std::abs(exact - z[t]), err[t]);
      }
    }
  }
}

// Of one (head, group of tokens): what the scan's contract allows.
struct Allowed {
  double quantisation = 0;  // SUM |q_c| step_c / 2
  double arithmetic = 0;    // for a backend that rounds weights to 16 bits and adds in fp32
};
Allowed Allow(const float* q, const Decoded& block, int bits) {
  const double levels = (1 << bits) - 1, d = static_cast<double>(block.lo.size());
  double magnitude = 0, widest = 0;
  Allowed allowed;
  for (size_t c = 0; c < block.lo.size(); ++c) {
    const double weight = std::abs(q[c]) * block.step[c];
    allowed.quantisation += weight / 2;
    widest = std::max(widest, weight);
    magnitude += std::abs(q[c]) * std::abs(block.lo[c]) + levels * weight;
  }
  allowed.quantisation /= std::sqrt(d);
  allowed.arithmetic = (levels / 2 * d * widest / 32767 + 2e-5 * magnitude + 1e-25) / std::sqrt(d);
  return allowed;
}

// The property that everything above stands on, over a few hundred thousand (head, token) cases per table.
TEST_P(CodesTest, TheBoundHoldsAndIsNotLoose) {
  SeededRng rng;
  int64_t cases = 0;
  for (const CodeFormat& format : AllFormats()) {
    for (const int32_t d : Dims()) {
      for (const KeyKind kind : kAllKinds) {
        SCOPED_TRACE(Describe(format, d, kind));
        const int32_t group = rng.Pick(Groups()), tokens = format.group_tokens;
        const int32_t groups = tokens == 64 ? 2 : 5, n = groups * tokens;
        const auto rows = MakeRows(rng, n, d, kind);
        const auto blocks = Encode(rows, format, d, ReferenceKernels());
        auto q = rng.Normals(static_cast<size_t>(group * d), std::exp2(rng.Uniform(-6, 6)));
        for (float& x : q) x *= rng.Chance(0.05) ? 50.0f : rng.Chance(0.05) ? 0.0f : 1.0f;
        const int64_t stride = n + 9;
        Guarded<float> z(static_cast<size_t>(group * stride)), err(z.size()), z_only(z.size());
        const ScanTask with[] = {{.q = q.data(), .blocks = blocks.data(), .groups = groups, .z = z.data(),
                                  .err = err.data(), .z_stride = stride, .seed = kSeed}};
        const ScanTask without[] = {
            {.q = q.data(), .blocks = blocks.data(), .groups = groups, .z = z_only.data(), .z_stride = stride, .seed = kSeed}};
        const ScanParams params{.tasks = with, .format = format, .group = group, .head_dim = d};
        ASSERT_OK(kernels().scan(params, launch()));
        ASSERT_OK(kernels().scan({.tasks = without, .format = format, .group = group, .head_dim = d}, launch()));
        EXPECT_TRUE(z.GuardsIntact());
        EXPECT_TRUE(err.GuardsIntact());
        for (int64_t g = 0; g < groups; ++g) {
          const size_t block_bytes = blocks.size() / static_cast<size_t>(groups);
          const Decoded block = Decode(blocks.data() + static_cast<size_t>(g) * block_bytes, format, d, static_cast<size_t>(g));
          for (int64_t h = 0; h < group; ++h) {
            const float* query = q.data() + h * d;
            const Allowed allowed = Allow(query, block, format.bits);
            double q_norm = 0;
            for (int64_t c = 0; c < d; ++c) q_norm += static_cast<double>(query[c]) * query[c];
            q_norm = std::sqrt(q_norm / d);
            for (int64_t t = 0; t < tokens; ++t, ++cases) {
              const auto at = static_cast<size_t>(h * stride + g * tokens + t);
              const double exact = NaiveLogit(query, rows.data() + (g * tokens + t) * 2 * d, d);
              ASSERT_LE(std::abs(exact - z[at]), err[at]) << "head " << h << ", token " << g * tokens + t << ", z " << z[at];
              double decoded = 0;
              for (int64_t c = 0; c < d; ++c) {
                decoded += query[c] * block.At(static_cast<size_t>(t), static_cast<size_t>(c));
              }
              decoded /= std::sqrt(static_cast<double>(d));
              ASSERT_NEAR(z[at], decoded, allowed.arithmetic) << "head " << h << ", token " << g * tokens + t;
              ASSERT_NEAR(z_only[at], decoded, allowed.arithmetic) << "head " << h << ", token " << g * tokens + t;
              double want = allowed.quantisation;
              if (format.error_norms) want = std::min(want, q_norm * block.norm[static_cast<size_t>(t)]);
              ASSERT_LE(err[at], want * (1 + 1e-4) + 2 * allowed.arithmetic);
            }
          }
        }
        for (int64_t h = 0; h < group; ++h) {
          for (int64_t i = n; i < stride; ++i) {
            ASSERT_TRUE(z.Poisoned(static_cast<size_t>(h * stride + i)));
            ASSERT_TRUE(err.Poisoned(static_cast<size_t>(h * stride + i)));
          }
        }
      }
    }
  }
  EXPECT_GE(cases, on_pool() ? 50'000 : 250'000);
}

// Keys of a channel are 1, -3 and what lies between: over the seeds every decoded value has the key as its mean, the variance
// of a uniform error, and no memory of the other channels.
TEST_P(CodesTest, DitheredErrorsAreUniformAndIndependentBetweenChannels) {
  SeededRng rng;
  const int32_t d = 16, kSeeds = 4000;
  for (const int32_t bits : {2, 8}) {
    const CodeFormat format{bits, 16, false, true};
    auto rows = MakeRows(rng, 16, d);
    std::vector<std::byte> block(kernels().code_block_bytes(format, d));
    std::vector<double> sum(16 * 16), squares(16 * 16), products(16);
    for (int64_t s = 0; s < kSeeds; ++s) {
      const EncodeTask task{.rows = rows.data(), .block = block.data(), .seed = CodeBlockSeed(kSeed, s)};
      ASSERT_OK(kernels().encode({.tasks = {&task, 1}, .format = format, .head_dim = d}, {}));
      const Decoded decoded = Decode(block.data(), format, d, static_cast<size_t>(s));
      for (size_t t = 0; t < 16; ++t) {
        double before = 0;
        for (size_t c = 0; c < 16; ++c) {
          const double off = (HalfToFloat(rows[t * 32 + c]) - decoded.At(t, c)) / decoded.step[c];  // [steps]
          sum[t * 16 + c] += off;
          squares[t * 16 + c] += off * off;
          if (c > 0) products[t] += off * before;
          before = off;
        }
      }
    }
    // Five standard deviations: of a mean 1 / sqrt(12 n), of a mean square sqrt(1 / 180 / n), of 15 n products 1 / 12 / sqrt(15 n).
    for (size_t i = 0; i < sum.size(); ++i) {
      EXPECT_LE(std::abs(sum[i] / kSeeds), 5 / std::sqrt(12.0 * kSeeds)) << bits << " " << i;
      EXPECT_NEAR(squares[i] / kSeeds, 1.0 / 12, 5 * std::sqrt(1.0 / 180 / kSeeds)) << bits << " " << i;
    }
    for (const double product : products) EXPECT_LE(std::abs(product / (15 * kSeeds)), 5.0 / 12 / std::sqrt(15.0 * kSeeds));
  }
}

TEST_P(CodesTest, TheVarianceIsThatOfTheSteps) {
  SeededRng rng;
  for (CodeFormat format : AllFormats()) {
    if (!format.dither) continue;
    for (const int32_t d : {16, 128}) {
      const int32_t group = 5, groups = 70, tokens = format.group_tokens;  // more than one part of a scan
      auto rows = MakeRows(rng, groups * tokens, d);
      rows[static_cast<size_t>(tokens * 2 * d + 3)] = 0x7c00;  // block 1 has an infinite key
      const auto blocks = Encode(rows, format, d, kernels());
      const auto q = rng.Normals(static_cast<size_t>(group * d));
      const int64_t n = int64_t{groups} * tokens;
      Guarded<float> z(static_cast<size_t>(group * n)), err(z.size()), variance(static_cast<size_t>(group * groups)), bias(variance.size());
      const ScanTask task{.q = q.data(), .blocks = blocks.data(), .groups = groups, .z = z.data(), .err = err.data(), .z_stride = n,
                          .seed = kSeed, .variance = variance.data(), .bias = bias.data()};
      ASSERT_OK(kernels().scan({.tasks = {&task, 1}, .format = format, .group = group, .head_dim = d}, launch()));
      EXPECT_TRUE(variance.GuardsIntact());
      EXPECT_TRUE(bias.GuardsIntact());
      std::vector<float> exact_z(z.size());
      ScanTask exact = task;
      exact.z = exact_z.data();
      exact.err = exact.variance = exact.bias = nullptr;
      ASSERT_OK(ReferenceKernels().scan({.tasks = {&exact, 1}, .format = format, .group = group, .head_dim = d}, {}));
      for (size_t g = 0; g < static_cast<size_t>(groups); ++g) {
        const Decoded block = Decode(blocks.data() + g * (blocks.size() / static_cast<size_t>(groups)), format, d, g);
        for (size_t h = 0; h < static_cast<size_t>(group); ++h) {
          const float found = variance[h * static_cast<size_t>(groups) + g];
          if (g == 1) {
            EXPECT_EQ(found, kInfinity);
            EXPECT_EQ(bias[h * static_cast<size_t>(groups) + g], kInfinity);
            continue;
          }
          const Allowed allowed = Allow(q.data() + h * static_cast<size_t>(d), block, format.bits);
          double want = 0;
          for (size_t c = 0; c < static_cast<size_t>(d); ++c) {
            want += std::pow(static_cast<double>(q[h * static_cast<size_t>(d) + c]) * block.step[c], 2) / 12 / d;
          }
          const float fixed = bias[h * static_cast<size_t>(groups) + g];
          ASSERT_GE(std::sqrt(found) * (1 + 1e-6), std::sqrt(want) + fixed);
          ASSERT_LE(fixed, allowed.arithmetic);
          ASSERT_GE(std::sqrt(found), std::sqrt(want));
          ASSERT_LE(std::sqrt(found), std::sqrt(want) * (1 + 1e-4) + allowed.arithmetic) << format.bits << " " << g;
          for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
            const size_t at = h * static_cast<size_t>(n) + g * static_cast<size_t>(tokens) + t;
            ASSERT_NEAR(z[at], exact_z[at], allowed.arithmetic);
          }
        }
      }
    }
  }
}

TEST_P(CodesTest, VarianceWithoutDitherOrBoundIsRefused) {
  const std::vector<std::byte> block(kernels().code_block_bytes({4, 16, false, true}, 16));
  const std::vector<float> q(16);
  std::vector<float> z(16), err(16), variance(1);
  ScanTask task{.q = q.data(), .blocks = block.data(), .groups = 1, .z = z.data(), .err = err.data(), .z_stride = 16,
                .variance = variance.data()};
  ScanParams params{.tasks = {&task, 1}, .format = {4, 16, false, false}, .group = 1, .head_dim = 16};
  EXPECT_TRUE(HasStatus(kernels().scan(params, {}), StatusCode::kInvalid, "format.dither=0"));
  params.format.dither = true;
  EXPECT_OK(kernels().scan(params, {}));
  task.err = nullptr;
  EXPECT_TRUE(HasStatus(kernels().scan(params, {}), StatusCode::kInvalid, "err is null"));
  task.err = err.data();
  task.variance = nullptr;
  task.bias = variance.data();
  EXPECT_TRUE(HasStatus(kernels().scan(params, {}), StatusCode::kInvalid, "variance is null"));
}

TEST_P(CodesTest, ScanOfManyTasksAndOfNothing) {
  SeededRng rng;
  const CodeFormat format{4, 64, false};
  const int32_t d = 64, group = 3;
  std::vector<std::vector<std::byte>> blocks;
  std::vector<std::vector<float>> q;
  std::vector<Guarded<float>> z, alone;
  std::vector<ScanTask> tasks;
  const std::vector<int32_t> sizes{0, 1, 2, 17, 0, 63, 1, 64};
  for (const int32_t groups : sizes) {
    blocks.push_back(Encode(MakeRows(rng, groups * 64, d), format, d, ReferenceKernels()));
    q.push_back(rng.Normals(static_cast<size_t>(group * d)));
    z.emplace_back(static_cast<size_t>(group * groups * 64));
    alone.emplace_back(z.back().size());
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    tasks.push_back({.q = q[i].data(), .blocks = blocks[i].data(), .groups = sizes[i], .z = z[i].data(),
                     .z_stride = int64_t{64} * sizes[i]});
  }
  ASSERT_OK(kernels().scan({.tasks = tasks, .format = format, .group = group, .head_dim = d}, launch()));
  ASSERT_OK(kernels().scan({.format = format, .group = group, .head_dim = d}, launch()));
  for (size_t i = 0; i < sizes.size(); ++i) {
    ScanTask task = tasks[i];
    task.z = alone[i].data();
    const ScanTask one[] = {task};
    ASSERT_OK(kernels().scan({.tasks = one, .format = format, .group = group, .head_dim = d}, {}));
    EXPECT_TRUE(AllEqual(z[i].span(), alone[i].span(), {group, int64_t{64} * sizes[i]})) << "task " << i;
    EXPECT_TRUE(z[i].GuardsIntact());
  }
}

}  // namespace
}  // namespace prehoc
