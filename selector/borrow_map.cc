#include "selector/borrow_map.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"

namespace prehoc {

int32_t Borrowers(double choosing, int32_t count) {
  // The nudge keeps (1 - 0.9) * 10 at 1, though 0.9 is not exact.
  const auto borrowers = static_cast<int32_t>((1 - choosing) * count + 1e-9);
  return std::clamp(borrowers, 0, std::max(0, count - 1));
}

int64_t InCommon(std::span<const int32_t> a, std::span<const int32_t> b) {
  int64_t common = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    common += a[i] == b[j];
    const bool next_i = a[i] <= b[j], next_j = b[j] <= a[i];
    i += next_i;
    j += next_j;
  }
  return common;
}

BorrowMap GreedyBorrowMap(std::span<const int64_t> common, int32_t count, int32_t borrowers) {
  PREHOC_CHECK(common.size() == static_cast<size_t>(count) * static_cast<size_t>(count));
  PREHOC_CHECK(borrowers < std::max(count, 1));
  BorrowMap source(static_cast<size_t>(count));
  std::iota(source.begin(), source.end(), int16_t{0});
  const auto chooses = [&](int32_t i) { return source[static_cast<size_t>(i)] == i; };
  for (int32_t round = 0; round < borrowers; ++round) {
    int64_t most = -1;
    int32_t borrower = -1, lender = -1;
    for (int32_t i = 1; i < count; ++i) {
      for (int32_t j = 0; j < i && chooses(i); ++j) {
        const int64_t both = common[static_cast<size_t>(i) * static_cast<size_t>(count) + static_cast<size_t>(j)];
        if (chooses(j) && both > most) most = both, borrower = i, lender = j;
      }
    }
    for (int16_t& of : source) {
      if (of == borrower) of = static_cast<int16_t>(lender);
    }
  }
  return source;
}

}  // namespace prehoc
