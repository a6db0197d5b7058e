// Rates by a clock that engines move, and the choice between two.
#include "transfer/transfer_speed.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/rng.h"
#include "tests/support/status_matchers.h"
#include "transfer/memory_transfer_engine.h"

namespace prehoc {
namespace {

// Takes `per_piece` and `per_byte` nanoseconds, the first time twice as long.
class TimedEngine final : public TransferEngine {
 public:
  TimedEngine(ManualClock* clock, int64_t per_piece, double per_byte) : clock_(clock), per_piece_(per_piece), per_byte_(per_byte) {}
  int posts = 0;
  int fail_at = -1;

 private:
  class Done final : public Operation {
   public:
    Status Poll() override { return {}; }
    Status Wait() override { return {}; }
  };
  Result<std::unique_ptr<Operation>> DoPost(std::span<const TransferPiece> pieces) override {
    if (posts == fail_at) return {StatusCode::kCuda, "the copy failed"};
    double nanos = 0;
    for (const TransferPiece& piece : pieces) {
      std::memcpy(piece.dst, piece.src, piece.bytes);
      nanos += static_cast<double>(per_piece_) + per_byte_ * static_cast<double>(piece.bytes);
    }
    clock_->Advance(static_cast<int64_t>(nanos) * (posts++ == 0 ? 2 : 1));
    return std::unique_ptr<Operation>(std::make_unique<Done>());
  }
  void DoVisitCounters(const CounterVisitor&) const override {}
  ManualClock* clock_;
  const int64_t per_piece_;
  const double per_byte_;
};

TEST(TransferSpeedTest, TheFastestRoundCounts) {
  ManualClock clock;
  TimedEngine engine(&clock, 100, 0.5);
  std::vector<std::byte> from(4096), to(4096);
  const auto rate = MeasureRate(engine, {{from.data(), to.data(), 1000}, {from.data() + 2000, to.data() + 2000, 1000}}, clock);
  ASSERT_OK(rate);
  EXPECT_DOUBLE_EQ(*rate, 2000e9 / 1200);  // 2 * (100 + 500) ns
  EXPECT_EQ(engine.posts, 3);
  TimedEngine still(&clock, 0, 0);
  EXPECT_OK(MeasureRate(still, {{from.data(), to.data(), 1000}}, clock)) << "a clock that stands still is no division by zero";
}

TEST(TransferSpeedTest, EveryPieceOfEverySizeIsMovedOnce) {
  ManualClock clock;
  MemoryTransferEngine few(nullptr), many(nullptr);
  std::vector<std::byte> from(5000), to(5000);
  Rng rng(2);
  for (std::byte& b : from) b = static_cast<std::byte>(rng.Next());
  const size_t sizes[] = {1000};
  const auto rates = MeasurePieces(few, many, from, to, sizes, clock);
  ASSERT_OK(rates);
  ASSERT_EQ(rates->size(), 1u);
  // The pieces are those of the source, each in one place.
  std::vector<bool> seen(5);
  for (size_t i = 0; i < 5; ++i) {
    for (size_t j = 0; j < 5; ++j) {
      if (std::memcmp(to.data() + i * 1000, from.data() + j * 1000, 1000) == 0) seen[j] = true;
    }
  }
  EXPECT_EQ(seen, std::vector<bool>(5, true));
}

// An engine that starts each piece slowly and one that reads slowly: they meet where the theory says.
TEST(TransferSpeedTest, TheOneForFewPiecesIsTakenFromWhereItIsAsFast) {
  ManualClock clock;
  TimedEngine few(&clock, 3000, 0.018), many(&clock, 20, 0.02);  // 55 and 50 GB/s; 0.3 and 50 million pieces a second
  std::vector<std::byte> from(4 << 20), to(4 << 20);
  const size_t sizes[] = {4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20};
  const auto rates = MeasurePieces(few, many, from, to, sizes, clock);
  ASSERT_OK(rates);
  EXPECT_NEAR(rates->back().few, 1e9 * (1 << 20) / (3000 + 0.018 * (1 << 20)), 1e7);
  EXPECT_EQ(FewFrom(*rates), size_t{1} << 20);  // 256 KiB: 7719 ns against 5263
  TimedEngine quick(&clock, 100, 0.018);
  const auto other = MeasurePieces(quick, many, from, to, sizes, clock);
  ASSERT_OK(other);
  EXPECT_EQ(FewFrom(*other), size_t{64} << 10);  // 16 KiB: 395 ns against 348
}

TEST(TransferSpeedTest, NowhereIsNowhere) {
  EXPECT_EQ(FewFrom({}), SIZE_MAX);
  const PieceRate slow[] = {{1024, 10, 20}, {4096, 18, 20}};
  EXPECT_EQ(FewFrom(slow), SIZE_MAX);
  const PieceRate mixed[] = {{1024, 30, 20}, {4096, 10, 20}, {16384, 19, 20}};  // in between it is slower: only from 16 KiB on
  EXPECT_EQ(FewFrom(mixed), 16384u);
  const PieceRate everywhere[] = {{4096, 30, 20}, {1024, 30, 20}};
  EXPECT_EQ(FewFrom(everywhere), 1024u);
}

TEST(TransferSpeedTest, RefusesAndFailsByName) {
  ManualClock clock;
  TimedEngine few(&clock, 1, 1), many(&clock, 1, 1);
  std::vector<std::byte> from(4096), to(4096);
  const size_t large[] = {3000}, none[] = {0}, fits[] = {1024};
  EXPECT_STATUS(StatusCode::kInvalid, "3000", MeasurePieces(few, many, from, to, large, clock));
  EXPECT_STATUS(StatusCode::kInvalid, "pieces of 0", MeasurePieces(few, many, from, to, none, clock));
  EXPECT_STATUS(StatusCode::kInvalid, "spans of 4096 and 100", MeasurePieces(few, many, from, std::span(to).first(100), fits, clock));
  many.fail_at = 1;
  EXPECT_STATUS(StatusCode::kCuda, "the copy failed", MeasurePieces(few, many, from, to, fits, clock));
}

}  // namespace
}  // namespace prehoc
