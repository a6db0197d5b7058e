// The contract of DeviceMemory, over every implementation, plain and behind its fault decorator, and the decorator
// itself.
#include "base/device_memory.h"

#include <cstring>

#include "tests/contract/device_memory_contract.h"
#include "tests/fakes/faulty_device_memory.h"
#include "tests/support/status_matchers.h"

// The sanitizers' allocators abort on sizes that they find absurd; here null is the answer that is looked for.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace prehoc {
namespace {

class HostWorld : public DeviceMemoryUnderTest {
 public:
  explicit HostWorld(size_t budget) : memory_(budget) {}
  DeviceMemory& memory() override { return memory_; }
  std::vector<std::byte> Read(const std::byte* device, size_t bytes) override { return {device, device + bytes}; }
  void Write(std::byte* device, const std::vector<std::byte>& bytes) override {
    std::memcpy(device, bytes.data(), bytes.size());
  }

 private:
  HostDeviceMemory memory_;
};

template <class Base>
class Decorated final : public DeviceMemoryUnderTest {
 public:
  explicit Decorated(size_t budget) : base_(budget) {}
  DeviceMemory& memory() override { return faulty_; }
  std::vector<std::byte> Read(const std::byte* device, size_t bytes) override { return base_.Read(device, bytes); }
  void Write(std::byte* device, const std::vector<std::byte>& bytes) override { base_.Write(device, bytes); }

 private:
  Base base_;
  FaultyDeviceMemory faulty_{&base_.memory()};
};

template <class World>
DeviceMemoryWorld Make(const char* name) {
  return {name, [](size_t budget) { return std::make_unique<World>(budget); }};
}

INSTANTIATE_TEST_SUITE_P(Worlds, DeviceMemoryContract,
                         ::testing::Values(Make<HostWorld>("Host"), Make<Decorated<HostWorld>>("FaultyHost")),
                         DeviceMemoryWorldName);

TEST(FaultyDeviceMemoryTest, RunsOutAtTheAllocationItWasToldTo) {
  HostDeviceMemory base(1 << 20);
  FaultyDeviceMemory memory(&base);
  memory.RunOutAt(2, 1);
  auto first = memory.Allocate(100, "first");
  EXPECT_OK(first);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "second", memory.Allocate(100, "second"));
  EXPECT_STATUS(StatusCode::kOutOfSpace, "on request", memory.Allocate(100, "third"));
  EXPECT_OK(memory.Allocate(100, "fourth"));
  EXPECT_EQ(memory.allocations(), 4);
  EXPECT_EQ(memory.used(), 256u) << "a failed allocation counts nothing";
  EXPECT_EQ(base.used(), 256u);
}

TEST(HostDeviceMemoryTest, ABudgetOfZeroHoldsNothing) {
  HostDeviceMemory memory(0);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "rows needs 256 B", memory.Allocate(1, "rows"));
  EXPECT_EQ(memory.peak(), 0u);
}

TEST(HostDeviceMemoryTest, SaysWhenTheSystemHasNoMemory) {
  HostDeviceMemory memory(SIZE_MAX);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "the system has no", memory.Allocate(size_t{1} << 62, "everything"));
  EXPECT_EQ(memory.used(), 0u);
}

}  // namespace
}  // namespace prehoc
