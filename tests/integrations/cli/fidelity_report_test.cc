// The page as text. What a browser makes of it scripts/check_report.sh sees, over the pages that are written here.
#include "integrations/cli/fidelity_report.h"
#include "tests/support/source_paths.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace prehoc::cli {
namespace {
using nlohmann::json;

constexpr std::string_view kOpen = R"(<script type="application/json" id="figures">)";
constexpr std::string_view kClose = "</script>";

std::string Sample() {
  std::ifstream file(SourcePath("/tests/integrations/cli/fidelity_sample.json"));
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// What a browser takes for the data: the text up to the first end of a script.
std::string Data(const std::string& page) {
  const size_t open = page.find(kOpen);
  if (open == std::string::npos) return "no data block";
  const size_t begin = open + kOpen.size();
  return page.substr(begin, page.find(kClose, begin) - begin);
}

size_t Count(const std::string& text, std::string_view what) {
  size_t count = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + what.size())) ++count;
  return count;
}

void NullNumbers(json* value) {
  if (value->is_number() || value->is_boolean()) *value = nullptr;
  if (value->is_structured()) {
    for (json& child : *value) NullNumbers(&child);
  }
}

void WritePage(const std::string& name, const std::string& data) {
  std::ofstream file(std::string(PREHOC_REPORT_DIR "/fidelity_") + name + ".html", std::ios::binary);
  file << FormatFidelityReport(data);
  ASSERT_TRUE(file.flush().good());
}

TEST(FidelityReport, CarriesTheData) {
  const std::string sample = Sample();
  ASSERT_TRUE(json::accept(sample));
  EXPECT_EQ(json::parse(Data(FormatFidelityReport(sample))), json::parse(sample));
}

TEST(FidelityReport, NoStringEndsTheDataBlock) {
  const std::string empty = FormatFidelityReport("{}");
  for (const char* hostile : {"</script><b>", "<!-- <script>", "</SCRIPT >", "a < b", "@FIGURES@", "<"}) {
    const std::string data = json{{"path", hostile}}.dump();
    const std::string page = FormatFidelityReport(data);
    EXPECT_EQ(json::parse(Data(page)), json::parse(data)) << hostile;
    EXPECT_EQ(Data(page).find('<'), std::string::npos) << hostile;
    EXPECT_EQ(Count(page, "<"), Count(empty, "<")) << hostile;
  }
}

TEST(FidelityReport, ThePageAddsItsOwnSizeOnce) {
  const size_t page = FormatFidelityReport("").size();
  EXPECT_LT(page, 128u << 10);
  EXPECT_EQ(FormatFidelityReport("{}").size(), page + 2);
  EXPECT_EQ(FormatFidelityReport("<<").size(), page + 2 * std::string_view("\\u003c").size());
  const std::string large = json(std::string(4 << 20, 'x')).dump();
  EXPECT_EQ(FormatFidelityReport(large).size(), page + large.size());
}

TEST(FidelityReport, NamesNoOtherFile) {
  std::string page = FormatFidelityReport("{}");
  const std::string_view svg = "http://www.w3.org/2000/svg";  // a name and not an address
  for (size_t at = page.find(svg); at != std::string::npos; at = page.find(svg)) page.erase(at, svg.size());
  for (const char* outside : {"http:", "https:", "src=", "@import", "url(", "fetch(", "XMLHttpRequest", "<link"}) {
    EXPECT_EQ(page.find(outside), std::string::npos) << outside;
  }
}

// For the browser: everything there, every number missing, nearly nothing there.
TEST(FidelityReport, WritesThePagesForTheBrowser) {
  WritePage("sample", Sample());
  json nulls = json::parse(Sample());
  NullNumbers(&nulls);
  WritePage("nulls", nulls.dump());
  WritePage("bare", R"({"schema": "prehoc.fidelity/1", "complete": false, "runs": []})");
}

}  // namespace
}  // namespace prehoc::cli
