// UTF-8 as it comes and goes: whole characters only on the way out, none that is broken on the way in.
#pragma once
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace prehoc::cli {

// Offset of the first byte that does not begin or continue a character (RFC 3629: no surrogates, no overlong forms).
std::optional<size_t> FirstInvalidUtf8(std::string_view text);

// Turns bytes that arrive token by token into text that a terminal can show at once: a character is given out when
// its last byte is there; bytes that can no longer become one turn into U+FFFD.
class Utf8Stream {
 public:
  // `for_terminal`: control characters other than newline and tab are left out, so that no text can move the cursor.
  explicit Utf8Stream(bool for_terminal = false) : for_terminal_(for_terminal) {}

  std::string Feed(std::string_view bytes);  // what became whole
  std::string Finish();                      // what is left, as U+FFFD

 private:
  void TakeWhole(std::string* out);
  const bool for_terminal_;
  std::string pending_;  // at most an unfinished character, between calls
};

}  // namespace prehoc::cli
