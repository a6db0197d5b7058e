// Labels of keys: a few channels of each key in few bits, by which positions are ordered (docs/selectors/hshare.md).
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/half.h"
#include "selector/options.h"

namespace prehoc {

// 4 bits: the least value and the step as fp16, then two codes a byte, the first in the low half. 16 bits: fp16 as it is.
struct LabelFormat {
  int32_t channels = 0;
  int32_t bits = 4;
  static LabelFormat Of(const HShareOptions& options, int32_t head_dim);
  size_t bytes() const;  // of one label
};

// The `count` channels with the largest queries[c] * keys[c], best first, equal ones by number.
// queries, keys [head_dim]: sums of |q_c| and |k_c|.
std::vector<int16_t> RankChannels(std::span<const double> queries, std::span<const double> keys, int32_t count);

// key [head_dim]; channels [format.channels]; label [format.bytes()], of any alignment.
void EncodeLabel(const LabelFormat& format, std::span<const int16_t> channels, const Half* key, std::byte* label);

// The channels of a query [head_dim] as they meet labels: with 4 bits rounded as a key's are.
std::vector<float> QueryLabel(const LabelFormat& format, std::span<const int16_t> channels, const float* q);

// z[h * stride + i] = query_h . label_i / sqrt(channels) for `count` labels in a row; query [heads, channels]. +inf where that
// is not a finite number: such a position is looked at, not passed over.
void ScoreLabels(const LabelFormat& format, const std::byte* labels, int64_t count, std::span<const float> queries, float* z,
                 int64_t stride);

}  // namespace prehoc
