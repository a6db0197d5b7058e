// One line on a terminal that moves while something long runs; nothing at all elsewhere.
#pragma once
#include <cstdint>
#include <ostream>
#include <string>
#include <string_view>

#include "base/clock.h"

namespace prehoc::cli {

// Draws at most ten times a second. Not thread-safe; `out` and `clock` outlive it.
class ProgressBar {
 public:
  // `enabled`: `out` is a terminal.
  ProgressBar(std::ostream& out, bool enabled, std::string label, const Clock& clock);
  ~ProgressBar() { Clear(); }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // `done` of `total` units; shows the share, units per second since construction, and the time left.
  void Update(int64_t done, int64_t total, std::string_view unit);
  void Clear();  // takes the line away again

 private:
  std::ostream& out_;
  const bool enabled_;
  const std::string label_;
  const Clock& clock_;
  const int64_t start_;
  int64_t first_done_ = -1;  // progress made before the bar was there is no speed
  int64_t drawn_ = 0;
  bool visible_ = false;
};

}  // namespace prehoc::cli
