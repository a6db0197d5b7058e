#include "integrations/cli/format.h"

#include <fmt/format.h>

#include <cmath>

namespace prehoc::cli {

std::string FormatCount(int64_t value) {
  const std::string digits = std::to_string(value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    const bool starts_group = (digits.size() - i) % 3 == 0;
    if (starts_group && i > 0 && digits[i - 1] != '-') text += ',';
    text += digits[i];
  }
  return text;
}

std::string FormatNumber(double value) {
  if (value == 0 || !std::isfinite(value)) return fmt::format("{}", value);
  if (std::abs(value) >= 999.5 && std::abs(value) < 9e18) return FormatCount(std::llround(value));
  // Rounded to three digits first: 9.996 is 10.0, not 10.00.
  const std::string rounded = fmt::format("{:.2e}", value);
  const int exponent = std::stoi(rounded.substr(rounded.find('e') + 1));
  return exponent < -4 ? rounded : fmt::format("{:.{}f}", value, 2 - exponent);
}

std::string FormatRate(double per_second) { return FormatNumber(per_second); }

std::string FormatSeconds(double seconds) {
  if (seconds < 0.9995) return FormatNumber(seconds * 1e3) + " ms";
  if (seconds < 99.95) return FormatNumber(seconds) + " s";
  const int64_t whole = std::llround(seconds);
  return std::to_string(whole / 60) + " min " + std::to_string(whole % 60) + " s";
}

std::string FormatShare(double share) { return FormatNumber(share * 100) + " %"; }

}  // namespace prehoc::cli
