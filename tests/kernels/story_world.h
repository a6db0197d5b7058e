// What the stories of the step kernels share. WORLD brings the backend and arrays that it reads:
//
//   WORLD::Array<T>(size or vector)   poisoned, with guard zones: data(), size(), Write(), Read(), GuardsIntact()
//   WORLD::Run(status of an enqueued call)   it was fine, and it is done
#pragma once
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/step_kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace prehoc {

template <class World, class T>
using Of = typename World::template Array<T>;

inline constexpr int32_t kStoryDim = 64;
inline constexpr int32_t kNoRow = std::numeric_limits<int32_t>::max();

// Chunks of 16 positions of one head among four in host memory, in any order; some are not there.
struct StoryChunks {
  StoryChunks(Rng& rng, int32_t positions, double missing) : first_row(static_cast<size_t>(positions + kTokens - 1) / kTokens) {
    for (size_t i = 0; i < first_row.size(); ++i) first_row[i] = static_cast<int32_t>(i) * 4 * kTokens;
    rng.Shuffle(first_row);
    for (int32_t& row : first_row) row = rng.Chance(missing) ? -1 : row;
  }
  bool Has(int32_t p) const { return first_row[static_cast<size_t>(p / kTokens)] >= 0; }
  int32_t RowOf(int32_t p) const { return first_row[static_cast<size_t>(p / kTokens)] + kHeadRow + p % kTokens; }
  int32_t rows() const { return static_cast<int32_t>(first_row.size()) * 4 * kTokens; }
  step::HostRows Table(const int32_t* chunk_row) const {
    return {.chunk_row = chunk_row, .chunk_tokens = kTokens, .num_chunks = static_cast<int32_t>(first_row.size()), .head_row = kHeadRow};
  }

  static constexpr int32_t kTokens = 16, kHeadRow = 2 * kTokens;
  std::vector<int32_t> first_row;
};

// The workspace that a call wants, zeroed.
template <class World>
Of<World, std::byte> StoryWorkspace(const Result<size_t>& bytes) {
  EXPECT_OK(bytes);
  return Of<World, std::byte>(std::vector<std::byte>(bytes.ok() ? *bytes : 0));
}

}  // namespace prehoc
