#include "integrations/cli/interrupt.h"

#include <gtest/gtest.h>

#include <csignal>

namespace prehoc::cli {
namespace {

TEST(InterruptGuardTest, RemembersTheFirstSignal) {
  InterruptGuard guard;
  EXPECT_FALSE(InterruptGuard::Requested());
  std::raise(SIGINT);
  EXPECT_TRUE(InterruptGuard::Requested());
  EXPECT_EQ(InterruptGuard::ExitCode(), 130);
}

TEST(InterruptGuardTest, StartsAfreshAndKnowsTermination) {
  InterruptGuard guard;
  EXPECT_FALSE(InterruptGuard::Requested());
  std::raise(SIGTERM);
  EXPECT_EQ(InterruptGuard::ExitCode(), 143);
}

TEST(InterruptGuardDeathTest, TheSecondSignalEndsTheProcess) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        InterruptGuard guard;
        std::raise(SIGINT);
        std::raise(SIGINT);
      },
      testing::KilledBySignal(SIGINT), "");
}

}  // namespace
}  // namespace prehoc::cli
