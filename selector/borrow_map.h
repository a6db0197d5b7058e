// Who takes whose choice in HShare (docs/selectors/hshare.md): heads of a layer among each other, and layers among each
// other, by how much of what they chose over the prompt's last queries they have in common. Pure functions.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace prehoc {

// For each head (or layer) the one whose choice it takes: an earlier one that chooses for itself, or itself.
using BorrowMap = std::vector<int16_t>;

// How many of `count` borrow when at least the share `choosing` must choose for itself; at least one always does.
int32_t Borrowers(double choosing, int32_t count);

// Positions that two sorted lists have in common.
int64_t InCommon(std::span<const int32_t> a, std::span<const int32_t> b);

// `common` [count, count], row-major: what i and j < i have in common; other entries are not looked at. Greedy: the pair
// that has most in common, both still choosing, makes i borrow from j, until `borrowers` do; whoever borrowed from i takes
// j's choice from then on. Equal pairs go to the lower i, then to the lower j. Requires borrowers < count, or both 0.
BorrowMap GreedyBorrowMap(std::span<const int64_t> common, int32_t count, int32_t borrowers);

}  // namespace prehoc
