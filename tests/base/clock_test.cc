// The contract of Clock, over every implementation, plain and behind its fault decorator, and the decorator itself.
#include "tests/contract/clock_contract.h"
#include "tests/fakes/faulty_clock.h"

namespace prehoc {
namespace {

class SteadyWorld final : public ClockUnderTest {
 public:
  Clock& clock() override { return clock_; }
  void Pass(int64_t nanos) override {
    const int64_t end = clock_.NowNanos() + nanos;
    while (clock_.NowNanos() < end) {
    }
  }

 private:
  SteadyClock clock_;
};

class ManualWorld final : public ClockUnderTest {
 public:
  Clock& clock() override { return clock_; }
  void Pass(int64_t nanos) override { clock_.Advance(nanos); }

 private:
  ManualClock clock_{1'000};
};

template <class Base>
class Decorated final : public ClockUnderTest {
 public:
  Clock& clock() override { return faulty_; }
  void Pass(int64_t nanos) override { base_.Pass(nanos); }

 private:
  Base base_;
  FaultyClock faulty_{&base_.clock()};
};

template <class World>
ClockWorld Make(const char* name) {
  return {name, [] { return std::make_unique<World>(); }};
}

INSTANTIATE_TEST_SUITE_P(Worlds, ClockContract,
                         ::testing::Values(Make<SteadyWorld>("Steady"), Make<ManualWorld>("Manual"),
                                           Make<Decorated<SteadyWorld>>("FaultySteady"),
                                           Make<Decorated<ManualWorld>>("FaultyManual")),
                         ClockWorldName);

TEST(ManualClockTest, MovesOnlyWhenTold) {
  ManualClock clock(50);
  EXPECT_EQ(clock.NowNanos(), 50);
  EXPECT_EQ(clock.NowNanos(), 50);
  clock.Advance(2'000'000'000);
  EXPECT_EQ(clock.NowNanos(), 2'000'000'050);
  EXPECT_DOUBLE_EQ(clock.SecondsSince(50), 2.0);
}

TEST(SteadyClockTest, IsOneForTheProcess) {
  const int64_t before = SteadyClock::Get().NowNanos();
  EXPECT_GE(SteadyClock().NowNanos(), before);
  EXPECT_EQ(&SteadyClock::Get(), &SteadyClock::Get());
}

TEST(FaultyClockTest, StallsAndGoesOnFromThere) {
  ManualClock base(100);
  FaultyClock clock(&base);
  clock.Stall();
  base.Advance(1000);
  EXPECT_EQ(clock.NowNanos(), 100);
  clock.Resume();
  EXPECT_EQ(clock.NowNanos(), 100);
  base.Advance(5);
  EXPECT_EQ(clock.NowNanos(), 105);
}

TEST(FaultyClockTest, JumpsAhead) {
  ManualClock base(100);
  FaultyClock clock(&base);
  clock.Jump(1'000'000);
  EXPECT_EQ(clock.NowNanos(), 1'000'100);
  clock.Stall();
  clock.Jump(7);
  base.Advance(50);
  EXPECT_EQ(clock.NowNanos(), 1'000'107);
  clock.Resume();
  base.Advance(1);
  EXPECT_EQ(clock.NowNanos(), 1'000'108);
}

}  // namespace
}  // namespace prehoc
