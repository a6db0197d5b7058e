// Words for error messages: one line each, whatever bytes a file puts into its names.
#pragma once
#include <cstdint>
#include <span>
#include <sstream>
#include <string>
#include <string_view>

#include "base/status.h"

namespace prehoc::reference::loader {

template <class... Parts>
std::string Cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// 'name', with bytes outside printable ASCII shown as '?' and long names cut.
std::string Quoted(std::string_view name);

// "[3, 64]"
std::string ShapeText(std::span<const int64_t> shape);

// An error about `file`: "file: what".
template <class... Parts>
Status FileError(StatusCode code, std::string_view file, const Parts&... what) {
  return {code, Cat(file, ": ", what...)};
}

}  // namespace prehoc::reference::loader
