// The prompt: the document begins the user's turn, so that every question about it shares its KV.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::cli {

struct PromptRequest {
  std::string_view document;       // UTF-8
  std::string_view document_name;  // for messages
  std::string_view question;
  int64_t context = 0;             // document tokens wanted; 0 = `default_context`, or as many as there are and fit
  int64_t default_context = 0;
  int64_t max_new_tokens = 0;
  int64_t max_positions = 0;       // of the model
};

struct Prompt {
  std::vector<int32_t> tokens;   // BOS, what the chat template puts first, document, question, what it puts last
  int64_t document_begin = 0;    // index of the document's first token
  int64_t context = 0;           // document tokens taken
  int64_t document_tokens = 0;   // document tokens there are
};

// Document and question cannot produce control tokens, whatever they spell.
// kInvalid: --context over the document, or prompt and answer over the model; the message says what would do.
Result<Prompt> BuildPrompt(const reference::Tokenizer& tokenizer, const PromptRequest& request);

}  // namespace prehoc::cli
