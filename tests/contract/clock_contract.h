// What every Clock does. A test program names its worlds with
//   INSTANTIATE_TEST_SUITE_P(Steady, ClockContract, ::testing::Values(world), ClockWorldName);
#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "base/clock.h"

namespace prehoc {

// Owns a clock and whatever lies under it.
class ClockUnderTest {
 public:
  virtual ~ClockUnderTest() = default;
  virtual Clock& clock() = 0;
  virtual void Pass(int64_t nanos) = 0;  // returns after at least `nanos` of the clock's time
};

struct ClockWorld {
  std::string name;
  std::function<std::unique_ptr<ClockUnderTest>()> make;
};
inline std::string ClockWorldName(const ::testing::TestParamInfo<ClockWorld>& info) { return info.param.name; }
inline void PrintTo(const ClockWorld& world, std::ostream* os) { *os << world.name; }

class ClockContract : public ::testing::TestWithParam<ClockWorld> {
 protected:
  ClockContract() : world_(GetParam().make()) {}
  Clock& clock() { return world_->clock(); }
  void Pass(int64_t nanos) { world_->Pass(nanos); }

 private:
  std::unique_ptr<ClockUnderTest> world_;
};

}  // namespace prehoc
