// The GPU's transfer engine: the contract over host memory, and copies between pinned memory and the device.
#include <numeric>

#include "base/cuda/faults.h"
#include "base/rng.h"
#include "tests/contract/transfer_engine_contract.h"
#include "tests/support/cuda_test.h"
#include "transfer/cuda_transfer_engine.h"

namespace prehoc {
namespace {

class CudaWorld final : public TransferEngineUnderTest {
 public:
  CudaWorld() : engine_(CudaTransferEngine::Create().value()) {}
  TransferEngine& engine() override { return *engine_; }

 private:
  std::unique_ptr<CudaTransferEngine> engine_;
};
// Without a device there is no world to build: the suite below says that it was skipped.
std::vector<TransferEngineWorld> Worlds() {
  if (CudaDeviceCount() == 0) return {};
  return {{"Cuda", [] { return std::make_unique<CudaWorld>(); }}};
}
INSTANTIATE_TEST_SUITE_P(Worlds, TransferEngineContract, testing::ValuesIn(Worlds()), TransferEngineWorldName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TransferEngineContract);

class CudaTransferTest : public CudaTest {};

TEST_F(CudaTransferTest, CalibrationMeasuresBothWays) {
  const auto made = CudaTransferEngine::Calibrate(SteadyClock::Get());
  ASSERT_OK(made);
  ASSERT_GE(made->rates.size(), 4u);
  for (const PieceRate& rate : made->rates) {
    EXPECT_GT(rate.few, 1e7) << rate.piece_bytes;
    EXPECT_GT(rate.many, 1e7) << rate.piece_bytes;
  }
  EXPECT_GT(made->rates.back().few, 4 * made->rates.front().few) << "copies cost a start each";
  EXPECT_GE(made->options.copy_engine_bytes, made->rates.front().piece_bytes);
  const auto engine = CudaTransferEngine::Create(made->options);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->options().copy_engine_bytes, made->options.copy_engine_bytes);
}

class CudaTransferWaysTest : public CudaTransferTest, public testing::WithParamInterface<size_t> {};
INSTANTIATE_TEST_SUITE_P(CopyEngineFrom, CudaTransferWaysTest, testing::Values(size_t{0}, size_t{4096}, size_t{256} << 10, SIZE_MAX));

TEST_P(CudaTransferWaysTest, PiecesOfEverySizeThereAndBack) {
  auto engine = CudaTransferEngine::Create({.copy_engine_bytes = GetParam()});
  ASSERT_OK(engine);
  Rng rng(3);
  for (const size_t bytes : {size_t{1}, size_t{64}, size_t{512}, size_t{1024}, size_t{1088}, size_t{4096}, size_t{16448}, size_t{70000}, size_t{300032}}) {
    constexpr size_t kPieces = 37;
    const size_t stride = (bytes + 63) / 64 * 64;
    std::vector<uint8_t> values(kPieces * stride);
    for (uint8_t& v : values) v = static_cast<uint8_t>(rng.Next());
    const CudaArray<uint8_t> from(values, CudaPlace::kPinned);
    CudaArray<uint8_t> device(values.size()), back(values.size(), CudaPlace::kPinned);
    std::vector<size_t> order(kPieces);
    std::iota(order.begin(), order.end(), size_t{0});
    rng.Shuffle(order);
    std::vector<TransferPiece> there, again;
    for (size_t i = 0; i < kPieces; ++i) {
      const auto at = [&](uint8_t* base, size_t piece) { return reinterpret_cast<std::byte*>(base + piece * stride); };
      there.push_back({at(from.data(), i), at(device.data(), order[i]), bytes});
      again.push_back({at(device.data(), order[i]), at(back.data(), i), bytes});
    }
    for (auto* pieces : {&there, &again}) {
      auto request = (*engine)->Prepare(*pieces);
      ASSERT_OK(request);
      ASSERT_OK(request->Post());
      ASSERT_OK(request->Wait());
      ASSERT_OK(request->Poll()) << "done stays done";
    }
    const std::vector<uint8_t> got = back.Read();
    for (size_t i = 0; i < kPieces; ++i) {
      ASSERT_TRUE(std::equal(values.begin() + static_cast<std::ptrdiff_t>(i * stride), values.begin() + static_cast<std::ptrdiff_t>(i * stride + bytes),
                             got.begin() + static_cast<std::ptrdiff_t>(i * stride))) << bytes << " bytes, piece " << i;
    }
    EXPECT_TRUE(device.GuardsIntact() && back.GuardsIntact());
  }
}

TEST_F(CudaTransferTest, AFailedCallIsToldAndCounted) {
#ifndef PREHOC_TEST_POINTS
  GTEST_SKIP() << "skipped: built without test points";
#endif
  auto engine = CudaTransferEngine::Create();
  ASSERT_OK(engine);
  const CudaArray<uint8_t> from(4096, CudaPlace::kPinned), to(4096);
  int failures = 0;
  for (int n = 1; n < 12; ++n) {
    auto request = (*engine)->Prepare({{reinterpret_cast<std::byte*>(from.data()), reinterpret_cast<std::byte*>(to.data()), 100}});
    ASSERT_OK(request);
    FailNthCudaCall(n);
    Status status = request->Post();
    if (status.ok()) status = request->Wait();
    FailNthCudaCall(0);
    failures += !status.ok();
    if (!status.ok()) {
      EXPECT_EQ(status.code(), StatusCode::kCuda) << status;
    }
    ASSERT_OK(request->Post()) << "the same request goes again";
    ASSERT_OK(request->Wait());
  }
  EXPECT_GE(failures, 3) << "event, copy, record";
}

}  // namespace
}  // namespace prehoc
