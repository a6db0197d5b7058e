// Labels as stored: what is read back is within half a step, whatever the channels and bits.
#include "cache/internal/labels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

std::vector<Half> Halves(const std::vector<float>& values) {
  std::vector<Half> halves;
  for (const float x : values) halves.push_back(FloatToHalf(x));
  return halves;
}

TEST(Labels, HaveTheSizeThatTheirFormatSays) {
  EXPECT_EQ((LabelFormat{32, 4}).bytes(), 20u);
  EXPECT_EQ((LabelFormat{5, 4}).bytes(), 7u);
  EXPECT_EQ((LabelFormat{32, 16}).bytes(), 64u);
  EXPECT_EQ(LabelFormat::Of({.channels = 0.25, .bits = 4}, 128).channels, 32);
  EXPECT_EQ(LabelFormat::Of({.channels = 0.001, .bits = 4}, 16).channels, 1);
  EXPECT_EQ(LabelFormat::Of({.channels = 1, .bits = 4}, 80).channels, 80);
}

TEST(Labels, ChannelsAreRankedByTheProductOfTheSums) {
  EXPECT_EQ(RankChannels(std::vector<double>{1, 3, 2, 0}, std::vector<double>{4, 1, 1, 9}, 3), (std::vector<int16_t>{0, 1, 2}));
  EXPECT_EQ(RankChannels(std::vector<double>{1, 1, 1}, std::vector<double>{1, 1, 1}, 2), (std::vector<int16_t>{0, 1}));
}

TEST(Labels, ScoresAreThoseOfTheChannelsWithinHalfAStep) {
  SeededRng rng;
  for (int run = 0; run < 200; ++run) {
    const auto dim = static_cast<int32_t>(16 * rng.Int(1, 8));
    const LabelFormat format{static_cast<int32_t>(rng.Int(1, dim)), rng.Chance(0.7) ? 4 : 16};
    std::vector<int16_t> channels;
    for (int32_t c = 0; c < format.channels; ++c) channels.push_back(static_cast<int16_t>((c * 7 + run) % dim));
    constexpr int64_t kCount = 9;
    std::vector<std::byte> labels(kCount * format.bytes() + 1, std::byte{0xab});
    std::vector<std::vector<Half>> keys;
    for (int64_t i = 0; i < kCount; ++i) {
      keys.push_back(Halves(rng.Normals(static_cast<size_t>(dim), 2)));
      EncodeLabel(format, channels, keys.back().data(), labels.data() + static_cast<size_t>(i) * format.bytes());
    }
    EXPECT_EQ(labels.back(), std::byte{0xab});
    std::vector<float> queries;
    for (int h = 0; h < 2; ++h) {
      const std::vector<float> query = QueryLabel(format, channels, rng.Normals(static_cast<size_t>(dim), 1).data());
      queries.insert(queries.end(), query.begin(), query.end());
    }
    std::vector<float> z(2 * (kCount + 3), -99);
    ScoreLabels(format, labels.data(), kCount, queries, z.data(), kCount + 3);
    for (size_t h = 0; h < 2; ++h) {
      for (size_t i = 0; i < kCount; ++i) {
        double exact = 0, slack = 1e-4, least = 1e9, most = -1e9;
        for (const int16_t c : channels) {
          least = std::min<double>(least, HalfToFloat(keys[i][static_cast<size_t>(c)]));
          most = std::max<double>(most, HalfToFloat(keys[i][static_cast<size_t>(c)]));
        }
        const double step = format.bits == 16 ? 0 : (most - least) / 15 * 1.02;  // 15 steps of fp16 may fall short, too
        for (size_t c = 0; c < channels.size(); ++c) {
          const double q = queries[h * channels.size() + c];
          exact += q * HalfToFloat(keys[i][static_cast<size_t>(channels[c])]);
          slack += std::abs(q) * step / 2;
        }
        const double scale = std::sqrt(static_cast<double>(format.channels));
        ASSERT_NEAR(z[h * (kCount + 3) + i], exact / scale, slack / scale) << "run " << run;
      }
      EXPECT_EQ(z[h * (kCount + 3) + kCount], -99);
    }
  }
}

TEST(Labels, WhatIsNotFiniteRanksFirst) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<int16_t> channels = {0, 1};
  for (const int32_t bits : {4, 16}) {
    const LabelFormat format{2, bits};
    std::vector<std::byte> labels(3 * format.bytes());
    const std::vector<std::vector<float>> keys = {{1, 2}, {kInfinity, 2}, {std::nanf(""), 2}};
    for (size_t i = 0; i < 3; ++i) EncodeLabel(format, channels, Halves(keys[i]).data(), labels.data() + i * format.bytes());
    const std::vector<float> query = {1, 1};
    std::vector<float> z(3);
    ScoreLabels(format, labels.data(), 3, query, z.data(), 3);
    EXPECT_TRUE(std::isfinite(z[0]));
    EXPECT_EQ(z[1], kInfinity) << bits;
    EXPECT_EQ(z[2], kInfinity) << bits;
  }
}

}  // namespace
}  // namespace prehoc
