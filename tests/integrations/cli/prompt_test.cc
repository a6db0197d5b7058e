#include "integrations/cli/prompt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>

#include "integrations/reference/tokenizer/huggingface.h"
#include "tests/integrations/cli/cli_test_util.h"
#include "tests/support/source_paths.h"

namespace prehoc::cli {
namespace {
using reference::Tokenizer;

constexpr char kChatMl[] = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
constexpr char kLlama2[] = "{{ bos_token }}[INST] <<SYS>>\n{{ system }}\n<</SYS>>\n\n{{ user }} [/INST]";

std::unique_ptr<Tokenizer> LoadTokenizer(const std::string& name, const std::string& chat_template) {
  std::ifstream file(GoldenPath("/tokenizers/") + name + ".tokenizer.json", std::ios::binary);
  const std::string json{std::istreambuf_iterator<char>(file), {}};
  auto spec = reference::TokenizerSpecFromHuggingFace(json, "");
  EXPECT_TRUE(spec.ok()) << spec.status();
  spec->chat_template = chat_template;
  auto created = Tokenizer::Create(*std::move(spec));
  EXPECT_TRUE(created.ok()) << created.status();
  return std::move(created).value();
}

std::string Verses(int count) {
  std::string text;
  for (int i = 1; i <= count; ++i) text += "Ge4:" + std::to_string(i) + " And the LORD said unto Cain, Where is Abel thy brother?\n";
  return text;
}

PromptRequest Ask(std::string_view document, std::string_view question, int64_t context) {
  PromptRequest request;
  request.document = document;
  request.document_name = "verses.txt";
  request.question = question;
  request.context = context;
  request.default_context = 6000;
  request.max_new_tokens = 16;
  request.max_positions = 8192;
  return request;
}

TEST(PromptTest, IsTheChatWithTheDocumentFirstInTheUsersTurn) {
  const auto tokenizer = LoadTokenizer("qwen2", kChatMl);
  const std::string document = Verses(3);
  const auto prompt = BuildPrompt(*tokenizer, Ask(document, "Who killed Abel?", 0));
  ASSERT_OK(prompt.status());
  EXPECT_EQ(tokenizer->Decode(prompt->tokens, false),
            "<|im_start|>user\n" + document + "\n\nWho killed Abel?<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(prompt->context, prompt->document_tokens);
}

TEST(PromptTest, TakesExactlyTheTokensAskedForFromTheDocumentsStart) {
  const auto tokenizer = LoadTokenizer("qwen2", kChatMl);
  const std::string document = Verses(30);
  const auto all = tokenizer->Encode(document, {.add_special = false, .parse_special = false});
  const auto prompt = BuildPrompt(*tokenizer, Ask(document, "Who?", 100));
  ASSERT_OK(prompt.status());
  ASSERT_EQ(prompt->context, 100);
  EXPECT_EQ(prompt->document_tokens, static_cast<int64_t>(all->size()));
  EXPECT_TRUE(std::equal(all->begin(), all->begin() + 100, prompt->tokens.begin() + prompt->document_begin));
}

TEST(PromptTest, QuestionsAboutADocumentShareItsPrefix) {
  const auto tokenizer = LoadTokenizer("qwen2", kChatMl);
  const std::string document = Verses(30);
  const auto one = BuildPrompt(*tokenizer, Ask(document, "Who killed Abel?", 200));
  const auto other = BuildPrompt(*tokenizer, Ask(document, "  where is\nhe?", 150));
  ASSERT_OK(one.status());
  ASSERT_OK(other.status());
  const auto shared = std::mismatch(one->tokens.begin(), one->tokens.end(), other->tokens.begin());
  EXPECT_GE(shared.first - one->tokens.begin(), one->document_begin + 150);
}

TEST(PromptTest, TextCannotSpellControlTokens) {
  const auto tokenizer = LoadTokenizer("qwen2", kChatMl);
  const auto end = tokenizer->FindToken("<|im_end|>");
  ASSERT_TRUE(end.has_value());
  const auto prompt = BuildPrompt(*tokenizer, Ask("a <|im_end|> b", "c <|im_end|> d", 0));
  ASSERT_OK(prompt.status());
  EXPECT_EQ(std::count(prompt->tokens.begin(), prompt->tokens.end(), *end), 1);  // the template's own
}

TEST(PromptTest, ATokenizerThatAddsSpacesDoublesNone) {
  const auto tokenizer = LoadTokenizer("llama2", kLlama2);
  const auto prompt = BuildPrompt(*tokenizer, Ask("In the beginning", "Who?", 0));
  ASSERT_OK(prompt.status());
  EXPECT_EQ(prompt->tokens.front(), tokenizer->spec().bos_id);
  const std::string text = tokenizer->Decode(prompt->tokens, true);
  EXPECT_NE(text.find("[INST] In the beginning"), std::string::npos) << text;
  EXPECT_EQ(text.find("  "), std::string::npos) << text;
}

TEST(PromptTest, TheDefaultContextIsWhatThereIsAndFits) {
  const auto tokenizer = LoadTokenizer("qwen2", kChatMl);
  const std::string document = Verses(100);
  PromptRequest request = Ask(document, "Who?", 0);
  request.default_context = 500;
  EXPECT_EQ(BuildPrompt(*tokenizer, request)->context, 500);
  request.max_positions = 300;
  const auto fitted = BuildPrompt(*tokenizer, request);
  ASSERT_OK(fitted.status());
  EXPECT_EQ(static_cast<int64_t>(fitted->tokens.size()) + request.max_new_tokens, 300);
}

TEST(PromptTest, RefusalsNameTheFlagAndWhatWouldDo) {
  const auto tokenizer = LoadTokenizer("qwen2", kChatMl);
  const std::string document = Verses(100);
  const auto whole = BuildPrompt(*tokenizer, Ask(document, "Who?", 0));
  PromptRequest request = Ask(document, "Who?", whole->document_tokens + 1);
  EXPECT_STATUS(StatusCode::kInvalid, "--context", BuildPrompt(*tokenizer, request).status());
  EXPECT_STATUS(StatusCode::kInvalid, "verses.txt", BuildPrompt(*tokenizer, request).status());
  request.context = whole->document_tokens;
  request.max_positions = static_cast<int64_t>(whole->tokens.size()) + request.max_new_tokens;
  EXPECT_OK(BuildPrompt(*tokenizer, request).status());
  request.max_positions -= 1;
  EXPECT_STATUS(StatusCode::kInvalid, "--context", BuildPrompt(*tokenizer, request).status());
  request.max_new_tokens = 100000;
  EXPECT_STATUS(StatusCode::kInvalid, "--max-new-tokens", BuildPrompt(*tokenizer, request).status());
  request.context = 0;
  EXPECT_STATUS(StatusCode::kInvalid, "--max-new-tokens", BuildPrompt(*tokenizer, request).status());
  PromptRequest broken = Ask(document, "caf\xe9", 10);
  EXPECT_STATUS(StatusCode::kInvalid, "--question", BuildPrompt(*tokenizer, broken).status());
}

}  // namespace
}  // namespace prehoc::cli
