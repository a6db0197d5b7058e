// Sizes as people write them: "64MiB", "1.5GB", "4096".
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace prehoc {

constexpr uint64_t kKiB = uint64_t{1} << 10;
constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kGiB = uint64_t{1} << 30;

// Accepts B, KB/MB/GB/TB (powers of 1000), KiB/MiB/GiB/TiB and K/M/G/T (powers of 1024), case ignored.
// Returns kInvalid for anything else, negative numbers and values over 2^63.
Result<uint64_t> ParseBytes(std::string_view text);

// "138.2 MB", "64.0 MiB" style for tables; binary units.
std::string FormatBytes(double bytes);

constexpr uint64_t RoundUp(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace prehoc
