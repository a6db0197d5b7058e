// One system and one user message as the prompt that chat models were trained on.
#pragma once
#include <string>
#include <string_view>

#include "integrations/reference/tokenizer_spec.h"

namespace prehoc::reference {

enum class ChatTemplate { kNone, kChatMl, kLlama3, kLlama2, kMistral };

// Recognised by the markers in the spec's Jinja source; kNone if there is none that we know.
ChatTemplate DetectChatTemplate(const TokenizerSpec& spec);
std::string_view ChatTemplateName(ChatTemplate chat);  // "none", "chatml", ...

// The system message that the spec's own ChatML template starts with when it is given none; empty if none.
std::string DefaultSystemPrompt(const TokenizerSpec& spec);

// What surrounds the user's text. `before_user` is the same for every question, so a document that begins
// the user's turn keeps its prefix.
struct ChatParts {
  std::string before_user, after_user;
};

// Up to where the assistant speaks, without BOS: that is Encode()'s, with add_special. An empty `system`
// means no system message. The parts are for Encode() with parse_special; the user's text, if it is not
// trusted, is for Encode() without. It is not trimmed.
ChatParts MakeChatParts(ChatTemplate chat, std::string_view system);
std::string RenderChat(ChatTemplate chat, std::string_view system, std::string_view user);

// With the spec's template, and its default system message where `system` is empty.
ChatParts MakeChatParts(const TokenizerSpec& spec, std::string_view system);
std::string RenderChat(const TokenizerSpec& spec, std::string_view system, std::string_view user);

}  // namespace prehoc::reference
