// Running variances of the keys' channels of one (layer, KV head), for the mass gate.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/half.h"

namespace prehoc {

class KeyVariance {
 public:
  void Reset(size_t head_dim) {
    count_ = 0;
    sums_.assign(head_dim, 0);
    squares_.assign(head_dim, 0);
    values_.assign(head_dim, 0);
  }
  void Add(const Half* key) {  // [head_dim]
    ++count_;
    for (size_t c = 0; c < sums_.size(); ++c) {
      const double x = HalfToFloat(key[c]);
      sums_[c] += x;
      squares_[c] += x * x;
    }
  }
  int64_t count() const { return count_; }
  void Update() {  // values() from what was added
    const double n = static_cast<double>(std::max<int64_t>(1, count_));
    for (size_t c = 0; c < sums_.size(); ++c) {
      const double mean = sums_[c] / n;
      values_[c] = static_cast<float>(std::max(0.0, squares_[c] / n - mean * mean));
    }
  }
  const float* values() const { return values_.data(); }  // [head_dim]

 private:
  int64_t count_ = 0;
  std::vector<double> sums_, squares_;
  std::vector<float> values_;
};

}  // namespace prehoc
