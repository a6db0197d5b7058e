// Which positions of one (layer, KV head) are on the device, and where.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "base/status.h"

namespace prehoc {

// Slots by position: a bitmap with a count per word, so that a position finds its slot by its rank, without a hash. A
// second bitmap adds what the ring holds: that one is what choosing looks at. Not thread-safe.
class HeadResidency {
 public:
  HeadResidency() = default;
  // Bitmaps [max_tokens / 64 rounded up], zero, outliving this.
  HeadResidency(uint64_t* slotted, uint64_t* resident, int64_t max_tokens, int32_t slots);

  const uint64_t* resident_bits() const { return resident_; }
  bool IsResident(int32_t position) const { return Bit(resident_, position); }
  // -1 if the position has no slot. O(1).
  int32_t SlotOf(int32_t position) const {
    if (!Bit(slotted_, position)) return -1;
    const auto word = static_cast<size_t>(position) / 64;
    const uint64_t below = slotted_[word] & ((uint64_t{1} << (position % 64)) - 1);
    return slots_[static_cast<size_t>(ranks_[word] + std::popcount(below))];
  }
  std::span<const int32_t> positions() const { return positions_; }  // that have a slot, sorted
  std::span<const int32_t> slots() const { return slots_; }          // of these
  // The row of a slot is attended to at this step. Whoever makes room asks for it: -1 = not since it came.
  void Use(int32_t slot, int64_t step) { used_[static_cast<size_t>(slot)] = step; }
  int64_t UsedAt(int32_t slot) const { return used_[static_cast<size_t>(slot)]; }
  int32_t free_slots() const { return static_cast<int32_t>(free_.size()); }
  int32_t held() const { return static_cast<int32_t>(positions_.size()); }

  // Takes a free slot out, for a copy under way; Publish() or GiveBack() follows. Requires a free one.
  int32_t Reserve();
  void GiveBack(int32_t slot) { free_.push_back(slot); }
  // The rows of `positions` (sorted, without a slot) are in `slots` from now on. O(held + max_tokens / 64).
  void Publish(std::span<const int32_t> positions, std::span<const int32_t> slots);
  // Frees the slots of `positions` (sorted, each with a slot); those from `ring_begin` on stay resident in the ring.
  void Evict(std::span<const int32_t> positions, int64_t ring_begin);

  // Frees the slots of positions from `begin` on, which are no longer there.
  void Forget(int64_t begin);

  // Starts anew: just `positions` (sorted) are in `slots` (different), and the ring holds [ring_begin, n). Allocates nothing.
  void Restore(std::span<const int32_t> positions, std::span<const int32_t> slots, int64_t ring_begin, int64_t n);

  // Positions [begin, end); nothing where begin >= end.
  void EnterRing(int64_t begin, int64_t end) {
    ForWords(begin, end, [&](size_t word, uint64_t mask) { resident_[word] |= mask; });
  }
  void LeaveRing(int64_t begin, int64_t end) {
    ForWords(begin, end, [&](size_t word, uint64_t mask) { resident_[word] &= ~mask | slotted_[word]; });
  }

  // kCorrupt with the first rule that does not hold; `ring_begin`, `n`: what the ring holds.
  Status CheckInvariants(int64_t ring_begin, int64_t n, int32_t pending_slots) const;

 private:
  static bool Bit(const uint64_t* bits, int32_t position) {
    return (bits[static_cast<size_t>(position) / 64] >> (position % 64)) & 1;
  }
  // fn(word, bits of [begin, end) in it).
  template <class Fn>
  static void ForWords(int64_t begin, int64_t end, const Fn& fn) {
    for (int64_t at = begin; at < end;) {
      const int64_t to = std::min((at / 64 + 1) * 64, end);
      const uint64_t ones = to - at == 64 ? ~uint64_t{0} : (uint64_t{1} << (to - at)) - 1;
      fn(static_cast<size_t>(at / 64), ones << (at % 64));
      at = to;
    }
  }
  void CountRanks();

  uint64_t* slotted_ = nullptr;
  uint64_t* resident_ = nullptr;
  int32_t total_ = 0;                // slots
  std::vector<int32_t> ranks_;       // [words] positions with a slot before the word
  std::vector<int32_t> positions_, slots_;  // [held] by position
  std::vector<int32_t> free_;        // the last one is taken first
  std::vector<int64_t> used_;        // [slots] step
  std::vector<int32_t> merged_positions_, merged_slots_;  // kept for their memory
};

}  // namespace prehoc
