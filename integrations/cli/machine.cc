#include "integrations/cli/machine.h"

#include <array>
#include <fstream>
#include <set>
#include <sstream>

namespace prehoc::cli {
namespace {

// The value of "name<blanks>: value" in a file of such lines.
std::string Field(const std::string& path, std::string_view name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(name)) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t value = line.find_first_not_of(" \t", colon + 1);
    return value == std::string::npos ? "" : line.substr(value);
  }
  return "";
}

}  // namespace

std::string CpuName() {
  const std::string name = Field("/proc/cpuinfo", "model name");
  return name.empty() ? "unknown" : name;
}

std::vector<std::string> CpuFeatures() {
  constexpr std::array kWanted = {"sse4_2", "f16c", "fma", "avx", "avx2", "avx512f", "avx512bw", "avx512dq", "avx512vl",
                                  "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"};
  std::istringstream flags(Field("/proc/cpuinfo", "flags"));
  std::set<std::string> present;
  for (std::string flag; flags >> flag;) present.insert(flag);
  std::vector<std::string> result;
  for (const char* flag : kWanted) {
    if (present.contains(flag)) result.emplace_back(flag);
  }
  return result;
}

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

int64_t PeakResidentBytes() {
  std::istringstream value(Field("/proc/self/status", "VmHWM"));
  int64_t kib = 0;
  return value >> kib ? kib * 1024 : 0;
}

}  // namespace prehoc::cli
