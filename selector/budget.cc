#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "selector/options.h"
#include "selector/text.h"

namespace prehoc {
namespace {
using selector_internal::ParseFraction;
using selector_internal::ParseNumber;
using selector_internal::PrintFraction;
using selector_internal::PrintNumber;

constexpr int32_t kMaxTokens = std::numeric_limits<int32_t>::max();
constexpr char kAccepted[] =
    "a share of the visible positions in (0, 1) such as 1/16 or 0.1, a number of positions such as 512, "
    "or mass(0.95), mass(0.95,cap=1/8), mass(0.95,cap=1024)";

// What is left for the middle of `tokens`, or of `fraction` of n when tokens is 0.
int32_t Middle(const Budget& budget, double fraction, int32_t tokens, int64_t n) {
  // The nudge keeps 0.1 of 10 at 1, though 0.1 is not exact.
  const int64_t total = tokens != 0 ? tokens : static_cast<int64_t>(fraction * static_cast<double>(n) + 1e-9);
  return static_cast<int32_t>(std::clamp<int64_t>(total - budget.sinks - budget.local, 0, kMaxTokens));
}

// "512" is a number of positions, anything with '/', '.' or an exponent is a share.
bool ParseSize(std::string_view text, double* fraction, int32_t* tokens) {
  if (const auto whole = ParseNumber<int32_t>(text)) {
    if (*whole < 1) return false;
    *tokens = *whole;
    return true;
  }
  const auto share = ParseFraction(text);
  if (!share || *share <= 0 || *share >= 1) return false;
  *fraction = *share;
  *tokens = 0;
  return true;
}

std::string PrintSize(double fraction, int32_t tokens) {
  return tokens != 0 ? std::to_string(tokens) : PrintFraction(fraction);
}

// Takes `prefix` and `suffix` off `text`, or nothing.
std::optional<std::string_view> Inside(std::string_view text, std::string_view prefix, std::string_view suffix) {
  if (text.size() < prefix.size() + suffix.size() || !text.starts_with(prefix) || !text.ends_with(suffix)) {
    return std::nullopt;
  }
  return text.substr(prefix.size(), text.size() - prefix.size() - suffix.size());
}

bool ParseMass(std::string_view inside, Budget* budget) {
  const size_t comma = inside.find(',');
  const auto mass = ParseNumber<double>(inside.substr(0, comma));
  if (!mass || *mass <= 0 || *mass > 1) return false;
  budget->mass = *mass;
  if (comma == std::string_view::npos) return true;
  const auto cap = Inside(inside.substr(comma + 1), "cap=", "");
  return cap && ParseSize(*cap, &budget->cap_fraction, &budget->cap_tokens);
}
}  // namespace

int32_t Budget::MiddleK(int64_t n) const { return mass > 0 ? 0 : Middle(*this, fraction, tokens, n); }

int32_t Budget::MiddleCap(int64_t n) const {
  return mass > 0 ? Middle(*this, cap_fraction, cap_tokens, n) : MiddleK(n);
}

Result<Budget> Budget::Parse(std::string_view text) {
  Budget budget;
  const auto inside = Inside(text, "mass(", ")");
  if (inside ? ParseMass(*inside, &budget) : ParseSize(text, &budget.fraction, &budget.tokens)) return budget;
  return {StatusCode::kInvalid, "budget " + selector_internal::Quote(text) + " is not " + kAccepted};
}

std::string Budget::ToString() const {
  // != rather than >, so that a nonsensical field is printed, and refused when read back.
  if (mass != 0) return "mass(" + PrintNumber(mass) + ",cap=" + PrintSize(cap_fraction, cap_tokens) + ")";
  return PrintSize(fraction, tokens);
}

}  // namespace prehoc
