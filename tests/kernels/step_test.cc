// The reference step kernels, in memory of this process.
#include <algorithm>
#include <vector>

#include "tests/kernels/step_stories.h"
#include "tests/support/guarded.h"

namespace prehoc {
namespace {

// As CudaArray: of memory that the backend reads and writes through data() of a const array, too.
template <class T>
class HostArray {
 public:
  explicit HostArray(size_t size, bool = false) : values_(size) {}
  explicit HostArray(const std::vector<T>& values, bool = false) : HostArray(values.size()) { Write(values); }
  T* data() const { return values_.data(); }
  size_t size() const { return values_.size(); }
  void Write(const std::vector<T>& values) {
    EXPECT_EQ(values.size(), size());
    std::copy(values.begin(), values.end(), data());
  }
  std::vector<T> Read() const { return std::vector<T>(data(), data() + size()); }
  testing::AssertionResult GuardsIntact() const { return values_.GuardsIntact(); }

 private:
  mutable Guarded<T> values_;
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
