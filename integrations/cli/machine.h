// What the operating system says about this machine.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace prehoc::cli {

std::string CpuName();                          // "unknown" where nothing says it
std::vector<std::string> CpuFeatures();         // of those that matter here: sse4_2, f16c, avx2, fma, avx512f, ...
std::string FirstLine(const std::string& path); // without its end; empty where the file cannot be read
int64_t PeakResidentBytes();                    // of this process; 0 where unknown

}  // namespace prehoc::cli
