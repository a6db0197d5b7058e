#include "tests/kernels/kernel_test_util.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace prehoc {

std::string KernelTest::Name(const testing::TestParamInfo<ParamType>& world) {
  return std::string(std::get<0>(world.param)) + (std::get<1>(world.param) ? "_pool" : "_alone");
}

void KernelTest::SetUp() {
  const auto [name, threads] = GetParam();
  kernels_ = FindKernels(name);
  if (kernels_ == nullptr) GTEST_SKIP() << "this CPU or build has no " << name << " kernels";
  if (!threads) return;
  auto pool = ThreadPool::Create({.loop_threads = 3, .spin_iterations = 100});
  ASSERT_OK(pool);
  pool_ = std::move(*pool);
  launch_.executor = pool_.get();
}

const std::vector<int32_t>& HeadDims() {
  static const std::vector<int32_t> dims{16, 48, 64, 80, 128, 256};
  return dims;
}
const std::vector<int32_t>& Groups() {
  static const std::vector<int32_t> groups{1, 3, 4, 8};
  return groups;
}
const std::vector<int32_t>& EdgeSizes() {
  static const std::vector<int32_t> sizes{0, 1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 127, 251, 509};
  return sizes;
}

namespace {
Half Extreme(Rng& rng) {
  static constexpr Half kValues[] = {0x7bff, 0xfbff, 0x7bfe, 0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x0400, 0x3c00};
  return kValues[rng.Int(0, 9)];
}

// fp16 and finite.
Half Clip(double value) { return FloatToHalf(static_cast<float>(std::clamp(value, -65504.0, 65504.0))); }

Half Key(Rng& rng, KeyKind kind, int32_t channel, double channel_value) {
  switch (kind) {
    case KeyKind::kNormal: return Clip(channel_value / 8 + rng.Normal());
    case KeyKind::kHeavyTailed: return Clip(3 * rng.HeavyTailed());
    case KeyKind::kConstant: return Clip(channel_value);
    case KeyKind::kMixed:
      if (channel % 3 == 0) return Clip(channel_value);
      if (channel == 1) return Clip(200 + rng.Normal());
      return channel == 2 ? Clip(20000 * rng.Normal()) : Clip(rng.Normal());
    case KeyKind::kExtremes: return Extreme(rng);
    case KeyKind::kSubnormal: return static_cast<Half>(rng.Int(0, 40) | (rng.Chance(0.5) ? 0x8000 : 0));
    case KeyKind::kManyScales: return Clip(rng.Normal() * std::exp2(rng.Uniform(-24, 14)));
  }
  return 0;
}
}  // namespace

std::vector<Half> MakeRows(Rng& rng, int64_t count, int32_t head_dim, KeyKind kind) {
  std::vector<double> of_channel;
  for (int32_t c = 0; c < head_dim; ++c) of_channel.push_back(rng.HeavyTailed() * std::exp2(rng.Int(-20, 8)));
  std::vector<Half> rows(static_cast<size_t>(count * 2 * head_dim));
  for (int64_t t = 0; t < count; ++t) {
    Half* k = rows.data() + 2 * t * head_dim;
    for (int32_t c = 0; c < head_dim; ++c) {
      k[c] = Key(rng, kind, c, of_channel[static_cast<size_t>(c)]);
      k[head_dim + c] = Clip(rng.Normal());
    }
  }
  return rows;
}

std::vector<RowRun> SplitIntoRuns(Rng& rng, const std::vector<Half>& rows, int32_t head_dim) {
  const auto count = static_cast<int32_t>(rows.size() / static_cast<size_t>(2 * head_dim));
  std::vector<RowRun> runs{{.rows = nullptr, .count = 0}};
  for (int32_t at = 0; at < count;) {
    const auto most = static_cast<int64_t>(rng.Chance(0.5) ? 3 : 100);
    const auto length = static_cast<int32_t>(std::min<int64_t>(rng.Int(0, most), count - at));
    runs.push_back({.rows = rows.data() + int64_t{2} * at * head_dim, .count = length});
    at += length;
  }
  return runs;
}

double NaiveLogit(const float* q, const Half* k, int32_t head_dim) {
  long double sum = 0;
  for (int32_t c = 0; c < head_dim; ++c) sum += static_cast<long double>(q[c]) * HalfToFloat(k[c]);
  return static_cast<double>(sum / std::sqrt(static_cast<long double>(head_dim)));
}

double NaiveMagnitude(const float* q, const Half* k, int32_t head_dim) {
  double sum = 0;
  for (int32_t c = 0; c < head_dim; ++c) sum += std::abs(static_cast<double>(q[c]) * HalfToFloat(k[c]));
  return sum / std::sqrt(static_cast<double>(head_dim));
}

double NaiveLse(const std::vector<double>& z) {
  if (z.empty()) return -std::numeric_limits<double>::infinity();
  const double most = *std::max_element(z.begin(), z.end());
  if (std::isinf(most)) return most;
  double sum = 0;
  for (const double x : z) sum += std::exp(x - most);
  return most + std::log(sum);
}

}  // namespace prehoc
