#include "integrations/cli/utf8.h"

#include <cstdint>

namespace prehoc::cli {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

enum class Verdict { kWhole, kUnfinished, kBroken };
struct Character {
  Verdict verdict = Verdict::kBroken;
  size_t length = 1;  // bytes of it that are well-formed; of a broken one, those to replace together
  uint32_t code = 0;
};

// Bounds of the second byte keep overlong forms, surrogates and what lies above U+10FFFF out (RFC 3629, table in 4).
Character ReadCharacter(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {Verdict::kWhole, 1, first};
  if (first < 0xc2 || first > 0xf4) return {};
  const size_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  const uint8_t least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const uint8_t most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  uint32_t code = first & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Verdict::kUnfinished, i, 0};
    if (byte(i) < (i == 1 ? least : 0x80) || byte(i) > (i == 1 ? most : 0xbf)) return {Verdict::kBroken, i, 0};
    code = (code << 6) | (byte(i) & 0x3fu);
  }
  return {Verdict::kWhole, length, code};
}

bool IsControl(uint32_t code) {
  if (code == '\n' || code == '\t') return false;
  return code < 0x20 || (code >= 0x7f && code < 0xa0);
}

}  // namespace

std::optional<size_t> FirstInvalidUtf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const Character character = ReadCharacter(text.substr(at));
    if (character.verdict != Verdict::kWhole) return at;
    at += character.length;
  }
  return std::nullopt;
}

void Utf8Stream::TakeWhole(std::string* out) {
  size_t at = 0;
  while (at < pending_.size()) {
    const std::string_view rest = std::string_view(pending_).substr(at);
    const Character character = ReadCharacter(rest);
    if (character.verdict == Verdict::kUnfinished) break;
    if (character.verdict == Verdict::kBroken) {
      out->append(kReplacement);
    } else if (!for_terminal_ || !IsControl(character.code)) {
      out->append(rest.substr(0, character.length));
    }
    at += character.length;
  }
  pending_.erase(0, at);
}

std::string Utf8Stream::Feed(std::string_view bytes) {
  std::string out;
  pending_.append(bytes);
  TakeWhole(&out);
  return out;
}

std::string Utf8Stream::Finish() {
  std::string out(pending_.empty() ? std::string_view() : kReplacement);
  pending_.clear();
  return out;
}

}  // namespace prehoc::cli
