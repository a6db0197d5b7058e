// The pieces below the tokenizer: Unicode, pre-tokenizers, added tokens, the byte alphabet, chat templates.
#include <gtest/gtest.h>

#include "integrations/reference/tokenizer/added_tokens.h"
#include "integrations/reference/tokenizer/byte_alphabet.h"
#include "integrations/reference/tokenizer/chat.h"
#include "integrations/reference/tokenizer/pre_tokenize.h"
#include "integrations/reference/tokenizer/unicode.h"

namespace prehoc::reference {
namespace {

using Pieces = std::vector<std::string>;

Pieces Cut(PreTokenizer pre, std::string_view text) {
  Pieces pieces;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = PieceEnd(pre, text, begin);
    EXPECT_GT(end, begin);
    pieces.emplace_back(text.substr(begin, end - begin));
    begin = end;
  }
  return pieces;
}

TEST(PreTokenizeTest, EachKindCutsItsOwnWay) {
  const std::string text = "I'LL  pay 1234\n\nok";
  EXPECT_EQ(Cut(PreTokenizer::kGpt2, text), (Pieces{"I", "'", "LL", " ", " pay", " 1234", "\n", "\n", "ok"}));
  EXPECT_EQ(Cut(PreTokenizer::kSmolLm, text), (Pieces{"I", "'", "LL", " ", " pay", " ", "1", "2", "3", "4", "\n", "\n", "ok"}));
  EXPECT_EQ(Cut(PreTokenizer::kLlama3, text), (Pieces{"I", "'LL", " ", " pay", " ", "123", "4", "\n\n", "ok"}));
  EXPECT_EQ(Cut(PreTokenizer::kQwen2, text), (Pieces{"I", "'LL", " ", " pay", " ", "1", "2", "3", "4", "\n\n", "ok"}));
  EXPECT_EQ(Cut(PreTokenizer::kNone, text), Pieces{text});
}

TEST(UnicodeTest, EveryCodePointSurvives) {
  for (char32_t code = 0; code < 0x110000; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    std::string text;
    AppendUtf8(code, &text);
    const auto number = static_cast<uint32_t>(code);
    ASSERT_FALSE(FindInvalidUtf8(text).has_value()) << number;
    ASSERT_TRUE(DecodeUtf8(text, 0).code == code) << number;
    ASSERT_EQ(DecodeUtf8(text, 0).length, text.size()) << number;
    ASSERT_EQ(ToNfc(ToNfc(text)), ToNfc(text)) << number;
  }
}

TEST(UnicodeTest, Classes) {
  EXPECT_EQ(ClassOf('a'), CharClass::kLetter);
  EXPECT_EQ(ClassOf(0x4E00), CharClass::kLetter);
  EXPECT_EQ(ClassOf('7'), CharClass::kNumber);
  EXPECT_EQ(ClassOf(0xBD), CharClass::kNumber);  // one half
  EXPECT_EQ(ClassOf(0x3000), CharClass::kSpace);
  EXPECT_EQ(ClassOf(0x1F600), CharClass::kOther);
  EXPECT_EQ(ClassOf(0x301), CharClass::kOther);  // a mark
}

TEST(UnicodeTest, Nfc) {
  EXPECT_EQ(ToNfc("cafe\u0301"), "caf\u00e9");
  EXPECT_EQ(ToNfc("a\u0323\u0307"), "\u1ea1\u0307");         // dot below composes first
  EXPECT_EQ(ToNfc("a\u0307\u0323"), "\u1ea1\u0307");         // whatever their order
  EXPECT_EQ(ToNfc("\u1112\u1161\u11ab"), "\ud55c");          // Hangul
  EXPECT_EQ(ToNfc("\u212b"), "\u00c5");                      // Angstrom is a letter
  EXPECT_EQ(ToNfc("\u0958"), "\u0915\u093c");                // excluded from composition
}

TEST(AddedTokenTest, LeftmostThenLongest) {
  AddedTokenMatcher matcher;
  matcher.Add({.text = "<a>", .id = 1});
  matcher.Add({.text = "<a>b", .id = 2});
  matcher.Add({.text = "b<a", .id = 3});
  const auto first = matcher.Next("x<a>b<a>", 0, true);
  ASSERT_TRUE(first);
  EXPECT_EQ(first->id, 2);
  EXPECT_EQ(first->begin, 1u);
  EXPECT_EQ(first->end, 5u);
  const auto second = matcher.Next("x<a>b<a>", first->end, true);
  ASSERT_TRUE(second);
  EXPECT_EQ(second->id, 1);
  EXPECT_FALSE(matcher.Next("x<a>b<a>", second->end, true));
  EXPECT_FALSE(AddedTokenMatcher().Next("anything", 0, true));
}

TEST(AddedTokenTest, WhitespaceAndSpecials) {
  AddedTokenMatcher matcher;
  matcher.Add({.text = "<l>", .id = 1, .lstrip = true});
  matcher.Add({.text = "<r>", .id = 2, .rstrip = true});
  matcher.Add({.text = "<s>", .id = 3, .special = true});
  const auto left = matcher.Next("a \u3000<l> b", 0, true);
  ASSERT_TRUE(left);
  EXPECT_EQ(left->begin, 1u);
  EXPECT_EQ(left->end, 8u);
  EXPECT_EQ(matcher.Next("a \u3000<l> b", 2, true)->begin, 2u);  // never before where the search began
  const auto right = matcher.Next("<r> \n\tb", 0, true);
  ASSERT_TRUE(right);
  EXPECT_EQ(right->end, 6u);
  EXPECT_EQ(matcher.Next("<s><r>", 0, true)->id, 3);
  EXPECT_EQ(matcher.Next("<s><r>", 0, false)->id, 2);
}

TEST(ByteAlphabetTest, EveryByteThereAndBack) {
  std::string bytes;
  for (int b = 0; b < 256; ++b) bytes.push_back(static_cast<char>(b));
  const std::string printable = PrintableOfBytes(bytes);
  EXPECT_EQ(FindInvalidUtf8(printable), std::nullopt);
  EXPECT_EQ(printable.find(' '), std::string::npos);
  EXPECT_EQ(BytesOfPrintable(printable), bytes);
  EXPECT_EQ(PrintableOfBytes(" \n"), "\u0120\u010a");
  EXPECT_EQ(BytesOfPrintable(" "), std::nullopt);
  EXPECT_EQ(BytesOfPrintable("\u4e00"), std::nullopt);
}

TokenizerSpec WithTemplate(std::string source) {
  TokenizerSpec spec;
  spec.chat_template = std::move(source);
  return spec;
}

TEST(ChatTest, TemplatesAreRecognised) {
  EXPECT_EQ(DetectChatTemplate(WithTemplate("")), ChatTemplate::kNone);
  EXPECT_EQ(DetectChatTemplate(WithTemplate("{{ '<|im_start|>' }}")), ChatTemplate::kChatMl);
  EXPECT_EQ(DetectChatTemplate(WithTemplate("'<|start_header_id|>'")), ChatTemplate::kLlama3);
  EXPECT_EQ(DetectChatTemplate(WithTemplate("[INST] <<SYS>>")), ChatTemplate::kLlama2);
  EXPECT_EQ(DetectChatTemplate(WithTemplate("[INST]")), ChatTemplate::kMistral);
  EXPECT_EQ(ChatTemplateName(ChatTemplate::kChatMl), "chatml");
}

TEST(ChatTest, DefaultSystemPromptIsTheTemplatesOwn) {
  const auto prompt = [](std::string source) { return DefaultSystemPrompt(WithTemplate(std::move(source))); };
  EXPECT_EQ(prompt("{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}"), "You are kind.");
  EXPECT_EQ(prompt("'<|im_start|>system\nTwo\\nlines<|im_end|>'"), "Two\nlines");
  EXPECT_EQ(prompt("'<|im_start|>system\\n' + message + '<|im_end|>'"), "");
  EXPECT_EQ(prompt("'<|im_start|>system\\n' + m + '<|im_end|>' '<|im_start|>system\\nLater.<|im_end|>'"), "Later.");
  EXPECT_EQ(prompt("<|im_start|>system\\n"), "");
}

TEST(ChatTest, Rendered) {
  EXPECT_EQ(RenderChat(ChatTemplate::kChatMl, "S", "U"),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(RenderChat(ChatTemplate::kChatMl, "", "U"), "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(RenderChat(ChatTemplate::kLlama3, "S", "U"),
            "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n");
  EXPECT_EQ(RenderChat(ChatTemplate::kLlama2, "S", "U"), "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]");
  EXPECT_EQ(RenderChat(ChatTemplate::kMistral, "S", "U"), "[INST] S\n\nU [/INST]");
  EXPECT_EQ(RenderChat(ChatTemplate::kNone, "S", "U"), "S\n\nU");
  EXPECT_EQ(RenderChat(ChatTemplate::kNone, "", "U"), "U");
  // The part before the user's text does not depend on it: a document keeps its prefix.
  const ChatParts parts = MakeChatParts(ChatTemplate::kChatMl, "S");
  EXPECT_EQ(parts.before_user + "x" + parts.after_user, RenderChat(ChatTemplate::kChatMl, "S", "x"));
}

}  // namespace
}  // namespace prehoc::reference
