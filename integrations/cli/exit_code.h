// Exit codes, and how a Status of the command becomes one.
#pragma once
#include <string>
#include <string_view>
#include <utility>

#include "base/status.h"

namespace prehoc::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitRuntime = 1;       // the command line is fine; a file, the disk or the machine is not
inline constexpr int kExitUsage = 2;         // the command line must change
inline constexpr int kExitInterrupted = 130; // Ctrl-C; 143 for SIGTERM (128 + signal)

// Inside the command kInvalid means one thing: a flag or its value is wrong. What libraries call kInvalid
// about files goes through RuntimeError() first.
inline Status UsageError(std::string message) { return {StatusCode::kInvalid, std::move(message)}; }

// `status` with `context: ` before it (no context if empty), as something that the command line is not to blame for.
inline Status RuntimeError(const Status& status, std::string_view context) {
  const std::string prefix = context.empty() ? std::string() : std::string(context) + ": ";
  const StatusCode code = status.code() == StatusCode::kInvalid ? StatusCode::kUnsupported : status.code();
  return status.ok() ? status : Status(code, prefix + status.message());
}

inline int ExitCodeOf(const Status& status) {
  if (status.ok()) return kExitOk;
  return status.code() == StatusCode::kInvalid ? kExitUsage : kExitRuntime;
}

}  // namespace prehoc::cli
