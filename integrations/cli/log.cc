#include "integrations/cli/log.h"

#include <array>
#include <nlohmann/json.hpp>

#include "integrations/cli/flag_values.h"

namespace prehoc::cli {
namespace {
constexpr std::array<std::string_view, 5> kNames = {"off", "error", "warning", "info", "debug"};
}

Result<LogLevel> ParseLogLevel(std::string_view text) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (text == kNames[i]) return static_cast<LogLevel>(i);
  }
  return Bad("--log", text, "off, error, warning, info or debug");
}

void Log::Write(LogLevel level, std::string_view event, std::initializer_list<Field> fields) {
  if (level > level_) return;
  nlohmann::ordered_json line;
  line["seconds"] = clock_.SecondsSince(start_);
  line["level"] = kNames[static_cast<size_t>(level)];
  line["event"] = event;
  for (const auto& [name, value] : fields) {
    std::visit([&, key = std::string(name)](const auto& v) { line[key] = v; }, value);
  }
  // A path may be no UTF-8.
  out_ << line.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::ordered_json::error_handler_t::replace) << std::endl;
}

}  // namespace prehoc::cli
