// Worlds and data of the kernel tests. Each test runs for every table of this CPU, alone and on a pool of threads, and is held
// against a naive fp64 computation made in the test.
#pragma once
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "base/executor.h"
#include "base/half.h"
#include "kernels/code_block.h"
#include "kernels/function_table.h"
#include "tests/support/compare.h"
#include "tests/support/guarded.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {

const std::vector<int32_t>& HeadDims();  // 16, 48, 64, 80, 128, 256

class KernelTest : public testing::TestWithParam<std::tuple<const char*, bool>> {
 public:
  static std::string Name(const testing::TestParamInfo<ParamType>& world);

 protected:
  void SetUp() override;
  const KernelTable& kernels() const { return *kernels_; }
  const Launch& launch() const { return launch_; }
  bool on_pool() const { return launch_.executor != nullptr; }
  // Head sizes of a sweep. On the pool two are enough: it adds threads, not arithmetic.
  std::vector<int32_t> Dims() const { return on_pool() ? std::vector<int32_t>{64, 80} : HeadDims(); }
  bool is_reference() const { return kernels_->name == "reference"; }

 private:
  const KernelTable* kernels_ = nullptr;
  std::unique_ptr<ThreadPool> pool_;
  Launch launch_;
};

#define PREHOC_INSTANTIATE_KERNELS(Suite)                                                                     \
  INSTANTIATE_TEST_SUITE_P(Tables, Suite,                                                                     \
                           testing::Combine(testing::Values("reference", "avx2", "avx512"), testing::Bool()), \
                           KernelTest::Name)

const std::vector<int32_t>& Groups();    // 1, 3, 4, 8
// 0, 1, around 16 and 64, primes.
const std::vector<int32_t>& EdgeSizes();

enum class KeyKind {
  kNormal,
  kHeavyTailed,
  kConstant,      // every channel constant over the tokens, values of all sizes
  kMixed,         // some channels constant, one far off, one huge
  kExtremes,      // 65504, -65504, 0 and neighbours
  kSubnormal,     // within a few fp16 steps of 0
  kManyScales,    // 2^-24 .. 2^15
};
inline constexpr KeyKind kAllKinds[] = {KeyKind::kNormal,   KeyKind::kHeavyTailed, KeyKind::kConstant,  KeyKind::kMixed,
                                        KeyKind::kExtremes, KeyKind::kSubnormal,   KeyKind::kManyScales};

// `count` rows [2, head_dim]; K of `kind`, V normal. Finite.
std::vector<Half> MakeRows(Rng& rng, int64_t count, int32_t head_dim, KeyKind kind = KeyKind::kNormal);

// Rows as one run each of random lengths (0 included), in place.
std::vector<RowRun> SplitIntoRuns(Rng& rng, const std::vector<Half>& rows, int32_t head_dim);

// SUM q_c k_c / sqrt(head_dim), in long double.
double NaiveLogit(const float* q, const Half* k, int32_t head_dim);
// SUM |q_c k_c| / sqrt(head_dim): what rounding errors are measured by.
double NaiveMagnitude(const float* q, const Half* k, int32_t head_dim);

// LSE in fp64; -inf for nothing.
double NaiveLse(const std::vector<double>& z);

}  // namespace prehoc
