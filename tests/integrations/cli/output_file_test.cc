#include "integrations/cli/output_file.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

int CountEntries(const std::string& directory) {
  const std::filesystem::directory_iterator entries(directory);
  return static_cast<int>(std::distance(begin(entries), end(entries)));
}

TEST(OutputFileTest, AppearsWholeAndReplacesWhatWasThere) {
  TempDir dir;
  const std::string path = dir.path() + "/run.json";
  WriteFile(path, "old");
  auto file = OutputFile::Create("--json", path);
  ASSERT_OK(file);
  EXPECT_EQ(ReadAll(path), "old");
  ASSERT_OK(file->Commit("new text\n"));
  EXPECT_EQ(ReadAll(path), "new text\n");
  EXPECT_EQ(CountEntries(dir.path()), 1);
}

TEST(OutputFileTest, LeavesNothingWithoutCommit) {
  TempDir dir;
  { ASSERT_OK(OutputFile::Create("--json", dir.path() + "/run.json")); }
  EXPECT_EQ(CountEntries(dir.path()), 0);
}

TEST(OutputFileTest, RefusesPlacesAtOnceAndNamesTheFlag) {
  TempDir dir;
  EXPECT_STATUS(StatusCode::kIoError, "--json /no/such/run.json", OutputFile::Create("--json", "/no/such/run.json"));
  EXPECT_STATUS(StatusCode::kIoError, "a directory", OutputFile::Create("--json", dir.path()));
}

}  // namespace
}  // namespace prehoc::cli
