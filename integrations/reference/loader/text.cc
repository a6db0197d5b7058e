#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {

std::string Quoted(std::string_view name) {
  constexpr size_t kMost = 96;
  std::string out = "'";
  for (const char c : name.substr(0, kMost)) out += (c >= 0x20 && c < 0x7f) ? c : '?';
  if (name.size() > kMost) out += "...";
  return out + "'";
}

std::string ShapeText(std::span<const int64_t> shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

}  // namespace prehoc::reference::loader
