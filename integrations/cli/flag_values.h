// Flags of the command line: how they are declared, and how the values typed for them are read. CLI11 only cuts the line into
// flags; reading values here gives every error the same shape.
#pragma once
#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "base/precision.h"
#include "base/units.h"
#include "integrations/cli/exit_code.h"

namespace prehoc::cli {

struct Flags {
  const CLI::App* app;
  bool Given(const char* flag) const { return app->get_option(flag)->count() > 0; }
};

inline CLI::Option* AddText(CLI::App& app, const char* flag, std::string& value, const char* type, std::string help,
                     const char* group) {
  return app.add_option(flag, value, std::move(help))->type_name(type)->group(group);
}

inline Status Bad(std::string_view flag, std::string_view value, std::string_view accepted) {
  constexpr size_t kShown = 60;
  std::string shown(value.substr(0, kShown));
  if (value.size() > kShown) shown += "...";
  return UsageError(std::string(flag) + " \"" + shown + "\": give " + std::string(accepted));
}

// Leaves `out` alone if the flag was not given.
template <class T>
Status ReadWhole(const Flags& flags, const char* flag, const std::string& text, T least, T most, T* out) {
  if (!flags.Given(flag)) return {};
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most) {
    return Bad(flag, text, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
  }
  *out = value;
  return {};
}

inline Status ReadBytes(const Flags& flags, const char* flag, const std::string& text, uint64_t least, uint64_t* out) {
  if (!flags.Given(flag)) return {};
  const Result<uint64_t> value = ParseBytes(text);
  if (!value.ok()) return Bad(flag, text, "a size such as 64MiB, 1.5GB or 1048576");
  if (*value < least) return Bad(flag, text, "at least " + FormatBytes(static_cast<double>(least)));
  *out = *value;
  return {};
}

// --device, whose kernels are its own. `cuda` is a bool or an optional one.
template <class Cuda>
Status ReadDevice(const Flags& flags, const std::string& text, const std::string& kernels, Cuda* cuda) {
  if (!flags.Given("--device")) return {};
  if (text != "cpu" && text != "cuda") return Bad("--device", text, "cpu or cuda");
  *cuda = text == "cuda";
  if (text == "cuda" && flags.Given("--kernels")) return Bad("--kernels", kernels, "--device cpu: with --device cuda the kernels are CUDA's");
  return {};
}

inline Status ReadPromptPrecision(const Flags& flags, const std::string& text, PromptPrecision* precision) {
  if (!flags.Given("--prompt-precision")) return {};
  const std::optional<PromptPrecision> found = FindPromptPrecision(text);
  if (!found) return Bad("--prompt-precision", text, "fp32 or half");
  *precision = *found;
  return {};
}

inline Status ReadText(const Flags& flags, const char* flag, const std::string& text, std::string* out) {
  if (!flags.Given(flag)) return {};
  if (text.empty()) return UsageError(std::string(flag) + " is empty: give a value, or leave the flag out");
  *out = text;
  return {};
}

}  // namespace prehoc::cli
