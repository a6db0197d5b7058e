// The tokenizer on hand-made vocabularies, and the specs that it refuses.
#include "integrations/reference/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "integrations/reference/tokenizer/byte_alphabet.h"
#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

using Ids = std::vector<int32_t>;

// All bytes in order (id = byte), then `more` with the merges that make them.
TokenizerSpec ByteLevel(const std::vector<std::pair<std::string, std::string>>& merges) {
  TokenizerSpec spec;
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    spec.tokens.push_back(PrintableOfBytes({&c, 1}));
  }
  for (const auto& [left, right] : merges) {
    spec.merges.emplace_back(PrintableOfBytes(left), PrintableOfBytes(right));
    spec.tokens.push_back(spec.merges.back().first + spec.merges.back().second);
  }
  spec.types.assign(spec.tokens.size(), TokenType::kNormal);
  return spec;
}

int32_t AddSpecial(TokenizerSpec* spec, const std::string& text) {
  spec->tokens.push_back(text);
  spec->types.push_back(TokenType::kControl);
  return static_cast<int32_t>(spec->tokens.size() - 1);
}

std::unique_ptr<Tokenizer> Make(TokenizerSpec spec) {
  auto created = Tokenizer::Create(std::move(spec));
  EXPECT_OK(created);
  return created.ok() ? std::move(created).value() : nullptr;
}

TEST(TokenizerTest, MergesByRankNotByPlace) {
  // "b c" ranks before "a b": the earlier place does not win.
  const auto t = Make(ByteLevel({{"b", "c"}, {"a", "b"}}));
  EXPECT_EQ(*t->Encode("abc"), (Ids{'a', 256}));
  EXPECT_EQ(*t->Encode("ab"), Ids{257});
  EXPECT_EQ(t->Decode(Ids{'a', 256}, false), "abc");
}

TEST(TokenizerTest, MergesStayWithinWords) {
  const auto t = Make(ByteLevel({{"a", " "}, {" ", "b"}}));
  EXPECT_EQ(*t->Encode("a b"), (Ids{'a', 257}));  // GPT-2's pattern cuts before the space
}

TEST(TokenizerTest, SpecialTokensAreParsedOnlyWhenAsked) {
  TokenizerSpec spec = ByteLevel({});
  const int32_t end = AddSpecial(&spec, "<end>"), start = AddSpecial(&spec, "<s>");
  spec.bos_id = start;
  spec.eos_id = end;
  spec.add_bos = true;
  const auto t = Make(std::move(spec));
  EXPECT_EQ(*t->Encode("a<end>"), (Ids{start, 'a', end}));
  EXPECT_EQ(*t->Encode("<s>", {.add_special = false, .parse_special = false}), (Ids{'<', 's', '>'}));
  EXPECT_EQ(t->Decode(Ids{start, 'a', end}, true), "a");
  EXPECT_EQ(t->Decode(Ids{start, 'a', end}, false), "<s>a<end>");
  EXPECT_TRUE(t->IsEndOfGeneration(end));
  EXPECT_FALSE(t->IsEndOfGeneration('a'));
  EXPECT_EQ(t->FindToken("<end>"), end);
  EXPECT_EQ(t->FindToken("<none>"), std::nullopt);
}

TEST(TokenizerTest, TextThatIsNotUtf8IsRefusedWithItsPlace) {
  const auto t = Make(ByteLevel({}));
  EXPECT_STATUS(StatusCode::kInvalid, "not UTF-8 at byte 2", t->Encode("ab\xff"));
  EXPECT_STATUS(StatusCode::kInvalid, "not UTF-8 at byte 0", t->Encode("\xc0\x80"));          // overlong
  EXPECT_STATUS(StatusCode::kInvalid, "not UTF-8 at byte 1", t->Encode("a\xed\xa0\x80"));     // a surrogate
  EXPECT_STATUS(StatusCode::kInvalid, "not UTF-8 at byte 0", t->Encode("\xf4\x90\x80\x80"));  // past U+10FFFF
  EXPECT_STATUS(StatusCode::kInvalid, "not UTF-8 at byte 1", t->Encode("a\xe2\x82"));         // cut short
}

TEST(TokenizerTest, IdsOutsideTheVocabularyHaveNoBytes) {
  const auto t = Make(ByteLevel({}));
  EXPECT_EQ(t->Decode(Ids{-1, 'x', 256, INT32_MAX, INT32_MIN}, false), "x");
  EXPECT_EQ(t->TokenBytes(-1), "");
  EXPECT_EQ(t->TokenBytes(256), "");
}

// <unk>, <s>, 256 byte tokens, then words by score.
TokenizerSpec SentencePiece(bool with_bytes) {
  TokenizerSpec spec;
  spec.kind = TokenizerKind::kSentencePieceBpe;
  spec.pre = PreTokenizer::kNone;
  const auto add = [&](std::string token, TokenType type, float score) {
    spec.tokens.push_back(std::move(token));
    spec.types.push_back(type);
    spec.scores.push_back(score);
  };
  add("<unk>", TokenType::kUnknown, 0);
  for (int byte = 0; with_bytes && byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", static_cast<unsigned>(byte));
    add(text, TokenType::kByte, 0);
  }
  add("\u2581", TokenType::kNormal, -3);
  add("a", TokenType::kNormal, -4);
  add("\u2581a", TokenType::kNormal, -1);
  add("aa", TokenType::kNormal, -2);
  spec.unk_id = 0;
  spec.add_space_prefix = true;
  return spec;
}

TEST(TokenizerTest, ScoresRankSentencePieceMerges) {
  const auto t = Make(SentencePiece(true));
  // A space goes in front; its merge with "a" outranks "aa".
  EXPECT_EQ(*t->Encode("aa"), (Ids{259, 258}));
  EXPECT_EQ(t->Decode(Ids{259, 258}, false), "aa");
  // What has no token falls back to bytes: <0xC3> <0xA9>.
  EXPECT_EQ(*t->Encode("\u00e9"), (Ids{257, 1 + 0xC3, 1 + 0xA9}));
  EXPECT_EQ(t->Decode(Ids{257, 1 + 0xC3, 1 + 0xA9}, false), "\u00e9");
  EXPECT_EQ(*t->Encode(""), Ids{});
}

TEST(TokenizerTest, RunsOfUnknownCharactersAreOneTokenWithoutBytes) {
  const auto t = Make(SentencePiece(false));
  EXPECT_EQ(*t->Encode("\u00e9\u00e8a"), (Ids{1, 0, 2}));
}

TEST(TokenizerTest, SpecsThatContradictThemselves) {
  const auto refused = [](StatusCode code, std::string_view text, const auto& spoil) {
    TokenizerSpec spec = ByteLevel({{"a", "b"}});
    spoil(spec);
    EXPECT_STATUS(code, text, Tokenizer::Create(std::move(spec)));
  };
  refused(StatusCode::kInvalid, "no tokens", [](TokenizerSpec& s) { s.tokens.clear(); s.types.clear(); });
  refused(StatusCode::kInvalid, "types for 257 tokens", [](TokenizerSpec& s) { s.types.pop_back(); });
  refused(StatusCode::kInvalid, "scores for 257 tokens", [](TokenizerSpec& s) { s.scores = {1}; });
  refused(StatusCode::kInvalid, "eos id 257 is outside", [](TokenizerSpec& s) { s.eos_id = 257; });
  refused(StatusCode::kInvalid, "end-of-generation id -5 is outside", [](TokenizerSpec& s) { s.eog_ids = {-5}; });
  refused(StatusCode::kInvalid, "added token id", [](TokenizerSpec& s) { s.added = {{.id = 999}}; });
  refused(StatusCode::kInvalid, "add_bos without", [](TokenizerSpec& s) { s.add_bos = true; });
  refused(StatusCode::kCorrupt, "token 3 has the unknown type 9", [](TokenizerSpec& s) { s.types[3] = static_cast<TokenType>(9); });
  refused(StatusCode::kCorrupt, "tokens 97 and 98 are both \"a\"", [](TokenizerSpec& s) { s.tokens[98] = "a"; });
  refused(StatusCode::kCorrupt, "token 4 is empty", [](TokenizerSpec& s) { s.tokens[4].clear(); });
  refused(StatusCode::kCorrupt, "token 4 is not UTF-8", [](TokenizerSpec& s) { s.tokens[4] = "\xff"; });
  refused(StatusCode::kCorrupt, "token 4 contains NUL", [](TokenizerSpec& s) { s.tokens[4] = std::string(2, '\0'); });
  refused(StatusCode::kCorrupt, "token 4 has 1025 bytes", [](TokenizerSpec& s) { s.tokens[4] = std::string(1025, 'x'); });
  refused(StatusCode::kCorrupt, "merge 1: \"zz\" is not a token", [](TokenizerSpec& s) { s.merges.emplace_back("z", "z"); });
  refused(StatusCode::kCorrupt, "merge 1 repeats \"a b\"", [](TokenizerSpec& s) { s.merges.push_back(s.merges[0]); });
  refused(StatusCode::kCorrupt, "merge 1: \"z??\" is not a token", [](TokenizerSpec& s) { s.merges.emplace_back("z\n\x1b", "b"); });
  refused(StatusCode::kInvalid, "no token stands for a single byte",
          [](TokenizerSpec& s) { s.types.assign(s.types.size(), TokenType::kControl); });
  TokenizerSpec spm = SentencePiece(true);
  spm.types[5] = TokenType::kNormal;
  EXPECT_STATUS(StatusCode::kInvalid, "255 of 256 byte tokens", Tokenizer::Create(spm));
  spm = SentencePiece(false);
  spm.scores[1] = NAN;
  EXPECT_STATUS(StatusCode::kCorrupt, "token 1 has a score that is not a number", Tokenizer::Create(spm));
  spm.scores.clear();
  EXPECT_STATUS(StatusCode::kInvalid, "needs merges or scores", Tokenizer::Create(spm));
}

TEST(TokenizerTest, EndOfTurnIsKnownByName) {
  TokenizerSpec spec = ByteLevel({});
  const int32_t im_end = AddSpecial(&spec, "<|im_end|>"), eot = AddSpecial(&spec, "<|eot_id|>");
  AddSpecial(&spec, "<|im_start|>");
  EXPECT_EQ(WellKnownEndOfGenerationIds(spec), (Ids{im_end, eot}));
  EXPECT_TRUE(Make(spec)->IsEndOfGeneration(eot));
  spec.eog_ids = {im_end};  // the file's word is final
  EXPECT_FALSE(Make(spec)->IsEndOfGeneration(eot));
}

}  // namespace
}  // namespace prehoc::reference
