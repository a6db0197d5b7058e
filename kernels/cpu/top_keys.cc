#include "kernels/cpu/top_keys.h"

#include <algorithm>
#include <cmath>

namespace prehoc::cpu {
namespace {
constexpr int32_t kAboveAll = 0x7f800001;  // above the key of +inf, the largest there is

// Fills up to a multiple of 16.
int64_t Pad(int32_t* keys, int64_t n) {
  const int64_t padded = (n + 15) / 16 * 16;
  std::fill(keys + n, keys + padded, kNoCandidate);
  return padded;
}

// An interval of keys: at least k of the list are >= low, fewer than k are >= high.
struct Interval {
  int64_t low = int64_t{kNoCandidate} + 1;
  int64_t high = kAboveAll;
};

// Halves the interval at `middle`; returns how many keys are >= middle.
int64_t Split(const VectorOps& ops, const int32_t* keys, int64_t n, int64_t k, int64_t middle, Interval& in) {
  const int64_t count = ops.count_at_least(keys, n, static_cast<int32_t>(middle));
  (count < k ? in.high : in.low) = middle;
  return count;
}

int64_t KthLargest(const VectorOps& ops, const int32_t* keys, int64_t n, int64_t k) {
  Interval in;
  while (in.high - in.low > 1) Split(ops, keys, n, k, in.low + (in.high - in.low) / 2, in);
  return in.low;
}

// Tries to put the interval closely around the k-th largest by what a sample says: two passes instead of ten.
void NarrowBySample(const VectorOps& ops, const int32_t* keys, int64_t n, int64_t k, Interval& in) {
  constexpr int64_t kSample = 256;
  alignas(64) int32_t sample[kSample];
  for (int64_t i = 0; i < kSample; ++i) sample[i] = keys[i * n / kSample];
  const double rank = static_cast<double>(k) * kSample / static_cast<double>(n);
  const double spread = 3 * std::sqrt(rank) + 1;
  const auto below = static_cast<int64_t>(rank + spread), above = static_cast<int64_t>(rank - spread);
  if (below <= kSample) {
    const int64_t key = KthLargest(ops, sample, kSample, below);
    if (key > in.low) Split(ops, keys, n, k, key, in);
  }
  if (above >= 1) {
    const int64_t key = KthLargest(ops, sample, kSample, above);
    if (key > in.low && key < in.high) Split(ops, keys, n, k, key, in);
  }
}
}  // namespace

KeptKeys TopKeys::Select(const VectorOps& ops, const int32_t* keys, int64_t n, int64_t k, int32_t base) {
  const auto room = static_cast<size_t>(n) + 32;
  int32_t* result = result_.Get(2 * room);
  KeptKeys top{result, result + room, 0};
  if (k <= 0 || n == 0) return top;
  Interval in;
  if (ops.count_at_least(keys, n, static_cast<int32_t>(in.low)) <= k) {
    top.count = ops.keep_at_least(keys, n, static_cast<int32_t>(in.low), base, top.key, top.where);
    return top;
  }
  if (n >= 4096) NarrowBySample(ops, keys, n, k, in);
  // Bisection; once few enough keys are left above `low`, on a copy of them alone.
  const int32_t* where = nullptr;
  int64_t count = n;  // an upper bound of the keys >= low
  while (in.high - in.low > 1 && count != k) {
    const int64_t split = Split(ops, keys, n, k, in.low + (in.high - in.low) / 2, in);
    if (split < k) continue;
    count = split;
    if (where == nullptr && count <= 2 * k && 2 * count <= n) {
      int32_t* copy = narrowed_.Get(2 * room);
      const int64_t kept = ops.keep_at_least(keys, n, static_cast<int32_t>(in.low), base, copy, copy + room);
      n = Pad(copy, kept);
      keys = copy;
      where = copy + room;
    }
  }
  const int64_t low = in.low;
  top.count = ops.keep_at_least(keys, n, static_cast<int32_t>(low), where != nullptr ? 0 : base, top.key, top.where);
  if (where != nullptr) {
    for (int64_t i = 0; i < top.count; ++i) top.where[i] = where[top.where[i]];
  }
  if (top.count > k) {
    // The k-th largest occurs more often than there is room: its last occurrences go.
    const auto last = static_cast<int32_t>(low);
    int64_t room_for_ties = k;
    for (int64_t i = 0; i < top.count; ++i) room_for_ties -= top.key[i] > last ? 1 : 0;
    int64_t kept = 0;
    for (int64_t i = 0; i < top.count; ++i) {
      if (top.key[i] == last && room_for_ties-- <= 0) continue;
      top.key[kept] = top.key[i];
      top.where[kept++] = top.where[i];
    }
    top.count = kept;
  }
  return top;
}

void TopKeys::Sort(KeptKeys& keys) {
  // Radix, least significant byte first: stable, so equal keys stay in order of place. `flipped` turns descending signed
  // order into ascending unsigned order.
  const auto n = static_cast<size_t>(keys.count);
  int32_t* other = sort_.Get(2 * n);
  int32_t *from_key = keys.key, *from_where = keys.where, *to_key = other, *to_where = other + n;
  const auto flipped = [](int32_t key) { return ~(static_cast<uint32_t>(key) ^ 0x80000000u); };
  for (int shift = 0; shift < 32; shift += 8) {
    uint32_t begin[257] = {};
    for (size_t i = 0; i < n; ++i) ++begin[((flipped(from_key[i]) >> shift) & 255u) + 1];
    for (int b = 0; b < 256; ++b) begin[b + 1] += begin[b];
    for (size_t i = 0; i < n; ++i) {
      const uint32_t at = begin[(flipped(from_key[i]) >> shift) & 255u]++;
      to_key[at] = from_key[i];
      to_where[at] = from_where[i];
    }
    std::swap(from_key, to_key);
    std::swap(from_where, to_where);
  }
  // Four passes: the result is back where it began.
}

}  // namespace prehoc::cpu
