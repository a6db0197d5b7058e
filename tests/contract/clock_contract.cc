#include "tests/contract/clock_contract.h"

#include <thread>
#include <vector>

namespace prehoc {

TEST_P(ClockContract, NeverGoesBackwards) {
  int64_t last = clock().NowNanos();
  for (int i = 0; i < 1000; ++i) {
    const int64_t now = clock().NowNanos();
    ASSERT_GE(now, last);
    last = now;
  }
}

TEST_P(ClockContract, ShowsTheTimeThatPassed) {
  const int64_t start = clock().NowNanos();
  Pass(200'000);
  EXPECT_GE(clock().NowNanos(), start + 200'000);
  EXPECT_GE(clock().SecondsSince(start), 200e-6);
  Pass(100'000);
  EXPECT_GE(clock().SecondsSince(start), 300e-6);
}

TEST_P(ClockContract, NeverGoesBackwardsForAnyThread) {
  std::vector<std::thread> threads;
  std::vector<int> backwards(3, 0);
  for (size_t t = 0; t < backwards.size(); ++t) {
    threads.emplace_back([&, t] {
      int64_t last = clock().NowNanos();
      for (int i = 0; i < 5000; ++i) {
        const int64_t now = clock().NowNanos();
        backwards[t] += now < last;
        last = now;
      }
    });
  }
  for (int i = 0; i < 20; ++i) Pass(1000);
  for (std::thread& thread : threads) thread.join();
  for (const int count : backwards) EXPECT_EQ(count, 0);
}

}  // namespace prehoc
