// Errors name the call; streams and events order work; the device's memory keeps the contract of every DeviceMemory.
#include "base/cuda/device_memory.h"
#include "tests/contract/device_memory_contract.h"
#include "tests/support/cuda_test.h"

namespace prehoc {
namespace {

TEST(CudaErrorTest, NamesTheCallAndTheError) {
  EXPECT_OK(CudaStatus(cudaSuccess, "cudaMalloc(...)"));
  const Status status = CudaStatus(cudaErrorInvalidValue, "file.cc:7 cudaMemcpy(a, b)");
  EXPECT_STATUS(StatusCode::kCuda, "file.cc:7 cudaMemcpy(a, b): cudaErrorInvalidValue", status);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "cudaErrorMemoryAllocation", CudaStatus(cudaErrorMemoryAllocation, "x"));
}

Status Fails() {
  PREHOC_CUDA_TRY(cudaErrorNotSupported);
  return {};
}
TEST(CudaErrorTest, TryReturnsTheStatusWithTheLine) { EXPECT_STATUS(StatusCode::kCuda, "cuda_base_test.cc:", Fails()); }

TEST(CudaErrorTest, DestructorsCount) {
  const int64_t before = UnreportedCudaErrors();
  CountCudaError(cudaSuccess);
  EXPECT_EQ(UnreportedCudaErrors(), before);
  CountCudaError(cudaErrorInvalidValue);
  EXPECT_EQ(UnreportedCudaErrors(), before + 1);
}

TEST(CudaDeviceTest, WithoutADeviceTheErrorSaysWhatIsMissing) {
  const auto device = CurrentCudaDevice();
  if (CudaDeviceCount() > 0) {
    ASSERT_OK(device);
    EXPECT_GE(device->major, 8);
    EXPECT_GT(device->multiprocessors, 0);
  } else {
    EXPECT_FALSE(device.ok());
    EXPECT_NE(device.status().message().find("driver"), std::string::npos);
  }
}

class CudaBaseTest : public CudaTest {};

TEST_F(CudaBaseTest, EventsOrderStreamsAndMeasure) {
  auto stream = CudaStream::Create(), other = CudaStream::Create();
  ASSERT_OK(stream);
  ASSERT_OK(other);
  auto start = CudaEvent::Create(CudaEvent::Timing::kOn), end = CudaEvent::Create(CudaEvent::Timing::kOn);
  ASSERT_OK(start);
  ASSERT_OK(end);
  CudaArray<int32_t> array(1 << 20);
  ASSERT_OK(start->Record(stream->get()));
  ASSERT_OK(CudaStatus(cudaMemsetAsync(array.data(), 0, array.size() * 4, stream->get()), "memset"));
  ASSERT_OK(end->Record(stream->get()));
  ASSERT_OK(end->Before(other->get()));
  ASSERT_OK(other->Synchronize());
  ASSERT_OK(end->Synchronize());
  const auto done = end->Done();
  ASSERT_OK(done);
  EXPECT_TRUE(*done);
  const auto milliseconds = end->MillisecondsSince(*start);
  ASSERT_OK(milliseconds);
  EXPECT_GT(*milliseconds, 0);
  EXPECT_EQ(array.Read()[12345], 0);
  EXPECT_TRUE(array.GuardsIntact());
}

TEST_F(CudaBaseTest, EmptyBuffersAndHugeOnes) {
  EXPECT_OK(CudaBytes::Create(CudaPlace::kDevice, 0));
  EXPECT_OK(CudaBytes::Create(CudaPlace::kPinned, 0));
  EXPECT_STATUS(StatusCode::kOutOfSpace, "cudaMalloc", CudaBytes::Create(CudaPlace::kDevice, size_t{1} << 50));
  EXPECT_OK(CudaStatus(cudaGetLastError(), "the refusal left no error behind"));
}

class CudaWorld final : public DeviceMemoryUnderTest {
 public:
  explicit CudaWorld(size_t budget) : memory_(budget) {}
  DeviceMemory& memory() override { return memory_; }
  std::vector<std::byte> Read(const std::byte* device, size_t bytes) override {
    std::vector<std::byte> host(bytes);
    EXPECT_OK(CudaStatus(cudaMemcpy(host.data(), device, bytes, cudaMemcpyDeviceToHost), "read"));
    return host;
  }
  void Write(std::byte* device, const std::vector<std::byte>& bytes) override {
    EXPECT_OK(CudaStatus(cudaMemcpy(device, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "write"));
  }

 private:
  CudaDeviceMemory memory_;
};
std::vector<DeviceMemoryWorld> Worlds() {
  if (CudaDeviceCount() == 0) return {};
  return {{"cuda", [](size_t budget) { return std::make_unique<CudaWorld>(budget); }}};
}
INSTANTIATE_TEST_SUITE_P(Cuda, DeviceMemoryContract, ::testing::ValuesIn(Worlds()), DeviceMemoryWorldName);

}  // namespace
// Where the list of worlds is empty, the one test of CudaBaseTest says why.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DeviceMemoryContract);
}  // namespace prehoc
