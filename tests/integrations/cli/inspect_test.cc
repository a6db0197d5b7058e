#include "integrations/cli/inspect.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cache/chunk_key.h"
#include "integrations/cli/exit_code.h"
#include "tests/integrations/cli/cli_test_util.h"
#include "tests/support/chunk_data.h"
#include "transfer/rocksdb_store.h"
#include "transfer/store_directory.h"

namespace prehoc::cli {
namespace {

namespace fs = std::filesystem;
constexpr int32_t kLayers = 2;  // as TestIdentity() says
constexpr size_t kBytes = 4096;
constexpr int32_t kTokens = 64;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

class InspectTest : public ::testing::Test {
 protected:
  InspectTest() { options_.store = path_; }

  RocksDbStore::Options StoreOptions() const {
    RocksDbStore::Options options;
    options.path = path_;
    options.identity = TestIdentity();
    options.chunk_bytes = kBytes;
    options.budget = 32 << 20;
    return options;
  }
  std::unique_ptr<RocksDbStore> OpenStore() { return RocksDbStore::Open(StoreOptions()).value(); }

  // The chunks of a prompt that begins as any other of this tenant does for `shared` chunks.
  static ChunkKeyChain Chain(const std::string& tenant, int chunks, int shared = 0, int prompt = 0) {
    ChunkKeyChain chain({.tenant_salt = tenant, .dtype = "f16", .layout = "rows"});
    for (int i = 0; i < chunks; ++i) {
      const std::vector<int32_t> tokens(kTokens, i < shared ? i : 1000 * prompt + i);
      chain.Append(tokens);
    }
    return chain;
  }
  static void Put(ChunkStore& store, const ChunkKeyChain& chain) {
    for (int32_t i = 0; i < chain.size(); ++i) {
      for (int32_t layer = 0; layer < kLayers; ++layer) {
        ASSERT_OK(store.Put(chain.Key(ChunkIndex(i), LayerId(layer)), TestChunk(i * kLayers + layer, kBytes), chain.Origin(ChunkIndex(i))));
      }
    }
  }
  // Two prompts of one tenant with two chunks in common, and one of another.
  void MakeStore() {
    auto store = OpenStore();
    Put(*store, Chain("a", 4, 2, 1));
    Put(*store, Chain("a", 3, 2, 2));
    Put(*store, Chain("b", 2, 0, 3));
  }
  int Run() {
    out_.str("");
    err_.str("");
    return RunInspect(options_, EnvironmentIn(dir_), out_, err_, SteadyClock::Get());
  }
  // The payload of the n-th record of the first file.
  void Damage(int record) {
    std::string table;
    for (const auto& entry : fs::directory_iterator(path_)) {
      if (entry.path().extension() == ".sst" && (table.empty() || entry.path().string() < table)) table = entry.path();
    }
    std::fstream file(table, std::ios::binary | std::ios::in | std::ios::out);
    const auto at = record * static_cast<int64_t>(kBytes + 200) + 1500;
    file.seekg(at);
    const char flipped = static_cast<char>(file.get() ^ 4);
    file.seekp(at);
    file.put(flipped);
    ASSERT_TRUE(file.good());
  }
  std::string Snapshot() const {
    std::string all;
    for (const auto& entry : fs::directory_iterator(path_)) all += entry.path().filename().string() + ReadFile(entry.path());
    return all;
  }

  TempDir dir_;
  const std::string path_ = dir_.path() + "/store";
  InspectOptions options_;
  std::ostringstream out_, err_;
};

TEST_F(InspectTest, SaysWhatAStoreHoldsAndChangesNothing) {
  MakeStore();
  const std::string before = Snapshot();
  options_.json = dir_.path() + "/report.json";
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_EQ(Snapshot(), before);
  const auto json = nlohmann::json::parse(ReadFile(options_.json));
  EXPECT_EQ(json["schema"], "prehoc.inspect/1");
  EXPECT_EQ(json["records"], 14);
  EXPECT_EQ(json["model"]["name"], "test-model");
  EXPECT_EQ(json["format"]["record"], 2);
  EXPECT_EQ(json["verified"], false);
  ASSERT_EQ(json["tenants"].size(), 2u);
  const auto& tenant = json["tenants"][json["tenants"][0]["prompts"] == 2 ? 0 : 1];
  EXPECT_EQ(tenant["prompts"], 2);
  EXPECT_EQ(tenant["longest_tokens"], 4 * kTokens);
  EXPECT_EQ(tenant["chunks"], 5);
  EXPECT_EQ(tenant["records"], 10);
  EXPECT_EQ(tenant["bytes"], 10 * kBytes);
  EXPECT_GE(tenant["oldest_seconds"], 0);
  for (const char* part : {"test-model", "rows-kv/l2/h2/d16/p16/c64", "14 records", "256 tokens", "tenant"}) {
    EXPECT_NE(out_.str().find(part), std::string::npos) << part << "\n" << out_.str();
  }
}

TEST_F(InspectTest, VerifyFindsDamageAndRepairDropsItWithWhatFollows) {
  MakeStore();
  options_.verify = true;
  ASSERT_EQ(Run(), kExitOk);
  EXPECT_NE(out_.str().find("every record is what was written"), std::string::npos) << out_.str();

  Damage(0);  // first chunk, first layer, of the prompts that share it
  const std::string before = Snapshot();
  options_.verify = false;
  EXPECT_EQ(Run(), kExitOk) << "without --verify payloads are not read";
  options_.verify = true;
  ASSERT_EQ(Run(), kExitRuntime);
  EXPECT_EQ(Snapshot(), before);
  const ChunkKey damaged = Chain("a", 1, 1).Key(ChunkIndex(0), LayerId(0));
  EXPECT_NE(out_.str().find("damaged   chunk " + damaged.ToString()), std::string::npos) << out_.str();
  EXPECT_NE(out_.str().find("checksum"), std::string::npos);
  EXPECT_NE(out_.str().find("--repair"), std::string::npos);

  options_.repair = true;
  options_.json = dir_.path() + "/report.json";
  ASSERT_EQ(Run(), kExitOk) << err_.str() << out_.str();
  const auto json = nlohmann::json::parse(ReadFile(options_.json));
  EXPECT_EQ(json["damaged"].size(), 1u);
  EXPECT_EQ(json["damaged"][0]["dropped"], true);
  EXPECT_EQ(json["unusable_records"]["chunk_not_whole"], 1);
  EXPECT_EQ(json["unusable_records"]["no_chunk_before"], 8);
  EXPECT_EQ(json["dropped_records"], 10);

  options_.repair = false;
  options_.json.clear();
  ASSERT_EQ(Run(), kExitOk);
  auto store = OpenStore();
  EXPECT_EQ(store->ListRecords().size(), 4u) << "the other tenant's";
  std::vector<std::byte> out(kBytes);
  EXPECT_OK(store->Get(Chain("b", 2, 0, 3).Key(ChunkIndex(1), LayerId(1)), out));
  EXPECT_EQ(out, TestChunk(3, kBytes));
}

TEST_F(InspectTest, RowsOfAnswersAreUnusableOnceTheirRunHasEnded) {
  {
    auto store = OpenStore();
    ChunkKeyChain chain = Chain("a", 1, 0, 1);
    const std::vector<int32_t> tokens(kTokens, 5);
    chain.Append(tokens, "branch:1");
    Put(*store, chain);
  }
  ASSERT_EQ(Run(), kExitOk);
  EXPECT_NE(out_.str().find("2 records, 8.0 KiB: of an answer"), std::string::npos) << out_.str();
  options_.repair = true;
  ASSERT_EQ(Run(), kExitOk);
  EXPECT_EQ(OpenStore()->ListRecords().size(), 2u);
}

TEST_F(InspectTest, ATornStoreKeepsWhatCanBeRead) {
  {
    auto store = OpenStore();
    Put(*store, Chain("a", 2, 0, 1));
    ASSERT_OK(store->Flush());
    Put(*store, Chain("b", 2, 0, 2));
  }
  std::vector<std::string> tables;
  for (const auto& entry : fs::directory_iterator(path_)) {
    if (entry.path().extension() == ".sst") tables.push_back(entry.path());
  }
  std::sort(tables.begin(), tables.end());
  ASSERT_EQ(tables.size(), 2u);
  fs::resize_file(tables[1], 1000);
  EXPECT_EQ(Run(), kExitRuntime);
  EXPECT_NE(err_.str().find("--repair keeps what can be read"), std::string::npos) << err_.str();
  options_.repair = true;
  EXPECT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_NE(out_.str().find("file " + fs::path(tables[1]).filename().string() + ": cannot be read, deleted"), std::string::npos) << out_.str();
  options_.repair = false;
  options_.verify = true;
  EXPECT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_EQ(OpenStore()->ListRecords().size(), 4u);
}

TEST_F(InspectTest, WorksBesideAWriterAndRepairNamesIt) {
  MakeStore();
  auto writer = OpenStore();
  ASSERT_OK(writer->Put(TestKey(1), TestChunk(1, kBytes)));
  options_.verify = true;
  EXPECT_EQ(Run(), kExitOk) << err_.str();
  options_.repair = true;
  EXPECT_EQ(Run(), kExitRuntime);
  EXPECT_NE(err_.str().find("is open in this process already"), std::string::npos) << err_.str();
}

TEST_F(InspectTest, ForeignFilesAreShownAndLeftAlone) {
  MakeStore();
  WriteFile(path_ + "/notes\x1b[2J\n.txt", "mine");
  options_.repair = true;
  EXPECT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_EQ(out_.str().find('\x1b'), std::string::npos) << "no name moves the cursor";
  EXPECT_NE(out_.str().find("foreign   notes"), std::string::npos) << out_.str();
  EXPECT_EQ(ReadFile(path_ + "/notes\x1b[2J\n.txt"), "mine");
}

TEST_F(InspectTest, RefusesWhatIsNoStoreByName) {
  const auto refused = [&](const std::string& part) {
    EXPECT_EQ(Run(), kExitRuntime);
    EXPECT_NE(err_.str().find("--store " + path_), std::string::npos) << err_.str();
    EXPECT_NE(err_.str().find(part), std::string::npos) << err_.str();
    const std::string error = err_.str();
    EXPECT_EQ(std::count(error.begin(), error.end(), '\n'), 1) << error;
  };
  refused("is no store");
  EXPECT_FALSE(fs::exists(path_)) << "nothing is created";
  MakeStore();
  const std::string note = ReadFile(path_ + "/" + kStoreNoteName);
  WriteFile(path_ + "/" + kStoreNoteName, "prehoc store\nstore 7\nnew things\n");
  refused("store version 7, this one knows 1");
  std::string newer = note;
  newer.replace(newer.find("format 2"), 8, "format 3");
  WriteFile(path_ + "/" + kStoreNoteName, newer);
  refused("version 3");
  refused("knows 2");
  WriteFile(path_ + "/" + kStoreNoteName, note.substr(0, 20));
  refused("lacks");
  WriteFile(path_ + "/" + kStoreNoteName, note);
  fs::remove(path_ + "/CURRENT");
  refused("no 'CURRENT'");
  fs::create_symlink("/etc/passwd", path_ + "/CURRENT");
  refused("'CURRENT' is a symbolic link");
}

}  // namespace
}  // namespace prehoc::cli
