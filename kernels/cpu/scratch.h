// Working room of a thread that is kept from call to call: a decode step makes a hundred calls and should not allocate.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace prehoc::cpu {

template <class T>
class Scratch {
 public:
  // At least `count` elements, 64-byte aligned, contents unspecified; valid until the next call.
  T* Get(size_t count) {
    if (count > capacity_) {
      // Half as much again: a context grows token by token.
      const size_t bytes = ((count + count / 2) * sizeof(T) + 63) / 64 * 64;
      data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      capacity_ = data_ ? bytes / sizeof(T) : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace prehoc::cpu
