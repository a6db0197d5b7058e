#include "integrations/cli/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "integrations/cli/output_file.h"
#include "integrations/cli/version.h"

namespace prehoc::cli {
namespace {
constexpr int64_t kInterval = 1'000'000'000;

std::string MetricName(std::string_view name) {
  std::string metric = "prehoc_";
  for (const char c : name) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    metric += plain ? c : '_';
  }
  if (!IsLevel(name)) metric += "_total";
  return metric;
}
}  // namespace

bool IsLevel(std::string_view name) {
  constexpr auto kLevels = std::to_array<std::string_view>({
      "blocks", "budget_bytes", "capacity_bytes", "copy_engine_bytes", "direct_io", "estimate_age_mean", "huge_page_bytes", "mapped_bytes", "max", "mean",
      "mean_attended", "min", "p50", "p99", "peak_bytes", "pinned", "pinned_bytes", "prefill_nanos_per_token", "queued",
      "resident_bytes", "restore_nanos_per_block", "rho", "scratch_bytes", "segments", "state", "tails", "used_bytes", "waiting",
      "weight_bytes"});
  const std::string_view last = name.substr(name.rfind('.') + 1);
  return std::find(kLevels.begin(), kLevels.end(), last) != kLevels.end();
}

std::string PrometheusText(const std::map<std::string, double>& counters) {
  std::string text = "# HELP prehoc_build_info The version that writes this.\n# TYPE prehoc_build_info gauge\nprehoc_build_info{version=\"" +
                     std::string(kVersion) + "\"} 1\n";
  for (const auto& [name, value] : counters) {
    if (!std::isfinite(value)) continue;
    const std::string metric = MetricName(name);
    text += fmt::format("# HELP {0} {1} of docs/cli.md\n# TYPE {0} {2}\n{0} {3}\n", metric, name, IsLevel(name) ? "gauge" : "counter", value);
  }
  return text;
}

Result<MetricsFile> MetricsFile::Create(const std::string& path, const Clock* clock) {
  PREHOC_RETURN_IF_ERROR(OutputFile::Create("--metrics", path).status());
  return MetricsFile(path, clock);
}

void MetricsFile::Refresh(const Source& source) {
  if (clock_->NowNanos() < next_) return;
  Write(source).IgnoreError();  // the run does not depend on it, and the last Write() tells
}

Status MetricsFile::Write(const Source& source) {
  next_ = clock_->NowNanos() + kInterval;
  PREHOC_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create("--metrics", path_));
  return file.Commit(PrometheusText(source()));
}

}  // namespace prehoc::cli
