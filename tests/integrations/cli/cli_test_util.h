// What the tests of the command share.
#pragma once
#include <fstream>
#include <string>
#include <string_view>

#include "integrations/cli/environment.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"

namespace prehoc::cli {

inline void WriteFile(const std::string& path, std::string_view text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// A cache directory of its own, empty.
inline Environment EnvironmentIn(const TempDir& dir) {
  Environment environment;
  environment.cache_dir = dir.path() + "/cache";
  environment.adapter_dirs = {dir.path() + "/installed", dir.path() + "/sources"};
  return environment;
}

}  // namespace prehoc::cli
