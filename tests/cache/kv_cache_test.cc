// The facade's refusals: what a caller can get wrong, and that nothing has changed afterwards.
#include "cache/kv_cache.h"

#include <gtest/gtest.h>

#include "cache/internal/cache_impl.h"
#include "tests/cache/pipeline_world.h"

namespace prehoc {
namespace {

// Memory of a device that host code is told not to touch.
class FarMemory final : public DeviceMemory {
 public:
  explicit FarMemory(size_t budget) : DeviceMemory(budget), base_(budget) {}
  bool host_accessible() const override { return false; }

 private:
  Result<std::byte*> DoAllocate(size_t size) override {
    PREHOC_ASSIGN_OR_RETURN(buffer_, base_.Allocate(size, "far"));
    return buffer_.data();
  }
  void DoFree(std::byte*, size_t) override { buffer_.Reset(); }
  HostDeviceMemory base_;
  DeviceBuffer buffer_;
};

class NoRegistrar final : public HostRegistrar {
  Status Register(std::byte*, size_t) override { return {}; }
  void Unregister(std::byte*) override {}
};

class KvCacheTest : public testing::Test {
 protected:
  KvCacheTest() {
    resources_.executor = &executor_;
    resources_.device = &device_;
  }
  Status Create() { return KvCache::Create(options_, resources_).status(); }
  void ExpectRefused(StatusCode code, const std::string& says) {
    const Status status = Create();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_NE(status.message().find(says), std::string::npos) << status;
  }

  ManualExecutor executor_;
  HostDeviceMemory device_{1 << 20};
  CacheOptions options_ = WorldOptions::Default().cache;
  CacheResources resources_;
};

TEST_F(KvCacheTest, NeedsAnExecutorAndADevice) {
  resources_.executor = nullptr;
  ExpectRefused(StatusCode::kInvalid, "executor");
  resources_.executor = &executor_;
  resources_.device = nullptr;
  ExpectRefused(StatusCode::kInvalid, "device memory");
}

TEST_F(KvCacheTest, ShapesMustFitTogether) {
  options_.codes.group_tokens = 48;
  ExpectRefused(StatusCode::kInvalid, "chunk_tokens = 64 is not a multiple of the codes' group of 48");
  options_ = WorldOptions::Default().cache;
  options_.audit_every = -1;
  ExpectRefused(StatusCode::kInvalid, "audit_every = -1");
  options_ = WorldOptions::Default().cache;
  options_.codes.bits = 7;
  ExpectRefused(StatusCode::kInvalid, "bits 2, 3, 4, 5, 8");
}

TEST_F(KvCacheTest, AStoreOfAnotherGeometryIsRefusedWithBothSizes) {
  MemoryChunkStore::Options store;
  store.chunk_bytes = 12345;
  store.identity.layout = "another";
  const auto other = MemoryChunkStore::Create(store).value();
  resources_.store = other.get();
  ExpectRefused(StatusCode::kInvalid, "12345");
  ExpectRefused(StatusCode::kInvalid, std::to_string(options_.geometry.block_bytes()));
}

TEST_F(KvCacheTest, AStatisticalBoundNeedsDitheredCodes) {
  ASSERT_OK(options_.selector.Set("selector", "tc"));
  ASSERT_OK(options_.selector.Set("bound", "statistical"));
  ExpectRefused(StatusCode::kInvalid, "dithered codes");
  options_.codes.dither = true;
  EXPECT_OK(Create());
}

// What needs host code in the device's memory is refused by its name, with what to use instead.
TEST_F(KvCacheTest, ADeviceOutOfReachRefusesByName) {
  FarMemory far(1 << 20);
  resources_.device = &far;
  ExpectRefused(StatusCode::kInvalid, "registrar");
  NoRegistrar registrar;
  resources_.registrar = &registrar;
  EXPECT_OK(Create());
  const std::pair<std::vector<std::pair<std::string, std::string>>, std::string> cases[] = {
      {{{"selector", "quest"}, {"budget", "64"}}, "selector quest"},
      {{{"selector", "hshare"}}, "selector hshare"},
      {{{"selector", "sc"}}, "selector sc"},
      {{{"selector", "tc"}, {"max_dropped_mass", "0.1"}}, "max_dropped_mass"},
      {{{"selector", "tc"}, {"budget", "mass(0.9,cap=64)"}}, "budget=mass"},
      {{{"selector", "cis"}, {"cis.scorer", "pages"}}, "cis.scorer=pages"},
      {{{"selector", "cis"}, {"cis.gate", "certified"}, {"cis.local_edge", "held"}}, "cis.gate=certified"},
      {{{"selector", "cis"}, {"cis.budget", "cis*"}}, "cis.budget=cis*"},
      {{{"selector", "cis"}, {"cis.precision", "f16"}}, "cis.precision=f16"},
      {{{"selector", "tc"}, {"tc.refresh", "16"}, {"tc.lag", "2"}}, "tc.lag > 0"},
  };
  for (const auto& [knobs, says] : cases) {
    options_ = WorldOptions::Default().cache;
    for (const auto& [knob, value] : knobs) ASSERT_OK(options_.selector.Set(knob, value));
    ExpectRefused(StatusCode::kUnsupported, says);
  }
  for (const RowFormat rows : {RowFormat::kInt8, RowFormat::kE4m3}) {
    options_ = WorldOptions::Default().cache;
    options_.geometry.rows = rows;
    EXPECT_OK(Create());
  }
  EXPECT_EQ(far.used(), 0u);
}

class SequenceCallsTest : public testing::Test {
 protected:
  SequenceCallsTest() : world_(WorldOptions::Default()), sequence_(world_.cache().Open({.max_tokens = 200}).value()) {}
  static void ExpectInvalid(const Status& status, const std::string& says) {
    EXPECT_EQ(status.code(), StatusCode::kInvalid) << status;
    EXPECT_NE(status.message().find(says), std::string::npos) << status;
  }
  LayerInput Input(int32_t layer) {
    LayerInput input;
    input.q = input.q_pre_rope = stream_.q(layer, 0);
    input.k = stream_.k(layer, 0);
    input.v = stream_.v(layer, 0);
    out_.assign(64 * 64, 0);
    input.out = out_.data();
    return input;
  }

  World world_;
  std::unique_ptr<Sequence> sequence_;
  Stream stream_{SmallGeometry(), 200, 3};
  std::vector<float> out_;
};

TEST_F(SequenceCallsTest, OpeningRefusesWhatCannotBe) {
  KvCache& cache = world_.cache();
  ExpectInvalid(cache.Open({.max_tokens = 0}).status(), "max_tokens = 0");
  ExpectInvalid(cache.Open({.max_tokens = 100, .device_slots = -1}).status(), "device_slots = -1");
  ExpectInvalid(cache.OpenWithPrefix({.max_tokens = 10}, stream_.ids(0, 11)).status(), "a prompt of 11 tokens with max_tokens = 10");
}

TEST_F(SequenceCallsTest, CallsOutOfOrderAreRefusedAndChangeNothing) {
  Sequence& s = *sequence_;
  EXPECT_EQ(s.max_tokens(), 200);
  EXPECT_EQ(s.chunk_tokens(), 64);
  ExpectInvalid(s.Prefill(LayerId(0), Input(0)), "without Begin()");
  ExpectInvalid(s.End(), "End() without Begin()");
  ExpectInvalid(s.EndRepair(), "EndRepair() without BeginRepair()");
  ExpectInvalid(s.Begin({}, 10), "without tokens");
  ExpectInvalid(s.Begin(stream_.ids(0, 2), 0), "one token at a time");
  ExpectInvalid(s.Begin(stream_.ids(0, 10), 9), "in a prompt of 9");
  ASSERT_OK(s.Begin(stream_.ids(0, 64), 64));
  ExpectInvalid(s.Begin(stream_.ids(0, 64), 64), "while a call is open");
  ExpectInvalid(s.BeginRepair(ChunkIndex(0)), "while a call is open");
  ExpectInvalid(s.Prefill(LayerId(1), Input(1)), "layer 0 is next");
  ExpectInvalid(s.Attend(LayerId(0), Input(0)), "use Prefill()");
  LayerInput skips = Input(0);
  skips.q_skip = 65;
  ExpectInvalid(s.Prefill(LayerId(0), skips), "q_skip = 65 of 64");
  EXPECT_FALSE(s.takes_device_memory());
  LayerInput elsewhere = Input(0);
  elsewhere.on_device = true;
  ExpectInvalid(s.Prefill(LayerId(0), elsewhere), "on_device");
  ASSERT_OK(s.Prefill(LayerId(0), Input(0)));
  ExpectInvalid(s.End(), "End() after 1 of 3 layers");
  for (int32_t l = 1; l < 3; ++l) ASSERT_OK(s.Prefill(LayerId(l), Input(l)));
  ASSERT_OK(s.End());
  EXPECT_EQ(s.length(), 64);
  EXPECT_EQ(s.prompt_length(), 64);
  ASSERT_EQ(s.tokens().size(), 64u);
  EXPECT_TRUE(std::equal(s.tokens().begin(), s.tokens().end(), stream_.ids(0, 64).begin()));
  EXPECT_OK(s.CheckInvariants());
}

TEST_F(SequenceCallsTest, ARepairIsOfAWholeChunkAndOfAllLayers) {
  Sequence& s = *sequence_;
  ASSERT_OK(PrefillAll(s, stream_, 100, 100));
  ExpectInvalid(s.BeginRepair(ChunkIndex(1)), "chunk 1 is not a whole chunk");
  ASSERT_OK(s.BeginRepair(ChunkIndex(0)));
  ExpectInvalid(s.End(), "use EndRepair()");
  ExpectInvalid(s.EndRepair(), "EndRepair() after 0 of 3 layers");
  s.Rollback();
  Outputs out;
  EXPECT_OK(DecodeOne(s, stream_, &out));
}

TEST_F(SequenceCallsTest, OnlyHeadsThatExistCanBeLookedAt) {
  ASSERT_OK(PrefillAll(*sequence_, stream_, 64, 64));
  ExpectInvalid(sequence_->LastStep(LayerId(3), KvHeadId(0)).status(), "layer 3, KV head 0 of 3 and 2");
  ExpectInvalid(sequence_->LastStep(LayerId(0), KvHeadId(2)).status(), "layer 0, KV head 2 of 3 and 2");
}

TEST_F(SequenceCallsTest, TokensBeyondTheMostAreRefused) {
  ASSERT_OK(PrefillAll(*sequence_, stream_, 200, 100));
  const Status full = sequence_->Begin(stream_.ids(0, 1), 0);
  EXPECT_EQ(full.code(), StatusCode::kOutOfSpace);
  EXPECT_NE(full.message().find("token 201 is beyond max_tokens = 200"), std::string::npos) << full;
}

// tc.dense_below=auto: bytes of K and V a layer, where a choice has to be waited for.
TEST(DenseBelowTest, FollowsTheDevice) {
  KvGeometry geometry = SmallGeometry();
  geometry.kv_heads = 8, geometry.heads = 32, geometry.head_dim = 128;
  EXPECT_EQ(DenseBelow(geometry, FarMemory(1 << 20)), 65'536);
  geometry.kv_heads = 4;
  EXPECT_EQ(DenseBelow(geometry, FarMemory(1 << 20)), 131'072);
  EXPECT_EQ(DenseBelow(geometry, HostDeviceMemory(1 << 20)), 0);
}

}  // namespace
}  // namespace prehoc
