// Comparison of arrays: the places of inf and nan first, then the numbers; a failure shows the worst element with its
// coordinates in `shape` and how many others are wrong.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <ranges>
#include <string>
#include <vector>

namespace prehoc {

// An element is right if |got - want| <= absolute + relative * |want|.
struct Tolerance {
  double absolute = 0;
  double relative = 0;
};

// "[2, 17]" for the flat index of an array of `shape` (first dimension varies slowest).
inline std::string Coordinates(size_t index, const std::vector<int64_t>& shape) {
  std::string text = "]";
  for (size_t i = shape.size(); i-- > 0;) {
    const auto extent = static_cast<size_t>(shape[i]);
    text = (i > 0 ? ", " : "") + std::to_string(extent > 0 ? index % extent : index) + text;
    if (extent > 0) index /= extent;
  }
  return "[" + text;
}

// `got` and `want`: any ranges of numbers. An empty shape means one dimension.
template <std::ranges::random_access_range Got, std::ranges::random_access_range Want>
testing::AssertionResult AllClose(const Got& got, const Want& want, Tolerance tolerance,
                                  std::vector<int64_t> shape = {}) {
  const auto size = static_cast<size_t>(std::ranges::size(want));
  if (static_cast<size_t>(std::ranges::size(got)) != size) {
    return testing::AssertionFailure() << std::ranges::size(got) << " elements instead of " << size;
  }
  if (shape.empty()) shape = {static_cast<int64_t>(size)};
  size_t wrong = 0, worst = 0;
  double worst_excess = -1;
  for (size_t i = 0; i < size; ++i) {
    const auto a = static_cast<double>(std::ranges::begin(got)[static_cast<std::ptrdiff_t>(i)]);
    const auto b = static_cast<double>(std::ranges::begin(want)[static_cast<std::ptrdiff_t>(i)]);
    double excess = 0;  // in units of what is allowed
    if (!std::isfinite(a) || !std::isfinite(b)) {
      const bool same = (std::isnan(a) && std::isnan(b)) || a == b;
      excess = same ? 0 : std::numeric_limits<double>::infinity();
    } else if (const double allowed = tolerance.absolute + tolerance.relative * std::abs(b); std::abs(a - b) > allowed) {
      excess = allowed > 0 ? std::abs(a - b) / allowed : std::abs(a - b) * 0x1p200;
    }
    wrong += excess > 0;
    if (excess > worst_excess) worst_excess = excess, worst = i;
  }
  if (wrong == 0) return testing::AssertionSuccess();
  const auto at = static_cast<std::ptrdiff_t>(worst);
  return testing::AssertionFailure() << wrong << " of " << size << " elements differ; worst at "
                                     << Coordinates(worst, shape) << ": got " << std::ranges::begin(got)[at]
                                     << ", want " << std::ranges::begin(want)[at] << " (allowed "
                                     << tolerance.absolute << " + " << tolerance.relative << " * |want|)";
}

// Equal numbers (and nan where nan is wanted).
template <std::ranges::random_access_range Got, std::ranges::random_access_range Want>
testing::AssertionResult AllEqual(const Got& got, const Want& want, std::vector<int64_t> shape = {}) {
  return AllClose(got, want, Tolerance{}, std::move(shape));
}

}  // namespace prehoc
