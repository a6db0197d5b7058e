#include "transfer/segment_table.h"

#include <fcntl.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <set>
#include <vector>

#include "tests/support/chunk_data.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/source_paths.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"

namespace prehoc {
namespace {

ListedRecord Listed(uint64_t number, int key, uint64_t offset = 0) { return {number, TestKey(key), offset}; }

// --- the list of keys ---

std::string_view View(const SegmentKey& key) { return {key.data(), key.size()}; }

TEST(SegmentKeysTest, ListsComeBackAsTheyWere) {
  std::string list;
  AppendListedKey(ListedKind::kRecord, View(MakeSegmentKey(7, TestKey(1, 3))), 4096, &list);
  AppendListedKey(ListedKind::kTombstone, View(MakeSegmentKey(UINT64_MAX, TestKey(2))), 0, &list);
  AppendListedKey(ListedKind::kRecord, View(MakeSegmentKey(9, TestKey(3))), 0x123456789abcdef0, &list);
  auto keys = ParseSegmentKeys(list, 3);
  ASSERT_OK(keys);
  ASSERT_EQ(keys->records.size(), 2u);
  EXPECT_EQ(keys->records[0].number, 7u);
  EXPECT_EQ(keys->records[0].key, TestKey(1, 3));
  EXPECT_EQ(keys->records[0].block_offset, 4096u);
  EXPECT_EQ(keys->records[1].block_offset, 0x123456789abcdef0u);
  EXPECT_EQ(keys->tombstones, std::vector<uint64_t>{UINT64_MAX});
  EXPECT_OK(ParseSegmentKeys("", 0));
}

TEST(SegmentKeysTest, ReadsAndWritesWhatVersionOneWrote) {
  std::ifstream file(GoldenPath("/store/segment-keys-v1.bin"), std::ios::binary);
  const std::string golden((std::istreambuf_iterator<char>(file)), {});
  auto keys = ParseSegmentKeys(golden, 3);
  ASSERT_OK(keys);
  ASSERT_EQ(keys->records.size(), 2u);
  EXPECT_EQ(keys->tombstones, std::vector<uint64_t>{3});
  std::string written;
  AppendListedKey(ListedKind::kRecord, View(MakeSegmentKey(7, TestKey(1, 5))), 4096, &written);
  AppendListedKey(ListedKind::kTombstone, View(MakeSegmentKey(3, TestKey(2))), 0, &written);
  AppendListedKey(ListedKind::kRecord, View(MakeSegmentKey(9, TestKey(3))), 212992, &written);
  EXPECT_EQ(written, golden);
}

TEST(SegmentKeysTest, OtherLengthsAndKindsAreRefused) {
  std::string list;
  AppendListedKey(ListedKind::kRecord, View(MakeSegmentKey(7, TestKey(1))), 0, &list);
  EXPECT_STATUS(StatusCode::kCorrupt, "list of keys", ParseSegmentKeys(list, 2));
  EXPECT_STATUS(StatusCode::kCorrupt, "list of keys", ParseSegmentKeys(list, 0));
  EXPECT_STATUS(StatusCode::kCorrupt, "list of keys", ParseSegmentKeys(list.substr(1), 1));
  EXPECT_STATUS(StatusCode::kCorrupt, "list of keys", ParseSegmentKeys("", UINT64_MAX));
  list[0] = 2;
  EXPECT_STATUS(StatusCode::kCorrupt, "kind 2", ParseSegmentKeys(list, 1));
}

TEST(SegmentKeysTest, KeysSortByNumber) {
  SeededRng rng;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t a = rng.Next() >> rng.Int(0, 63), b = rng.Next() >> rng.Int(0, 63);
    if (a != b) {
      ASSERT_EQ(View(MakeSegmentKey(a, TestKey(2))) < View(MakeSegmentKey(b, TestKey(1))), a < b) << a << " " << b;
    }
  }
}

TEST(ValueShapeTest, LargePayloadsBeginOnAPage) {
  for (const uint64_t payload : {uint64_t{64} << 10, uint64_t{192} << 10, uint64_t{1} << 20, uint64_t{2} << 20,
                                 (uint64_t{2} << 20) - 4096, uint64_t{64} << 20}) {
    const ValueShape shape = ValueShape::For(128, payload);
    EXPECT_TRUE(shape.aligned) << payload;
    EXPECT_EQ(shape.RecordOffset(0) + 128, 4096u) << payload;
    EXPECT_EQ(shape.RecordOffset(8192) + 128, 4096u + 8192) << payload;
    EXPECT_EQ(shape.value_bytes(), shape.pad + 128 + payload);
    EXPECT_LT(shape.pad, 4096u);
  }
  for (const uint64_t payload : {1, 4096, 60 << 10, (192 << 10) + 512}) {
    const ValueShape shape = ValueShape::For(128, payload);
    EXPECT_FALSE(shape.aligned);
    EXPECT_EQ(shape.pad, 0u);
  }
}

// --- the table ---

TEST(SegmentTableTest, ARecordGoesFromMemtableToFileToNothing) {
  SegmentTable table(4);
  EXPECT_FALSE(table.Find(TestKey(1)));
  table.BeginWrite(1, 100);
  EXPECT_FALSE(table.Find(TestKey(1))) << "not before it is written";
  table.Publish(TestKey(1), 1);
  EXPECT_EQ(table.Find(TestKey(1))->segment, 0u);
  EXPECT_EQ(table.totals().pending_bytes, 100u);
  table.AddSegment(8, "/000008.sst", 90, 1, {{Listed(1, 1, 512)}, {}});
  EXPECT_EQ(table.Find(TestKey(1))->segment, 8u);
  EXPECT_EQ(table.Find(TestKey(1))->block_offset, 512u);
  EXPECT_EQ(table.totals().pending_bytes, 0u);
  EXPECT_EQ(table.totals().segment_bytes, 90u);
  EXPECT_OK(table.CheckInvariants());
  const auto dropped = table.DropOldest();
  EXPECT_EQ(dropped.bytes, 90u);
  EXPECT_EQ(dropped.records, 1u);
  EXPECT_FALSE(table.Find(TestKey(1)));
  EXPECT_EQ(table.totals().leaving_bytes, 90u);
  EXPECT_EQ(table.totals().disk_bytes(), 90u);
  table.Left(90);
  EXPECT_EQ(table.totals().disk_bytes(), 0u);
  EXPECT_EQ(table.totals().peak_bytes, 100u);
  EXPECT_OK(table.CheckInvariants());
}

TEST(SegmentTableTest, AFlushMayEndBeforeTheWriterIsBack) {
  SegmentTable table(4);
  table.BeginWrite(1, 100);
  table.Publish(TestKey(1), 1);
  table.BeginWrite(2, 100);
  table.AddSegment(8, "/000008.sst", 190, 2, {{Listed(1, 1, 0), Listed(2, 2, 95)}, {}});
  EXPECT_EQ(table.totals().pending_bytes, 0u);
  table.Publish(TestKey(2), 2);
  EXPECT_EQ(table.Find(TestKey(2))->segment, 8u);
  EXPECT_EQ(table.Find(TestKey(2))->block_offset, 95u);
  EXPECT_OK(table.CheckInvariants());
}

TEST(SegmentTableTest, AWriteThatFailedCountsNothing) {
  SegmentTable table(4);
  table.BeginWrite(1, 100);
  table.AbortWrite(1);
  EXPECT_EQ(table.totals().disk_bytes(), 0u);
  table.BeginWrite(1, 70);  // the number was not used
  table.Publish(TestKey(1), 1);
  EXPECT_EQ(table.totals().pending_bytes, 70u);
  EXPECT_OK(table.CheckInvariants());
}

TEST(SegmentTableTest, OnlyTheNumberMeantIsErased) {
  SegmentTable table(4);
  table.BeginWrite(5, 1);
  table.Publish(TestKey(1), 5);
  EXPECT_FALSE(table.Erase(TestKey(1), 4));
  EXPECT_TRUE(table.Find(TestKey(1)));
  EXPECT_EQ(table.Erase(TestKey(1), 5), 5u);
  EXPECT_FALSE(table.Erase(TestKey(1)));
}

TEST(SegmentTableTest, ReadRecordsDeserveASecondChanceAndMovedOnesLeaveNoEntry) {
  SegmentTable table(4);
  for (uint64_t n = 1; n <= 4; ++n) {
    table.BeginWrite(n, 10);
    table.Publish(TestKey(static_cast<int>(n)), n);
  }
  table.AddSegment(8, "/000008.sst", 40, 4, {{Listed(1, 1), Listed(2, 2), Listed(3, 3), Listed(4, 4)}, {}});
  for (const int key : {2, 3, 4}) table.FindToRead(TestKey(key));
  EXPECT_TRUE(table.FindOldest(0)->wanted.empty());
  auto oldest = table.FindOldest(2);
  ASSERT_EQ(oldest->wanted.size(), 2u);
  EXPECT_EQ(oldest->wanted[0].number, 2u);
  // Key 2 moves; what is left of the two chances is one.
  table.BeginWrite(5, 10);
  table.Publish(TestKey(2), 5);
  table.CountMoved(8);
  oldest = table.FindOldest(2);
  ASSERT_EQ(oldest->wanted.size(), 1u);
  EXPECT_EQ(oldest->wanted[0].number, 3u);
  EXPECT_EQ(table.DropOldest().records, 3u);
  EXPECT_TRUE(table.Find(TestKey(2)));
  EXPECT_FALSE(table.Find(TestKey(3)));
  EXPECT_FALSE(table.FindOldest(1));
  EXPECT_OK(table.CheckInvariants());
}

TEST(SegmentTableTest, LoadingTakesTheNewestOfEachKeyAndNoDeadOnes) {
  SegmentTable table(4);
  table.Load({{8, "/8", 100, {{Listed(1, 1), Listed(2, 2), Listed(3, 3)}, {}}},
              {9, "/9", 50, {{Listed(4, 1, 7)}, {2}}},
              {11, "/11", 10, {{}, {3}}}});
  EXPECT_EQ(table.Find(TestKey(1))->number, 4u);
  EXPECT_EQ(table.Find(TestKey(1))->segment, 9u);
  EXPECT_FALSE(table.Find(TestKey(2)));
  EXPECT_FALSE(table.Find(TestKey(3)));
  EXPECT_EQ(table.totals().segment_bytes, 160u);
  EXPECT_EQ(table.totals().segments, 3u);
  EXPECT_OK(table.CheckInvariants());
}

TEST(SegmentTableTest, KeepsAsManyFilesOpenAsItMay) {
  TempDir dir;
  std::ofstream(dir.path() + "/f") << "x";
  const auto open = [&] { return DirectFile::Open(dir.path() + "/f", false).value(); };
  SegmentTable table(2);
  table.Load({{1, "/1", 1, {{Listed(1, 1)}, {}}}, {2, "/2", 1, {{Listed(2, 2)}, {}}}, {3, "/3", 1, {{Listed(3, 3)}, {}}}});
  for (const uint64_t segment : {1, 2, 3}) table.KeepFile(segment, open());
  EXPECT_EQ(table.Find(TestKey(1))->file, nullptr) << "closed for the third";
  EXPECT_NE(table.Find(TestKey(2))->file, nullptr);
  EXPECT_NE(table.Find(TestKey(3))->file, nullptr);
  table.KeepFile(77, open());  // a segment that is gone
  EXPECT_NE(table.Find(TestKey(2))->file, nullptr);
}

// Random lives of records and files, against a model that knows only what must be true.
TEST(SegmentTableTest, RandomUseMatchesTheModel) {
  SeededRng rng;
  SegmentTable table(3);
  std::map<int, uint64_t> model;                       // key -> number
  std::map<uint64_t, std::set<uint64_t>> file_numbers;  // file -> numbers in it
  std::vector<std::pair<uint64_t, int>> memtable;
  uint64_t next_number = 1, next_file = 1, file_bytes = 0, memtable_bytes = 0;
  std::map<uint64_t, uint64_t> bytes_of;
  for (int step = 0; step < 5000; ++step) {
    const int key = static_cast<int>(rng.Int(0, 60));
    switch (rng.Int(0, 5)) {
      case 0:
      case 1:
      case 2: {
        table.BeginWrite(next_number, 10);
        table.Publish(TestKey(key), next_number);
        model[key] = next_number;
        memtable.emplace_back(next_number++, key);
        memtable_bytes += 10;
        break;
      }
      case 3:
        ASSERT_EQ(table.Erase(TestKey(key)).has_value(), model.erase(key) == 1);
        break;
      case 4: {
        SegmentKeys keys;
        for (const auto& [number, k] : memtable) {
          keys.records.push_back(Listed(number, k, number * 3));
          file_numbers[next_file].insert(number);
        }
        bytes_of[next_file] = 9 * memtable.size() + 5;
        file_bytes += bytes_of[next_file];
        table.AddSegment(next_file, "/f", bytes_of[next_file], next_number - 1, std::move(keys));
        file_numbers[next_file++];
        memtable.clear();
        memtable_bytes = 0;
        break;
      }
      default: {
        if (file_numbers.size() < 3) break;
        const auto oldest = file_numbers.begin();
        const auto dropped = table.DropOldest();
        ASSERT_EQ(dropped.bytes, bytes_of[oldest->first]);
        const auto gone = std::erase_if(model, [&](const auto& item) { return oldest->second.contains(item.second); });
        ASSERT_EQ(dropped.records, gone);
        file_bytes -= dropped.bytes;
        table.Left(dropped.bytes);
        file_numbers.erase(oldest);
      }
    }
    for (int k = 0; k <= 60; ++k) {
      const auto found = table.Find(TestKey(k));
      const auto expected = model.find(k);
      ASSERT_EQ(found.has_value(), expected != model.end()) << step;
      if (!found) continue;
      ASSERT_EQ(found->number, expected->second);
      const bool filed = found->segment != 0;
      ASSERT_EQ(filed, std::none_of(memtable.begin(), memtable.end(), [&](auto& m) { return m.first == found->number; }));
      if (filed) {
        ASSERT_TRUE(file_numbers[found->segment].contains(found->number));
        ASSERT_EQ(found->block_offset, found->number * 3);
      }
    }
    ASSERT_EQ(table.totals().disk_bytes(), file_bytes + memtable_bytes);
    ASSERT_OK(table.CheckInvariants()) << step;
  }
}

// --- DirectFile ---

TEST(DirectFileTest, ReadsAnyRangePastThePageCacheOrThroughIt) {
  TempDir dir;
  const std::string path = dir.path() + "/file";
  const std::vector<std::byte> bytes = TestChunk(1, 50'000);
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), 50'000);
  SeededRng rng;
  for (const bool direct : {false, true}) {
    auto file = DirectFile::Open(path, direct);
    if (direct && !file.ok()) GTEST_SKIP() << "no direct I/O in " << dir.path() << ": " << file.status();
    ASSERT_OK(file);
    AlignedBuffer scratch;
    for (int i = 0; i < 300; ++i) {
      const auto offset = static_cast<uint64_t>(rng.Int(0, 49'999));
      const auto size = static_cast<size_t>(rng.Int(0, 50'000 - static_cast<int64_t>(offset)));
      auto read = (*file)->Read(offset, size, &scratch);
      ASSERT_OK(read);
      ASSERT_EQ(read->size(), size);
      ASSERT_TRUE(std::equal(read->begin(), read->end(), bytes.begin() + static_cast<std::ptrdiff_t>(offset)));
    }
    EXPECT_STATUS(StatusCode::kCorrupt, "ends before", (*file)->Read(49'000, 1001, &scratch));
    EXPECT_STATUS(StatusCode::kCorrupt, "ends before", (*file)->Read(1 << 20, 1, &scratch));
    AlignedBuffer out;
    ASSERT_TRUE(out.Reserve(16384));
    auto before = (*file)->ReadInPlace(8192, {out.data(), 16384}, &scratch);
    ASSERT_OK(before);
    EXPECT_TRUE(std::equal(before->begin(), before->end(), bytes.begin() + 4096));
    EXPECT_TRUE(std::equal(out.data(), out.data() + 16384, bytes.begin() + 8192));
    EXPECT_STATUS(StatusCode::kCorrupt, "ends before", (*file)->ReadInPlace(40960, {out.data(), 16384}, &scratch));
  }
}

TEST(DirectFileTest, KnowsWhetherItsFileStillHasAName) {
  TempDir dir;
  const std::string path = dir.path() + "/file";
  EXPECT_STATUS(StatusCode::kNotFound, path, DirectFile::Open(path, false));
  std::ofstream(path) << "still here";
  auto file = DirectFile::Open(path, false).value();
  EXPECT_TRUE(file->has_name());
  ::unlink(path.c_str());
  EXPECT_FALSE(file->has_name());
  AlignedBuffer scratch;
  EXPECT_OK(file->Read(0, 10, &scratch)) << "readable as long as it is open";
}

}  // namespace
}  // namespace prehoc
