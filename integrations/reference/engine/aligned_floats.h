// A fixed number of floats (or other plain numbers) on a cache line boundary.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace prehoc::reference {

template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(int64_t count)
      : size_(static_cast<size_t>(count)), data_(static_cast<T*>(::operator new(bytes(), kAlignment))) {
    std::fill_n(data_.get(), size_, T{});
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  size_t size_ = 0;
  std::unique_ptr<T, Free> data_;
};
using AlignedFloats = AlignedArray<float>;

}  // namespace prehoc::reference
