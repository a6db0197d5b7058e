#include "base/test_point.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace prehoc {
namespace {

#ifndef PREHOC_TEST_POINTS
TEST(TestPointTest, AreNothingInThisBuild) {
  PREHOC_TEST_POINT("anything");
  GTEST_SKIP() << "built without PREHOC_TEST_POINTS";
}
#else

TEST(TestPointTest, RunsTheHookOfItsNameWhileThatLives) {
  int a = 0, b = 0;
  PREHOC_TEST_POINT("test.a");
  {
    TestPointHook hook_a("test.a", [&] { ++a; });
    TestPointHook hook_b("test.b", [&] { ++b; });
    PREHOC_TEST_POINT("test.a");
    PREHOC_TEST_POINT("test.a");
    PREHOC_TEST_POINT("test.b");
    PREHOC_TEST_POINT("test.c");
  }
  PREHOC_TEST_POINT("test.a");
  EXPECT_EQ(a, 2);
  EXPECT_EQ(b, 1);
}

TEST(TestPointTest, AHookMayPassPointsItself) {
  int inner = 0;
  TestPointHook hook_inner("test.inner", [&] { ++inner; });
  TestPointHook hook_outer("test.outer", [] { PREHOC_TEST_POINT("test.inner"); });
  PREHOC_TEST_POINT("test.outer");
  EXPECT_EQ(inner, 1);
}

TEST(TestPointTest, TheEndOfAHookWaitsForThoseThatRun) {
  std::atomic<bool> begun{false}, go{false}, ended{false};
  auto hook = std::make_unique<TestPointHook>("test.slow", [&] {
    begun = true;
    while (!go) std::this_thread::yield();
    ended = true;
  });
  std::thread passer([] { PREHOC_TEST_POINT("test.slow"); });
  while (!begun) std::this_thread::yield();
  std::thread opener([&] { go = true; });
  hook.reset();
  EXPECT_TRUE(ended);
  passer.join();
  opener.join();
}

TEST(TestPointTest, MayBePassedFromAnyThreadWhileHooksComeAndGo) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 2000; ++i) PREHOC_TEST_POINT("test.race");
    });
  }
  for (int i = 0; i < 200; ++i) TestPointHook hook("test.race", [] {});
  for (std::thread& thread : threads) thread.join();
}
#endif

}  // namespace
}  // namespace prehoc
