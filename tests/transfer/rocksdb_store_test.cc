#include "transfer/rocksdb_store.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include "base/test_point.h"
#include "tests/support/chunk_data.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"
#include "transfer/direct_file.h"
#include "transfer/record_format.h"
#include "transfer/segment_keys.h"
#include "transfer/store_directory.h"

extern char** environ;

namespace prehoc {
namespace {

namespace fs = std::filesystem;
constexpr size_t kBytes = 4096;
std::vector<std::byte> TestChunk(int n, size_t bytes = kBytes) { return prehoc::TestChunk(n, bytes); }

class RocksDbStoreTest : public ::testing::Test {
 protected:
  RocksDbStoreTest() {
    options_.path = dir_.path() + "/a/store";
    options_.identity = TestIdentity();
    options_.chunk_bytes = kBytes;
    options_.budget = 32 << 20;
  }
  std::unique_ptr<RocksDbStore> Open() {
    auto store = RocksDbStore::Open(options_);
    EXPECT_TRUE(store.ok()) << store.status().ToString();
    return store.ok() ? std::move(*store) : nullptr;
  }
  Status TryOpen() { return RocksDbStore::Open(options_).status(); }
  uint64_t BytesOnDisk() const {
    uint64_t total = 0;
    for (const auto& entry : fs::directory_iterator(options_.path)) {
      std::error_code gone;
      const uintmax_t bytes = fs::file_size(entry.path(), gone);
      if (!gone) total += bytes;
    }
    return total;
  }
  std::vector<fs::path> Tables() const {
    std::vector<fs::path> tables;
    for (const auto& entry : fs::directory_iterator(options_.path)) {
      if (entry.path().extension() == ".sst") tables.push_back(entry.path());
    }
    std::sort(tables.begin(), tables.end());
    return tables;
  }
  // Puts until it is taken: kBusy means that a flush is under way.
  static Status PutPatiently(ChunkStore& store, int n, size_t bytes = kBytes) {
    while (true) {
      Status status = store.Put(TestKey(n), TestChunk(n, bytes));
      if (status.code() != StatusCode::kBusy) return status;
      PREHOC_RETURN_IF_ERROR(store.Flush());
    }
  }

  TempDir dir_;
  RocksDbStore::Options options_;
};

TEST_F(RocksDbStoreTest, RefusesOptionsThatMakeNoSense) {
  options_.path.clear();
  EXPECT_STATUS(StatusCode::kInvalid, "path is empty", TryOpen());
  options_.path = dir_.path() + "/s";
  options_.budget = 1 << 20;
  EXPECT_STATUS(StatusCode::kInvalid, "budget=1048576", TryOpen());
  options_.budget = UINT64_MAX;
  EXPECT_STATUS(StatusCode::kInvalid, "over 64 TiB", TryOpen());
  options_.budget = 32 << 20;
  options_.chunk_bytes = 0;
  EXPECT_STATUS(StatusCode::kInvalid, "chunk_bytes=0", TryOpen());
  options_.chunk_bytes = 3 << 20;
  EXPECT_STATUS(StatusCode::kInvalid, "a sixteenth of the budget", TryOpen());
  options_.chunk_bytes = kBytes;
  options_.segment_bytes = 1;
  EXPECT_STATUS(StatusCode::kInvalid, "segment_bytes=1", TryOpen());
  EXPECT_FALSE(fs::exists(dir_.path() + "/s")) << "a refused store leaves nothing behind";
}

TEST_F(RocksDbStoreTest, KeepsRecordsAcrossReopening) {
  {
    auto store = Open();
    for (int i = 0; i < 30; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
    ASSERT_OK(store->Flush());
    ASSERT_OK(store->Delete(TestKey(3)));   // tombstone in another file
    ASSERT_OK(store->Put(TestKey(30), TestChunk(30)));
    ASSERT_OK(store->Delete(TestKey(30)));  // record and tombstone in one memtable
    ASSERT_OK(store->Put(TestKey(31), TestChunk(31)));
  }  // closing flushes
  auto store = Open();
  for (int i = 0; i < 32; ++i) {
    const bool expected = i != 3 && i != 30;
    ASSERT_EQ(store->Contains(TestKey(i)), expected) << i;
    std::vector<std::byte> out(kBytes);
    if (expected) {
      ASSERT_OK(store->Get(TestKey(i), out));
      ASSERT_EQ(out, TestChunk(i));
    }
  }
  EXPECT_EQ(store->resident_bytes(), 30 * (kBytes + sizeof(RecordHeader)));
  ASSERT_OK(store->CheckInvariants());
  // Numbers go on after the ones on disk: a new record of a deleted key stays.
  ASSERT_OK(store->Put(TestKey(3), TestChunk(3)));
  store.reset();
  EXPECT_TRUE(Open()->Contains(TestKey(3)));
}

TEST_F(RocksDbStoreTest, RefusesAnotherIdentityWithBothValues) {
  Open().reset();
  const RocksDbStore::Options good = options_;
  options_.identity.model[0] ^= 1;
  options_.identity.model_name = "other-model";
  EXPECT_STATUS(StatusCode::kInvalid, "'test-model'", TryOpen());
  EXPECT_STATUS(StatusCode::kInvalid, "'other-model'", TryOpen());
  options_ = good;
  options_.identity.layout = "rows-kv/l3";
  EXPECT_STATUS(StatusCode::kInvalid, "rows-kv/l2/h2/d16/p16/c64, not rows-kv/l3", TryOpen());
  options_ = good;
  options_.chunk_bytes = 8192;
  EXPECT_STATUS(StatusCode::kInvalid, "4096, not 8192", TryOpen());
  options_ = good;
  // A note of a later version, as a later build would leave it.
  StoreNote note{kStoreVersion, options_.identity, kBytes};
  note.identity.dtype = "bf16";
  std::ofstream(options_.path + "/" + kStoreNoteName) << FormatStoreNote(note);
  EXPECT_STATUS(StatusCode::kInvalid, "bf16, not f16", TryOpen());
  note = {kStoreVersion + 1, options_.identity, kBytes};
  std::ofstream(options_.path + "/" + kStoreNoteName) << FormatStoreNote(note);
  EXPECT_STATUS(StatusCode::kInvalid, "store version 2, not 1", TryOpen());
  note = {kStoreVersion, options_.identity, kBytes};
  note.identity.format_version = 9;
  std::ofstream(options_.path + "/" + kStoreNoteName) << FormatStoreNote(note);
  EXPECT_STATUS(StatusCode::kInvalid, "format version 9, not 2", TryOpen());
  std::ofstream(options_.path + "/" + kStoreNoteName) << "nonsense";
  EXPECT_STATUS(StatusCode::kCorrupt, "prehoc-store", TryOpen());
}

TEST_F(RocksDbStoreTest, TakesOnlyAnEmptyDirectory) {
  options_.path = dir_.path();
  std::ofstream(dir_.path() + "/thesis.txt") << "work of years";
  EXPECT_STATUS(StatusCode::kInvalid, "thesis.txt", TryOpen());
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_.path()), {}), 1);
  options_.path = dir_.path() + "/thesis.txt";
  EXPECT_STATUS(StatusCode::kInvalid, "not a directory", TryOpen());
  options_.path = dir_.path() + "/none";
  options_.create_if_missing = false;
  EXPECT_STATUS(StatusCode::kNotFound, "no such directory", TryOpen());
  options_.create_if_missing = true;
  options_.path = dir_.path() + "/empty";
  fs::create_directory(options_.path);
  std::ofstream(options_.path + "/prehoc-store.tmp") << "a crash while the note was written";
  EXPECT_OK(TryOpen());
}

TEST_F(RocksDbStoreTest, NobodyElseMayRead) {
  const mode_t before = ::umask(0);
  {
    auto store = Open();
    ASSERT_OK(store->Put(TestKey(1), TestChunk(1)));
    ASSERT_OK(store->Flush());
    struct stat info {};
    for (const auto& entry : fs::directory_iterator(options_.path)) {
      ASSERT_EQ(::stat(entry.path().c_str(), &info), 0);
      EXPECT_EQ(info.st_mode & 0777, 0600u) << entry.path();
    }
    for (const std::string& path : {options_.path, dir_.path() + "/a"}) {
      ASSERT_EQ(::stat(path.c_str(), &info), 0);
      EXPECT_EQ(info.st_mode & 0777, 0700u) << path;
    }
  }
  ::umask(before);
}

TEST_F(RocksDbStoreTest, ReadOnlyReadsAndDoesNotWrite) {
  options_.read_only = true;
  EXPECT_STATUS(StatusCode::kNotFound, "no such directory", TryOpen());
  options_.read_only = false;
  auto writer = Open();
  ASSERT_OK(writer->Put(TestKey(1), TestChunk(1)));
  ASSERT_OK(writer->Flush());
  options_.read_only = true;
  auto reader = Open();  // beside the writer: no lock
  std::vector<std::byte> out(kBytes);
  ASSERT_OK(reader->Get(TestKey(1), out));
  EXPECT_EQ(out, TestChunk(1));
  EXPECT_STATUS(StatusCode::kUnsupported, "read-only", reader->Put(TestKey(2), TestChunk(2)));
  EXPECT_STATUS(StatusCode::kUnsupported, "read-only", reader->Delete(TestKey(1)));
  EXPECT_OK(reader->Flush());
}

TEST_F(RocksDbStoreTest, RefusesADirectoryItMayNotWrite) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  Open().reset();
  fs::permissions(options_.path, fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_STATUS(StatusCode::kIoError, "read_only", TryOpen());
  fs::permissions(options_.path, fs::perms::owner_all);
}

TEST_F(RocksDbStoreTest, ASecondStoreInThisProcessIsBusy) {
  auto store = Open();
  EXPECT_STATUS(StatusCode::kBusy, options_.path, TryOpen());
}

// rocksdb_store_child, which stands beside this program.
class Child {
 public:
  explicit Child(std::vector<std::string> arguments) {
    int in[2], out[2];
    if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0) std::abort();
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    arguments.insert(arguments.begin(), fs::read_symlink("/proc/self/exe").parent_path() / "rocksdb_store_child");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    if (::posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) pid_ = -1;
    posix_spawn_file_actions_destroy(&actions);
    ::close(in[0]);
    ::close(out[1]);
    in_ = in[1];
    out_ = out[0];
  }
  ~Child() {
    if (pid_ > 0) Kill();
    ::close(in_);
    ::close(out_);
  }
  pid_t pid() const { return pid_; }
  bool WaitForByte() {
    char byte = 0;
    return ::read(out_, &byte, 1) == 1 && byte == 'r';
  }
  // Nothing that it holds is closed.
  void Kill() {
    ::kill(pid_, SIGKILL);
    Join();
  }
  // Its exit code, -1 for a signal.
  int Join() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_ = -1;
  int in_ = -1, out_ = -1;
};

TEST_F(RocksDbStoreTest, NamesTheProcessThatHoldsIt) {
  Child child({"hold", options_.path, "1", "0"});
  ASSERT_TRUE(child.WaitForByte());
  EXPECT_STATUS(StatusCode::kBusy, "process " + std::to_string(child.pid()), TryOpen());
  EXPECT_STATUS(StatusCode::kBusy, "rocksdb_store_c", TryOpen());  // the system keeps 15 characters of a name
  EXPECT_STATUS(StatusCode::kBusy, options_.path, TryOpen());
  options_.read_only = true;
  EXPECT_OK(TryOpen());
  options_.read_only = false;
  child.Kill();
  EXPECT_OK(TryOpen());
}

TEST_F(RocksDbStoreTest, ACrashLosesOnlyWhatWasNotFlushed) {
  Child child({"hold", options_.path, "10", "5"});
  ASSERT_TRUE(child.WaitForByte());
  child.Kill();
  auto store = Open();
  std::vector<std::byte> out(kBytes);
  for (int i = 0; i < 10; ++i) {
    ASSERT_OK(store->Get(TestKey(i), out));
    EXPECT_EQ(out, TestChunk(i));
  }
  for (int i = 10; i < 15; ++i) EXPECT_FALSE(store->Contains(TestKey(i))) << i;
  // A number that the crash freed may be used again; its bytes are another record's.
  ASSERT_OK(store->Put(TestKey(20), TestChunk(20)));
  ASSERT_OK(store->Get(TestKey(20), out));
  EXPECT_EQ(out, TestChunk(20));
}

TEST_F(RocksDbStoreTest, MayBeKilledAtAnyTime) {
  for (int round = 0; round < 5; ++round) {
    options_.path = dir_.path() + "/killed" + std::to_string(round);
    Child child({"pump", options_.path});
    const int flushes = 3 + 4 * round;
    for (int i = 0; i < flushes; ++i) ASSERT_TRUE(child.WaitForByte());
    child.Kill();  // somewhere in a write or a flush
    auto store = Open();
    ASSERT_NE(store, nullptr);
    std::vector<std::byte> out(kBytes);
    for (int i = 0; i < 10 * flushes; ++i) {
      ASSERT_OK(store->Get(TestKey(i), out)) << round << " " << i;
      ASSERT_EQ(out, TestChunk(i));
    }
    for (int i = 10 * flushes; i < 10 * flushes + 500; ++i) {
      const Status status = store->Get(TestKey(i), out);
      if (status.ok()) {
        ASSERT_EQ(out, TestChunk(i));
      } else {
        ASSERT_EQ(status.code(), StatusCode::kNotFound) << status;
      }
    }
    ASSERT_OK(store->Put(TestKey(100'000), TestChunk(1)));
    ASSERT_OK(store->CheckInvariants());
  }
}

TEST_F(RocksDbStoreTest, ADiskThatIsReallyFullRefusesPutsServesReadsAndGoesOnWhenThereIsRoom) {
  Child child({"full-disk", dir_.path() + "/disk"});
  const int code = child.Join();
  if (code == 77) GTEST_SKIP() << "may not mount a small disk of its own here";
  EXPECT_EQ(code, 0);
}

TEST_F(RocksDbStoreTest, AReaderSurvivesWhatAWriterDrops) {
  options_.budget = 16 << 20;
  options_.segment_bytes = 128 << 10;
  options_.second_chance = false;
  auto writer = Open();
  constexpr int kRecords = 3000;
  for (int n = 0; n < kRecords; ++n) ASSERT_OK(PutPatiently(*writer, n));
  ASSERT_OK(writer->Flush());
  RocksDbStore::Options reading = options_;
  reading.read_only = true;
  auto reader = std::move(RocksDbStore::Open(reading)).value();
  EXPECT_EQ(reader->resident_bytes(), kRecords * (kBytes + sizeof(RecordHeader)));
  for (int n = kRecords; n < 2 * kRecords; ++n) ASSERT_OK(PutPatiently(*writer, n));
  ASSERT_FALSE(writer->Contains(TestKey(0)));
  std::vector<std::byte> out(kBytes);
  int found = 0, gone = 0;
  for (int n = 0; n < kRecords; ++n) {
    const Status status = reader->Get(TestKey(n), out);
    if (status.ok()) {
      ASSERT_EQ(out, TestChunk(n));
      ++found;
    } else {
      ASSERT_EQ(status.code(), StatusCode::kNotFound) << status;
      ASSERT_FALSE(reader->Contains(TestKey(n)));
      ++gone;
    }
  }
  EXPECT_GT(gone, 0);
  EXPECT_EQ(CounterOf(*reader, "store.corrupt"), 0);
  EXPECT_EQ(CounterOf(*reader, "store.misses"), gone);
}

TEST_F(RocksDbStoreTest, ReadsRecordsWhereTheyLieInTheirFiles) {
  // If RocksDB laid its blocks out otherwise, every read would take the long way: right, and slow.
  for (const size_t bytes : {kBytes, size_t{5000}, size_t{64} << 10, size_t{192} << 10}) {
    for (const bool direct : {false, true}) {
      options_.path = dir_.path() + "/shape" + std::to_string(bytes) + (direct ? "d" : "b");
      options_.chunk_bytes = bytes;
      options_.direct_io = direct;
      auto store = Open();
      constexpr int kRecords = 12;
      for (int n = 0; n < kRecords; ++n) ASSERT_OK(PutPatiently(*store, n, bytes));
      ASSERT_OK(store->Flush());
      AlignedBuffer aligned;
      ASSERT_TRUE(aligned.Reserve(bytes + 1));
      for (const size_t shift : {0, 1}) {  // straight to where it is wanted, and by a copy
        for (int n = 0; n < kRecords; ++n) {
          const std::span<std::byte> out(aligned.data() + shift, bytes);
          std::fill(out.begin(), out.end(), std::byte{0});
          ASSERT_OK(store->Get(TestKey(n), out));
          const auto expected = TestChunk(n, bytes);
          ASSERT_TRUE(std::equal(out.begin(), out.end(), expected.begin()));
        }
      }
      EXPECT_EQ(CounterOf(*store, "store.file_reads"), 2 * kRecords) << bytes;
    }
  }
}

TEST_F(RocksDbStoreTest, DamageInARecordThatIsReadInPlaceIsFound) {
  options_.chunk_bytes = 64 << 10;
  {
    auto store = Open();
    for (int n = 0; n < 3; ++n) ASSERT_OK(store->Put(TestKey(n), TestChunk(n, 64 << 10)));
  }
  const auto flip = [&](int64_t at) {
    std::fstream file(Tables()[0], std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(at);
    const char flipped = static_cast<char>(file.get() ^ 0x10);
    file.seekp(at);
    file.put(flipped);
  };
  flip(4096 + 12345);                      // payload of the first
  flip(4096 + (64 << 10) + 4096 + 4000);   // header of the second: its block begins on the page after the first's
  auto store = Open();
  AlignedBuffer out;
  ASSERT_TRUE(out.Reserve(64 << 10));
  EXPECT_STATUS(StatusCode::kCorrupt, options_.path, store->Get(TestKey(0), {out.data(), 64 << 10}));
  EXPECT_STATUS(StatusCode::kCorrupt, options_.path, store->Get(TestKey(1), {out.data(), 64 << 10}));
  EXPECT_OK(store->Get(TestKey(2), {out.data(), 64 << 10}));
  EXPECT_EQ(CounterOf(*store, "store.corrupt"), 2);
}

TEST_F(RocksDbStoreTest, FlushDoesNotHoldUpWriters) {
#ifndef PREHOC_TEST_POINTS
  GTEST_SKIP() << "needs test points";
#else
  auto store = Open();
  ASSERT_OK(store->Put(TestKey(1), TestChunk(1)));
  std::atomic<bool> flushing{false}, go{false};
  TestPointHook hook("rocksdb_store.flush", [&] {
    flushing = true;
    while (!go) std::this_thread::yield();
  });
  std::thread flusher([&] { EXPECT_OK(store->Flush()); });
  while (!flushing) std::this_thread::yield();
  EXPECT_OK(store->Put(TestKey(2), TestChunk(2)));
  EXPECT_OK(store->Delete(TestKey(1)));
  std::vector<std::byte> out(kBytes);
  EXPECT_OK(store->Get(TestKey(2), out));
  go = true;
  flusher.join();
#endif
}

TEST_F(RocksDbStoreTest, FindsBytesThatRottedOnDisk) {
  constexpr int kRecords = 40, kRounds = 40;
  {
    auto store = Open();
    for (int i = 0; i < kRecords; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
  }
  const std::string pristine = options_.path;
  SeededRng rng;
  for (int round = 0; round < kRounds; ++round) {
    options_.path = dir_.path() + "/damaged" + std::to_string(round);
    options_.direct_io = round % 2 == 0;
    fs::copy(pristine, options_.path, fs::copy_options::recursive);
    ASSERT_EQ(Tables().size(), 1u);
    // First rounds: RocksDB's own lengths and key of the first record, which are not needed to read it. Then its
    // header, then anywhere in the payload of any.
    const auto first = static_cast<int64_t>(ValueShape::For(sizeof(RecordHeader), kBytes).RecordOffset(0));
    const int64_t record = rng.Int(0, kRecords - 1);
    const int64_t at = round < 10   ? rng.Int(0, first - 1)
                       : round < 20 ? rng.Int(first, first + static_cast<int64_t>(sizeof(RecordHeader)) - 1)
                                    : record * static_cast<int64_t>(kBytes + 200) + rng.Int(300, kBytes - 1);
    const int expected_bad = round < 10 ? 0 : 1;
    std::fstream file(Tables()[0], std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(at);
    const char flipped = static_cast<char>(file.get() ^ (1 << rng.Int(0, 7)));
    file.seekp(at);
    file.put(flipped);
    ASSERT_TRUE(file.good());
    file.close();
    auto store = Open();
    ASSERT_NE(store, nullptr);
    int bad_here = 0;
    for (int i = 0; i < kRecords; ++i) {
      std::vector<std::byte> out(kBytes);
      const Status status = store->Get(TestKey(i), out);
      if (status.ok()) {
        ASSERT_EQ(out, TestChunk(i)) << "wrong bytes were given out; flipped at " << at;
        continue;
      }
      EXPECT_STATUS(StatusCode::kCorrupt, options_.path, status);
      EXPECT_FALSE(store->Contains(TestKey(i)));
      EXPECT_EQ(store->Get(TestKey(i), out).code(), StatusCode::kNotFound);
      ++bad_here;
    }
    EXPECT_EQ(bad_here, expected_bad) << "flipped at " << at;
    EXPECT_EQ(CounterOf(*store, "store.corrupt"), bad_here);
    // It stays dropped, and the key may be written anew.
    store.reset();
    store = Open();
    EXPECT_EQ(store->resident_bytes(), (kRecords - bad_here) * (kBytes + sizeof(RecordHeader)));
    for (int i = 0; i < kRecords; ++i) {
      std::vector<std::byte> out(kBytes);
      ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
      ASSERT_OK(store->Get(TestKey(i), out));
      ASSERT_EQ(out, TestChunk(i));
    }
    EXPECT_EQ(CounterOf(*store, "store.puts"), bad_here);
  }
}

TEST_F(RocksDbStoreTest, ListsRecordsAndSaysWhatIsWrongWithOneWithoutDroppingIt) {
  constexpr ChunkOrigin kOrigin{.tenant = 7, .parent = 8, .chunk = 9, .branch = true};
  auto store = Open();
  for (int i = 0; i < 20; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i), kOrigin));
  EXPECT_TRUE(store->ListRecords().empty()) << "still in a memtable";
  ASSERT_OK(store->Flush());
  ASSERT_OK(store->Delete(TestKey(3)));
  const auto records = store->ListRecords();
  ASSERT_EQ(records.size(), 19u);
  EXPECT_EQ(records[0].key, TestKey(0));
  ASSERT_EQ(store->ListSegments().size(), 1u);
  EXPECT_EQ(store->ListSegments()[0].number, records[0].segment);
  EXPECT_EQ(options_.path + "/" + store->ListSegments()[0].name, Tables()[0].string());
  for (const VerifyPayload verify : {VerifyPayload::kNo, VerifyPayload::kYes}) {
    const auto header = store->Inspect(TestKey(5), verify);
    ASSERT_OK(header);
    EXPECT_EQ(OriginOf(*header), kOrigin);
    EXPECT_STATUS(StatusCode::kNotFound, "no chunk", store->Inspect(TestKey(3), verify));
  }
  store.reset();
  // One byte of the payload of a record in the middle of the file.
  std::fstream file(Tables()[0], std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(10 * (static_cast<int64_t>(kBytes) + 200) + 1000);
  file.put('x');
  file.close();
  store = Open();
  int bad = 0;
  for (const auto& record : store->ListRecords()) {
    EXPECT_OK(store->Inspect(record.key, VerifyPayload::kNo));
    const auto header = store->Inspect(record.key, VerifyPayload::kYes);
    if (!header.ok()) {
      ++bad;
      EXPECT_EQ(header.status().code(), StatusCode::kCorrupt) << header.status();
      EXPECT_TRUE(store->Contains(record.key)) << "looking does not drop";
    }
  }
  EXPECT_EQ(bad, 1);
  EXPECT_EQ(CounterOf(*store, "store.corrupt"), 0);
}

TEST_F(RocksDbStoreTest, WhatCanBeReadIsSalvaged) {
  {
    auto store = Open();
    for (int i = 0; i < 20; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
    ASSERT_OK(store->Flush());
    for (int i = 20; i < 40; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
  }
  ASSERT_EQ(Tables().size(), 2u);
  const std::string torn = Tables()[1].filename();
  fs::resize_file(Tables()[1], fs::file_size(Tables()[1]) / 2);
  EXPECT_STATUS(StatusCode::kCorrupt, "delete the directory", TryOpen());
  {
    const auto gone = RocksDbStore::Salvage(options_);
    ASSERT_OK(gone);
    EXPECT_EQ(*gone, std::vector<std::string>{torn});
  }
  auto store = Open();
  ASSERT_NE(store, nullptr);
  std::vector<std::byte> out(kBytes);
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(store->Get(TestKey(i), out));
    EXPECT_EQ(out, TestChunk(i));
  }
  for (int i = 20; i < 40; ++i) EXPECT_FALSE(store->Contains(TestKey(i)));
  ASSERT_OK(store->Put(TestKey(50), TestChunk(50)));
  EXPECT_OK(store->CheckInvariants());
  EXPECT_FALSE(fs::exists(options_.path + "/lost"));
  EXPECT_STATUS(StatusCode::kBusy, "in this process", RocksDbStore::Salvage(options_));
}

TEST_F(RocksDbStoreTest, HalfACopyIsRefusedNotBegunAnew) {
  {
    auto store = Open();
    for (int i = 0; i < 20; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
  }
  const std::string pristine = options_.path;
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(pristine)) files.push_back(entry.path().filename());
  for (const fs::path& left_out : files) {
    options_.path = dir_.path() + "/without-" + left_out.string();
    fs::copy(pristine, options_.path);
    fs::remove(options_.path / left_out);
    auto store = RocksDbStore::Open(options_);
    if (!store.ok()) {
      EXPECT_NE(store.status().message().find(options_.path), std::string::npos) << store.status();
      continue;
    }
    // What may be missing without harm: then everything is there.
    std::vector<std::byte> out(kBytes);
    for (int i = 0; i < 20; ++i) ASSERT_OK((*store)->Get(TestKey(i), out)) << left_out;
  }
}

TEST_F(RocksDbStoreTest, ATornFileIsRefusedNotServed) {
  {
    auto store = Open();
    for (int i = 0; i < 40; ++i) ASSERT_OK(store->Put(TestKey(i), TestChunk(i)));
  }
  fs::resize_file(Tables()[0], fs::file_size(Tables()[0]) / 2);
  EXPECT_STATUS(StatusCode::kCorrupt, "delete the directory", TryOpen());
}

TEST_F(RocksDbStoreTest, StaysWithinTheBudgetAndDropsTheOldestFirst) {
  options_.budget = 16 << 20;
  options_.segment_bytes = 256 << 10;
  options_.second_chance = false;
  constexpr int kRecords = 8000;  // 33 MB through 16 MiB
  auto store = Open();
  int oldest = 0;  // the model: records 0 .. oldest - 1 are gone, the rest is there
  for (int n = 0; n < kRecords; ++n) {
    ASSERT_OK(PutPatiently(*store, n));
    ASSERT_TRUE(store->Contains(TestKey(n))) << n;
    while (!store->Contains(TestKey(oldest))) ++oldest;
    ASSERT_LE(store->disk_bytes(), options_.budget);
    if (n % 500 == 0 || n == kRecords - 1) {
      ASSERT_LE(BytesOnDisk(), options_.budget) << n;
      for (int i = 0; i <= n; ++i) ASSERT_EQ(store->Contains(TestKey(i)), i >= oldest) << n;
      ASSERT_OK(store->CheckInvariants());
    }
    // Nothing is shed before the budget is needed: all but a few segments of it hold live records.
    if (oldest > 0) {
      ASSERT_GE(store->resident_bytes(), options_.budget * 8 / 10) << n;
    }
  }
  EXPECT_GT(oldest, 0);
  EXPECT_EQ(CounterOf(*store, "store.evicted"), oldest);
  EXPECT_EQ(CounterOf(*store, "store.puts"), kRecords);
  EXPECT_LE(CounterOf(*store, "store.peak_bytes"), CounterOf(*store, "store.budget_bytes"));
  std::vector<std::byte> out(kBytes);
  for (int i = oldest; i < kRecords; i += 97) {
    ASSERT_OK(store->Get(TestKey(i), out));
    ASSERT_EQ(out, TestChunk(i));
  }
  // A smaller budget holds from the next opening on.
  store.reset();
  EXPECT_LE(BytesOnDisk(), options_.budget);
  const uint64_t before = options_.budget;
  options_.budget = 24 << 20;
  EXPECT_TRUE(Open()->Contains(TestKey(kRecords - 1)));
  options_.budget = before;
  EXPECT_TRUE(Open()->Contains(TestKey(kRecords - 1)));
}

TEST_F(RocksDbStoreTest, WhatIsReadGetsASecondChance) {
  options_.budget = 16 << 20;
  options_.segment_bytes = 256 << 10;
  auto store = Open();
  std::vector<std::byte> out(kBytes);
  constexpr int kHot = 10, kRecords = 10000;
  for (int n = 0; n < kRecords; ++n) {
    ASSERT_OK(PutPatiently(*store, n));
    if (n >= kHot && n % 200 == 0) {
      for (int hot = 0; hot < kHot; ++hot) {
        ASSERT_OK(store->Get(TestKey(hot), out)) ;
        ASSERT_EQ(out, TestChunk(hot));
      }
    }
  }
  EXPECT_FALSE(store->Contains(TestKey(kHot)));
  EXPECT_GE(CounterOf(*store, "store.rescued"), 2 * kHot);
  EXPECT_LE(CounterOf(*store, "store.peak_bytes"), CounterOf(*store, "store.budget_bytes"));
  EXPECT_LE(BytesOnDisk(), options_.budget);
  const uint64_t live = store->resident_bytes() / (kBytes + sizeof(RecordHeader));
  EXPECT_EQ(CounterOf(*store, "store.puts") - CounterOf(*store, "store.evicted"), static_cast<double>(live));
  store.reset();
  store = Open();
  for (int hot = 0; hot < kHot; ++hot) {
    ASSERT_OK(store->Get(TestKey(hot), out));
    ASSERT_EQ(out, TestChunk(hot));
  }
  EXPECT_EQ(store->resident_bytes() / (kBytes + sizeof(RecordHeader)), live);
}

TEST_F(RocksDbStoreTest, AFullDiskRefusesPutsAndServesReads) {
  Open().reset();
  options_.min_free_bytes = 0;
  auto store = Open();
  ASSERT_OK(store->Put(TestKey(1), TestChunk(1)));
  store.reset();
  options_.min_free_bytes = UINT64_MAX;  // no disk has that much
  store = Open();
  EXPECT_STATUS(StatusCode::kOutOfSpace, "min_free_bytes", store->Put(TestKey(2), TestChunk(2)));
  EXPECT_EQ(CounterOf(*store, "store.put_dropped"), 1);
  std::vector<std::byte> out(kBytes);
  EXPECT_OK(store->Get(TestKey(1), out));
}

TEST_F(RocksDbStoreTest, NeverWaitsForTheDisk) {
#ifndef PREHOC_TEST_POINTS
  GTEST_SKIP() << "needs test points";
#else
  options_.budget = 16 << 20;
  options_.segment_bytes = 256 << 10;
  auto store = Open();
  std::mutex mutex;
  std::condition_variable cv;
  bool go = false;
  int dropped = 0;
  {
    TestPointHook hook("rocksdb_store.flush", [&] {
      std::unique_lock lock(mutex);
      cv.wait(lock, [&] { return go; });
    });
    // The flush stands still: two memtables fill up, then writes are dropped and counted.
    for (int n = 0; n < 1000; ++n) {
      const Status status = store->Put(TestKey(n), TestChunk(n));
      if (status.code() == StatusCode::kBusy) {
        ++dropped;
        EXPECT_FALSE(store->Contains(TestKey(n)));
      } else {
        ASSERT_OK(status);
        EXPECT_TRUE(store->Contains(TestKey(n)));
      }
    }
    EXPECT_GT(dropped, 700);
    EXPECT_EQ(CounterOf(*store, "store.put_dropped"), dropped);
    // What cannot be replaced stays.
    EXPECT_EQ(store->Replace(TestKey(1), TestChunk(2)).code(), StatusCode::kBusy);
    std::vector<std::byte> out(kBytes);
    ASSERT_OK(store->Get(TestKey(1), out));
    EXPECT_EQ(out, TestChunk(1));
    // A delete in this state survives the restart, too.
    EXPECT_OK(store->Delete(TestKey(0)));
    EXPECT_OK(store->CheckInvariants());
    std::unique_lock lock(mutex);
    go = true;
    cv.notify_all();
  }
  ASSERT_OK(store->Flush());
  ASSERT_OK(store->Put(TestKey(5000), TestChunk(5000)));
  store.reset();
  store = Open();
  EXPECT_FALSE(store->Contains(TestKey(0)));
  EXPECT_TRUE(store->Contains(TestKey(1)));
  EXPECT_TRUE(store->Contains(TestKey(5000)));
#endif
}

TEST_F(RocksDbStoreTest, ReadersAndEvictionDoNotMeet) {
  options_.budget = 16 << 20;
  options_.segment_bytes = 256 << 10;
  auto store = Open();
  std::atomic<int> written{0};
  std::atomic<bool> stop{false};
  std::vector<std::string> errors(3);
  std::vector<std::thread> readers;
  for (int t = 0; t < 3; ++t) {
    readers.emplace_back([&, t] {
      Rng rng(static_cast<uint64_t>(t));
      std::vector<std::byte> out(kBytes);
      while (!stop) {
        // Mostly around the oldest records, where segments are being dropped.
        const int newest = written;
        const int n = std::max(0, newest - 3500 + static_cast<int>(rng.Int(0, 599)));
        const Status status = store->Get(TestKey(n), out);
        if (status.ok() && out != TestChunk(n)) errors[t] = "wrong bytes";
        if (!status.ok() && status.code() != StatusCode::kNotFound) errors[t] = status.ToString();
      }
    });
  }
  uint64_t most_on_disk = 0;
  for (int n = 0; n < 6000; ++n) {
    const Status status = PutPatiently(*store, n);
    if (!status.ok()) errors[0] = status.ToString();
    written = n;
    if (n % 50 == 0) most_on_disk = std::max(most_on_disk, BytesOnDisk());
  }
  stop = true;
  for (std::thread& reader : readers) reader.join();
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_EQ(CounterOf(*store, "store.corrupt"), 0);
  EXPECT_GT(CounterOf(*store, "store.evicted"), 0);
  EXPECT_LE(most_on_disk, options_.budget);
  EXPECT_LE(CounterOf(*store, "store.peak_bytes"), CounterOf(*store, "store.budget_bytes"));
  EXPECT_OK(store->CheckInvariants());
}

TEST_F(RocksDbStoreTest, LargeValues) {
  options_.chunk_bytes = 1 << 20;
  options_.budget = 64 << 20;
  {
    auto store = Open();
    for (int i = 0; i < 5; ++i) ASSERT_OK(PutPatiently(*store, i, 1 << 20));
  }
  auto store = Open();
  std::vector<std::byte> out(1 << 20);
  for (int i = 0; i < 5; ++i) {
    ASSERT_OK(store->Get(TestKey(i), out));
    EXPECT_EQ(out, TestChunk(i, 1 << 20));
  }
}

}  // namespace
}  // namespace prehoc
