#include "transfer/record_format.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "tests/support/chunk_data.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/source_paths.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

constexpr size_t kPayload = 300;
constexpr ChunkOrigin kOrigin{.tenant = 0x1122334455667788u, .parent = 0x99aabbccddeeff00u, .chunk = 7, .branch = true};

class RecordFormatTest : public ::testing::Test {
 protected:
  std::vector<std::byte> Record(const ChunkKey& key, const std::vector<std::byte>& payload) const {
    return Record(EncodeHeader(context_, key, payload, kOrigin), payload);
  }
  static std::vector<std::byte> Record(const RecordHeader& header, const std::vector<std::byte>& payload) {
    std::vector<std::byte> record(sizeof header + payload.size());
    std::memcpy(record.data(), &header, sizeof header);
    std::copy(payload.begin(), payload.end(), record.begin() + sizeof header);
    return record;
  }
  Status Parse(const std::vector<std::byte>& record, VerifyPayload verify = VerifyPayload::kYes) const {
    return ParseRecord(context_, key_, record, verify).status();
  }

  const RecordContext context_ = RecordContext::Create(TestIdentity()).value();
  const ChunkKey key_ = TestKey(1, 5);
  const std::vector<std::byte> payload_ = TestChunk(1, kPayload);
};

TEST_F(RecordFormatTest, GivesThePayloadBackInPlace) {
  for (const size_t size : {size_t{0}, size_t{1}, kPayload, size_t{100'000}}) {
    const std::vector<std::byte> payload = TestChunk(2, size);
    const std::vector<std::byte> record = Record(key_, payload);
    auto parsed = ParseRecord(context_, key_, record);
    ASSERT_OK(parsed);
    EXPECT_EQ(parsed->data(), record.data() + sizeof(RecordHeader));
    EXPECT_TRUE(std::equal(parsed->begin(), parsed->end(), payload.begin(), payload.end()));
  }
}

TEST_F(RecordFormatTest, EveryFlippedBitIsFound) {
  const std::vector<std::byte> good = Record(key_, payload_);
  for (size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::vector<std::byte> bad = good;
    bad[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_EQ(Parse(bad).code(), StatusCode::kCorrupt) << "bit " << bit;
    const auto header = std::span(bad).first(sizeof(RecordHeader)), payload = std::span(bad).subspan(sizeof(RecordHeader));
    ASSERT_EQ(CheckRecord(context_, key_, header, payload).code(), StatusCode::kCorrupt) << "bit " << bit;
  }
}

TEST_F(RecordFormatTest, EveryOtherValueOfEveryByteIsFound) {
  const std::vector<std::byte> good = Record(key_, TestChunk(1, 16));
  for (size_t i = 0; i < good.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      if (good[i] == static_cast<std::byte>(value)) continue;
      std::vector<std::byte> bad = good;
      bad[i] = static_cast<std::byte>(value);
      ASSERT_EQ(Parse(bad).code(), StatusCode::kCorrupt) << "byte " << i;
    }
  }
}

TEST_F(RecordFormatTest, EveryOtherLengthIsFound) {
  const std::vector<std::byte> good = Record(key_, payload_);
  for (size_t size = 0; size < good.size(); ++size) {
    ASSERT_EQ(Parse({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}).code(), StatusCode::kCorrupt) << size;
  }
  std::vector<std::byte> longer = good;
  longer.push_back(std::byte{0});
  EXPECT_STATUS(StatusCode::kCorrupt, "payload length is 301, expected 300", Parse(longer));
}

TEST_F(RecordFormatTest, SwappedPiecesOfThePayloadAreFound) {
  std::vector<std::byte> bad = Record(key_, payload_);
  std::swap_ranges(bad.begin() + 128, bad.begin() + 192, bad.begin() + 192);
  EXPECT_STATUS(StatusCode::kCorrupt, "checksum", Parse(bad));
}

TEST_F(RecordFormatTest, NamesWhatIsWrongWithBothValues) {
  // Each with a checksum that holds: only the field itself is wrong.
  const auto with = [&](auto change) {
    RecordHeader header = EncodeHeader(context_, key_, payload_);
    change(header);
    std::vector<std::byte> sealed(offsetof(RecordHeader, checksum));
    std::memcpy(sealed.data(), &header, sealed.size());
    header.checksum = Hash128(payload_, Hash64(sealed));
    return Parse(Record(header, payload_));
  };
  EXPECT_OK(with([](RecordHeader&) {}));
  EXPECT_STATUS(StatusCode::kCorrupt, "magic is 0x1, expected 0x43524850", with([](auto& h) { h.magic = 1; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "format version is 3, expected 2", with([](auto& h) { h.version = 3; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "dtype is 9, expected 1", with([](auto& h) { h.dtype = 9; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "expected", with([](auto& h) { h.layout ^= 1; }));
  EXPECT_STATUS(StatusCode::kCorrupt, TestIdentity().layout, with([](auto& h) { h.layout ^= 1; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "model is", with([](auto& h) { h.model[31] ^= 1; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "payload length", with([](auto& h) { h.payload_bytes = 1; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "branch is 2, expected 0 or 1", with([](auto& h) { h.branch = 2; }));
  EXPECT_STATUS(StatusCode::kCorrupt, "chunk number is -1", with([](auto& h) { h.chunk = -1; }));
}

TEST_F(RecordFormatTest, ARecordOfAnotherKeyIsRefusedWithBothKeys) {
  const std::vector<std::byte> record = Record(TestKey(2, 5), payload_);
  EXPECT_STATUS(StatusCode::kCorrupt, TestKey(2, 5).ToString(), Parse(record));
  EXPECT_STATUS(StatusCode::kCorrupt, key_.ToString(), Parse(record));
  EXPECT_STATUS(StatusCode::kCorrupt, "key is", Parse(Record(TestKey(1, 6), payload_)));
  ChunkKey last_byte = key_;
  last_byte.chain[31] ^= 0x80;
  EXPECT_STATUS(StatusCode::kCorrupt, "key is", Parse(Record(last_byte, payload_)));
}

TEST_F(RecordFormatTest, ARecordOfAnotherStoreIsRefused) {
  for (const auto change : {+[](StoreIdentity& id) { id.model[0] ^= 1; }, +[](StoreIdentity& id) { id.layout += "x"; }}) {
    StoreIdentity other = TestIdentity();
    change(other);
    const RecordContext context = RecordContext::Create(other).value();
    EXPECT_EQ(Parse(Record(EncodeHeader(context, key_, payload_), payload_)).code(), StatusCode::kCorrupt);
  }
}

TEST_F(RecordFormatTest, SaysWhereItsChunkStands) {
  EXPECT_EQ(OriginOf(EncodeHeader(context_, key_, payload_, kOrigin)), kOrigin);
  EXPECT_EQ(OriginOf(EncodeHeader(context_, key_, payload_)), ChunkOrigin{});
  const auto plain = EncodeHeader(context_, key_, payload_).checksum;
  for (const ChunkOrigin& other : {ChunkOrigin{.tenant = 1}, ChunkOrigin{.parent = 1}, ChunkOrigin{.chunk = 1}, ChunkOrigin{.branch = true}}) {
    EXPECT_NE(EncodeHeader(context_, key_, payload_, other).checksum, plain) << "the checksum covers all of it";
  }
}

TEST_F(RecordFormatTest, TheChecksumIsBoundToTheHeader) {
  const RecordHeader a = EncodeHeader(context_, key_, payload_);
  const RecordHeader b = EncodeHeader(context_, TestKey(2, 5), payload_);
  EXPECT_NE(a.checksum, b.checksum) << "the same payload under another key";
}

TEST_F(RecordFormatTest, WithoutVerifyingOnlyTheHeaderIsCompared) {
  std::vector<std::byte> record = Record(key_, payload_);
  record.back() ^= std::byte{1};
  EXPECT_STATUS(StatusCode::kCorrupt, "checksum", Parse(record));
  EXPECT_OK(Parse(record, VerifyPayload::kNo));
  record[0] ^= std::byte{1};
  EXPECT_STATUS(StatusCode::kCorrupt, "magic", Parse(record, VerifyPayload::kNo));
}

TEST_F(RecordFormatTest, HeadersApartNeedTheirLength) {
  const std::vector<std::byte> record = Record(key_, payload_);
  EXPECT_STATUS(StatusCode::kCorrupt, "header length is 127, expected 128",
                CheckRecord(context_, key_, std::span(record).first(127), payload_));
}

TEST_F(RecordFormatTest, AnUnknownIdentityIsRefusedWithBothValues) {
  StoreIdentity identity = TestIdentity();
  identity.format_version = 3;
  EXPECT_STATUS(StatusCode::kInvalid, "version 3", RecordContext::Create(identity));
  EXPECT_STATUS(StatusCode::kInvalid, "knows 2", RecordContext::Create(identity));
  identity = TestIdentity();
  identity.dtype = "bf16";
  EXPECT_STATUS(StatusCode::kInvalid, "'bf16'", RecordContext::Create(identity));
  EXPECT_STATUS(StatusCode::kInvalid, "'f16'", RecordContext::Create(identity));
}

// The header is what docs/formats.md says, byte for byte. A change here is a new version.
TEST_F(RecordFormatTest, TheHeaderLiesAsDocumented) {
  const std::vector<std::byte> record = Record(key_, payload_);
  const auto at = [&](size_t offset, size_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, record.data() + offset, bytes);
    return value;
  };
  EXPECT_EQ(std::memcmp(record.data(), "PHRC", 4), 0);
  EXPECT_EQ(at(4, 2), 2u);
  EXPECT_EQ(at(6, 1), 1u);
  EXPECT_EQ(at(7, 1), 1u);
  const std::string layout = TestIdentity().layout;
  EXPECT_EQ(at(8, 8), Hash64(std::as_bytes(std::span(layout))));
  EXPECT_EQ(std::memcmp(record.data() + 16, TestIdentity().model.data(), 32), 0);
  EXPECT_EQ(std::memcmp(record.data() + 48, key_.chain.data(), 32), 0);
  EXPECT_EQ(at(80, 4), 5u);
  EXPECT_EQ(at(84, 4), 7u);
  EXPECT_EQ(at(88, 8), kPayload);
  EXPECT_EQ(at(96, 8), kOrigin.parent);
  EXPECT_EQ(at(104, 8), kOrigin.tenant);
  const auto checksum = Hash128(payload_, Hash64(std::span(record).first(112)));
  EXPECT_EQ(at(112, 8), checksum[0]);
  EXPECT_EQ(at(120, 8), checksum[1]);
}

std::string Golden(const char* name) {
  std::ifstream file(GoldenPath("/store/") + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST_F(RecordFormatTest, RefusesWhatVersionOneWroteWithBothVersions) {
  const std::string bytes = Golden("record-v1.bin");
  ASSERT_FALSE(bytes.empty());
  EXPECT_STATUS(StatusCode::kCorrupt, "format version is 1, expected 2", ParseRecord(context_, key_, std::as_bytes(std::span(bytes))));
}

// A record as version 2 wrote it. If this fails, stores of users are lost: raise the version.
TEST_F(RecordFormatTest, ReadsAndWritesWhatVersionTwoWrote) {
  const std::string bytes = Golden("record-v2.bin");
  const auto golden = std::as_bytes(std::span(bytes));
  auto payload = ParseRecord(context_, key_, golden);
  ASSERT_OK(payload);
  EXPECT_TRUE(std::equal(payload->begin(), payload->end(), payload_.begin(), payload_.end()));
  EXPECT_EQ(Record(key_, payload_), std::vector<std::byte>(golden.begin(), golden.end()));
}

// Values of XXH3 itself, so that another library, or another vector path of it, would show.
TEST(HashTest, IsXxh3) {
  const std::string text = "prehoc";
  EXPECT_EQ(Hash64(std::as_bytes(std::span(text.data(), 0))), 0x2d06800538d394c2u);
  EXPECT_EQ(Hash128(std::as_bytes(std::span(text.data(), 0)))[0], 0x6001c324468d497fu);
  EXPECT_EQ(Hash128(std::as_bytes(std::span(text.data(), 0)))[1], 0x99aa06d3014798d8u);
  const std::vector<std::byte> zeros(1000);
  EXPECT_NE(Hash64(zeros), Hash64(zeros, 1));
}

}  // namespace
}  // namespace prehoc
