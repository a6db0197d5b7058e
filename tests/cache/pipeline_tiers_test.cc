// The tiers of the pipeline: budgets that hold, rows that come back from wherever they went, prefixes that are restored or
// refused, chunks that are lost and made anew, and the accounting of it all.
#include <gtest/gtest.h>

#include <limits>

#include "base/units.h"
#include "cache/chunk_key.h"
#include "tests/cache/pipeline_world.h"
#include "tests/fakes/faulty_chunk_store.h"
#include "tests/support/compare.h"

namespace prehoc {
namespace {

constexpr int64_t kPrompt = 300;
constexpr int64_t kSteps = 24;

std::unique_ptr<Sequence> Open(World& world) { return Open(world, kPrompt + kSteps); }

// The smallest host budget that one layer of the longest sequence fits in.
uint64_t LeastHost(const KvGeometry& geometry) {
  return static_cast<uint64_t>(geometry.layers + CeilDiv(kPrompt + kSteps, geometry.chunk_tokens)) * geometry.block_bytes();
}

// Keys of the prompt's chunks, as another process would compute them.
ChunkKeyChain KeysOf(const Stream& stream) {
  const std::string layout = stream.geometry().LayoutName();
  const ChunkKeyRoot root{.tenant_salt = "", .model = {}, .dtype = "f16", .layout = layout, .method = ""};
  return ChainOf(root, stream.ids(0, kPrompt), stream.geometry().chunk_tokens);
}

std::vector<float> RunWith(const WorldOptions& options, SequenceReport* report = nullptr) {
  World world(options);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
  auto sequence = Open(world);
  EXPECT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
  std::vector<float> out = Decode(*sequence, stream, kSteps);
  if (report) *report = sequence->Report();
  return out;
}

TEST(PipelineTiers, DenseIsTheSameFromEveryTier) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kDense;
  const std::vector<float> resident = RunWith(options);
  options.device_budget = SmallestDevice(options, kPrompt + kSteps);
  options.cache.host_budget = LeastHost(options.cache.geometry);
  SequenceReport report;
  const std::vector<float> tiered = RunWith(options, &report);
  EXPECT_TRUE(AllClose(tiered, resident, {1e-5, 1e-5}));
  EXPECT_GT(report.rows_device, 0);
  EXPECT_GT(report.rows_host, 0);
  EXPECT_GT(report.rows_disk, 0);
  EXPECT_GT(report.bytes_from_disk, 0);
}

// Whatever is done with them, from whatever tier: rows of a format are those of a cache of fp16 rows that was given what they hold.
TEST(PipelineTiers, RowsOfAFormatAreTheRowsThatTheyStandFor) {
  for (const RowFormat format : {RowFormat::kInt8, RowFormat::kE4m3}) {
    for (const auto& [kind, lag] : std::initializer_list<std::pair<SelectorKind, int32_t>>{
             {SelectorKind::kDense, 0}, {SelectorKind::kTwoClock, 0}, {SelectorKind::kTwoClock, 2}, {SelectorKind::kOracle, 0}, {SelectorKind::kCis, 0},
             {SelectorKind::kCpe, 0}, {SelectorKind::kQuest, 0}, {SelectorKind::kHShare, 0}, {SelectorKind::kSharedCandidates, 0}}) {
      SCOPED_TRACE(std::string(RowFormatName(format)) + ", " + std::string(SelectorKindName(kind)) + ", lag " + std::to_string(lag));
      WorldOptions options = WorldOptions::Default();
      options.cache.selector.kind = kind;
      options.cache.selector.tc.refresh = 4;
      options.cache.selector.tc.theta = 0.002;
      options.cache.selector.tc.lag = lag;
      if (kind == SelectorKind::kQuest) options.cache.selector.budget.tokens = 96;
      options.device_budget = SmallestDevice(options, kPrompt + kSteps);
      SequenceReport report[2];
      std::vector<float> out[2], again[2];
      for (const size_t narrow : {size_t{0}, size_t{1}}) {
        options.cache.geometry.rows = narrow == 1 ? format : RowFormat::kF16;
        const uint64_t block = options.cache.geometry.block_bytes();
        options.cache.host_budget = LeastHost(options.cache.geometry) / block * RoundUp(block, 4096);  // whole pages of memory
        if (lag > 0) options.cache.host_budget *= 2;  // copies under way hold their blocks
        Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
        if (narrow == 0) stream.RoundTo(format);
        World world(options);
        {
          auto sequence = Open(world);
          ASSERT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
          out[narrow] = Decode(*sequence, stream, kSteps);
          report[narrow] = sequence->Report();
        }
        ASSERT_OK(world.cache().Flush());
        auto restored = world.cache().OpenWithPrefix({.max_tokens = kPrompt + kSteps}, stream.ids(0, kPrompt));
        ASSERT_TRUE(restored.ok()) << restored.status();
        EXPECT_EQ((*restored)->restored(), kPrompt / 64 * 64);
        ASSERT_OK(PrefillAll(**restored, stream, kPrompt, 128));
        again[narrow] = Decode(**restored, stream, kSteps);
        ASSERT_OK((*restored)->CheckInvariants());
      }
      EXPECT_EQ(out[1], out[0]);
      EXPECT_EQ(again[1], again[0]);
      EXPECT_EQ(report[1].rows_host + report[1].rows_disk, report[0].rows_host + report[0].rows_disk);
      EXPECT_GT(report[1].rows_host + report[1].rows_disk + report[1].rows_behind, 0);
      if (format == RowFormat::kE4m3) {
        EXPECT_EQ(2 * report[1].bytes_from_host, report[0].bytes_from_host);
      }
    }
  }
}

// Blocks of which rows are to come are sealed, and go, before these rows are used.
TEST(PipelineTiers, RowsOfAFormatComeBeforeTheirBlocksGo) {
  constexpr int64_t kMany = 200;
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kTwoClock;
  options.cache.selector.tc.refresh = 8;
  options.cache.selector.tc.lag = 7;
  options.cache.selector.tc.theta = 0.9;  // what is missing is left out: rows are used only once they have come
  options.cache.persist_decode = true;
  options.cache.geometry.rows = RowFormat::kInt8;
  const KvGeometry& geometry = options.cache.geometry;
  options.device_budget = SmallestDevice(options, kPrompt + kMany);
  // Whole pages of memory; copies under way hold their blocks.
  options.cache.host_budget = 2 * static_cast<uint64_t>(geometry.layers + CeilDiv(kPrompt + kMany, geometry.chunk_tokens)) * RoundUp(geometry.block_bytes(), 4096);
  const Stream stream(geometry, kPrompt + kMany, 11);
  Stream rounded(geometry, kPrompt + kMany, 11);
  rounded.RoundTo(geometry.rows);
  World world(options);
  auto sequence = Open(world, kPrompt + kMany);
  ASSERT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
  for (int64_t step = 0; step < kMany; ++step) {
    const int64_t t = sequence->length();
    Outputs out;
    ASSERT_OK(DecodeOne(*sequence, stream, &out));
    for (int32_t l = 0; l < geometry.layers; ++l) {
      for (int32_t head = 0; head < geometry.heads; ++head) {
        auto view = sequence->LastStep(LayerId(l), KvHeadId(head / geometry.group()));
        ASSERT_OK(view);
        const std::span got(out[static_cast<size_t>(l)].data() + head * geometry.head_dim, static_cast<size_t>(geometry.head_dim));
        ASSERT_TRUE(AllClose(got, NaiveAttention(rounded, l, t, head, view->attended), {1e-4, 1e-3})) << "step " << step << " layer " << l << " head " << head;
      }
    }
  }
  EXPECT_GT(sequence->Report().rows_behind, 0);
  EXPECT_EQ(sequence->Report().failed_fetches, 0);
}

TEST(PipelineTiers, WithoutAStoreAFullHostTierSaysSo) {
  WorldOptions options = WorldOptions::Default();
  options.with_store = false;
  options.cache.host_budget = LeastHost(options.cache.geometry);
  World world(options);
  const Stream stream(options.cache.geometry, kPrompt, 11);
  auto sequence = Open(world, kPrompt);
  const Status status = PrefillAll(*sequence, stream, kPrompt, 64);
  EXPECT_EQ(status.code(), StatusCode::kOutOfSpace) << status;
  EXPECT_OK(sequence->CheckInvariants());
}

TEST(PipelineTiers, TooSmallBudgetsAreRefusedWithWhatWouldDo) {
  WorldOptions options = WorldOptions::Default();
  options.device_budget = 16 << 10;
  {
    World world(options);
    EXPECT_TRUE(HasStatus(world.cache().Open({.max_tokens = 4096}), StatusCode::kOutOfSpace, "is needed"));
  }
  options = WorldOptions::Default();
  options.cache.host_budget = options.cache.geometry.block_bytes();
  World world(options);
  EXPECT_TRUE(HasStatus(world.cache().Open({.max_tokens = kPrompt}), StatusCode::kOutOfSpace, "one layer"));
}

TEST(PipelineTiers, APrefixComesBackBitForBit) {
  for (const SelectorKind kind :
       {SelectorKind::kDense, SelectorKind::kTwoClock, SelectorKind::kCpe, SelectorKind::kQuest, SelectorKind::kHShare}) {
    WorldOptions options = WorldOptions::Default();
    options.cache.selector.kind = kind;
    options.cache.selector.budget.tokens = 48;
    options.cache.selector.quest.page = 32;  // put together from smaller ones, here and there
    if (kind == SelectorKind::kQuest) options.cache.selector.budget.tokens = 96;
    World world(options);
    const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
    std::vector<float> first;
    {
      auto sequence = Open(world);
      ASSERT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
      first = Decode(*sequence, stream, kSteps);
      ASSERT_OK(world.cache().Flush());
    }
    auto again = world.cache().OpenWithPrefix({.max_tokens = kPrompt + kSteps}, stream.ids(0, kPrompt));
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ((*again)->restored(), kPrompt / 64 * 64) << SelectorKindName(kind);
    ASSERT_OK(PrefillAll(**again, stream, kPrompt, 128));
    EXPECT_EQ(Decode(**again, stream, kSteps), first) << SelectorKindName(kind);
    ASSERT_OK((*again)->CheckInvariants());
  }
}

TEST(PipelineTiers, AWholePromptInTheStoreLeavesItsLastTokenToRun) {
  World world(WorldOptions::Default());
  const Stream stream(SmallGeometry(), 256, 11);
  ASSERT_OK(PrefillAll(*Open(world, 256), stream, 256, 128));
  auto again = world.cache().OpenWithPrefix({.max_tokens = 256}, stream.ids(0, 256));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ((*again)->restored(), 192);
}

TEST(PipelineTiers, NothingOfAnotherTenantModelVariantOrMethodIsRestored) {
  const Stream stream(SmallGeometry(), kPrompt, 11);
  const WorldOptions base = WorldOptions::Default();
  World owner(base);
  ASSERT_OK(PrefillAll(*Open(owner), stream, kPrompt, 128));
  ASSERT_OK(owner.cache().Flush());
  const auto restored = [&](const WorldOptions& options, const std::string& variant) {
    World other(options, &owner.store());
    auto sequence = other.cache().OpenWithPrefix({.max_tokens = kPrompt, .variant = variant}, stream.ids(0, kPrompt));
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    return (*sequence)->restored();
  };
  EXPECT_EQ(restored(base, ""), kPrompt / 64 * 64);
  WorldOptions other = base;
  other.cache.tenant_salt = "another";
  EXPECT_EQ(restored(other, ""), 0);
  other = base;
  other.cache.model[0] ^= 1;
  EXPECT_EQ(restored(other, ""), 0);
  other = base;
  other.cache.selector.kind = SelectorKind::kPsaw;
  EXPECT_EQ(restored(other, ""), 0);
  other.cache.selector.kind = SelectorKind::kEtf;
  EXPECT_EQ(restored(other, ""), 0);
  EXPECT_EQ(restored(base, "rope=8192"), 0);
  // Rows of another format have keys of their own; a store of such rows is refused where its records are of another size.
  other = base;
  other.cache.geometry.rows = RowFormat::kE4m3;
  const ChunkKeyRoot f16{.dtype = "f16", .layout = "l"}, e4m3{.dtype = "e4m3", .layout = "l"};
  EXPECT_NE(ChainOf(f16, stream.ids(0, 64), 64).Key(ChunkIndex(0), LayerId(0)), ChainOf(e4m3, stream.ids(0, 64), 64).Key(ChunkIndex(0), LayerId(0)));
  HostDeviceMemory device(1 << 20);
  ManualExecutor executor;
  EXPECT_STATUS(StatusCode::kInvalid, "this geometry has blocks of",
                KvCache::Create(other.cache, {.executor = &executor, .device = &device, .store = &owner.store()}));
}

TEST(PipelineTiers, RowsWrittenUnderSparseAttentionAreNeverShared) {
  WorldOptions options = WorldOptions::Default();
  const Stream stream(options.cache.geometry, 256, 11);
  for (const bool dense : {true, false}) {
    options.cache.selector.kind = dense ? SelectorKind::kDense : SelectorKind::kOracle;
    World world(options);
    auto sequence = Open(world, 256);
    ASSERT_OK(PrefillAll(*sequence, stream, 128, 128));
    Decode(*sequence, stream, 100);
    ASSERT_OK(world.cache().Flush());
    auto again = world.cache().OpenWithPrefix({.max_tokens = 256}, stream.ids(0, 228));
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ((*again)->restored(), dense ? 192 : 128);
  }
}

TEST(PipelineTiers, ADamagedChunkEndsThePrefixThere) {
  WorldOptions options = WorldOptions::Default();
  World writer(options);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
  auto sequence = Open(writer);
  ASSERT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
  ASSERT_OK(writer.cache().Flush());
  const std::vector<float> want = Decode(*sequence, stream, kSteps);
  const ChunkKeyChain chain = KeysOf(stream);
  ASSERT_OK(writer.store().FlipBitForTest(chain.Key(ChunkIndex(2), LayerId(1)), 12345));

  World reader(options, &writer.store());
  auto again = reader.cache().OpenWithPrefix({.max_tokens = kPrompt + kSteps}, stream.ids(0, kPrompt));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ((*again)->restored(), 128);
  EXPECT_EQ((*again)->Report().corrupt_chunks, 1);
  ASSERT_OK(PrefillAll(**again, stream, kPrompt, 128));
  EXPECT_EQ(Decode(**again, stream, kSteps), want);
}

// Chunks that fall out of every tier in the middle of decoding are found out, made anew, and change nothing.
TEST(PipelineTiers, LostChunksAreRepaired) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kDense;
  const std::vector<float> want = RunWith(options);
  options.device_budget = SmallestDevice(options, kPrompt + kSteps);
  options.cache.host_budget = LeastHost(options.cache.geometry) + options.cache.geometry.layers * options.cache.geometry.block_bytes();
  World world(options);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
  auto sequence = Open(world);
  ASSERT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
  const ChunkKeyChain chain = KeysOf(stream);
  std::vector<float> got;
  int repairs = 0;
  for (int64_t step = 0; step < kSteps; ++step) {
    if (step == 5) {
      for (int32_t l = 0; l < options.cache.geometry.layers; ++l) {
        ASSERT_OK(world.store().Delete(chain.Key(ChunkIndex(1), LayerId(l))));
      }
    }
    Outputs out;
    Status status = DecodeOne(*sequence, stream, &out);
    while (!status.ok()) {
      ASSERT_EQ(status.code(), StatusCode::kNotFound) << status;
      const std::vector<ChunkIndex> lost = sequence->LostChunks();
      ASSERT_EQ(lost.size(), 1u);
      ++repairs;
      ASSERT_OK(sequence->BeginRepair(lost[0]));
      Outputs unused;
      ASSERT_OK(RunLayers(*sequence, stream, lost[0].value() * 64, 64, false, &unused));
      ASSERT_OK(sequence->EndRepair());
      EXPECT_TRUE(sequence->LostChunks().empty());
      status = DecodeOne(*sequence, stream, &out);
    }
    for (const auto& layer : out) got.insert(got.end(), layer.begin(), layer.end());
  }
  EXPECT_EQ(repairs, 1);
  EXPECT_EQ(sequence->Report().recomputed_chunks, 1);
  EXPECT_TRUE(AllClose(got, want, {1e-5, 1e-5}));
}

TEST(PipelineTiers, ARolledBackStepLeavesNoTrace) {
  for (const bool small : {false, true}) {
    WorldOptions options = WorldOptions::Default();
    options.cache.selector.kind = SelectorKind::kOracle;
    if (small) options.device_budget = SmallestDevice(options, kPrompt + kSteps);
    const std::vector<float> want = RunWith(options);
    World world(options);
    const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
    const Stream other(options.cache.geometry, kPrompt + kSteps, 12);
    auto sequence = Open(world);
    Outputs out;
    while (sequence->length() < kPrompt) {
      const int64_t first = sequence->length();
      const int64_t piece = std::min<int64_t>(128, kPrompt - first);
      ASSERT_OK(sequence->Begin(other.ids(first, piece), kPrompt));
      ASSERT_OK(RunLayers(*sequence, other, first, piece, false, &out, 2));  // the last layer is never given
      sequence->Rollback();
      ASSERT_OK(PrefillPiece(*sequence, stream, piece, kPrompt, &out));
    }
    std::vector<float> got;
    for (int64_t i = 0; i < kSteps; ++i) {
      ASSERT_OK(sequence->Begin(other.ids(sequence->length(), 1), 0));
      ASSERT_OK(RunLayers(*sequence, other, sequence->length(), 1, true, &out, static_cast<int32_t>(i % 4)));
      sequence->Rollback();
      ASSERT_OK(sequence->CheckInvariants());
      ASSERT_OK(DecodeOne(*sequence, stream, &out));
      for (const auto& layer : out) got.insert(got.end(), layer.begin(), layer.end());
    }
    EXPECT_TRUE(AllClose(got, want, {1e-6, 1e-6}));
    EXPECT_EQ(sequence->Report().decode_steps, kSteps);
  }
}

// Kernels whose gather fails after so many calls.
struct FailingGather {
  static inline int64_t calls = 0, most = -1;  // -1: any number
  static Status Gather(const GatherParams& params, const Launch& launch) {
    if (calls == most) return {StatusCode::kCuda, "gather fails, as the test wants it"};
    ++calls;
    return BestCpuKernels().gather(params, launch);
  }
};

// What the slots of some layers got before the end of a prompt failed is of tokens that are gone, and must not be taken for others.
TEST(PipelineTiers, APromptWhoseEndFailsLeavesNoRows) {
  static KernelTable kernels = BestCpuKernels();
  kernels.gather = FailingGather::Gather;
  WorldOptions options = WorldOptions::Default();
  options.kernels = &kernels;
  options.cache.selector.tc.theta = 0;
  options.cache.selector.tc.tau = 1;
  options.device_budget = SmallestDevice(options, kPrompt + kSteps) + (64 << 10);
  // With a last piece of other tokens that fails at its last gather, which is that of the last layer's slots.
  const auto run = [&](int64_t gathers) {
    World world(options);
    const Stream stream(options.cache.geometry, kPrompt + kSteps, 11), other(options.cache.geometry, kPrompt + kSteps, 12);
    const auto opened = Open(world);
    Sequence& sequence = *opened;
    Outputs out;
    EXPECT_OK(PrefillPiece(sequence, stream, 128, kPrompt, &out));
    FailingGather::calls = 0;
    if (gathers > 0) {
      EXPECT_OK(sequence.Begin(other.ids(128, kPrompt - 128), kPrompt));
      FailingGather::most = gathers - 1;
      Status status = RunLayers(sequence, other, 128, kPrompt - 128, false, &out);
      if (status.ok()) status = sequence.End();
      EXPECT_TRUE(HasStatus(status, StatusCode::kCuda, "as the test wants it"));
      FailingGather::most = -1;
      EXPECT_GT(sequence.CountResidency().device_slots, 0);
      sequence.Rollback();
      EXPECT_OK(sequence.CheckInvariants());
    }
    FailingGather::calls = 0;
    EXPECT_OK(PrefillPiece(sequence, stream, kPrompt - 128, kPrompt, &out));
    const int64_t of_piece = FailingGather::calls;
    return std::pair(Decode(sequence, stream, kSteps), of_piece);
  };
  const auto [want, gathers] = run(0);
  EXPECT_EQ(run(gathers).first, want);
}

TEST(PipelineTiers, AnInheritedStepCostsItsGateAndNothingElse) {
  WorldOptions options = WorldOptions::Default();
  options.cache.audit_every = 0;
  options.cache.selector.kind = SelectorKind::kCis;
  ASSERT_OK(options.cache.selector.Set("cis.tau", "-0.999"));  // asked, and always held
  SequenceReport report;
  RunWith(options, &report);
  const KvGeometry& geometry = options.cache.geometry;
  const int64_t pairs = int64_t{geometry.layers} * geometry.kv_heads;
  EXPECT_EQ(report.triples, pairs * kSteps);
  EXPECT_EQ(report.retrievals, pairs);  // step 16 starts a block; 1 .. 15 inherit from the prompt, 17 .. 24 from 16
  EXPECT_EQ(report.inherited, pairs * (kSteps - 1));
  EXPECT_EQ(report.first_selections, pairs);
  EXPECT_EQ(report.bytes_codes, 0);
  EXPECT_EQ(report.bytes_exact_keys, pairs * (kPrompt + 16) * geometry.head_dim * 2);
  EXPECT_EQ(report.bytes_gate, pairs * (kSteps - 1) * geometry.group() * geometry.head_dim * 2 * 4);
  EXPECT_DOUBLE_EQ(report.rho(), 1.0 / kSteps);
}

// Bounds of pages are read once for all query heads of a KV head, at every step, and in sparse layers alone.
TEST(PipelineTiers, QuestReadsTheBoundsOfWholePages) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kQuest;
  options.cache.selector.budget.tokens = 64;
  SequenceReport report;
  RunWith(options, &report);
  const KvGeometry& geometry = options.cache.geometry;
  int64_t pages = 0, attended = 0;  // of one head, over all steps
  for (int64_t n = kPrompt + 1; n <= kPrompt + kSteps; ++n) {
    pages += (n - 1) / 16;
    attended += 3 * 16 + n - (n - 1) / 16 * 16;
  }
  EXPECT_EQ(report.triples, geometry.heads * kSteps);  // one of three layers, by query head
  EXPECT_EQ(report.dense_triples, 2 * geometry.heads * kSteps);
  EXPECT_EQ(report.retrievals, report.triples);
  EXPECT_DOUBLE_EQ(report.rho(), 1);
  EXPECT_EQ(report.attended, geometry.heads * attended);
  EXPECT_EQ(report.bytes_codes, geometry.kv_heads * pages * 2 * geometry.head_dim * 2);
  EXPECT_EQ(report.bytes_exact_keys, 0);
  EXPECT_EQ(report.bytes_gate, 0);
  EXPECT_EQ(report.first_selections, 0);
  // What it dropped is known from audits alone.
  EXPECT_EQ(report.dropped_estimated.count(), 0);
  EXPECT_EQ(report.dropped_bound.count(), 0);
  EXPECT_EQ(report.estimate_error.count(), 0);
  EXPECT_EQ(report.dropped_audited.count(), geometry.heads * kSteps);
  EXPECT_EQ(report.audited_steps, kSteps);
}

// Of 3 layers 2 choose, of 4 heads in them 3, at every other step: labels are read once for all heads of a KV head.
TEST(PipelineTiers, HShareCountsWhatIsChosenBorrowedAndKept) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kHShare;
  options.cache.selector.hshare.layers = 0.5;
  SequenceReport report;
  RunWith(options, &report);
  const KvGeometry& geometry = options.cache.geometry;
  const int64_t choosing_steps = kSteps / 2;
  EXPECT_EQ(report.triples, geometry.layers * geometry.heads * kSteps);
  EXPECT_EQ(report.retrievals, 2 * 3 * choosing_steps);
  EXPECT_EQ(report.borrowed, (2 * 1 + 4) * choosing_steps);
  EXPECT_EQ(report.inherited, geometry.layers * geometry.heads * (kSteps - choosing_steps));
  EXPECT_EQ(report.retrievals + report.borrowed + report.inherited, report.triples);
  EXPECT_DOUBLE_EQ(report.rho(), 2.0 / 3 * 3 / 4 / 2);
  EXPECT_EQ(report.first_selections, geometry.layers * geometry.heads);  // at the last prompt token nobody borrows
  // A discard list: a position more in the steps that keep a choice. Lengths are even where heads choose.
  EXPECT_EQ(report.attended, report.triples * 32 + report.inherited);
  int64_t middle = 0;
  for (int64_t n = kPrompt + 1; n <= kPrompt + kSteps; ++n) middle += n % 2 == 0 ? n - 4 - 8 : 0;
  // 4 of 16 channels: 2 bytes of codes, 4 of header; 3 of 4 heads choose, so both KV heads are looked at.
  EXPECT_EQ(report.bytes_codes, middle * 2 * geometry.kv_heads * (4 + 2));
  EXPECT_EQ(report.bytes_exact_keys, 0);
  EXPECT_EQ(report.bytes_gate, 0);
  EXPECT_EQ(report.dropped_estimated.count(), 0);
  EXPECT_EQ(report.dropped_bound.count(), 0);
  EXPECT_EQ(report.estimate_error.count(), 0);
  EXPECT_EQ(report.dropped_audited.count(), report.triples);
}

TEST(PipelineTiers, HShareWithoutAPromptLabelsAtItsFirstChoice) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kHShare;
  World world(options);
  const Stream stream(options.cache.geometry, 80, 11);
  auto sequence = Open(world, 80);
  Decode(*sequence, stream, 80);
  EXPECT_EQ(sequence->Report().borrowed, 0);
  EXPECT_GT(sequence->Report().retrievals, 0);
  EXPECT_GT(sequence->Report().inherited, 0);
}

// The maps are those of the last prompt; a step that is rolled back, or a piece of a prompt, leaves no trace in them.
TEST(PipelineTiers, HShareIsTheSameAfterRollbacks) {
  for (const bool again : {false, true}) {
    WorldOptions options = WorldOptions::Default();
    options.cache.selector.kind = SelectorKind::kHShare;
    options.cache.selector.hshare.heads = 0.5;
    World world(options);
    const Stream stream(options.cache.geometry, 2 * kPrompt, 11), other(options.cache.geometry, 2 * kPrompt, 12);
    const auto run = [&](bool undo) {
      auto sequence = Open(world, 2 * kPrompt);
      Outputs out;
      std::vector<float> all;
      for (const int64_t prompt : {int64_t{120}, int64_t{400}}) {  // the second after some steps of decoding
        if (prompt == 400 && !again) break;
        while (sequence->length() < prompt) {
          const int64_t first = sequence->length(), piece = std::min<int64_t>(50, prompt - first);
          if (undo) {
            EXPECT_OK(sequence->Begin(other.ids(first, piece), prompt));
            EXPECT_OK(RunLayers(*sequence, other, first, piece, false, &out, 2));
            sequence->Rollback();
          }
          EXPECT_OK(PrefillPiece(*sequence, stream, piece, prompt, &out));
        }
        for (int i = 0; i < 12; ++i) {
          if (undo) {
            EXPECT_OK(sequence->Begin(other.ids(sequence->length(), 1), 0));
            EXPECT_OK(RunLayers(*sequence, other, sequence->length(), 1, true, &out, i % 4));
            sequence->Rollback();
          }
          EXPECT_OK(DecodeOne(*sequence, stream, &out));
          for (const auto& layer : out) all.insert(all.end(), layer.begin(), layer.end());
        }
      }
      EXPECT_GT(sequence->Report().borrowed, 0);
      return all;
    };
    const std::vector<float> want = run(false);
    EXPECT_EQ(run(true), want);
  }
}

TEST(PipelineTiers, QuestPagesDivideAChunk) {
  WorldOptions options = WorldOptions::Default();
  options.cache.geometry.chunk_tokens = 48;
  options.cache.selector.kind = SelectorKind::kQuest;
  options.cache.selector.budget.tokens = 200;
  EXPECT_OK(options.cache.Validate());
  options.cache.selector.quest.page = 64;
  EXPECT_STATUS(StatusCode::kInvalid, "multiple of quest.page=64", options.cache.Validate());
}

TEST(PipelineTiers, TwoClocksOnASmallDeviceFetchLittleAndStayWithinTheBound) {
  WorldOptions options = WorldOptions::Default();
  options.device_budget = SmallestDevice(options, kPrompt + kSteps) + (16 << 10);
  for (const char* lag : {"0", "4"}) {
    ASSERT_OK(options.cache.selector.Set("tc.lag", lag));
    ASSERT_OK(options.cache.selector.Set("tc.refresh", "8"));
    SequenceReport report;
    RunWith(options, &report);
    EXPECT_GT(report.refreshes, 0);
    EXPECT_GT(report.rows_behind, 0) << "lag " << lag;
    EXPECT_GT(report.bytes_codes, 0);
    EXPECT_GT(report.inherited, 0);
    EXPECT_GT(report.dropped_audited.count(), 0);
    // Codes of 4 bits tell the dropped mass within a few per cent (of what was seen in that very step).
    EXPECT_LT(report.estimate_error.mean(), 0.15);
  }
}

TEST(PipelineTiers, NoAuditedStepExceedsThePromisedMass) {
  for (const double promise : {0.3, 0.1, 0.02}) {
    for (const bool small : {false, true}) {
      WorldOptions options = WorldOptions::Default();
      options.cache.selector.max_dropped_mass = promise;
      if (small) options.device_budget = SmallestDevice(options, kPrompt + kSteps);
      SequenceReport report;
      RunWith(options, &report);
      EXPECT_GT(report.dropped_audited.count(), 0);
      EXPECT_LE(report.dropped_audited.max(), promise);
      EXPECT_LE(report.dropped_bound.max(), promise * 1.01);
      EXPECT_EQ(report.bound_violations, 0);
    }
  }
}

TEST(PipelineTiers, EveryCodeFormatEstimatesAndBounds) {
  for (const int bits : {2, 3, 4, 5, 8}) {
    for (const bool norms : {false, true}) {
      WorldOptions options = WorldOptions::Default();
      options.cache.codes = {.bits = bits, .group_tokens = 16, .error_norms = norms};
      options.cache.selector.max_dropped_mass = 0.2;
      SequenceReport report;
      RunWith(options, &report);
      EXPECT_EQ(report.bound_violations, 0) << bits;
      EXPECT_LE(report.dropped_audited.max(), 0.2) << bits;
    }
  }
}

// The same promise rests on either bound; the statistical one attends to fewer rows for it.
TEST(PipelineTiers, AStatisticalBoundKeepsThePromiseWithFewerRows) {
  for (const int bits : {2, 4, 8}) {
    for (const bool small : {false, true}) {
      WorldOptions options = WorldOptions::Default();
      options.cache.codes = {.bits = bits, .group_tokens = 16, .dither = true};
      options.cache.selector.max_dropped_mass = 0.2;
      if (small) options.device_budget = SmallestDevice(options, kPrompt + kSteps);
      SequenceReport proven, statistical;
      RunWith(options, &proven);
      EXPECT_EQ(proven.bound_violations, 0);
      EXPECT_EQ(proven.statistical_checked, 0);
      EXPECT_EQ(proven.dropped_bound_statistical.count(), 0);
      options.cache.selector.bound = BoundKind::kStatistical;
      options.cache.selector.bound_confidence = 0.9;
      RunWith(options, &statistical);
      EXPECT_GT(statistical.statistical_checked, 0) << bits;
      EXPECT_LE(statistical.statistical_violations, statistical.statistical_checked / 10) << bits;
      EXPECT_EQ(statistical.dropped_bound.count(), 0);
      EXPECT_EQ(statistical.dropped_bound_statistical.count(), statistical.dropped_estimated.count());
      EXPECT_LE(statistical.dropped_bound_statistical.max(), 0.2 * 1.01);
      EXPECT_LE(statistical.dropped_audited.max(), 0.2);
      EXPECT_EQ(statistical.bound_violations, 0);
      if (bits == 8) continue;  // little is left to gain
      EXPECT_LT(statistical.attended, proven.attended) << bits;
    }
  }
}

// Without a promise a bound is a figure beside the estimate, and changes no choice; whatever the budget aims at.
TEST(PipelineTiers, ABoundThatIsOnlyReportedChangesNothing) {
  for (const char* budget : {"32", "mass(0.9,cap=1/3)"}) {
    WorldOptions options = WorldOptions::Default();
    ASSERT_OK(options.cache.selector.Set("budget", budget));
    options.cache.codes.dither = true;
    SequenceReport none, proven, statistical;
    const std::vector<float> without = RunWith(options, &none);
    EXPECT_EQ(none.dropped_bound.count() + none.dropped_bound_statistical.count(), 0);
    options.cache.selector.bound = BoundKind::kProven;
    EXPECT_EQ(RunWith(options, &proven), without) << budget;
    options.cache.selector.bound = BoundKind::kStatistical;
    EXPECT_EQ(RunWith(options, &statistical), without) << budget;
    EXPECT_EQ(proven.bound_violations, 0) << budget;
    EXPECT_EQ(statistical.statistical_violations, 0) << budget;
    EXPECT_GT(statistical.statistical_checked, 0) << budget;
    EXPECT_EQ(proven.dropped_bound.count(), 2 * proven.retrievals) << "a bound for each query head that selected";
    EXPECT_EQ(statistical.dropped_bound_statistical.count(), 2 * proven.retrievals);
    // In this order: estimate, statistical, proven, all.
    EXPECT_GT(statistical.dropped_bound_statistical.mean(), statistical.dropped_audited.mean()) << budget;
    EXPECT_LT(statistical.dropped_bound_statistical.mean(), proven.dropped_bound.mean()) << budget;
    EXPECT_LT(proven.dropped_bound.mean(), 1) << budget;
    // Of the set alone: tighter still.
    options.cache.selector.bound_scope = SelectorOptions::BoundScope::kSet;
    SequenceReport of_set;
    EXPECT_EQ(RunWith(options, &of_set), without) << budget;
    EXPECT_LT(of_set.dropped_bound_statistical.mean(), statistical.dropped_bound_statistical.mean()) << budget;
  }
}

// Coarse codes that keep nearly everything leave out what they have underrated: without an allowance for that, the bound of
// the set would lie below the truth more often than not.
TEST(PipelineTiers, ABoundOfTheSetAllowsForWhatTheCodesChose) {
  WorldOptions options = WorldOptions::Default();
  options.cache.codes = {.bits = 2, .group_tokens = 16, .dither = true};
  options.cache.selector.budget.tokens = 270;
  options.cache.selector.tc.tau = 1;
  options.cache.selector.bound = BoundKind::kStatistical;
  options.cache.selector.bound_scope = SelectorOptions::BoundScope::kSet;
  options.cache.selector.bound_confidence = 0.5;
  SequenceReport report;
  RunWith(options, &report);
  EXPECT_GT(report.statistical_checked, 100);
  EXPECT_LE(report.statistical_violations, report.statistical_checked / 100);
}

TEST(PipelineTiers, AStatisticalBoundNeedsDitheredCodesAndNoOneOffersSeven) {
  WorldOptions options = WorldOptions::Default();
  ThreadPool::Options threads{.loop_threads = 1, .job_threads = 1};
  const auto pool = ThreadPool::Create(threads).value();
  HostDeviceMemory device(options.device_budget);
  CacheResources resources;
  resources.executor = pool.get();
  resources.device = &device;
  options.cache.selector.bound = BoundKind::kStatistical;
  EXPECT_TRUE(HasStatus(KvCache::Create(options.cache, resources).status(), StatusCode::kInvalid, "needs dithered codes"));
  options.cache.codes.dither = true;
  EXPECT_OK(KvCache::Create(options.cache, resources).status());
  options.cache.codes.bits = 7;
  EXPECT_TRUE(HasStatus(KvCache::Create(options.cache, resources).status(), StatusCode::kInvalid, ": bits 2, 3, 4, 5, 8, over 16 or 64"));
}

// Codes are made anew when a prefix is restored, by blocks instead of as they filled: from the same seed, the same ones.
TEST(PipelineTiers, TheSameDitherAfterARestore) {
  WorldOptions options = WorldOptions::Default();
  options.cache.codes = {.bits = 2, .group_tokens = 16, .dither = true};
  World world(options);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
  const auto run = [&](uint64_t seed, int64_t restored) {
    auto sequence = world.cache().OpenWithPrefix({.max_tokens = kPrompt + kSteps, .dither_seed = seed}, stream.ids(0, kPrompt));
    EXPECT_TRUE(sequence.ok()) << sequence.status();
    EXPECT_EQ((*sequence)->restored(), restored);
    EXPECT_OK(PrefillAll(**sequence, stream, kPrompt, 100));
    std::vector<float> out = Decode(**sequence, stream, kSteps);
    EXPECT_OK(world.cache().Flush());
    return out;
  };
  const std::vector<float> first = run(1, 0);
  EXPECT_EQ(run(1, kPrompt / 64 * 64), first);
  EXPECT_NE(run(2, kPrompt / 64 * 64), first) << "the seed decides what the codes err by";
}

// The codes of a group with an infinite key know nothing of its logits: a certificate over them must not hold.
TEST(PipelineTiers, AnUnknownLogitIsNotANeglectedOne) {
  for (const bool spoiled : {false, true}) {
    WorldOptions options = WorldOptions::Default();
    SelectorOptions& selector = options.cache.selector;
    selector.kind = SelectorKind::kCis;
    for (const auto& [knob, value] : {std::pair{"cis.gate", "certified"}, {"cis.scorer", "codes"}, {"cis.local_edge", "held"},
                                      {"cis.delta_max", "0.999"}}) {
      ASSERT_OK(selector.Set(knob, value));
    }
    World world(options);
    Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
    if (spoiled) stream.SetKeys(150, -std::numeric_limits<float>::infinity());
    auto sequence = Open(world);
    ASSERT_OK(PrefillAll(*sequence, stream, kPrompt, 128));
    Decode(*sequence, stream, kSteps);
    EXPECT_EQ(sequence->Report().inherited > 0, !spoiled) << sequence->Report().inherited;
    EXPECT_EQ(sequence->Report().bound_violations, 0);
  }
}

TEST(PipelineTiers, SharedCandidatesChooseAmongWhatIsResident) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.kind = SelectorKind::kSharedCandidates;
  options.device_budget = SmallestDevice(options, kPrompt + kSteps) + (16 << 10);
  SequenceReport report;
  RunWith(options, &report);
  EXPECT_EQ(report.rows_in_step, 0);  // never fetches for a step
  EXPECT_GT(report.refreshes, 0);
  EXPECT_EQ(report.retrievals, int64_t{3} * 2 * (kSteps / options.cache.selector.sc.refresh));
}

// Recomputes what was dropped from the stream alone.
class CheckingObserver : public AuditObserver {
 public:
  explicit CheckingObserver(const Stream& stream) : stream_(stream) {}
  void OnUnit(const AuditedUnit& unit) override {
    ++units;
    scanned += unit.scanned;
    if (unit.logits.empty()) return;
    const KvGeometry& geometry = stream_.geometry();
    const int64_t t = unit.n - 1;
    const auto in_sight = unit.n - (unit.cut_end - unit.cut_begin);
    ASSERT_EQ(unit.logits.size(), static_cast<size_t>(unit.heads * in_sight));
    EXPECT_TRUE(std::is_sorted(unit.attended.begin(), unit.attended.end()));
    for (int32_t h = 0; h < unit.heads; ++h) {
      const float* q = stream_.q(unit.layer, t) + (unit.first_head + h) * geometry.head_dim;
      double all = 0, kept = 0;
      for (int32_t i = 0; i < unit.n; ++i) {
        if (i >= unit.cut_begin && i < unit.cut_end) continue;
        double dot = 0;
        for (int32_t c = 0; c < geometry.head_dim; ++c) dot += static_cast<double>(q[c]) * stream_.key(unit.layer, i, unit.kv_head)[c];
        const double weight = std::exp(dot / std::sqrt(static_cast<double>(geometry.head_dim)));
        all += weight;
        kept += std::binary_search(unit.attended.begin(), unit.attended.end(), i) ? weight : 0;
      }
      EXPECT_NEAR(unit.dropped[static_cast<size_t>(h)], 1 - kept / all, 1e-4);
      if (kept < all) ++dropped;
    }
  }
  int64_t units = 0, scanned = 0, dropped = 0;

 private:
  const Stream& stream_;
};

TEST(PipelineTiers, AnObserverSeesTheTruthOfEveryAuditedUnit) {
  for (const SelectorKind kind : {SelectorKind::kTwoClock, SelectorKind::kPsaw, SelectorKind::kDense}) {
    WorldOptions options = WorldOptions::Default();
    options.cache.selector.kind = kind;
    World world(options);
    const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
    CheckingObserver observer(stream);
    auto opened = world.cache().Open({.max_tokens = kPrompt + kSteps, .observer = &observer});
    ASSERT_TRUE(opened.ok()) << opened.status();
    ASSERT_OK(PrefillAll(**opened, stream, kPrompt, 128));
    Decode(**opened, stream, kSteps);
    const SequenceReport& report = (*opened)->Report();
    EXPECT_EQ(observer.units, kSteps * options.cache.geometry.layers * options.cache.geometry.kv_heads);
    EXPECT_EQ(observer.scanned, report.retrievals);
    EXPECT_EQ(observer.dropped > 0, kind == SelectorKind::kTwoClock) << SelectorKindName(kind);
  }
}

TEST(PipelineTiers, DeviceSlotsLimitWhatIsResidentAndNothingElse) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.tc.theta = 0;
  const std::vector<float> resident = RunWith(options);
  World world(options);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
  auto opened = world.cache().Open({.max_tokens = kPrompt + kSteps, .device_slots = 40});
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_OK(PrefillAll(**opened, stream, kPrompt, 128));
  EXPECT_TRUE(AllClose(Decode(**opened, stream, kSteps), resident, {1e-5, 1e-5}));
  const KvGeometry& geometry = options.cache.geometry;
  EXPECT_EQ((*opened)->CountResidency().device_slots, 40 * geometry.layers * geometry.kv_heads);
  EXPECT_GT((*opened)->Report().rows_host, 0);
  EXPECT_TRUE(HasStatus(world.cache().Open({.max_tokens = kPrompt, .device_slots = -1}), StatusCode::kInvalid, "device_slots"));
}

// Without turns scores are pooled for one layer at a time: the device has room for rows instead.
TEST(PipelineTiers, ScoresOfOneLayerAreKeptWithoutTurns) {
  WorldOptions options = WorldOptions::Default();
  const KvGeometry& geometry = options.cache.geometry;
  const uint64_t scores = RoundUp(static_cast<uint64_t>(kPrompt + kSteps), 16) * sizeof(float) * static_cast<uint64_t>(geometry.kv_heads);  // of a layer
  const uint64_t without = SmallestDevice(options, kPrompt + kSteps);
  options.cache.selector.tc.refresh = 16;
  EXPECT_GE(SmallestDevice(options, kPrompt + kSteps) + 512, without + static_cast<uint64_t>(geometry.layers - 1) * scores);  // both are rounded up
}

// The first choice is made when no row is on the device yet; it must be as large as any other.
TEST(PipelineTiers, TwoClocksStartWithAWholeBudget) {
  WorldOptions options = WorldOptions::Default();
  options.cache.selector.tc.tau = -1;  // the first choice is inherited
  options.cache.selector.tc.theta = 0.5;
  options.cache.selector.budget.tokens = 160;  // more than the ring holds
  World world(options);
  const Stream stream(options.cache.geometry, kPrompt + kSteps, 11);
  auto opened = world.cache().Open({.max_tokens = kPrompt + kSteps, .device_slots = 200});
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_OK(PrefillAll(**opened, stream, kPrompt, 128));
  Decode(**opened, stream, 2);
  EXPECT_EQ((*opened)->Report().retrievals, 0);
  EXPECT_EQ((*opened)->Report().mean_attended(), options.cache.selector.budget.tokens);
}

TEST(PipelineTiers, MisuseIsRefused) {
  World world(WorldOptions::Default());
  const Stream stream(SmallGeometry(), 64, 1);
  auto sequence = Open(world, 32);
  Outputs out;
  EXPECT_TRUE(HasStatus(sequence->End(), StatusCode::kInvalid, "without Begin"));
  EXPECT_TRUE(HasStatus(sequence->Begin({}, 10), StatusCode::kInvalid, "without tokens"));
  EXPECT_TRUE(HasStatus(sequence->Begin(stream.ids(0, 33), 33), StatusCode::kOutOfSpace, "max_tokens = 32"));
  EXPECT_TRUE(HasStatus(sequence->Begin(stream.ids(0, 2), 0), StatusCode::kInvalid, "one token"));
  EXPECT_TRUE(HasStatus(sequence->Begin(stream.ids(0, 9), 8), StatusCode::kInvalid, "prompt of 8"));
  ASSERT_OK(sequence->Begin(stream.ids(0, 8), 8));
  EXPECT_TRUE(HasStatus(sequence->Begin(stream.ids(0, 8), 8), StatusCode::kInvalid, "open"));
  LayerInput input;
  EXPECT_TRUE(HasStatus(sequence->Prefill(LayerId(1), input), StatusCode::kInvalid, "layer 0 is next"));
  EXPECT_TRUE(HasStatus(sequence->Attend(LayerId(0), input), StatusCode::kInvalid, "Prefill"));
  EXPECT_TRUE(HasStatus(sequence->End(), StatusCode::kInvalid, "0 of 3"));
  sequence->Rollback();
  ASSERT_OK(PrefillAll(*sequence, stream, 8, 8));
  EXPECT_TRUE(HasStatus(sequence->BeginRepair(ChunkIndex(0)), StatusCode::kInvalid, "not a whole chunk"));
}

}  // namespace
}  // namespace prehoc
