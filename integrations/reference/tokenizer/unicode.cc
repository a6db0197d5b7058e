#include "integrations/reference/tokenizer/unicode.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <tuple>
#include <vector>

namespace prehoc::reference {
namespace {

struct Range {
  char32_t first, last;
};
struct ClassRange {
  char32_t first, last;
  uint8_t combining_class;
};
struct Decomposition {
  char32_t code;
  char32_t parts[4];  // 0 ends it early
};
struct Composition {
  char32_t first, second, result;
};

#include "integrations/reference/tokenizer/unicode_tables.inc"

constexpr char32_t kCodePoints = 0x110000;
constexpr uint8_t kRustNumericBit = 0x80;

// One byte per code point: 1.1 MB, and no search per character.
class CharTable {
 public:
  CharTable() : flags_(kCodePoints, 0) {
    Set(kLetters, static_cast<uint8_t>(CharClass::kLetter));
    Set(kNumbers, static_cast<uint8_t>(CharClass::kNumber));
    Set(kSpaces, static_cast<uint8_t>(CharClass::kSpace));
    Set(kRustNumerics, kRustNumericBit);
  }
  uint8_t operator[](char32_t code) const { return code < kCodePoints ? flags_[code] : 0; }

 private:
  template <size_t N>
  void Set(const Range (&ranges)[N], uint8_t flag) {
    for (const Range& range : ranges) {
      for (char32_t c = range.first; c <= range.last; ++c) flags_[c] |= flag;
    }
  }
  std::vector<uint8_t> flags_;
};

uint8_t FlagsOf(char32_t code) {
  static const CharTable table;
  return table[code];
}

// Hangul syllables are composed by arithmetic: Unicode Standard, section 3.12.
constexpr char32_t kHangulBase = 0xAC00, kLeadBase = 0x1100, kVowelBase = 0x1161, kTrailBase = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTrails = 28, kSyllables = kLeads * kVowels * kTrails;

// Below it nothing decomposes into, composes with or reorders anything in composed text.
constexpr char32_t kFirstCombining = 0x300;

uint8_t CombiningClass(char32_t code) {
  if (code < kFirstCombining) return 0;
  const auto* it = std::upper_bound(std::begin(kCombiningClasses), std::end(kCombiningClasses), code,
                                    [](char32_t c, const ClassRange& r) { return c < r.first; });
  if (it == std::begin(kCombiningClasses)) return 0;
  --it;
  return code <= it->last ? it->combining_class : 0;
}

struct Mark {
  char32_t code;
  uint8_t combining_class;
};

void AppendDecomposed(char32_t code, std::vector<Mark>* out) {
  if (code - kHangulBase < kSyllables) {
    const char32_t index = code - kHangulBase;
    out->push_back({kLeadBase + index / (kVowels * kTrails), 0});
    out->push_back({kVowelBase + index % (kVowels * kTrails) / kTrails, 0});
    if (index % kTrails != 0) out->push_back({kTrailBase + index % kTrails, 0});
    return;
  }
  const auto* it = std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), code,
                                    [](const Decomposition& d, char32_t c) { return d.code < c; });
  if (it == std::end(kDecompositions) || it->code != code) {
    out->push_back({code, CombiningClass(code)});
    return;
  }
  for (const char32_t part : it->parts) {
    if (part != 0) out->push_back({part, CombiningClass(part)});
  }
}

void OrderMarks(std::vector<Mark>* marks) {
  const auto is_starter = [](const Mark& m) { return m.combining_class == 0; };
  for (auto begin = marks->begin(); begin != marks->end();) {
    begin = std::find_if_not(begin, marks->end(), is_starter);
    const auto end = std::find_if(begin, marks->end(), is_starter);
    std::stable_sort(begin, end, [](const Mark& a, const Mark& b) { return a.combining_class < b.combining_class; });
    begin = end;
  }
}

// 0 if the two do not compose.
char32_t Compose(char32_t first, char32_t second) {
  if (first - kLeadBase < kLeads && second - kVowelBase < kVowels) {
    return kHangulBase + ((first - kLeadBase) * kVowels + (second - kVowelBase)) * kTrails;
  }
  if (first - kHangulBase < kSyllables && (first - kHangulBase) % kTrails == 0 && second > kTrailBase &&
      second - kTrailBase < kTrails) {
    return first + (second - kTrailBase);
  }
  const auto* it = std::lower_bound(std::begin(kCompositions), std::end(kCompositions), std::pair(first, second),
                                    [](const Composition& c, const std::pair<char32_t, char32_t>& key) {
                                      return std::tie(c.first, c.second) < std::tie(key.first, key.second);
                                    });
  const bool found = it != std::end(kCompositions) && it->first == first && it->second == second;
  return found ? it->result : 0;
}

// A mark joins the last starter unless something of its own class or higher stands between.
void ComposeMarks(std::vector<Mark>* marks) {
  size_t kept = 0;
  std::optional<size_t> starter;
  for (const Mark mark : *marks) {
    const bool adjacent = starter && kept == *starter + 1;
    const bool blocked = starter && !adjacent && (*marks)[kept - 1].combining_class >= mark.combining_class;
    const char32_t composed = starter && !blocked ? Compose((*marks)[*starter].code, mark.code) : 0;
    if (composed != 0) {
      (*marks)[*starter].code = composed;
      continue;
    }
    if (mark.combining_class == 0) starter = kept;
    (*marks)[kept++] = mark;
  }
  marks->resize(kept);
}

}  // namespace

std::optional<size_t> FindInvalidUtf8(std::string_view text) {
  const auto continues = [&](size_t at, unsigned low, unsigned high) {
    return at < text.size() && static_cast<uint8_t>(text[at]) >= low && static_cast<uint8_t>(text[at]) <= high;
  };
  for (size_t pos = 0; pos < text.size();) {
    const uint8_t lead = static_cast<uint8_t>(text[pos]);
    if (lead < 0x80) {
      ++pos;
      continue;
    }
    // The second byte's range rules out overlong forms, surrogates and what lies past U+10FFFF.
    const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    const unsigned low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    bool ok = lead >= 0xC2 && lead <= 0xF4 && continues(pos + 1, low, high);
    for (size_t i = 2; i < length; ++i) ok = ok && continues(pos + i, 0x80, 0xBF);
    if (!ok) return pos;
    pos += length;
  }
  return std::nullopt;
}

Char DecodeUtf8(std::string_view text, size_t pos) {
  if (pos >= text.size()) return {};
  const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(text[pos + i])); };
  const char32_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) return {(lead & 0x1F) << 6 | (byte(1) & 0x3F), 2};
  if (lead < 0xF0) return {(lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
  return {(lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
}

void AppendUtf8(char32_t code, std::string* out) {
  const auto push = [&](char32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    push(code);
    return;
  }
  if (code < 0x800) {
    push(0xC0 | code >> 6);
  } else {
    if (code < 0x10000) {
      push(0xE0 | code >> 12);
    } else {
      push(0xF0 | code >> 18);
      push(0x80 | (code >> 12 & 0x3F));
    }
    push(0x80 | (code >> 6 & 0x3F));
  }
  push(0x80 | (code & 0x3F));
}

CharClass ClassOf(char32_t code) { return static_cast<CharClass>(FlagsOf(code) & ~kRustNumericBit); }
bool IsRustNumeric(char32_t code) { return (FlagsOf(code) & kRustNumericBit) != 0; }

std::string ToNfc(std::string_view text) {
  std::vector<Mark> marks;
  bool plain = true;
  for (size_t pos = 0; pos < text.size() && plain;) {
    const Char c = DecodeUtf8(text, pos);
    plain = c.code < kFirstCombining;
    pos += c.length;
  }
  if (plain) return std::string(text);
  marks.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const Char c = DecodeUtf8(text, pos);
    AppendDecomposed(c.code, &marks);
    pos += c.length;
  }
  OrderMarks(&marks);
  ComposeMarks(&marks);
  std::string out;
  out.reserve(text.size());
  for (const Mark& mark : marks) AppendUtf8(mark.code, &out);
  return out;
}

}  // namespace prehoc::reference
