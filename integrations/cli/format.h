// Numbers as people read them.
#pragma once
#include <cstdint>
#include <string>

namespace prehoc::cli {

std::string FormatCount(int64_t value);           // "1,207,908"
std::string FormatRate(double per_second);        // "1,940", "194", "13.3", "0.520"
std::string FormatSeconds(double seconds);        // "850 ms", "12.4 s", "3 min 20 s"
std::string FormatShare(double share);            // "12.3 %", "0.0520 %"
std::string FormatNumber(double value);           // three digits that matter

}  // namespace prehoc::cli
