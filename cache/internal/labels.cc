#include "cache/internal/labels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace prehoc {
namespace {
constexpr float kLevels = 15;  // codes 0 .. 15
constexpr size_t kHeader = 2 * sizeof(Half);

int Code(float x, float lo, float step) {
  const float code = std::floor((x - lo) / step + 0.5f);
  // Not a number for a query that is not finite: any code will do, the score is not finite either.
  return step > 0 && code >= 0 ? static_cast<int>(std::min(code, kLevels)) : 0;
}

Half LoadHalf(const std::byte* from) {
  Half half;
  std::memcpy(&half, from, sizeof half);
  return half;
}

// The channels of a stored label.
void Decode(const LabelFormat& format, const std::byte* label, float* out) {
  if (format.bits == 16) {
    for (int32_t c = 0; c < format.channels; ++c) out[c] = HalfToFloat(LoadHalf(label + 2 * c));
    return;
  }
  const float lo = HalfToFloat(LoadHalf(label)), step = HalfToFloat(LoadHalf(label + sizeof(Half)));
  for (int32_t c = 0; c < format.channels; ++c) {
    const auto two = std::to_integer<unsigned>(label[kHeader + static_cast<size_t>(c / 2)]);
    out[c] = lo + static_cast<float>(c % 2 == 0 ? two & 15u : two >> 4) * step;
  }
}
}  // namespace

LabelFormat LabelFormat::Of(const HShareOptions& options, int32_t head_dim) {
  return {std::clamp(static_cast<int32_t>(options.channels * head_dim + 1e-9), 1, head_dim), options.bits};
}

size_t LabelFormat::bytes() const {
  const auto num = static_cast<size_t>(channels);
  return bits == 16 ? num * sizeof(Half) : kHeader + (num + 1) / 2;
}

std::vector<int16_t> RankChannels(std::span<const double> queries, std::span<const double> keys, int32_t count) {
  std::vector<int16_t> channels(queries.size());
  std::iota(channels.begin(), channels.end(), int16_t{0});
  const auto weight = [&](int16_t c) {
    const double product = queries[static_cast<size_t>(c)] * keys[static_cast<size_t>(c)];
    return std::isnan(product) ? std::numeric_limits<double>::infinity() : product;  // keeps the order one
  };
  std::stable_sort(channels.begin(), channels.end(), [&](int16_t a, int16_t b) { return weight(a) > weight(b); });
  channels.resize(static_cast<size_t>(count));
  return channels;
}

void EncodeLabel(const LabelFormat& format, std::span<const int16_t> channels, const Half* key, std::byte* label) {
  if (format.bits == 16) {
    for (size_t c = 0; c < channels.size(); ++c) std::memcpy(label + 2 * c, key + channels[c], sizeof(Half));
    return;
  }
  float least = std::numeric_limits<float>::infinity(), most = -least;
  bool finite = true;
  for (const int16_t c : channels) {
    const float x = HalfToFloat(key[c]);
    finite = finite && std::isfinite(x);
    least = std::min(least, x);
    most = std::max(most, x);
  }
  if (!finite) least = most = std::numeric_limits<float>::infinity();  // the label says so, the score with it
  const Half lo = FloatToHalf(least), step = finite ? FloatToHalf((most - least) / kLevels) : Half{0};
  std::memcpy(label, &lo, sizeof lo);
  std::memcpy(label + sizeof lo, &step, sizeof step);
  std::fill(label + kHeader, label + format.bytes(), std::byte{0});
  for (size_t c = 0; c < channels.size(); ++c) {
    const int code = Code(HalfToFloat(key[channels[c]]), least, HalfToFloat(step));
    label[kHeader + c / 2] |= static_cast<std::byte>(code << (c % 2 == 0 ? 0 : 4));
  }
}

std::vector<float> QueryLabel(const LabelFormat& format, std::span<const int16_t> channels, const float* q) {
  std::vector<float> label;
  for (const int16_t c : channels) label.push_back(q[c]);
  if (format.bits == 16) return label;
  const auto [least, most] = std::minmax_element(label.begin(), label.end());
  const float lo = *least, step = (*most - lo) / kLevels;
  for (float& x : label) x = lo + static_cast<float>(Code(x, lo, step)) * step;
  return label;
}

void ScoreLabels(const LabelFormat& format, const std::byte* labels, int64_t count, std::span<const float> queries, float* z,
                 int64_t stride) {
  const auto num = static_cast<size_t>(format.channels);
  const float scale = 1 / std::sqrt(static_cast<float>(format.channels));
  std::vector<float> key(num);
  for (int64_t i = 0; i < count; ++i) {
    Decode(format, labels + static_cast<size_t>(i) * format.bytes(), key.data());
    for (size_t h = 0; h * num < queries.size(); ++h) {
      float dot = 0;
      for (size_t c = 0; c < num; ++c) dot += queries[h * num + c] * key[c];
      z[static_cast<int64_t>(h) * stride + i] = std::isfinite(dot) ? dot * scale : std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace prehoc
