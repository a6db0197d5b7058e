#include "integrations/cli/disk_speed.h"

#include <gtest/gtest.h>

#include "base/units.h"
#include "integrations/cli/machine.h"
#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

TEST(DiskSpeedTest, MeasuresAndLeavesNothing) {
  TempDir dir;
  ManualExecutor executor;
  const auto speed = MeasureDisk(dir.path(), 3 * kMiB, executor, SteadyClock::Get());
  ASSERT_OK(speed);
  EXPECT_GT(speed->write_rate, 0);
  EXPECT_GT(speed->read_rate, 0);
  EXPECT_GT(speed->free_bytes, 0u);
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(DiskSpeedTest, RefusalsNameTheDirectory) {
  ManualExecutor executor;
  EXPECT_STATUS(StatusCode::kIoError, "/no/such", MeasureDisk("/no/such", kMiB, executor, SteadyClock::Get()));
  TempDir dir;
  EXPECT_STATUS(StatusCode::kOutOfSpace, "--test-size", MeasureDisk(dir.path(), uint64_t{1} << 60, executor, SteadyClock::Get()));
}

TEST(MachineTest, KnowsThisProcess) {
  EXPECT_FALSE(CpuName().empty());
  EXPECT_GT(PeakResidentBytes(), 1 << 20);
  EXPECT_EQ(FirstLine("/no/such/file"), "");
}

}  // namespace
}  // namespace prehoc::cli
