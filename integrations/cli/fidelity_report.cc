#include "integrations/cli/fidelity_report.h"

#include <algorithm>

#include "base/check.h"

namespace prehoc::cli {

// The bytes of fidelity_report.html; embed_file.cmake writes their definition.
extern const unsigned char kFidelityPage[];
extern const size_t kFidelityPageSize;

namespace {

constexpr std::string_view kPlace = "@FIGURES@";  // where the page wants its data

void AppendEscaped(std::string_view json, std::string* page) {
  for (size_t begin = 0; begin < json.size();) {
    const size_t end = std::min(json.find('<', begin), json.size());
    page->append(json, begin, end - begin);
    if (end < json.size()) page->append("\\u003c");  // outside of strings JSON has no `<`
    begin = end + 1;
  }
}

}  // namespace

std::string FormatFidelityReport(std::string_view json) {
  const std::string_view page(reinterpret_cast<const char*>(kFidelityPage), kFidelityPageSize);
  const size_t place = page.find(kPlace);
  PREHOC_CHECK(place != std::string_view::npos);
  std::string report;
  report.reserve(page.size() + json.size() + json.size() / 16);
  report.append(page.substr(0, place));
  AppendEscaped(json, &report);
  report.append(page.substr(place + kPlace.size()));
  return report;
}

}  // namespace prehoc::cli
