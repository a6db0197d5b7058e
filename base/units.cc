#include "base/units.h"

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace prehoc {

Result<uint64_t> ParseBytes(std::string_view text) {
  const auto bad = [&](const char* why) {
    return Status(StatusCode::kInvalid, "size '" + std::string(text) + "' " + why +
                                            "; write a number with a unit, such as 64MiB or 1.5GB");
  };
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || !std::isfinite(number)) return bad("is not a number");
  if (number < 0) return bad("is negative");
  std::string unit;
  for (const char* p = end; p != text.data() + text.size(); ++p) {
    if (*p != ' ') unit += static_cast<char>(std::tolower(static_cast<unsigned char>(*p)));
  }
  double scale = 1;
  if (!unit.empty() && unit != "b") {
    const std::string_view prefixes = "kmgt";
    const size_t power = prefixes.find(unit[0]);
    const std::string rest = unit.substr(1);
    if (power == std::string_view::npos || (rest != "" && rest != "b" && rest != "ib")) {
      return bad("has an unknown unit");
    }
    scale = std::pow(rest == "b" ? 1000.0 : 1024.0, static_cast<double>(power + 1));
  }
  const double bytes = number * scale;
  if (bytes > 9.2e18) return bad("is too large");
  return static_cast<uint64_t>(bytes);
}

std::string FormatBytes(double bytes) {
  static constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (std::abs(bytes) >= 1024 && unit + 1 < kUnits.size()) {
    bytes /= 1024;
    ++unit;
  }
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, unit == 0 ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
  return buffer;
}

}  // namespace prehoc
