// What tokenizers ask of Unicode, as the Hugging Face libraries answer it: UTF-8, character classes, NFC.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace prehoc::reference {

enum class CharClass : uint8_t { kOther, kLetter, kNumber, kSpace };  // \p{L}, \p{N}, \s of the regexes

struct Char {
  char32_t code = 0;
  uint8_t length = 0;  // [bytes]; 0 = end of text
};

// Offset of the first byte that is not well-formed UTF-8 (overlong forms and surrogates are not).
std::optional<size_t> FindInvalidUtf8(std::string_view text);

// The character at `pos`. Requires valid UTF-8; length 0 at the end.
Char DecodeUtf8(std::string_view text, size_t pos);
void AppendUtf8(char32_t code, std::string* out);

CharClass ClassOf(char32_t code);
// Rust's char::is_numeric, which knows a newer Unicode than the regex engine's \p{N}.
bool IsRustNumeric(char32_t code);

// Normalisation form C by the Unicode version that Hugging Face normalises with: characters that are
// newer keep their place. Requires valid UTF-8.
std::string ToNfc(std::string_view text);

}  // namespace prehoc::reference
