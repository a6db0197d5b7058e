#include "integrations/cli/progress.h"

#include <algorithm>
#include <utility>

#include "integrations/cli/format.h"

namespace prehoc::cli {
namespace {
constexpr int kWidth = 30;
constexpr int64_t kRedrawNanos = 100'000'000;
constexpr std::string_view kClearLine = "\r\x1b[K";

std::string Bar(double share) {
  const int filled = static_cast<int>(share * kWidth);
  return "[" + std::string(static_cast<size_t>(filled), '#') + std::string(static_cast<size_t>(kWidth - filled), '.') + "]";
}
}  // namespace

ProgressBar::ProgressBar(std::ostream& out, bool enabled, std::string label, const Clock& clock)
    : out_(out), enabled_(enabled), label_(std::move(label)), clock_(clock), start_(clock.NowNanos()) {}

void ProgressBar::Update(int64_t done, int64_t total, std::string_view unit) {
  if (!enabled_ || total <= 0) return;
  if (first_done_ < 0) first_done_ = done;
  const int64_t now = clock_.NowNanos();
  if (visible_ && done < total && now - drawn_ < kRedrawNanos) return;
  drawn_ = now;
  visible_ = true;
  out_ << kClearLine << label_ << " " << Bar(std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0))
       << " " << FormatCount(done) << " of " << FormatCount(total) << " " << unit;
  const double seconds = clock_.SecondsSince(start_);
  const int64_t gained = done - first_done_;
  if (gained > 0 && seconds > 0) {
    const double rate = static_cast<double>(gained) / seconds;
    out_ << ", " << FormatRate(rate) << "/s, " << FormatSeconds(static_cast<double>(total - done) / rate) << " left";
  }
  out_ << std::flush;
}

void ProgressBar::Clear() {
  if (std::exchange(visible_, false)) out_ << kClearLine << std::flush;
}

}  // namespace prehoc::cli
