// Ctrl-C as a question that loops ask between tokens.
#pragma once

namespace prehoc::cli {

// While one lives, the first SIGINT or SIGTERM is remembered instead of ending the process; a second one ends it as
// usual. One at a time.
class InterruptGuard {
 public:
  InterruptGuard();
  ~InterruptGuard();  // what was there before comes back
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

  static bool Requested();
  static int ExitCode();  // 128 + signal; requires Requested()
};

}  // namespace prehoc::cli
