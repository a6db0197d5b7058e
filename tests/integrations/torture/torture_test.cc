#include "integrations/torture/torture.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

#include "integrations/torture/faulty_medium.h"
#include "integrations/torture/faulty_seams.h"
#include "integrations/torture/truth.h"
#include "tests/fakes/faulty_chunk_store.h"
#include "tests/support/chunk_data.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"
#include "transfer/memory_chunk_store.h"
#include "transfer/record_format.h"

namespace prehoc::torture {
namespace {

FaultSet All() { return ParseFaults("all").value(); }

std::string Report(const TortureResult& result) {
  std::string text;
  for (const std::string& what : result.wrong) text += what + "\n";
  return text;
}

void ExpectAllFound(const TortureResult& result, RowFormat rows = RowFormat::kF16) {
  EXPECT_EQ(result.wrong_count, 0u) << Report(result);
  for (size_t f = 0; f < kFaults; ++f) {
    const FaultInfo& info = InfoOf(static_cast<Fault>(f));
    const FaultPlan::Count& count = result.counts[f];
    const bool of_copies = static_cast<Fault>(f) == Fault::kCopyError || static_cast<Fault>(f) == Fault::kCopyHalf;
    if (of_copies && rows != RowFormat::kF16) {  // rows of 8 bits are widened where they lie: there are no copies
      EXPECT_EQ(count.injected, 0u);
      continue;
    }
    EXPECT_GT(count.injected, 0u) << info.name;
    EXPECT_EQ(count.missed, 0u) << info.name;
    if (info.bytes) {
      EXPECT_EQ(count.detected + count.unread, count.injected) << info.name;
      EXPECT_GT(count.detected, 0u) << info.name;
    }
  }
  EXPECT_GT(result.finished, result.sequences / 2) << "work goes on all the same";
  EXPECT_GT(result.repaired, 0u);
  EXPECT_GT(result.restored, 0u);
}

class TortureOfRowsTest : public testing::TestWithParam<RowFormat> {};
INSTANTIATE_TEST_SUITE_P(Rows, TortureOfRowsTest, testing::Values(RowFormat::kF16, RowFormat::kInt8),
                         [](const auto& of) { return std::string(RowFormatName(of.param)); });

TEST_P(TortureOfRowsTest, FindsEveryFaultInMemoryAndOnDisk) {
  TempDir dir;
  TortureOptions options;
  options.rows = GetParam();
  options.faults = All();
  options.directory = dir.path();
  options.seconds = 1000;
  options.max_rounds = 4;  // two clocks and dense attention, in memory and on disk
  options.steps = 4000;
  const auto result = RunTorture(options);
  ASSERT_OK(result);
  EXPECT_EQ(result->rounds, 4);
  ExpectAllFound(*result, GetParam());
}

TEST(TortureTest, ASeedRepeatsToTheLastBit) {
  TortureOptions options;
  options.faults = All();
  options.max_rounds = 2;
  options.steps = 1500;
  options.seconds = 1000;
  const auto first = RunTorture(options), again = RunTorture(options);
  ASSERT_OK(first);
  ASSERT_OK(again);
  EXPECT_NE(first->digest, 0u);
  EXPECT_EQ(first->digest, again->digest);
  EXPECT_EQ(first->injected(), again->injected());
  EXPECT_EQ(first->told, again->told);
  options.seed = 2;
  EXPECT_NE(RunTorture(options).value().digest, first->digest);
}

TEST(TortureTest, OneRoundCanBeRunAgain) {
  TortureOptions options;
  options.faults = All();
  options.steps = 800;
  options.only_round = 6;
  const auto result = RunTorture(options);
  ASSERT_OK(result);
  EXPECT_EQ(result->rounds, 1);
  EXPECT_EQ(result->digest, RunTorture(options).value().digest);
}

TEST(TortureTest, WithoutFaultsNothingFails) {
  TempDir dir;
  TortureOptions options;
  options.faults = ParseFaults("none").value();
  options.directory = dir.path();
  options.max_rounds = 2;
  options.steps = 1500;
  const auto result = RunTorture(options);
  ASSERT_OK(result);
  EXPECT_EQ(result->injected(), 0u);
  EXPECT_EQ(result->wrong_count, 0u) << Report(*result);
  EXPECT_TRUE(result->told.empty());
  EXPECT_EQ(result->retried, 0u);
  EXPECT_GT(result->reads, 0u);
}

TEST(TortureTest, AsksWhetherToStop) {
  TortureOptions options;
  options.faults = All();
  int asked = 0;
  options.stop = [&] { return ++asked > 100; };
  const auto result = RunTorture(options);
  ASSERT_OK(result);
  EXPECT_LT(result->steps, 110u);
}

TEST(ParseFaultsTest, TakesNamesAndRefusesOthers) {
  const FaultSet two = ParseFaults("flip,memory").value();
  EXPECT_TRUE(two[static_cast<size_t>(Fault::kFlip)]);
  EXPECT_TRUE(two[static_cast<size_t>(Fault::kMemory)]);
  EXPECT_EQ(std::count(two.begin(), two.end(), true), 2);
  EXPECT_STATUS(StatusCode::kInvalid, "no fault \"flop\"", ParseFaults("flip,flop"));
  EXPECT_STATUS(StatusCode::kInvalid, "write-torn", ParseFaults("flip,"));
  EXPECT_STATUS(StatusCode::kInvalid, "no fault \"\"", ParseFaults(""));
  std::set<std::string_view> names;
  for (size_t f = 0; f < kFaults; ++f) names.insert(InfoOf(static_cast<Fault>(f)).name);
  EXPECT_EQ(names.size(), kFaults);
}

// What would be seen if a check did not find a fault: each part of the harness, alone.

class MediumTest : public ::testing::Test {
 protected:
  FaultyMedium& Medium(const char* faults) {
    plan_ = std::make_unique<FaultPlan>(ParseFaults(faults).value(), 1);
    medium_ = std::make_unique<FaultyMedium>(plan_.get(), 8.0);  // each fault of a read in every read
    return *medium_;
  }
  // Header and payload of record `n`.
  std::pair<RecordHeader, std::vector<std::byte>> Record(int n) {
    std::vector<std::byte> payload = TestChunk(n, 2048);
    return {EncodeHeader(context_, TestKey(n), payload), payload};
  }
  const RecordContext context_ = RecordContext::Create(TestIdentity()).value();
  std::unique_ptr<FaultPlan> plan_;
  std::unique_ptr<FaultyMedium> medium_;
};

TEST_F(MediumTest, EveryReadFaultChangesTheRecordAndIsCountedByWhatTheCheckSays) {
  for (const Fault fault : {Fault::kFlip, Fault::kTorn, Fault::kShort, Fault::kStale, Fault::kSwapped, Fault::kWrongKey}) {
    SCOPED_TRACE(InfoOf(fault).name);
    FaultyMedium& medium = Medium(std::string(InfoOf(fault).name).c_str());
    for (int n = 0; n < 10; ++n) {
      auto [header, payload] = Record(n);
      EXPECT_TRUE(medium.OnWrite(TestKey(n), std::as_writable_bytes(std::span(&header, 1)), payload));
    }
    auto [header, payload] = Record(20);
    const auto before = std::make_pair(header, payload);
    uint64_t ticket = 0;
    ASSERT_OK(medium.OnRead(TestKey(20), std::as_writable_bytes(std::span(&header, 1)), payload, &ticket));
    EXPECT_NE(ticket, 0u);
    EXPECT_FALSE(std::memcmp(&header, &before.first, sizeof header) == 0 && payload == before.second);
    EXPECT_EQ(CheckRecord(context_, TestKey(20), std::as_bytes(std::span(&header, 1)), payload).code(), StatusCode::kCorrupt);
    EXPECT_EQ(plan_->Of(fault).injected, 1u);
    medium.OnChecked(TestKey(20), ticket, {});
    EXPECT_EQ(plan_->Of(fault).missed, 1u) << "a check that passes it";
    medium.OnChecked(TestKey(20), ticket, {StatusCode::kCorrupt, "found"});
    EXPECT_EQ(plan_->Of(fault).detected, 1u);
  }
}

TEST_F(MediumTest, WhatWasWrittenWrongIsFollowedUntilItIsReadOrGone) {
  FaultyMedium& medium = Medium("write-flip");
  for (const int n : {1, 2, 3}) {
    auto [header, payload] = Record(n);
    EXPECT_TRUE(medium.OnWrite(TestKey(n), std::as_writable_bytes(std::span(&header, 1)), payload));
    EXPECT_EQ(CheckRecord(context_, TestKey(n), std::as_bytes(std::span(&header, 1)), payload).code(), StatusCode::kCorrupt);
  }
  EXPECT_EQ(medium.UnreadDamage().size(), 3u);
  auto [header, payload] = Record(1);
  for (int look = 0; look < 2; ++look) {
    uint64_t ticket = 0;
    ASSERT_OK(medium.OnRead(TestKey(1), std::as_writable_bytes(std::span(&header, 1)), payload, &ticket));
    medium.OnChecked(TestKey(1), ticket, {StatusCode::kCorrupt, "found"});
  }
  EXPECT_EQ(plan_->Of(Fault::kWriteFlip).detected, 1u) << "once, however often it is seen";
  uint64_t ticket = 0;
  ASSERT_OK(medium.OnRead(TestKey(2), std::as_writable_bytes(std::span(&header, 1)), payload, &ticket));
  medium.OnChecked(TestKey(2), ticket, {});
  EXPECT_EQ(plan_->Of(Fault::kWriteFlip).missed, 1u);
  medium.ForgetDamage(TestKey(3));
  EXPECT_EQ(plan_->Of(Fault::kWriteFlip).unread, 1u);
}

TEST(TruthTest, KnowsItsBlocksAndNoOthers) {
  const Truth truth(5);
  std::vector<std::byte> block = truth.stream(1).Block(3, 1);
  EXPECT_EQ(block.size(), TortureGeometry().block_bytes());
  EXPECT_TRUE(truth.BlockIsRight(3, 1, block));
  EXPECT_FALSE(truth.BlockIsRight(3, 0, block));
  EXPECT_FALSE(truth.BlockIsRight(2, 1, block));
  block[100] ^= std::byte{1};
  EXPECT_FALSE(truth.BlockIsRight(3, 1, block));
  const Truth narrow(5, RowFormat::kInt8);
  EXPECT_EQ(narrow.geometry().block_bytes(), TortureGeometry().block_bytes() * 48 / 64);
  EXPECT_TRUE(narrow.BlockIsRight(3, 1, narrow.stream(1).Block(3, 1, RowFormat::kInt8)));
  EXPECT_FALSE(narrow.BlockIsRight(3, 1, truth.stream(1).Block(3, 1)));
}

TEST(TruthTest, OneChangedNumberIsAnotherOutput) {
  Truth truth(5);
  SelectorOptions dense;
  dense.kind = SelectorKind::kDense;
  ASSERT_OK(truth.Prepare(dense));
  ManualExecutor executor;
  HostDeviceMemory device(64 << 20);
  CacheOptions options;
  options.geometry = TortureGeometry();
  options.host_budget = 16 << 20;
  options.huge_pages = false;
  options.selector = dense;
  options.codes.group_tokens = 16;
  CacheResources resources;
  resources.executor = &executor;
  resources.device = &device;
  const auto cache = KvCache::Create(options, resources).value();
  const auto sequence = cache->Open({.max_tokens = kMaxTokens}).value();
  Outputs outputs;
  ASSERT_OK(RunTokens(*sequence, truth.stream(0), 40, 65, &outputs));
  EXPECT_TRUE(truth.PrefillIsRight(0, 0, 40, outputs));
  EXPECT_FALSE(truth.PrefillIsRight(1, 0, 40, outputs));
  outputs[1][77] += 0.01f;
  EXPECT_FALSE(truth.PrefillIsRight(0, 0, 40, outputs));
  ASSERT_OK(RunTokens(*sequence, truth.stream(0), 25, 65, &outputs));
  ASSERT_OK(RunTokens(*sequence, truth.stream(0), 1, 0, &outputs));
  EXPECT_TRUE(truth.StepIsRight(0, 65, 0, outputs));
  EXPECT_FALSE(truth.StepIsRight(0, 65, 1, outputs));
  outputs[0][0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(truth.StepIsRight(0, 65, 0, outputs));
}

TEST(TruthStoreTest, TellsWrongBytesInBothDirections) {
  const Truth truth(5);
  MemoryChunkStore::Options options;
  options.identity = TestIdentity();
  options.chunk_bytes = TortureGeometry().block_bytes();
  const auto memory = MemoryChunkStore::Create(options).value();
  FaultyChunkStore faulty(memory.get());
  FaultPlan plan(ParseFaults("none").value(), 1);
  TruthStore store(&faulty, &truth, &plan, 0);
  const std::vector<std::byte> block = truth.stream(0).Block(2, 1);
  ASSERT_OK(store.Put(TestKey(1, 1), block, {.chunk = 2}));
  std::vector<std::byte> out(block.size());
  ASSERT_OK(store.Get(TestKey(1, 1), out));
  EXPECT_TRUE(store.TakeWrong().empty());
  faulty.FlipBitInGet(1, 999);
  ASSERT_OK(store.Get(TestKey(1, 1), out));
  EXPECT_EQ(store.TakeWrong().size(), 1u);
  out = block;
  out[7] ^= std::byte{2};
  ASSERT_OK(store.Put(TestKey(2, 1), out, {.chunk = 2}));
  EXPECT_EQ(store.TakeWrong().size(), 1u);
  ASSERT_OK(memory->Put(TestKey(3, 1), block));
  ASSERT_OK(store.Get(TestKey(3, 1), out));
  EXPECT_EQ(store.TakeWrong().size(), 1u) << "never written through it";
}

TEST(FaultySeamsTest, HeldJobsRunOnceAndAtTheEndOfAllThings) {
  ManualExecutor base;
  FaultPlan plan(ParseFaults("job-late").value(), 1);
  int ran = 0;
  {
    FaultyJobs jobs(&base, &plan, 1.0);
    for (int i = 0; i < 100; ++i) ASSERT_OK(jobs.Post([&] { ++ran; }));
    base.Drain();
    EXPECT_LT(ran, 100);
    jobs.Drain();
    EXPECT_EQ(ran, 100);
    for (int i = 0; i < 3; ++i) ASSERT_OK(jobs.Post([&] { ++ran; }));
    base.Drain();
  }
  base.Drain();
  EXPECT_EQ(ran, 103);
}

}  // namespace
}  // namespace prehoc::torture
