#include "integrations/cli/named_models.h"

#include <gtest/gtest.h>

#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

constexpr char kFile[] = "/models/SmolLM2-135M-Instruct.Q4_1.gguf";

TEST(NamedModelsTest, AFileThatWasNotFetchedNamesTheScript) {
  TempDir dir;
  const Environment environment = EnvironmentIn(dir);
  EXPECT_STATUS(StatusCode::kNotFound, "scripts/fetch_model.sh", ResolveModel("smollm2-135m", "", environment).status());
  EXPECT_STATUS(StatusCode::kNotFound, environment.cache_dir + kFile, ResolveModel("smollm2-135m", "", environment).status());
}

TEST(NamedModelsTest, ANameIsAFileInTheCache) {
  TempDir dir;
  const Environment environment = EnvironmentIn(dir);
  WriteFile(environment.cache_dir + kFile, "gguf");
  const auto paths = ResolveModel("smollm2-135m", "", environment);
  ASSERT_OK(paths.status());
  EXPECT_EQ(paths->path, environment.cache_dir + kFile);
  EXPECT_EQ(paths->lora, "");
}

TEST(NamedModelsTest, TheLongModelFindsItsAdapterInstalledFirst) {
  TempDir dir;
  const Environment environment = EnvironmentIn(dir);
  WriteFile(environment.cache_dir + kFile, "gguf");
  EXPECT_STATUS(StatusCode::kNotFound, "/sources/smollm2-135m-128k", ResolveModel("smollm2-128k", "", environment).status());
  WriteFile(dir.path() + "/sources/smollm2-135m-128k/adapter_config.json", "{}");
  EXPECT_EQ(ResolveModel("smollm2-128k", "", environment)->lora, dir.path() + "/sources/smollm2-135m-128k");
  WriteFile(dir.path() + "/installed/smollm2-135m-128k/adapter_config.json", "{}");
  EXPECT_EQ(ResolveModel("smollm2-128k", "", environment)->lora, dir.path() + "/installed/smollm2-135m-128k");
  EXPECT_STATUS(StatusCode::kInvalid, "--lora", ResolveModel("smollm2-128k", dir.path(), environment).status());
}

TEST(NamedModelsTest, PathsAreTakenAsTheyAreAndMustExist) {
  TempDir dir;
  const Environment environment = EnvironmentIn(dir);
  WriteFile(dir.path() + "/m.gguf", "gguf");
  EXPECT_EQ(ResolveModel(dir.path() + "/m.gguf", dir.path(), environment)->lora, dir.path());
  EXPECT_STATUS(StatusCode::kNotFound, "--model /no/such", ResolveModel("/no/such", "", environment).status());
  EXPECT_STATUS(StatusCode::kNotFound, "--model no-such.gguf", ResolveModel("no-such.gguf", "", environment).status());
  EXPECT_STATUS(StatusCode::kInvalid, "smollm2-135m", ResolveModel("smollm3", "", environment).status());
  EXPECT_STATUS(StatusCode::kNotFound, "--lora /no/lora", ResolveModel("smollm2-135m", "/no/lora", environment).status());
}

TEST(NamedModelsTest, WithoutAHomeThereIsNoCache) {
  EXPECT_STATUS(StatusCode::kNotFound, "XDG_CACHE_HOME", ResolveModel("smollm2-135m", "", Environment{}).status());
}

}  // namespace
}  // namespace prehoc::cli
