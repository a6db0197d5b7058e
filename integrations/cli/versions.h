// The libraries that this program runs with, as they call themselves.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace prehoc::cli {

std::vector<std::pair<std::string, std::string>> LibraryVersions();  // name, version

}  // namespace prehoc::cli
