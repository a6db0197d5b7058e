// Data of the CUDA kernel tests: host arrays in the layouts of both backends, so that the plain C++ reference is the truth.
#pragma once
#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "base/half.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/function_table.h"
#include "tests/kernels/kernel_test_util.h"
#include "tests/support/compare.h"
#include "tests/support/cuda_test.h"
#include "tests/support/seeded_rng.h"

namespace prehoc {

class CudaKernelTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    auto made = CudaStream::Create();
    ASSERT_OK(made);
    stream_.emplace(std::move(*made));
  }
  cudaStream_t stream() const { return stream_->get(); }
  Status Wait() const { return stream_->Synchronize(); }
  // Poisoned, except for what the contract wants zeroed.
  CudaArray<std::byte> Workspace(const Result<size_t>& bytes) {
    EXPECT_OK(bytes);
    CudaArray<std::byte> workspace(bytes.ok() ? *bytes : 0);
    workspace.Zero();
    return workspace;
  }

 private:
  std::optional<CudaStream> stream_;
};

inline const std::vector<int32_t>& CudaHeadDims() {
  static const std::vector<int32_t> dims{64, 96, 128, 256};
  return dims;
}
inline const char* NameOf(cuda::RowType type) { return type == cuda::RowType::kF16 ? "f16" : "bf16"; }
inline constexpr cuda::RowType kRowTypes[] = {cuda::RowType::kF16, cuda::RowType::kBF16};

// The nearest number that the row type and fp16 both hold exactly, so that one array serves both backends.
inline Half Shared(cuda::RowType type, Half h) {
  if (type == cuda::RowType::kF16) return h;
  const float f = HalfToFloat(h);
  if (std::abs(f) < 0x1p-14f) return 0;
  const Half rounded = FloatToHalf(BFloat16ToFloat(FloatToBFloat16(f)));
  return (rounded & 0x7fffu) > 0x7bffu ? static_cast<Half>((h & 0x8000u) | 0x7b00u) : rounded;  // 57344
}
// `count` rows whose numbers are Shared(); K of `kind`.
inline std::vector<Half> SharedRows(Rng& rng, cuda::RowType type, int64_t count, int32_t d, KeyKind kind = KeyKind::kNormal) {
  std::vector<Half> rows = MakeRows(rng, count, d, kind);
  for (Half& h : rows) h = Shared(type, h);
  return rows;
}
// The bits that the device sees.
inline std::vector<Half> AsStored(cuda::RowType type, std::vector<Half> rows) {
  if (type == cuda::RowType::kF16) return rows;
  for (Half& h : rows) h = FloatToBFloat16(HalfToFloat(h));
  return rows;
}

}  // namespace prehoc
