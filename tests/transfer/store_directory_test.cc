#include "transfer/store_directory.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "tests/support/chunk_data.h"
#include "tests/support/source_paths.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"

namespace prehoc {
namespace {

namespace fs = std::filesystem;

StoreNote Note() { return {kStoreVersion, TestIdentity(), 4096}; }

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(StoreNoteTest, ComesBackAsItWas) {
  const std::string text = FormatStoreNote(Note());
  auto note = ParseStoreNote(text);
  ASSERT_OK(note);
  EXPECT_EQ(note->store_version, kStoreVersion);
  EXPECT_EQ(note->identity, TestIdentity());
  EXPECT_EQ(note->identity.model_name, "test-model");
  EXPECT_EQ(note->chunk_bytes, 4096u);
  EXPECT_OK(CheckStoreNote(*note, Note()));
  EXPECT_EQ(FormatStoreNote(*note), text);
}

TEST(StoreNoteTest, IsTheTextThatIsDocumented) {
  EXPECT_EQ(FormatStoreNote(Note()),
            "prehoc store\nstore 1\nformat 2\ndtype f16\nlayout rows-kv/l2/h2/d16/p16/c64\nmodel "
            "01080f161d242b323940474e555c636a71787f868d949ba2a9b0b7bec5ccd3da\nmodel_name test-model\nchunk_bytes 4096\n");
}

TEST(StoreNoteTest, AStoreWithRecordsOfVersionOneIsRefusedWithBothVersions) {
  auto note = ParseStoreNote(ReadFile(GoldenPath("/store/note-v1.txt")));
  ASSERT_OK(note);
  EXPECT_STATUS(StatusCode::kInvalid, "format version 1, not 2", CheckStoreNote(*note, Note()));
}

TEST(StoreNoteTest, ReadsAndWritesWhatVersionTwoWrote) {
  const std::string golden = ReadFile(GoldenPath("/store/note-v2.txt"));
  auto note = ParseStoreNote(golden);
  ASSERT_OK(note);
  EXPECT_OK(CheckStoreNote(*note, Note()));
  EXPECT_EQ(FormatStoreNote(Note()), golden);
}

TEST(StoreNoteTest, ANameWithLineBreaksStaysOneField) {
  StoreNote note = Note();
  note.identity.model_name = "evil\nchunk_bytes 7\nmodel_name x\r\t";
  auto parsed = ParseStoreNote(FormatStoreNote(note));
  ASSERT_OK(parsed);
  EXPECT_EQ(parsed->chunk_bytes, 4096u);
  EXPECT_OK(CheckStoreNote(*parsed, note));
}

TEST(StoreNoteTest, EveryTruncationIsRefused) {
  const std::string text = FormatStoreNote(Note());
  for (size_t size = 0; size < text.size(); ++size) {
    ASSERT_EQ(ParseStoreNote(text.substr(0, size)).status().code(), StatusCode::kCorrupt) << size;
  }
  EXPECT_STATUS(StatusCode::kCorrupt, "prehoc-store", ParseStoreNote(text + "more\n"));
}

TEST(StoreNoteTest, DamageIsRefusedOrChangesAValueThatIsCompared) {
  const std::string text = FormatStoreNote(Note());
  const size_t name_begin = text.find("model_name ") + 11, name_end = text.find('\n', name_begin);
  for (size_t i = 0; i < text.size(); ++i) {
    if (i >= name_begin && i < name_end) continue;  // for people only
    for (int round = 0; round < 8; ++round) {
      std::string bad = text;
      bad[i] = static_cast<char>(bad[i] ^ (1 << round));
      auto parsed = ParseStoreNote(bad);
      if (!parsed.ok()) {
        ASSERT_EQ(parsed.status().code(), StatusCode::kCorrupt) << i;
      } else {
        ASSERT_EQ(CheckStoreNote(*parsed, Note()).code(), StatusCode::kInvalid) << "byte " << i << " of the note: " << bad;
      }
    }
  }
}

TEST(StoreNoteTest, MalformedValuesAreRefused) {
  const auto with = [](std::string from, std::string to) {
    std::string text = FormatStoreNote(Note());
    text.replace(text.find(from), from.size(), to);
    return ParseStoreNote(text).status();
  };
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("chunk_bytes 4096", "chunk_bytes -1"));
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("chunk_bytes 4096", "chunk_bytes 99999999999999999999999"));
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("chunk_bytes 4096", "chunk_bytes 4096 "));
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("format 2", "format two"));
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("model 01", "model 0"));
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("model 01", "model 0g"));
  EXPECT_STATUS(StatusCode::kCorrupt, "lacks", with("dtype", "type"));
  EXPECT_STATUS(StatusCode::kCorrupt, "malformed", with("prehoc store\n", "prehoc store \n"));
}

TEST(StoreNoteTest, RefusalsNameBothValues) {
  const auto differs = [](auto change, const char* was, const char* is) {
    StoreNote found = Note();
    change(found);
    EXPECT_STATUS(StatusCode::kInvalid, was, CheckStoreNote(found, Note()));
    EXPECT_STATUS(StatusCode::kInvalid, is, CheckStoreNote(found, Note()));
  };
  differs([](auto& n) { n.store_version = 7; }, "store version 7", "not 1");
  differs([](auto& n) { n.identity.format_version = 3; }, "format version 3", "not 2");
  differs([](auto& n) { n.identity.dtype = "bf16"; }, "dtype bf16", "not f16");
  differs([](auto& n) { n.identity.layout = "other"; }, "layout other", "rows-kv/l2");
  differs([](auto& n) { n.identity.model[0] = 0xff, n.identity.model_name = "gpt"; }, "'gpt' (ff", "'test-model' (01");
  differs([](auto& n) { n.chunk_bytes = 1; }, "chunk_bytes 1", "not 4096");
}

class StoreDirectoryTest : public ::testing::Test {
 protected:
  Status Prepare(bool create = true, bool read_only = false) {
    return PrepareStoreDirectory(path_, Note(), create, read_only);
  }
  TempDir dir_;
  std::string path_ = dir_.path() + "/a/b/store";
};

TEST_F(StoreDirectoryTest, CreatesPrivateDirectoriesAndNote) {
  ASSERT_OK(Prepare());
  for (const std::string& made : {dir_.path() + "/a", dir_.path() + "/a/b", path_}) {
    EXPECT_EQ(static_cast<unsigned>(fs::status(made).permissions()), 0700u) << made;
  }
  EXPECT_EQ(static_cast<unsigned>(fs::status(path_ + "/prehoc-store").permissions()), 0600u);
  EXPECT_EQ(ReadFile(path_ + "/prehoc-store"), FormatStoreNote(Note()));
  EXPECT_EQ(std::distance(fs::directory_iterator(path_), {}), 1) << "no temporary file is left";
  EXPECT_OK(Prepare());
  EXPECT_OK(Prepare(false, true));
}

TEST_F(StoreDirectoryTest, WritesNothingWhereItMayNot) {
  EXPECT_STATUS(StatusCode::kNotFound, "no such directory", Prepare(/*create=*/false));
  EXPECT_STATUS(StatusCode::kNotFound, "no such directory", Prepare(true, /*read_only=*/true));
  EXPECT_FALSE(fs::exists(dir_.path() + "/a"));
  fs::create_directories(path_);
  EXPECT_STATUS(StatusCode::kNotFound, "is empty", Prepare(/*create=*/false));
  EXPECT_STATUS(StatusCode::kNotFound, "is empty", Prepare(true, /*read_only=*/true));
  EXPECT_TRUE(fs::is_empty(path_));
}

TEST_F(StoreDirectoryTest, LeavesDirectoriesOfOthersAlone) {
  fs::create_directories(path_);
  std::ofstream(path_ + "/letters.txt") << "dear";
  EXPECT_STATUS(StatusCode::kInvalid, "letters.txt", Prepare());
  EXPECT_EQ(ReadFile(path_ + "/letters.txt"), "dear");
  EXPECT_STATUS(StatusCode::kInvalid, path_, Prepare());
  path_ += "/letters.txt";
  EXPECT_STATUS(StatusCode::kInvalid, "not a directory", Prepare());
  path_ += "/below";
  EXPECT_EQ(Prepare().code(), StatusCode::kIoError);
}

TEST_F(StoreDirectoryTest, AHalfWrittenNoteIsWrittenAgain) {
  fs::create_directories(path_);
  std::ofstream(path_ + "/prehoc-store.tmp") << "prehoc st";
  ASSERT_OK(Prepare());
  EXPECT_EQ(ReadFile(path_ + "/prehoc-store"), FormatStoreNote(Note()));
}

TEST_F(StoreDirectoryTest, ADamagedNoteIsRefusedWithThePath) {
  ASSERT_OK(Prepare());
  std::ofstream(path_ + "/prehoc-store") << "prehoc store\nstore 1\n";
  EXPECT_STATUS(StatusCode::kCorrupt, path_, Prepare());
}

unsigned ModeOf(const std::string& path) { return static_cast<unsigned>(fs::status(path).permissions()); }
void WriteText(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

TEST_F(StoreDirectoryTest, RestrictsItsOwnFilesAndNoOthers) {
  ASSERT_OK(Prepare());
  const std::string outside = dir_.path() + "/outside";
  for (const std::string& path : {path_ + "/000007.sst", path_ + "/notes.txt", outside}) {
    WriteText(path, "x");
    ::chmod(path.c_str(), 0644);
  }
  fs::create_symlink(outside, path_ + "/000008.sst");
  RestrictFiles(path_);
  EXPECT_EQ(ModeOf(path_ + "/000007.sst"), 0600u);
  EXPECT_EQ(ModeOf(path_ + "/notes.txt"), 0644u) << "of somebody else";
  EXPECT_EQ(ModeOf(outside), 0644u) << "behind a link";
}

TEST_F(StoreDirectoryTest, ListsWhatIsWhose) {
  ASSERT_OK(Prepare());
  for (const char* name : {"000012.sst", "CURRENT", "MANIFEST-000004", "OPTIONS-000007", "LOCK", "12.sst.bak", "x.sst", "MANIFEST-x", "core"}) {
    WriteText(path_ + "/" + name, "12345");
  }
  fs::create_directory(path_ + "/000013.sst");
  fs::create_symlink("/etc/passwd", path_ + "/IDENTITY");
  const Result<StoreFiles> files = ListStoreFiles(path_);
  ASSERT_OK(files);
  using Names = std::vector<std::string>;
  EXPECT_EQ(files->tables, Names{"000012.sst"});
  EXPECT_EQ(files->others, (Names{"CURRENT", "LOCK", "MANIFEST-000004", "OPTIONS-000007", kStoreNoteName}));
  EXPECT_EQ(files->links, Names{"IDENTITY"});
  EXPECT_EQ(files->foreign, (Names{"000013.sst", "12.sst.bak", "MANIFEST-x", "core", "x.sst"}));
  EXPECT_EQ(files->bytes, 5 * 5 + fs::file_size(path_ + "/" + kStoreNoteName));
}

TEST_F(StoreDirectoryTest, LinksAreRefusedByName) {
  ASSERT_OK(Prepare());
  fs::create_symlink("/etc/passwd", path_ + "/CURRENT");
  EXPECT_STATUS(StatusCode::kInvalid, "'CURRENT' is a symbolic link", Prepare());
  fs::remove(path_ + "/CURRENT");
  fs::rename(path_ + "/" + kStoreNoteName, dir_.path() + "/note");
  fs::create_symlink(dir_.path() + "/note", path_ + "/" + kStoreNoteName);
  EXPECT_STATUS(StatusCode::kInvalid, "is a symbolic link", Prepare());
  EXPECT_STATUS(StatusCode::kInvalid, "is a symbolic link", ReadStoreNote(path_));
}

TEST_F(StoreDirectoryTest, HalfAStoreIsRefusedWithWhatIsMissing) {
  ASSERT_OK(Prepare());
  WriteText(path_ + "/MANIFEST-000001", "x");
  EXPECT_OK(Prepare()) << "a crash while RocksDB made its first files";
  WriteText(path_ + "/000009.sst", "x");
  EXPECT_STATUS(StatusCode::kCorrupt, "no 'CURRENT'", Prepare());
  WriteText(path_ + "/CURRENT", "MANIFEST-000002\n");
  EXPECT_STATUS(StatusCode::kCorrupt, "names 'MANIFEST-000002', which is not there", Prepare());
  WriteText(path_ + "/MANIFEST-000002", "x");
  EXPECT_OK(Prepare());
}

TEST_F(StoreDirectoryTest, ANoteOfANewerProgramIsRefusedWithBothVersions) {
  ASSERT_OK(Prepare());
  WriteText(path_ + "/" + kStoreNoteName, "prehoc store\nstore 9\nsomething that is not known yet\n");
  EXPECT_STATUS(StatusCode::kUnsupported, "store version 9, this one knows 1", Prepare());
  WriteText(path_ + "/" + kStoreNoteName, std::string(1 << 20, 'x'));
  EXPECT_EQ(Prepare().code(), StatusCode::kCorrupt);
}

TEST_F(StoreDirectoryTest, ReadsTheNoteOfAnyStore) {
  EXPECT_STATUS(StatusCode::kNotFound, "is no store", ReadStoreNote(path_));
  ASSERT_OK(Prepare());
  const Result<StoreNote> note = ReadStoreNote(path_);
  ASSERT_OK(note);
  EXPECT_EQ(note->identity, TestIdentity());
}

}  // namespace
}  // namespace prehoc
