// GPT-2's printable stand-ins for bytes: visible Latin-1 stays, the other bytes move to U+0100 and on.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace prehoc::reference {

// The bytes that a byte-level token stands for, or nullopt if a character of it is in nobody's place.
// Requires valid UTF-8.
std::optional<std::string> BytesOfPrintable(std::string_view printable);

// The printable form of `bytes`, as vocabularies are written.
std::string PrintableOfBytes(std::string_view bytes);

}  // namespace prehoc::reference
