// The reference step kernels, in memory of this process.
#include <cstring>

#include "tests/kernels/step_stories.h"

namespace prehoc {
namespace {

// As CudaArray: of memory that the backend reads and writes through data() of a const array, too.
template <class T>
class HostArray {
 public:
  explicit HostArray(size_t size, bool = false) : bytes_(size * sizeof(T) + 2 * kGuard, kPoison), size_(size) {}
  explicit HostArray(const std::vector<T>& values, bool = false) : HostArray(values.size()) { Write(values); }
  T* data() const { return reinterpret_cast<T*>(const_cast<uint8_t*>(bytes_.data()) + kGuard); }
  size_t size() const { return size_; }
  void Write(const std::vector<T>& values) {
    EXPECT_EQ(values.size(), size_);
    if (size_ > 0) std::memcpy(static_cast<void*>(data()), values.data(), size_ * sizeof(T));
  }
  std::vector<T> Read() const { return std::vector<T>(data(), data() + size_); }
  testing::AssertionResult GuardsIntact() const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      const bool guard = i < kGuard || i >= bytes_.size() - kGuard;
      if (guard && bytes_[i] != kPoison) return testing::AssertionFailure() << "byte " << i << " of " << bytes_.size() << " was written";
    }
    return testing::AssertionSuccess();
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kPoison = 0xa5;
  std::vector<uint8_t> bytes_;
  size_t size_;
};

struct ReferenceWorld {
  template <class T>
  using Array = HostArray<T>;
  static constexpr bool kHostMemory = true;
  static constexpr int32_t kMostTasks = 4;  // in time
  const step::StepKernels& kernels() const { return step::ReferenceStepKernels(); }
  void* stream() const { return nullptr; }
  void Run(const Status& status) const { ASSERT_OK(status); }
};

class ReferenceStepTest : public testing::Test {
 protected:
  ReferenceWorld world() const { return {}; }
};
PREHOC_STEP_STORIES(ReferenceStepTest)

TEST_F(ReferenceStepTest, RowsAreFp16) {
  EXPECT_STATUS(StatusCode::kUnsupported, "type=1", world().kernels().append({.type = step::RowType::kBF16, .head_dim = 64}, nullptr));
  EXPECT_STATUS(StatusCode::kUnsupported, "type=1", world().kernels().attend({.type = step::RowType::kBF16, .group = 1, .head_dim = 64}, nullptr));
  EXPECT_STATUS(StatusCode::kUnsupported, "type=1", world().kernels().select({.type = step::RowType::kBF16, .group = 1, .head_dim = 64}, nullptr));
}

}  // namespace
}  // namespace prehoc
