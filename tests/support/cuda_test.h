// Tests that need a device: skipped where there is none, and arrays that travel there and back.
#pragma once
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/stream.h"
#include "tests/support/status_matchers.h"

namespace prehoc {

class CudaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (CudaDeviceCount() == 0) GTEST_SKIP() << "skipped: no CUDA device";
  }
};

// [size] T on the device (or pinned), with a poisoned zone on each side.
template <class T>
class CudaArray {
 public:
  explicit CudaArray(size_t size, CudaPlace place = CudaPlace::kDevice)
      : bytes_(Make(place, size * sizeof(T) + 2 * kGuard)), size_(size) {
    EXPECT_OK(CudaStatus(cudaMemset(bytes_.data(), kPoison, bytes_.size()), "poison"));
    Wait();
  }
  explicit CudaArray(const std::vector<T>& values, CudaPlace place = CudaPlace::kDevice) : CudaArray(values.size(), place) {
    Write(values);
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.data() + kGuard); }
  size_t size() const { return size_; }

  void Write(const std::vector<T>& values) {
    EXPECT_EQ(values.size(), size_);
    EXPECT_OK(CudaStatus(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyDefault), "write"));
    Wait();
  }
  void Zero() {
    EXPECT_OK(CudaStatus(cudaMemset(data(), 0, size_ * sizeof(T)), "zero"));
    Wait();
  }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    EXPECT_OK(CudaStatus(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDefault), "read"));
    return values;
  }
  // Nothing was written outside.
  testing::AssertionResult GuardsIntact() const {
    std::vector<uint8_t> all(bytes_.size());
    EXPECT_OK(CudaStatus(cudaMemcpy(all.data(), bytes_.data(), all.size(), cudaMemcpyDefault), "read"));
    for (size_t i = 0; i < all.size(); ++i) {
      if (i >= kGuard && i < all.size() - kGuard) continue;
      if (all[i] != kPoison) return testing::AssertionFailure() << "byte " << i << " of " << all.size() << " was written";
    }
    return testing::AssertionSuccess();
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kPoison = 0xa5;
  static CudaBytes Make(CudaPlace place, size_t size) {
    auto made = CudaBytes::Create(place, size);
    EXPECT_OK(made);
    return std::move(made).value();
  }
  // Copies and fills run on the default stream, which the streams of the tests do not wait for.
  static void Wait() { EXPECT_OK(CudaStatus(cudaDeviceSynchronize(), "wait")); }
  CudaBytes bytes_;
  size_t size_;
};

}  // namespace prehoc
