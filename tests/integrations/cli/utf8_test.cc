#include "integrations/cli/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace prehoc::cli {
namespace {

const std::string kReplacement = "\xef\xbf\xbd";

std::string FeedBytewise(const std::string& bytes, bool for_terminal = false) {
  Utf8Stream stream(for_terminal);
  std::string out;
  for (const char byte : bytes) out += stream.Feed(std::string_view(&byte, 1));
  return out + stream.Finish();
}

TEST(Utf8Test, FindsTheFirstBrokenByte) {
  const struct { std::string text; int64_t at; } cases[] = {
      {"", -1}, {"plain", -1}, {"\xc3\xa9\xe2\x82\xac\xf0\x9f\x99\x82", -1}, {"ab\xff", 2}, {"\x80", 0},
      {"a\xc3", 1},                 // ends inside a character
      {"\xc0\xaf", 0},              // overlong
      {"\xe0\x80\x80", 0},          // overlong
      {"x\xed\xa0\x80", 1},         // surrogate
      {"\xf4\x90\x80\x80", 0},      // above U+10FFFF
      {"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf", -1},  // the last ones before each hole
  };
  for (const auto& c : cases) {
    const std::optional<size_t> found = FirstInvalidUtf8(c.text);
    EXPECT_EQ(found ? static_cast<int64_t>(*found) : -1, c.at) << testing::PrintToString(c.text);
  }
}

TEST(Utf8StreamTest, HoldsACharacterBackUntilItIsWhole) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Feed("na\xc3"), "na");
  EXPECT_EQ(stream.Feed("\xafve \xf0\x9f"), "\xc3\xafve ");
  EXPECT_EQ(stream.Feed("\x99"), "");
  EXPECT_EQ(stream.Feed("\x82!"), "\xf0\x9f\x99\x82!");
  EXPECT_EQ(stream.Finish(), "");
}

TEST(Utf8StreamTest, ReplacesWhatCanNoLongerBecomeACharacter) {
  EXPECT_EQ(FeedBytewise("a\xff" "b"), "a" + kReplacement + "b");
  EXPECT_EQ(FeedBytewise("a\xe2\x82" "b"), "a" + kReplacement + "b");
  EXPECT_EQ(FeedBytewise("a\xe2\x82"), "a" + kReplacement);
}

TEST(Utf8StreamTest, KeepsControlCharactersFromATerminalOnly) {
  const std::string text = "a\x1b[2Jb\nc\td\x7f\xc2\x9b" "e";
  EXPECT_EQ(FeedBytewise(text, true), "a[2Jb\nc\tde");
  EXPECT_EQ(FeedBytewise(text, false), text);
}

TEST(Utf8StreamTest, GivesValidTextForAnyBytesHoweverTheyAreCut) {
  const uint32_t seed = 20260209;
  std::mt19937 random(seed);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes(random() % 24, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random() % 3 ? 0x80 + random() % 0x80 : random() % 0x80);
    Utf8Stream stream;
    std::string out;
    for (size_t at = 0; at < bytes.size();) {
      const size_t length = 1 + random() % 5;
      out += stream.Feed(std::string_view(bytes).substr(at, length));
      at += length;
    }
    out += stream.Finish();
    ASSERT_FALSE(FirstInvalidUtf8(out)) << "seed " << seed << " round " << round;
    ASSERT_EQ(out, FeedBytewise(bytes)) << "seed " << seed << " round " << round;
    if (!FirstInvalidUtf8(bytes)) {
      ASSERT_EQ(out, bytes);
    }
  }
}

}  // namespace
}  // namespace prehoc::cli
