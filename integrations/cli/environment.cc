#include "integrations/cli/environment.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <system_error>

namespace prehoc::cli {
namespace {

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// The XDG specification has relative paths ignored.
std::string CacheDir() {
  if (const std::string xdg = Variable("XDG_CACHE_HOME"); xdg.starts_with("/")) return xdg + "/prehoc";
  if (const std::string home = Variable("HOME"); home.starts_with("/")) return home + "/.cache/prehoc";
  return "";
}

// Installed: beside the program. Built: in the sources.
std::vector<std::string> AdapterDirs() {
  std::vector<std::string> result;
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) result.push_back((program.parent_path().parent_path() / "share/prehoc/models").string());
  result.push_back(PREHOC_SOURCE_DIR "/bench/models");
  return result;
}

uint64_t MemoryBytes() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  uint64_t bytes = pages > 0 && page > 0 ? static_cast<uint64_t>(pages) * static_cast<uint64_t>(page) : 0;
  uint64_t limit = 0;  // "max" leaves it unread
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    if (std::ifstream(path) >> limit && limit > 0) bytes = bytes ? std::min(bytes, limit) : limit;
  }
  return bytes;
}

}  // namespace

Environment Environment::OfProcess() {
  Environment result;
  result.cache_dir = CacheDir();
  result.adapter_dirs = AdapterDirs();
  result.memory_bytes = MemoryBytes();
  result.stdout_terminal = isatty(STDOUT_FILENO) == 1;
  result.stderr_terminal = isatty(STDERR_FILENO) == 1;
  return result;
}

}  // namespace prehoc::cli
