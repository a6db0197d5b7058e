#include "cache/internal/residency.h"

#include <algorithm>
#include <string>

namespace prehoc {

HeadResidency::HeadResidency(uint64_t* slotted, uint64_t* resident, int64_t max_tokens, int32_t slots)
    : slotted_(slotted), resident_(resident), total_(slots), ranks_(static_cast<size_t>((max_tokens + 63) / 64), 0), used_(static_cast<size_t>(slots), -1) {
  // All that will ever be: no later call allocates.
  for (std::vector<int32_t>* list : {&positions_, &slots_, &free_, &merged_positions_, &merged_slots_}) list->reserve(static_cast<size_t>(slots));
  for (int32_t slot = slots - 1; slot >= 0; --slot) free_.push_back(slot);
}

int32_t HeadResidency::Reserve() {
  PREHOC_CHECK(!free_.empty());
  const int32_t slot = free_.back();
  free_.pop_back();
  return slot;
}

void HeadResidency::Publish(std::span<const int32_t> positions, std::span<const int32_t> slots) {
  PREHOC_CHECK(positions.size() == slots.size());
  if (positions.empty()) return;
  merged_positions_.clear();
  merged_slots_.clear();
  size_t old = 0;
  for (size_t i = 0; i < positions.size(); ++i) {
    for (; old < positions_.size() && positions_[old] < positions[i]; ++old) {
      merged_positions_.push_back(positions_[old]);
      merged_slots_.push_back(slots_[old]);
    }
    PREHOC_DCHECK(!Bit(slotted_, positions[i]));
    used_[static_cast<size_t>(slots[i])] = -1;
    merged_positions_.push_back(positions[i]);
    merged_slots_.push_back(slots[i]);
    const auto word = static_cast<size_t>(positions[i]) / 64;
    const uint64_t bit = uint64_t{1} << (positions[i] % 64);
    slotted_[word] |= bit;
    resident_[word] |= bit;
  }
  merged_positions_.insert(merged_positions_.end(), positions_.begin() + static_cast<std::ptrdiff_t>(old), positions_.end());
  merged_slots_.insert(merged_slots_.end(), slots_.begin() + static_cast<std::ptrdiff_t>(old), slots_.end());
  positions_.swap(merged_positions_);
  slots_.swap(merged_slots_);
  CountRanks();
}

void HeadResidency::Evict(std::span<const int32_t> positions, int64_t ring_begin) {
  if (positions.empty()) return;
  size_t kept = 0, gone = 0;
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (gone < positions.size() && positions_[i] == positions[gone]) {
      free_.push_back(slots_[i]);
      const auto word = static_cast<size_t>(positions_[i]) / 64;
      const uint64_t bit = uint64_t{1} << (positions_[i] % 64);
      slotted_[word] &= ~bit;
      if (positions_[i] < ring_begin) resident_[word] &= ~bit;
      ++gone;
    } else {
      positions_[kept] = positions_[i];
      slots_[kept] = slots_[i];
      ++kept;
    }
  }
  PREHOC_CHECK(gone == positions.size());
  positions_.resize(kept);
  slots_.resize(kept);
  CountRanks();
}

void HeadResidency::Forget(int64_t begin) {
  const auto kept = static_cast<size_t>(std::lower_bound(positions_.begin(), positions_.end(), begin) - positions_.begin());
  if (kept == positions_.size()) return;
  for (size_t i = kept; i < positions_.size(); ++i) {
    const auto word = static_cast<size_t>(positions_[i]) / 64;
    const uint64_t bit = uint64_t{1} << (positions_[i] % 64);
    slotted_[word] &= ~bit, resident_[word] &= ~bit;
    free_.push_back(slots_[i]);
  }
  positions_.resize(kept);
  slots_.resize(kept);
  CountRanks();
}

void HeadResidency::Restore(std::span<const int32_t> positions, std::span<const int32_t> slots, int64_t ring_begin, int64_t n) {
  std::fill_n(slotted_, ranks_.size(), 0);
  std::fill_n(resident_, ranks_.size(), 0);
  positions_.clear();
  slots_.clear();
  free_.clear();
  for (int32_t slot = total_ - 1; slot >= 0; --slot) free_.push_back(slot);
  for (const int32_t slot : slots) free_[static_cast<size_t>(total_ - 1 - slot)] = -1;
  std::erase(free_, -1);
  CountRanks();
  Publish(positions, slots);
  EnterRing(ring_begin, n);
}

void HeadResidency::CountRanks() {
  int32_t count = 0;
  for (size_t word = 0; word < ranks_.size(); ++word) {
    ranks_[word] = count;
    count += std::popcount(slotted_[word]);
  }
}

Status HeadResidency::CheckInvariants(int64_t ring_begin, int64_t n, int32_t pending_slots) const {
  const auto broken = [](std::string what) { return Status{StatusCode::kCorrupt, "residency: " + std::move(what)}; };
  if (positions_.size() + free_.size() + static_cast<size_t>(pending_slots) != static_cast<size_t>(total_)) {
    return broken("slots held, free and pending do not add up to " + std::to_string(total_));
  }
  std::vector<bool> used(static_cast<size_t>(total_), false);
  for (const std::vector<int32_t>* list : {&slots_, &free_}) {
    for (const int32_t slot : *list) {
      if (used[static_cast<size_t>(slot)]) return broken("slot " + std::to_string(slot) + " is listed twice");
      used[static_cast<size_t>(slot)] = true;
    }
  }
  for (size_t i = 0; i < positions_.size(); ++i) {
    if (i > 0 && positions_[i - 1] >= positions_[i]) return broken("positions are not sorted");
    if (SlotOf(positions_[i]) != slots_[i]) return broken("position " + std::to_string(positions_[i]) + " finds another slot");
  }
  for (int64_t i = 0; i < static_cast<int64_t>(ranks_.size()) * 64; ++i) {
    const auto position = static_cast<int32_t>(i);
    const bool expected = (i >= ring_begin && i < n) || Bit(slotted_, position);
    if (Bit(resident_, position) != expected) return broken("resident bit of position " + std::to_string(i));
  }
  return {};
}

}  // namespace prehoc
