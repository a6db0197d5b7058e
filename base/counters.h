// Counters by visitor: each layer names its numbers, the host decides how to show them.
#pragma once
#include <cstdint>
#include <functional>
#include <string_view>

namespace prehoc {

// Receives (name, value) pairs; names are dotted paths such as "host.resident_bytes".
using CounterVisitor = std::function<void(std::string_view name, double value)>;

}  // namespace prehoc
