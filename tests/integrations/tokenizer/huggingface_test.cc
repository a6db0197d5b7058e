// tokenizer.json: parts that cannot be run exactly are refused by name.
#include "integrations/reference/tokenizer/huggingface.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

using Json = nlohmann::json;

class HuggingFaceTest : public testing::Test {
 protected:
  Json json_ = Json::parse(R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}, "decoder": {"type": "ByteLevel"},
    "added_tokens": [{"id": 3, "content": "</s>", "special": true}, {"id": 5, "content": "<s>", "special": true}]})");
  auto Read(std::string_view config = "") const { return TokenizerSpecFromHuggingFace(json_.dump(), config); }
};

TEST_F(HuggingFaceTest, ReadsVocabularyAndNames) {
  json_["post_processor"] = Json::parse(R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}})");
  const auto spec = Read(R"({"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "T"}]})");
  ASSERT_OK(spec);
  EXPECT_EQ(spec->tokens, (std::vector<std::string>{"a", "b", "ab", "</s>", "", "<s>"}));
  EXPECT_EQ(spec->types[4], TokenType::kUnused);  // a hole in the numbering
  EXPECT_EQ(spec->merges.size(), 1u);
  EXPECT_EQ(spec->bos_id, 5);
  EXPECT_TRUE(spec->add_bos);
  EXPECT_EQ(spec->eos_id, 3);
  EXPECT_FALSE(spec->add_eos);
  EXPECT_EQ(spec->eog_ids, std::vector<int32_t>{3});
  EXPECT_EQ(spec->chat_template, "T");
}

TEST_F(HuggingFaceTest, UnsupportedPartsAreNamed) {
  const auto refused = [&](const char* pointer, const char* value, std::string_view text) {
    const Json saved = json_;
    json_[Json::json_pointer(pointer)] = Json::parse(value);
    EXPECT_STATUS(StatusCode::kUnsupported, text, Read()) << pointer << " " << value;
    json_ = saved;
  };
  refused("/model/type", R"("WordPiece")", "model WordPiece; BPE is supported");
  refused("/model/dropout", "0.1", "dropout 0.1");
  refused("/model/end_of_word_suffix", R"("</w>")", "end_of_word_suffix");
  refused("/model/byte_fallback", "true", "byte_fallback");
  refused("/normalizer", R"({"type": "Lowercase"})", R"(normalizer {"type":"Lowercase"})");
  refused("/pre_tokenizer", R"({"type": "Whitespace"})", "supported are ByteLevel");
  refused("/pre_tokenizer/add_prefix_space", "true", "pre-tokenizer");
  refused("/pre_tokenizer", R"({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"},
    "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})", "Split");
  refused("/decoder", R"({"type": "CTC"})", "decoder");
  refused("/post_processor", R"({"type": "BertProcessing"})", "post-processor");
  refused("/added_tokens/0/single_word", "true", "single_word");
}

TEST_F(HuggingFaceTest, DamageIsNamed) {
  const auto corrupt = [&](const char* pointer, const char* value, std::string_view text) {
    const Json saved = json_;
    json_[Json::json_pointer(pointer)] = Json::parse(value);
    EXPECT_STATUS(StatusCode::kCorrupt, text, Read()) << pointer << " " << value;
    json_ = saved;
  };
  corrupt("/model", "null", "no model");
  corrupt("/model/vocab", "{}", "no vocabulary");
  corrupt("/model/vocab/a", "-1", "token a has the id -1");
  corrupt("/model/vocab/a", "1", "two tokens have the id 1");
  corrupt("/model/vocab/a", "99999999999999999999", "token a has the id");
  corrupt("/model/vocab/a", "4000000", "id 4000000 is far beyond");
  corrupt("/model/vocab", R"({"a\nb": -1})", "token a?b has the id -1");
  corrupt("/model/merges", "7", "no merges");
  corrupt("/model/merges/0", R"("a b c")", "merge 0 is");
  corrupt("/added_tokens", "7", "added_tokens is no list");
  corrupt("/added_tokens/0/content", "7", "added token");
  corrupt("/model/unk_token", R"("zz")", "unk_token zz is not a token");
  EXPECT_STATUS(StatusCode::kCorrupt, "not a JSON object", TokenizerSpecFromHuggingFace("", ""));
  EXPECT_STATUS(StatusCode::kCorrupt, "nested deeper than 64", TokenizerSpecFromHuggingFace("{\"a\":" + std::string(100000, '['), ""));
  EXPECT_STATUS(StatusCode::kCorrupt, "tokenizer_config.json", Read("{"));
}

}  // namespace
}  // namespace prehoc::reference
