#include "tests/support/source_paths.h"

namespace prehoc {

std::string SourcePath(std::string_view under) { return std::string(PREHOC_SOURCE_DIR).append(under); }

std::string GoldenPath(std::string_view under) { return SourcePath("/tests/golden").append(under); }

}  // namespace prehoc
