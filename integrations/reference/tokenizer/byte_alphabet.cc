#include "integrations/reference/tokenizer/byte_alphabet.h"

#include <array>

#include "integrations/reference/tokenizer/unicode.h"

namespace prehoc::reference {
namespace {

constexpr char32_t kFirstMoved = 0x100;
constexpr size_t kMoved = 68;

struct Alphabet {
  std::array<char32_t, 256> printable{};
  std::array<int16_t, kFirstMoved + kMoved> byte{};  // -1 = stands for none
};

constexpr bool IsVisible(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

constexpr Alphabet MakeAlphabet() {
  Alphabet alphabet;
  alphabet.byte.fill(-1);
  char32_t moved = kFirstMoved;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const char32_t code = IsVisible(byte) ? byte : moved++;
    alphabet.printable[byte] = code;
    alphabet.byte[code] = static_cast<int16_t>(byte);
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

std::optional<std::string> BytesOfPrintable(std::string_view printable) {
  std::string bytes;
  for (size_t pos = 0; pos < printable.size();) {
    const Char c = DecodeUtf8(printable, pos);
    if (c.code >= kAlphabet.byte.size() || kAlphabet.byte[c.code] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kAlphabet.byte[c.code]));
    pos += c.length;
  }
  return bytes;
}

std::string PrintableOfBytes(std::string_view bytes) {
  std::string printable;
  for (const char byte : bytes) AppendUtf8(kAlphabet.printable[static_cast<uint8_t>(byte)], &printable);
  return printable;
}

}  // namespace prehoc::reference
