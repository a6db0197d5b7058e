#include "integrations/reference/engine/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace prehoc::reference {
namespace {

using Type = RopeScaling::Type;

int64_t OriginalPositions(const ModelConfig& c) {
  return c.rope_scaling.original_max_positions > 0 ? c.rope_scaling.original_max_positions : c.max_positions;
}

// base^(2i / d), as fp32 arithmetic gives it.
float Power(double base, int64_t i, int64_t head_dim) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
  return static_cast<float>(std::pow(base, static_cast<double>(exponent)));
}

std::vector<float> PlainInverse(double base, int64_t head_dim) {
  std::vector<float> inverse(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < inverse.size(); ++i) inverse[i] = 1.0f / Power(base, static_cast<int64_t>(i), head_dim);
  return inverse;
}

// The base grows so that the lowest frequency is stretched to `length`.
double DynamicBase(const ModelConfig& c, int64_t length) {
  const double original = static_cast<double>(OriginalPositions(c)), factor = c.rope_scaling.factor;
  const double reach = std::max(static_cast<double>(length), original);
  const double d = c.head_dim;
  return c.rope_theta * std::pow(factor * reach / original - (factor - 1), d / (d - 2));
}

// Wavelengths above original / low are stretched by factor, those below original / high are kept, between them both
// are mixed.
void ScaleLlama3(const ModelConfig& c, std::vector<float>& inverse) {
  const RopeScaling& s = c.rope_scaling;
  const double original = static_cast<double>(OriginalPositions(c));
  for (float& f : inverse) {
    const double wavelength = 2 * std::numbers::pi / f;
    if (wavelength < original / s.high_freq_factor) continue;
    if (wavelength > original / s.low_freq_factor) {
      f = static_cast<float>(f / s.factor);
    } else {
      const double smooth =
          (original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      f = static_cast<float>((1 - smooth) * f / s.factor + smooth * f);
    }
  }
}

// The pair whose wave turns `rotations` times within the original length (a real number).
double CorrectionPair(const ModelConfig& c, double rotations) {
  const double original = static_cast<double>(OriginalPositions(c));
  return c.head_dim * std::log(original / (rotations * 2 * std::numbers::pi)) / (2 * std::log(c.rope_theta));
}

// Fast pairs are kept, slow ones stretched by factor, with a linear ramp between.
void ScaleYarn(const ModelConfig& c, std::vector<float>& inverse) {
  const RopeScaling& s = c.rope_scaling;
  double low = CorrectionPair(c, s.beta_fast), high = CorrectionPair(c, s.beta_slow);
  if (s.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, c.head_dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inverse.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    inverse[i] = static_cast<float>(inverse[i] / s.factor * ramp + inverse[i] * (1 - ramp));
  }
}

double YarnMagnitude(const RopeScaling& s) {
  const auto scaled = [&](double mscale) { return s.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(s.factor) + 1; };
  if (s.mscale != 0 && s.mscale_all_dim != 0) return scaled(s.mscale) / scaled(s.mscale_all_dim);
  return scaled(1);
}

double LongRopeMagnitude(const ModelConfig& c) {
  if (c.rope_scaling.factor <= 1) return 1;
  return std::sqrt(1 + std::log(c.rope_scaling.factor) / std::log(static_cast<double>(OriginalPositions(c))));
}

void DivideBy(const std::vector<double>& factors, const ModelConfig& c, std::vector<float>& inverse) {
  for (size_t i = 0; i < inverse.size() && i < factors.size(); ++i) {
    inverse[i] = 1.0f / (static_cast<float>(factors[i]) * Power(c.rope_theta, static_cast<int64_t>(i), c.head_dim));
  }
}

}  // namespace

int64_t RopeVariantOf(const ModelConfig& config, int64_t length) {
  if (length <= OriginalPositions(config)) return 0;
  if (config.rope_scaling.type == Type::kDynamic) return length;
  return config.rope_scaling.type == Type::kLongRope ? 1 : 0;
}

RopeFrequencies MakeRopeFrequencies(const ModelConfig& config, int64_t length) {
  const RopeScaling& s = config.rope_scaling;
  RopeFrequencies result;
  result.inverse = PlainInverse(config.rope_theta, config.head_dim);
  double magnitude = 1;
  switch (s.type) {
    case Type::kNone: break;
    case Type::kLinear:
      for (float& f : result.inverse) f /= static_cast<float>(s.factor);
      break;
    case Type::kDynamic: result.inverse = PlainInverse(DynamicBase(config, length), config.head_dim); break;
    case Type::kYarn:
      ScaleYarn(config, result.inverse);
      magnitude = s.attention_factor.value_or(YarnMagnitude(s));
      break;
    case Type::kLlama3: ScaleLlama3(config, result.inverse); break;
    case Type::kLongRope:
      DivideBy(RopeVariantOf(config, length) != 0 ? s.long_factor : s.short_factor, config, result.inverse);
      magnitude = s.attention_factor.value_or(LongRopeMagnitude(config));
      break;
  }
  for (size_t i = 0; i < config.rope_freq_factors.size() && i < result.inverse.size(); ++i) {
    result.inverse[i] /= config.rope_freq_factors[i];
  }
  result.magnitude = static_cast<float>(magnitude);
  return result;
}

RopeTables::RopeTables(const ModelConfig& config, int64_t max_tokens)
    : config_(config),
      half_(config.head_dim / 2),
      frequencies_(MakeRopeFrequencies(config, 0)),
      cos_(max_tokens * half_),
      sin_(max_tokens * half_) {}

void RopeTables::Prepare(int64_t first, int64_t count, int64_t length) {
  const int64_t variant = RopeVariantOf(config_, length);
  if (variant != variant_) {
    frequencies_ = MakeRopeFrequencies(config_, length);
    variant_ = variant;
  }
  for (int64_t t = 0; t < count; ++t) {
    const float position = static_cast<float>(first + t);
    for (int64_t i = 0; i < half_; ++i) {
      // The product is rounded to fp32 as transformers rounds it; the functions of it are exact to the last bit.
      const float angle = position * frequencies_.inverse[static_cast<size_t>(i)];
      cos_.data()[t * half_ + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * frequencies_.magnitude;
      sin_.data()[t * half_ + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * frequencies_.magnitude;
    }
  }
}

void RopeTables::Rotate(int64_t index, float* head) const {
  const float* cos = cos_.data() + index * half_;
  const float* sin = sin_.data() + index * half_;
  const bool interleaved = config_.rope_layout == RopeLayout::kInterleaved;
  for (int64_t i = 0; i < half_; ++i) {
    float& a = head[interleaved ? 2 * i : i];
    float& b = head[interleaved ? 2 * i + 1 : i + half_];
    const float x = a, y = b;
    a = x * cos[i] - y * sin[i];
    b = y * cos[i] + x * sin[i];
  }
}

}  // namespace prehoc::reference
