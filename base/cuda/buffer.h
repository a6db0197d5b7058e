// Arrays on the device and in pinned host memory, for set-up code: each Create() is a call into the driver.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <utility>

#include "base/result.h"

namespace prehoc {

enum class CudaPlace { kDevice, kPinned };  // pinned: host memory that the device reads and writes at the same address

// Owns `size` bytes (at least 1), aligned to 256, of unspecified content.
class [[nodiscard]] CudaBytes {
 public:
  static Result<CudaBytes> Create(CudaPlace place, size_t size);
  CudaBytes(CudaBytes&& other) noexcept
      : place_(other.place_), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  CudaBytes& operator=(CudaBytes&& other) noexcept {
    std::swap(place_, other.place_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~CudaBytes();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  CudaBytes(CudaPlace place, std::byte* data, size_t size) : place_(place), data_(data), size_(size) {}
  CudaPlace place_ = CudaPlace::kDevice;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace prehoc
