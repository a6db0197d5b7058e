// Byte-pair merges: which neighbours become one token, and in which order.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace prehoc::reference {

// A table of ranked merges over token ids. Immutable after the Add() calls, then safe from any thread.
class MergeTable {
 public:
  // Two neighbours `left`, `right` become `result`; a lower rank goes first. False if the pair is known.
  bool Add(int32_t left, int32_t right, int32_t rank, int32_t result);

  // Merges in place, lowest rank first and leftmost among equals, until nothing merges.
  // O(n log n) for long input, with 24 bytes of working memory per id.
  void Apply(std::vector<int32_t>* ids) const;

 private:
  struct Merge {
    int32_t rank, result;
  };
  const Merge* Find(int32_t left, int32_t right) const;
  void ApplyShort(std::vector<int32_t>* ids) const;
  void ApplyLong(std::vector<int32_t>* ids) const;

  std::unordered_map<uint64_t, Merge> merges_;  // by pair
};

}  // namespace prehoc::reference
