// What happened, for machines: one JSON object a line, at levels. The library below prints and logs nothing.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "base/clock.h"
#include "base/result.h"

namespace prehoc::cli {

enum class LogLevel : uint8_t { kOff, kError, kWarning, kInfo, kDebug };
Result<LogLevel> ParseLogLevel(std::string_view text);  // kInvalid with what is accepted

// One thread. {"seconds":0.512,"level":"info","event":"prompt done","tokens":6036}; seconds since this began.
// Values are numbers, names, paths and messages; never a prompt, an answer or a token.
class Log {
 public:
  using Value = std::variant<int64_t, double, std::string_view>;
  using Field = std::pair<std::string_view, Value>;
  Log(std::ostream& out, LogLevel level, const Clock& clock) : out_(out), level_(level), clock_(clock), start_(clock.NowNanos()) {}

  void Error(std::string_view event, std::initializer_list<Field> fields) { Write(LogLevel::kError, event, fields); }
  void Warning(std::string_view event, std::initializer_list<Field> fields) { Write(LogLevel::kWarning, event, fields); }
  void Info(std::string_view event, std::initializer_list<Field> fields) { Write(LogLevel::kInfo, event, fields); }
  void Debug(std::string_view event, std::initializer_list<Field> fields) { Write(LogLevel::kDebug, event, fields); }

 private:
  void Write(LogLevel level, std::string_view event, std::initializer_list<Field> fields);
  std::ostream& out_;
  const LogLevel level_;
  const Clock& clock_;
  const int64_t start_;
};

}  // namespace prehoc::cli
