// What every Executor does. A test program names its worlds with
//   INSTANTIATE_TEST_SUITE_P(Pool, ExecutorContract, ::testing::Values(world), ExecutorWorldName);
#pragma once
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "base/executor.h"

namespace prehoc {

// Owns an executor and whatever lies under it.
class ExecutorUnderTest {
 public:
  virtual ~ExecutorUnderTest() = default;
  virtual Executor& executor() = 0;
};

struct ExecutorWorld {
  std::string name;
  // An executor that takes at least kContractJobs jobs.
  std::function<std::unique_ptr<ExecutorUnderTest>()> make;
};
inline constexpr int kContractJobs = 1000;
inline std::string ExecutorWorldName(const ::testing::TestParamInfo<ExecutorWorld>& info) { return info.param.name; }
inline void PrintTo(const ExecutorWorld& world, std::ostream* os) { *os << world.name; }

class ExecutorContract : public ::testing::TestWithParam<ExecutorWorld> {
 protected:
  ExecutorContract() : world_(GetParam().make()) {}
  Executor& executor() { return world_->executor(); }

 private:
  std::unique_ptr<ExecutorUnderTest> world_;
};

}  // namespace prehoc
