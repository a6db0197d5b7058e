// Where tests find files of the checkout. source_paths.cc alone depends on where that is, so that compilers' caches serve all checkouts.
#pragma once
#include <string>
#include <string_view>

namespace prehoc {

std::string SourcePath(std::string_view under);  // "/docs/cli.md" -> <checkout>/docs/cli.md
std::string GoldenPath(std::string_view under);  // "/store/" -> <checkout>/tests/golden/store/

}  // namespace prehoc
