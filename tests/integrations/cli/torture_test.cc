#include "integrations/cli/torture.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "integrations/cli/exit_code.h"
#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

class TortureCommandTest : public ::testing::Test {
 protected:
  int Run() { return RunTortureCommand(flags_, EnvironmentIn(dir_), out_, err_, SteadyClock::Get()); }
  TempDir dir_;
  TortureFlags flags_;
  std::ostringstream out_, err_;
};

TEST_F(TortureCommandTest, PrintsATableWritesJsonAndLeavesNothing) {
  flags_.round = 1;
  flags_.faults = "flip,delay,memory";
  flags_.store = dir_.path();
  flags_.json = dir_.path() + "/torture.json";
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  for (const char* part : {"fault ", "flip", "memory", "wrong bytes", "1 rounds in", "nothing wrong came back"}) {
    EXPECT_NE(out_.str().find(part), std::string::npos) << part << "\n" << out_.str();
  }
  std::ifstream file(flags_.json);
  const auto json = nlohmann::json::parse(file);
  EXPECT_EQ(json["schema"], "prehoc.torture/1");
  EXPECT_EQ(json["wrong"], 0);
  const auto& flip = json["kinds"]["flip"];
  EXPECT_GT(flip["injected"], 0);
  EXPECT_EQ(flip["injected"], flip["detected"].get<int64_t>() + flip["never_read"].get<int64_t>());
  EXPECT_EQ(flip["passed"], 0);
  EXPECT_EQ(json["kinds"]["torn"]["injected"], 0);
  EXPECT_FALSE(json["kinds"]["delay"].contains("detected")) << "a delay damages nothing";
  int left = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir_.path())) left += entry.path() != flags_.json;
  EXPECT_EQ(left, 0) << "the directory on the disk is removed";
}

TEST_F(TortureCommandTest, RefusesWhatItCannotDo) {
  flags_.faults = "flop";
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_NE(err_.str().find("--faults: there is no fault \"flop\""), std::string::npos) << err_.str();
  flags_.faults = "all";
  flags_.store = dir_.path() + "/none";
  EXPECT_EQ(Run(), kExitRuntime);
  EXPECT_NE(err_.str().find("--store " + flags_.store), std::string::npos) << err_.str();
}

}  // namespace
}  // namespace prehoc::cli
