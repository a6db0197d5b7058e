// Reading and printing of knob values, and names near a misspelt one. Internal to selector/.
#pragma once
#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace prehoc::selector_internal {

// The whole of `text` as a number: no blanks, no sign '+', no inf or nan.
template <class T>
std::optional<T> ParseNumber(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  if constexpr (std::is_floating_point_v<T>) {
    if (!std::isfinite(value)) return std::nullopt;
  }
  return value;
}

// "0.25" or "1/4".
inline std::optional<double> ParseFraction(std::string_view text) {
  const size_t slash = text.find('/');
  if (slash == std::string_view::npos) return ParseNumber<double>(text);
  const auto above = ParseNumber<double>(text.substr(0, slash));
  const auto below = ParseNumber<double>(text.substr(slash + 1));
  if (!above || !below || *below == 0) return std::nullopt;
  const double value = *above / *below;
  if (!std::isfinite(value)) return std::nullopt;
  return value;
}

// The shortest text that reads back as the same number.
inline std::string PrintNumber(double value) {
  char buffer[32];
  const auto result = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return {buffer, result.ptr};
}

// "1/16" where that is exact, else as PrintNumber().
inline std::string PrintFraction(double value) {
  const double below = std::round(1 / value);
  if (below >= 2 && below <= 1e6 && 1 / below == value) return "1/" + std::to_string(static_cast<int64_t>(below));
  return PrintNumber(value);
}

// Levenshtein.
inline size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replace = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replace, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

// "cis.tau, tc.tau, cis.r": the three nearest of `names`. A name without its prefix ("tau") counts as near.
template <class Names>
std::string Nearest(std::string_view text, const Names& names) {
  std::vector<std::pair<size_t, std::string_view>> order;
  for (const auto& name : names) {
    const std::string_view full = name;
    const size_t dot = full.rfind('.');
    size_t distance = EditDistance(text, full);
    if (dot != std::string_view::npos) distance = std::min(distance, EditDistance(text, full.substr(dot + 1)));
    order.emplace_back(distance, full);
  }
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::string result;
  for (size_t i = 0; i < std::min<size_t>(3, order.size()); ++i) {
    result += (i ? ", " : "") + std::string(order[i].second);
  }
  return result;
}

// A message shows what was typed, but not all of a hostile argument.
inline std::string Quote(std::string_view text) {
  constexpr size_t kShown = 60;
  return "\"" + std::string(text.substr(0, kShown)) + (text.size() > kShown ? "...\"" : "\"");
}

}  // namespace prehoc::selector_internal
