#include "integrations/cli/document.h"

#include <gtest/gtest.h>

#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

TEST(DocumentTest, ReadsTextWithoutItsByteOrderMark) {
  TempDir dir;
  const std::string path = dir.path() + "/d.txt";
  WriteFile(path, "\xef\xbb\xbfna\xc3\xafve\n");
  const auto document = ReadDocument(path, EnvironmentIn(dir));
  ASSERT_OK(document.status());
  EXPECT_EQ(document->text, "na\xc3\xafve\n");
  EXPECT_EQ(document->path, path);
}

TEST(DocumentTest, ReadsMoreThanOnePiece) {
  TempDir dir;
  std::string text;
  while (text.size() < (size_t{3} << 20) + 17) text += "In the beginning \xe2\x82\xac ";
  WriteFile(dir.path() + "/d.txt", text);
  EXPECT_EQ(ReadDocument(dir.path() + "/d.txt", EnvironmentIn(dir))->text, text);
}

TEST(DocumentTest, RefusalsNameTheFileAndWhatToDo) {
  TempDir dir;
  const Environment environment = EnvironmentIn(dir);
  const std::string missing = dir.path() + "/none.txt", empty = dir.path() + "/empty.txt", latin = dir.path() + "/latin.txt";
  WriteFile(empty, "");
  WriteFile(latin, "caf\xe9 noir");
  EXPECT_STATUS(StatusCode::kNotFound, "--document " + missing, ReadDocument(missing, environment).status());
  EXPECT_STATUS(StatusCode::kCorrupt, "--document " + empty + ": the file is empty", ReadDocument(empty, environment).status());
  EXPECT_STATUS(StatusCode::kCorrupt, "not UTF-8 at byte 3", ReadDocument(latin, environment).status());
  EXPECT_STATUS(StatusCode::kUnsupported, "a directory", ReadDocument(dir.path(), environment).status());
}

TEST(DocumentTest, TheDefaultIsInTheCacheOrNamesItsScript) {
  TempDir dir;
  const Environment environment = EnvironmentIn(dir);
  EXPECT_STATUS(StatusCode::kNotFound, "scripts/fetch_document.sh", ReadDocument("", environment).status());
  EXPECT_STATUS(StatusCode::kNotFound, "scripts/fetch_document.sh", ReadDocument("", Environment{}).status());
  WriteFile(environment.documents_dir() + "/king-james.txt", "Ge1:1 In the beginning");
  EXPECT_EQ(ReadDocument("", environment)->text, "Ge1:1 In the beginning");
}

}  // namespace
}  // namespace prehoc::cli
