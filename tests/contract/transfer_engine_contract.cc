#include "tests/contract/transfer_engine_contract.h"

#include <algorithm>
#include <thread>

#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

std::vector<std::byte> RandomBytes(Rng& rng, size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(rng.Next());
  return bytes;
}

// A batch of pieces between two buffers, in disjoint places, with gaps that must stay as they are.
struct Batch {
  std::vector<std::byte> src, dst, expected;
  std::vector<TransferPiece> pieces;

  Batch(Rng& rng, int count) {
    std::vector<size_t> sizes;
    size_t total = 0;
    for (int i = 0; i < count; ++i) {
      sizes.push_back(rng.Chance(0.1) ? 0 : static_cast<size_t>(rng.Int(1, 700)));
      total += sizes.back() + 16;
    }
    src = RandomBytes(rng, total);
    dst = RandomBytes(rng, total);
    expected = dst;
    std::vector<size_t> begins;
    size_t at = 0;
    for (const size_t size : sizes) begins.push_back(at), at += size + 16;
    for (size_t i = 0; i < sizes.size(); ++i) {
      std::copy_n(src.begin() + static_cast<std::ptrdiff_t>(begins[i]), sizes[i],
                  expected.begin() + static_cast<std::ptrdiff_t>(begins[i]));
      pieces.push_back({src.data() + begins[i], dst.data() + begins[i], sizes[i]});
    }
    rng.Shuffle(pieces);
  }
};

Status PollUntilDone(TransferRequest& request) {
  while (true) {
    Status status = request.Poll();
    if (status.code() != StatusCode::kBusy) return status;
    std::this_thread::yield();
  }
}

}  // namespace

double TransferEngineContract::Counter(std::string_view name) {
  double found = -1;
  engine().VisitCounters([&](std::string_view shown, double value) {
    if (shown == name) found = value;
  });
  return found;
}

TEST_P(TransferEngineContract, CopiesEveryPieceAndNothingElse) {
  SeededRng rng;
  for (const int count : {1, 2, 3, 50, 400}) {
    Batch batch(rng, count);
    auto request = engine().Prepare(batch.pieces);
    ASSERT_OK(request);
    ASSERT_OK(request->Post());
    ASSERT_OK(request->Wait());
    ASSERT_EQ(batch.dst, batch.expected) << count;
  }
}

TEST_P(TransferEngineContract, DoesNothingBeforePost) {
  SeededRng rng;
  Batch batch(rng, 10);
  const std::vector<std::byte> before = batch.dst;
  auto request = engine().Prepare(batch.pieces);
  ASSERT_OK(request);
  EXPECT_STATUS(StatusCode::kInvalid, "never posted", request->Poll());
  EXPECT_STATUS(StatusCode::kInvalid, "never posted", request->Wait());
  EXPECT_EQ(batch.dst, before);
}

TEST_P(TransferEngineContract, OwnsItsDescriptors) {
  SeededRng rng;
  Batch batch(rng, 30);
  std::vector<TransferPiece> pieces = batch.pieces;
  auto request = engine().Prepare(pieces);
  ASSERT_OK(request);
  std::fill(pieces.begin(), pieces.end(), TransferPiece{});
  EXPECT_EQ(request->pieces().size(), batch.pieces.size());
  ASSERT_OK(request->Post());
  ASSERT_OK(request->Wait());
  EXPECT_EQ(batch.dst, batch.expected);
}

TEST_P(TransferEngineContract, SaysTheSameOnceDone) {
  SeededRng rng;
  Batch batch(rng, 5);
  auto request = engine().Prepare(batch.pieces);
  ASSERT_OK(request);
  ASSERT_OK(request->Post());
  ASSERT_OK(request->Wait());
  EXPECT_OK(request->Wait());
  EXPECT_OK(request->Poll());
  EXPECT_OK(request->Poll());
}

TEST_P(TransferEngineContract, MayBePostedAgain) {
  SeededRng rng;
  Batch batch(rng, 20);
  auto request = engine().Prepare(batch.pieces);
  ASSERT_OK(request);
  for (int round = 0; round < 5; ++round) {
    for (std::byte& byte : batch.src) byte ^= std::byte{0x5a};
    ASSERT_OK(request->Post());
    ASSERT_OK(request->Wait());
    for (const TransferPiece& piece : batch.pieces) {
      ASSERT_TRUE(std::equal(piece.src, piece.src + piece.bytes, piece.dst)) << round;
    }
  }
}

TEST_P(TransferEngineContract, MovesInEveryState) {
  SeededRng rng;
  Batch batch(rng, 20);
  auto made = engine().Prepare(batch.pieces);
  ASSERT_OK(made);
  TransferRequest prepared = std::move(*made);
  EXPECT_STATUS(StatusCode::kInvalid, "empty", made->Post());
  ASSERT_OK(prepared.Post());
  TransferRequest posted = std::move(prepared);
  EXPECT_TRUE(prepared.pieces().empty());
  EXPECT_EQ(prepared.bytes(), 0u);
  ASSERT_OK(posted.Wait());
  TransferRequest done = std::move(posted);
  EXPECT_OK(done.Poll());
  EXPECT_EQ(batch.dst, batch.expected);
  EXPECT_STATUS(StatusCode::kInvalid, "never posted", posted.Poll());
}

TEST_P(TransferEngineContract, ARequestThatDiesWaitsForItsCopies) {
  SeededRng rng;
  for (int round = 0; round < 20; ++round) {
    Batch batch(rng, 40);
    {
      auto request = engine().Prepare(batch.pieces);
      ASSERT_OK(request);
      ASSERT_OK(request->Post());
    }
    // Nobody writes here any more.
    std::fill(batch.dst.begin(), batch.dst.end(), std::byte{0});
    ASSERT_EQ(std::count(batch.dst.begin(), batch.dst.end(), std::byte{0}), static_cast<std::ptrdiff_t>(batch.dst.size()));
  }
}

TEST_P(TransferEngineContract, AnEmptyBatchIsDoneAtOnce) {
  auto request = engine().Prepare({});
  ASSERT_OK(request);
  EXPECT_EQ(request->bytes(), 0u);
  ASSERT_OK(request->Post());
  EXPECT_OK(request->Wait());
  std::byte byte{};
  auto nothing = engine().Prepare({{nullptr, nullptr, 0}, {&byte, &byte, 0}});
  ASSERT_OK(nothing);
  ASSERT_OK(nothing->Post());
  EXPECT_OK(nothing->Wait());
}

TEST_P(TransferEngineContract, RefusesPiecesThatMakeNoSense) {
  std::vector<std::byte> memory(64);
  std::byte* const p = memory.data();
  EXPECT_STATUS(StatusCode::kInvalid, "piece 0 of 8 bytes has a null pointer", engine().Prepare({{nullptr, p, 8}}));
  EXPECT_STATUS(StatusCode::kInvalid, "null pointer", engine().Prepare({{p, nullptr, 8}}));
  EXPECT_STATUS(StatusCode::kInvalid, "piece 1", engine().Prepare({{p, p + 8, 8}, {p, p + 8, SIZE_MAX}}));
  EXPECT_STATUS(StatusCode::kInvalid, "overlaps itself", engine().Prepare({{p, p + 7, 8}}));
  EXPECT_STATUS(StatusCode::kInvalid, "overlaps itself", engine().Prepare({{p + 7, p, 8}}));
  EXPECT_STATUS(StatusCode::kInvalid, "overlaps itself", engine().Prepare({{p, p, 8}}));
  EXPECT_OK(engine().Prepare({{p, p + 8, 8}, {p + 8, p + 16, 8}}));
}

TEST_P(TransferEngineContract, ManyRequestsAtOnceFromSeveralThreads) {
  constexpr int kThreads = 3, kRounds = 40;
  std::vector<std::thread> threads;
  std::vector<std::string> errors(kThreads);
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Rng rng(t + 1);
      for (int round = 0; round < kRounds; ++round) {
        Batch one(rng, 12), two(rng, 12);
        auto first = engine().Prepare(one.pieces), second = engine().Prepare(two.pieces);
        if (!first.ok() || !first->Post().ok() || !second.ok() || !second->Post().ok()) {
          errors[t] = "a post failed";
          return;
        }
        // The second may be done before the first.
        const Status b = round % 2 == 0 ? second->Wait() : PollUntilDone(*second);
        const Status a = first->Wait();
        if (!a.ok() || !b.ok() || one.dst != one.expected || two.dst != two.expected) errors[t] = "wrong bytes";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST_P(TransferEngineContract, CountsRequestsPiecesAndBytes) {
  SeededRng rng;
  Batch one(rng, 7), two(rng, 9);
  size_t bytes = 0;
  for (const Batch* batch : {&one, &two}) {
    auto request = engine().Prepare(batch->pieces);
    ASSERT_OK(request);
    bytes += request->bytes();
    ASSERT_OK(request->Post());
    ASSERT_OK(request->Wait());
  }
  EXPECT_EQ(Counter("transfer.requests"), 2);
  EXPECT_EQ(Counter("transfer.pieces"), 16);
  EXPECT_EQ(Counter("transfer.bytes"), static_cast<double>(bytes));
  EXPECT_EQ(Counter("transfer.failed"), 0);
  EXPECT_GE(Counter("transfer.inline"), 0);
}

}  // namespace prehoc
