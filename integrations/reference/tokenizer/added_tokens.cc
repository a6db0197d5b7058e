#include "integrations/reference/tokenizer/added_tokens.h"

#include <algorithm>

#include "integrations/reference/tokenizer/unicode.h"

namespace prehoc::reference {
namespace {

size_t SkipSpaces(std::string_view text, size_t pos) {
  for (;;) {
    const Char c = DecodeUtf8(text, pos);
    if (c.length == 0 || ClassOf(c.code) != CharClass::kSpace) return pos;
    pos += c.length;
  }
}

// Start of the whitespace that ends at `end`, not before `from`.
size_t SpacesBefore(std::string_view text, size_t from, size_t end) {
  size_t begin = end;
  while (begin > from) {
    size_t start = begin - 1;
    while (start > from && (static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) --start;
    if (ClassOf(DecodeUtf8(text, start).code) != CharClass::kSpace) break;
    begin = start;
  }
  return begin;
}

}  // namespace

int32_t AddedTokenMatcher::FindOrAddChild(int32_t* head, char byte) {
  for (int32_t i = *head; i != kNone; i = nodes_[static_cast<size_t>(i)].sibling) {
    if (nodes_[static_cast<size_t>(i)].byte == byte) return i;
  }
  const int32_t added = static_cast<int32_t>(nodes_.size());
  const int32_t sibling = *head;
  *head = added;  // before the push: `head` may point into nodes_
  nodes_.push_back({byte, kNone, sibling, kNone});
  return added;
}

void AddedTokenMatcher::Add(Pattern pattern) {
  int32_t* head = &root_[static_cast<uint8_t>(pattern.text.front())];
  int32_t node = kNone;
  for (const char byte : pattern.text) {
    node = FindOrAddChild(head, byte);
    head = &nodes_[static_cast<size_t>(node)].child;
  }
  int32_t& slot = nodes_[static_cast<size_t>(node)].pattern;
  if (slot != kNone) return;
  slot = static_cast<int32_t>(patterns_.size());
  patterns_.push_back(std::move(pattern));
}

const AddedTokenMatcher::Pattern* AddedTokenMatcher::LongestAt(std::string_view text) const {
  int32_t longest = kNone;
  int32_t node = root_[static_cast<uint8_t>(text.front())];
  for (size_t i = 0; node != kNone && i < text.size();) {
    const Node& here = nodes_[static_cast<size_t>(node)];
    if (here.byte != text[i]) {
      node = here.sibling;
      continue;
    }
    if (here.pattern != kNone) longest = here.pattern;
    node = here.child;
    ++i;
  }
  return longest == kNone ? nullptr : &patterns_[static_cast<size_t>(longest)];
}

std::optional<AddedTokenMatcher::Match> AddedTokenMatcher::Next(std::string_view text, size_t from,
                                                                bool parse_special) const {
  if (patterns_.empty()) return std::nullopt;
  for (size_t pos = from; pos < text.size();) {
    const Pattern* pattern = LongestAt(text.substr(pos));
    if (pattern == nullptr) {
      ++pos;
      continue;
    }
    const size_t end = pos + pattern->text.size();
    if (pattern->special && !parse_special) {
      pos = end;
      continue;
    }
    return Match{pattern->lstrip ? SpacesBefore(text, from, pos) : pos,
                 pattern->rstrip ? SkipSpaces(text, end) : end, pattern->id};
  }
  return std::nullopt;
}

}  // namespace prehoc::reference
