// Counters as a file for Prometheus (the textfile collector of its node exporter, or any scraper of files).
#pragma once
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/result.h"

namespace prehoc::cli {

// Text exposition format 0.0.4. "host.hits" becomes prehoc_host_hits_total, a counter; what can fall again
// ("host.used_bytes") a gauge under its own name. Not-a-numbers are left out.
std::string PrometheusText(const std::map<std::string, double>& counters);

// Whether the figure of this name is a level, not a sum.
bool IsLevel(std::string_view name);

// A file that is always whole: written beside its place and renamed.
class MetricsFile {
 public:
  using Source = std::function<std::map<std::string, double>()>;
  // kIoError at once if the place cannot be written to. `clock` outlives this.
  static Result<MetricsFile> Create(const std::string& path, const Clock* clock);

  // Asks `source` and writes, if the last time is a second ago or more. An error shows at the final Write().
  void Refresh(const Source& source);
  Status Write(const Source& source);

 private:
  MetricsFile(std::string path, const Clock* clock) : path_(std::move(path)), clock_(clock) {}
  std::string path_;
  const Clock* clock_;
  int64_t next_ = 0;  // clock
};

}  // namespace prehoc::cli
