// What every DeviceMemory does. A test program names its worlds with
//   INSTANTIATE_TEST_SUITE_P(Host, DeviceMemoryContract, ::testing::Values(world), DeviceMemoryWorldName);
#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "base/device_memory.h"

namespace prehoc {

// Owns a memory and whatever lies under it. Bytes are moved by its own means: the contract does not dereference.
class DeviceMemoryUnderTest {
 public:
  virtual ~DeviceMemoryUnderTest() = default;
  virtual DeviceMemory& memory() = 0;
  virtual std::vector<std::byte> Read(const std::byte* device, size_t bytes) = 0;
  virtual void Write(std::byte* device, const std::vector<std::byte>& bytes) = 0;
};

struct DeviceMemoryWorld {
  std::string name;
  std::function<std::unique_ptr<DeviceMemoryUnderTest>(size_t budget)> make;
};
inline std::string DeviceMemoryWorldName(const ::testing::TestParamInfo<DeviceMemoryWorld>& info) {
  return info.param.name;
}
inline void PrintTo(const DeviceMemoryWorld& world, std::ostream* os) { *os << world.name; }

class DeviceMemoryContract : public ::testing::TestWithParam<DeviceMemoryWorld> {
 protected:
  static constexpr size_t kBudget = 64 << 10;
  DeviceMemoryContract() : world_(GetParam().make(kBudget)) {}
  DeviceMemoryUnderTest& world() { return *world_; }
  DeviceMemory& memory() { return world_->memory(); }

 private:
  std::unique_ptr<DeviceMemoryUnderTest> world_;
};

}  // namespace prehoc
