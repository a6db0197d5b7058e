// An output buffer that tells what a kernel wrote: poisoned inside, with guard zones around it.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace prehoc {

template <class T>
class Guarded {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Guarded(size_t size) : bytes_((size + 2 * kGuard) * sizeof(T), kPoison), size_(size) {}

  T* data() { return reinterpret_cast<T*>(bytes_.data()) + kGuard; }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.data()) + kGuard; }
  size_t size() const { return size_; }
  std::span<const T> span() const { return {data(), size_}; }
  const T& operator[](size_t i) const { return data()[i]; }

  bool Poisoned(size_t i) const {
    T poison;
    std::memset(&poison, kPoison, sizeof(T));
    return std::memcmp(data() + i, &poison, sizeof(T)) == 0;
  }
  testing::AssertionResult Untouched() const { return PoisonedOutside(0, 0); }
  testing::AssertionResult GuardsIntact() const { return PoisonedOutside(0, size_); }
  // Nothing was written outside [begin, end).
  testing::AssertionResult PoisonedOutside(size_t begin, size_t end) const {
    for (size_t i = 0; i < size_ + 2 * kGuard; ++i) {
      const auto at = static_cast<int64_t>(i) - static_cast<int64_t>(kGuard);
      if (at >= static_cast<int64_t>(begin) && at < static_cast<int64_t>(end)) continue;
      for (size_t b = 0; b < sizeof(T); ++b) {
        if (bytes_[i * sizeof(T) + b] == kPoison) continue;
        return testing::AssertionFailure() << "element " << at << " of " << size_ << " was written; allowed were ["
                                           << begin << ", " << end << ")";
      }
    }
    return testing::AssertionSuccess();
  }

 private:
  static constexpr uint8_t kPoison = 0xa5;
  static constexpr size_t kGuard = 64;
  std::vector<uint8_t> bytes_;
  size_t size_;
};

}  // namespace prehoc
