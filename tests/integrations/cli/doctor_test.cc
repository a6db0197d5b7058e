#include "integrations/cli/doctor.h"

#include <gtest/gtest.h>

#include <sstream>

#include "base/units.h"
#include "integrations/cli/exit_code.h"
#include "tests/integrations/cli/cli_test_util.h"

namespace prehoc::cli {
namespace {

TEST(DoctorTest, SaysWhatIsThereAndWhatWillBeUsed) {
  TempDir dir;
  std::ostringstream out, err;
  DoctorOptions options;
  options.store = dir.path() + "/not/yet/there";
  options.test_bytes = 2 * kMiB;
  EXPECT_EQ(RunDoctor(options, EnvironmentIn(dir), out, err, SteadyClock::Get()), kExitOk) << err.str();
  const std::string text = "\n" + out.str();
  for (const char* line : {"prehoc", "CPU", "CPU features", "kernels", "GPU", "device tier", "huge pages", "pinning", "disk",
                           "direct I/O", "disk speed", "model", "RocksDB", "OpenSSL"}) {
    EXPECT_NE(text.find("\n" + std::string(line) + " "), std::string::npos) << line << text;
  }
  EXPECT_NE(text.find("disk          " + dir.path() + " ("), std::string::npos) << text;  // nearest directory that exists
  EXPECT_NE(text.find("missing; fetch it with scripts/fetch_model.sh"), std::string::npos) << text;
  EXPECT_FALSE(std::filesystem::exists(options.store));
}

TEST(DoctorTest, ADiskThatCannotBeMeasuredIsAnError) {
  TempDir dir;
  std::ostringstream out, err;
  DoctorOptions options;
  options.store = dir.path();
  options.test_bytes = uint64_t{1} << 60;
  EXPECT_EQ(RunDoctor(options, EnvironmentIn(dir), out, err, SteadyClock::Get()), kExitRuntime);
  EXPECT_NE(err.str().find("--test-size"), std::string::npos) << err.str();
}

}  // namespace
}  // namespace prehoc::cli
