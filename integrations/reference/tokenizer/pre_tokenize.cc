#include "integrations/reference/tokenizer/pre_tokenize.h"

#include <algorithm>

#include "integrations/reference/tokenizer/unicode.h"

namespace prehoc::reference {
namespace {

constexpr char32_t kLongS = 0x17F;  // folds to s, so (?i:'s) matches it

bool IsNewline(char32_t code) { return code == '\r' || code == '\n'; }

// The alternatives of one regex, tried by hand in their order.
class Matcher {
 public:
  // With `stop_at_numeric` the text ends, for lookaheads too, before the next numeric character.
  Matcher(std::string_view text, bool stop_at_numeric) : text_(text), stop_at_numeric_(stop_at_numeric) {}

  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  size_t Gpt2(size_t begin) const {
    if (const size_t length = Contraction(begin, false)) return begin + length;
    const size_t word = At(begin).code == ' ' && StartsWord(begin + 1) ? begin + 1 : begin;
    if (StartsWord(word)) return RunEnd(word, ClassOf(At(word).code));
    return SpacesBeforeWord(begin);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,max_digits}| ?[^\s\p{L}\p{N}]+[\r\n]*
  // |\s*[\r\n]+|\s+(?!\S)|\s+
  size_t Llama3(size_t begin, int max_digits) const {
    if (const size_t length = Contraction(begin, true)) return begin + length;
    const Char first = At(begin);
    const size_t second = begin + first.length;
    const CharClass first_class = ClassOf(first.code);
    if (first_class == CharClass::kLetter) return RunEnd(begin, CharClass::kLetter);
    if (first_class == CharClass::kNumber) return RunEnd(begin, CharClass::kNumber, max_digits);
    if (!IsNewline(first.code) && Is(second, CharClass::kLetter)) return RunEnd(second, CharClass::kLetter);
    const size_t symbols = first.code == ' ' ? second : begin;
    if (Is(symbols, CharClass::kOther)) return NewlinesEnd(RunEnd(symbols, CharClass::kOther));
    const size_t after_newline = LastNewlineEnd(begin);
    return after_newline != begin ? after_newline : SpacesBeforeWord(begin);
  }

 private:
  Char At(size_t pos) const {
    const Char c = DecodeUtf8(text_, pos);
    return stop_at_numeric_ && IsRustNumeric(c.code) ? Char{} : c;
  }
  bool Is(size_t pos, CharClass wanted) const {
    const Char c = At(pos);
    return c.length != 0 && ClassOf(c.code) == wanted;
  }
  bool StartsWord(size_t pos) const {
    const Char c = At(pos);
    return c.length != 0 && ClassOf(c.code) != CharClass::kSpace;
  }

  size_t RunEnd(size_t pos, CharClass wanted, int max_chars = -1) const {
    for (; max_chars != 0 && Is(pos, wanted); --max_chars) pos += At(pos).length;
    return pos;
  }

  size_t NewlinesEnd(size_t pos) const {
    while (IsNewline(At(pos).code)) ++pos;
    return pos;
  }

  // \s*[\r\n]+ backs off to the last newline of the run; `begin` if there is none.
  size_t LastNewlineEnd(size_t begin) const {
    size_t end = begin;
    for (size_t pos = begin; Is(pos, CharClass::kSpace);) {
      const Char c = At(pos);
      pos += c.length;
      if (IsNewline(c.code)) end = pos;
    }
    return end;
  }

  // \s+(?!\S)|\s+: before a word the last space of several is left to it.
  size_t SpacesBeforeWord(size_t begin) const {
    size_t last = begin, end = begin;
    while (Is(end, CharClass::kSpace)) {
      last = end;
      end += At(end).length;
    }
    return At(end).length != 0 && last != begin ? last : end;
  }

  // Length of 's 't 're 've 'm 'll 'd at `pos`, else 0.
  size_t Contraction(size_t pos, bool ignore_case) const {
    if (At(pos).code != '\'') return 0;
    const Char first = At(pos + 1);
    const char32_t a = Fold(first.code, ignore_case);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1 + size_t{first.length};
    const char32_t b = Fold(At(pos + 2).code, ignore_case);
    const bool two = (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l');
    return two ? 3 : 0;
  }
  static char32_t Fold(char32_t code, bool ignore_case) {
    if (!ignore_case) return code;
    if (code == kLongS) return 's';
    return code >= 'A' && code <= 'Z' ? code + ('a' - 'A') : code;
  }

  const std::string_view text_;
  const bool stop_at_numeric_;
};

size_t SmolLm(std::string_view text, size_t begin) {
  const Char first = DecodeUtf8(text, begin);
  if (IsRustNumeric(first.code)) return begin + first.length;
  return Matcher(text, true).Gpt2(begin);
}

}  // namespace

size_t PieceEnd(PreTokenizer pre, std::string_view text, size_t begin) {
  switch (pre) {
    case PreTokenizer::kNone: return text.size();
    case PreTokenizer::kGpt2: return Matcher(text, false).Gpt2(begin);
    case PreTokenizer::kSmolLm: return SmolLm(text, begin);
    case PreTokenizer::kLlama3: return Matcher(text, false).Llama3(begin, 3);
    case PreTokenizer::kQwen2: return Matcher(text, false).Llama3(begin, 1);
  }
  return text.size();
}

}  // namespace prehoc::reference
