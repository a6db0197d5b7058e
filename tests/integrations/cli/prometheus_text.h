// A reader of Prometheus' text format 0.0.4 that is stricter than Prometheus: one sample a metric, each with its type.
#pragma once
#include <cstdlib>
#include <map>
#include <regex>
#include <sstream>
#include <string>

namespace prehoc::cli {

struct PrometheusMetrics {
  struct Metric {
    std::string type;
    double value = 0;
  };
  std::map<std::string, Metric> values;
  std::string error;  // empty, or the first line that is wrong
};

inline PrometheusMetrics ParsePrometheusText(const std::string& text) {
  static const std::regex kType("# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge)");
  static const std::regex kHelp("# HELP [a-zA-Z_:][a-zA-Z0-9_:]* [^\n]+");
  static const std::regex kSample("([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\\{[a-z]+=\"[^\"\\\\\n]*\"\\})? (\\S+)");
  PrometheusMetrics metrics;
  std::map<std::string, std::string> types;
  std::istringstream lines(text);
  if (!text.empty() && text.back() != '\n') metrics.error = "the last line is not ended";
  for (std::string line; std::getline(lines, line);) {
    std::smatch match;
    if (std::regex_match(line, match, kType)) {
      types[match[1]] = match[2];
    } else if (std::regex_match(line, match, kSample)) {
      char* end = nullptr;
      const std::string number = match[2];
      const double value = std::strtod(number.c_str(), &end);
      const bool wrong = *end != '\0' || types.count(match[1]) == 0 || metrics.values.count(match[1]) > 0;
      if (wrong && metrics.error.empty()) metrics.error = line;
      metrics.values[match[1]] = {types[match[1]], value};
    } else if (!std::regex_match(line, kHelp) && metrics.error.empty()) {
      metrics.error = line;
    }
  }
  return metrics;
}

}  // namespace prehoc::cli
