#include "integrations/reference/tokenizer/chat.h"

namespace prehoc::reference {
namespace {

constexpr std::string_view kSystemMarker = "<|im_start|>system";
constexpr std::string_view kEndMarker = "<|im_end|>";

// A newline in a Jinja string literal, as itself or escaped.
size_t NewlineLength(std::string_view text) {
  if (text.starts_with("\n")) return 1;
  return text.starts_with("\\n") ? 2 : 0;
}

std::string Unescaped(std::string_view literal) {
  std::string out;
  for (size_t i = 0; i < literal.size(); ++i) {
    const bool newline = literal.substr(i).starts_with("\\n");
    out.push_back(newline ? '\n' : literal[i]);
    i += newline ? 1 : 0;
  }
  return out;
}

}  // namespace

ChatTemplate DetectChatTemplate(const TokenizerSpec& spec) {
  const auto has = [&](std::string_view marker) { return spec.chat_template.find(marker) != std::string::npos; };
  if (has("<|im_start|>")) return ChatTemplate::kChatMl;
  if (has("<|start_header_id|>")) return ChatTemplate::kLlama3;
  if (has("[INST]")) return has("<<SYS>>") ? ChatTemplate::kLlama2 : ChatTemplate::kMistral;
  return ChatTemplate::kNone;
}

std::string_view ChatTemplateName(ChatTemplate chat) {
  switch (chat) {
    case ChatTemplate::kNone: return "none";
    case ChatTemplate::kChatMl: return "chatml";
    case ChatTemplate::kLlama3: return "llama3";
    case ChatTemplate::kLlama2: return "llama2";
    case ChatTemplate::kMistral: return "mistral";
  }
  return "none";
}

std::string DefaultSystemPrompt(const TokenizerSpec& spec) {
  const std::string_view source = spec.chat_template;
  for (size_t at = source.find(kSystemMarker); at != std::string_view::npos; at = source.find(kSystemMarker, at + 1)) {
    std::string_view rest = source.substr(at + kSystemMarker.size());
    const size_t newline = NewlineLength(rest);
    const size_t end = rest.find(kEndMarker);
    if (newline == 0 || end == std::string_view::npos) continue;
    const std::string_view literal = rest.substr(newline, end - newline);
    // Quotes and braces mean that an expression stands between the markers, not a message.
    if (!literal.empty() && literal.find_first_of("'{}\"") == std::string_view::npos) return Unescaped(literal);
  }
  return "";
}

ChatParts MakeChatParts(ChatTemplate chat, std::string_view system) {
  const std::string text(system);
  const auto if_system = [&](const std::string& part) { return text.empty() ? std::string() : part; };
  switch (chat) {
    case ChatTemplate::kNone: return {if_system(text + "\n\n"), ""};
    case ChatTemplate::kChatMl:
      return {if_system("<|im_start|>system\n" + text + "<|im_end|>\n") + "<|im_start|>user\n",
              "<|im_end|>\n<|im_start|>assistant\n"};
    case ChatTemplate::kLlama3:
      return {if_system("<|start_header_id|>system<|end_header_id|>\n\n" + text + "<|eot_id|>") +
                  "<|start_header_id|>user<|end_header_id|>\n\n",
              "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"};
    case ChatTemplate::kLlama2: return {"[INST] " + if_system("<<SYS>>\n" + text + "\n<</SYS>>\n\n"), " [/INST]"};
    case ChatTemplate::kMistral: return {"[INST] " + if_system(text + "\n\n"), " [/INST]"};
  }
  return {};
}

std::string RenderChat(ChatTemplate chat, std::string_view system, std::string_view user) {
  ChatParts parts = MakeChatParts(chat, system);
  return parts.before_user + std::string(user) + parts.after_user;
}

ChatParts MakeChatParts(const TokenizerSpec& spec, std::string_view system) {
  const ChatTemplate chat = DetectChatTemplate(spec);
  return MakeChatParts(chat, system.empty() ? DefaultSystemPrompt(spec) : std::string(system));
}

std::string RenderChat(const TokenizerSpec& spec, std::string_view system, std::string_view user) {
  ChatParts parts = MakeChatParts(spec, system);
  return parts.before_user + std::string(user) + parts.after_user;
}

}  // namespace prehoc::reference
