// What every TransferEngine does. A test program names its worlds with
//   INSTANTIATE_TEST_SUITE_P(Memory, TransferEngineContract, ::testing::Values(world), TransferEngineWorldName);
#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "transfer/transfer_engine.h"

namespace prehoc {

// Owns an engine and whatever lies under it. The contract copies between buffers that live in the world, so that an
// engine of another kind can bring memory of its own.
class TransferEngineUnderTest {
 public:
  virtual ~TransferEngineUnderTest() = default;
  virtual TransferEngine& engine() = 0;
};

struct TransferEngineWorld {
  std::string name;
  std::function<std::unique_ptr<TransferEngineUnderTest>()> make;
};
inline std::string TransferEngineWorldName(const ::testing::TestParamInfo<TransferEngineWorld>& info) {
  return info.param.name;
}
inline void PrintTo(const TransferEngineWorld& world, std::ostream* os) { *os << world.name; }

class TransferEngineContract : public ::testing::TestWithParam<TransferEngineWorld> {
 protected:
  TransferEngineContract() : world_(GetParam().make()) {}
  TransferEngine& engine() { return world_->engine(); }
  double Counter(std::string_view name);

 private:
  std::unique_ptr<TransferEngineUnderTest> world_;
};

}  // namespace prehoc
