#include "integrations/cli/prompt.h"

#include <algorithm>
#include <string>

#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/reference/tokenizer/chat.h"

namespace prehoc::cli {
namespace {
using reference::Tokenizer;
using Tokens = std::vector<int32_t>;

struct Pieces {
  Tokens before, document, after;  // after: question and the end of the user's turn
};

// A tokenizer that puts a space in front of every piece would double the one that the template has there.
std::string_view WithoutJointSpace(const Tokenizer& tokenizer, std::string_view text, bool at_end) {
  if (!tokenizer.spec().add_space_prefix) return text;
  if (at_end && text.ends_with(' ')) text.remove_suffix(1);
  if (!at_end && text.starts_with(' ')) text.remove_prefix(1);
  return text;
}

Status Append(const Tokenizer& tokenizer, std::string_view text, bool trusted, Tokens* out) {
  if (text.empty()) return {};
  PREHOC_ASSIGN_OR_RETURN(const Tokens ids, tokenizer.Encode(text, {.add_special = false, .parse_special = trusted}));
  out->insert(out->end(), ids.begin(), ids.end());
  return {};
}

Result<Pieces> Encode(const Tokenizer& tokenizer, const PromptRequest& request) {
  const reference::ChatParts chat = reference::MakeChatParts(tokenizer.spec(), "");
  Pieces pieces;
  if (tokenizer.spec().add_bos && tokenizer.spec().bos_id >= 0) pieces.before.push_back(tokenizer.spec().bos_id);
  PREHOC_RETURN_IF_ERROR(Append(tokenizer, WithoutJointSpace(tokenizer, chat.before_user, true), true, &pieces.before));
  PREHOC_RETURN_IF_ERROR(Append(tokenizer, request.document, false, &pieces.document));
  const Status question = Append(tokenizer, "\n\n" + std::string(request.question), false, &pieces.after);
  if (!question.ok()) return UsageError("--question: " + question.message());
  PREHOC_RETURN_IF_ERROR(Append(tokenizer, WithoutJointSpace(tokenizer, chat.after_user, false), true, &pieces.after));
  return pieces;
}

Status TooLong(const PromptRequest& request, int64_t context, int64_t frame, int64_t room) {
  const std::string model = " the model takes " + FormatCount(request.max_positions) + " positions, and template, question and --max-new-tokens " +
                            FormatCount(request.max_new_tokens) + " need " + FormatCount(frame);
  if (room < 1) return UsageError("--max-new-tokens:" + model + ", which leaves nothing for the document; give less");
  return UsageError("--context " + FormatCount(context) + ":" + model + "; give at most " + FormatCount(room) +
                    ", or a model for longer contexts such as --model smollm2-128k");
}

// Document tokens to take.
Result<int64_t> ChooseContext(const PromptRequest& request, int64_t available, int64_t frame) {
  const int64_t room = request.max_positions - frame;
  const bool asked = request.context > 0;
  if (asked && request.context > available) {
    return UsageError("--context " + FormatCount(request.context) + ": the document " + std::string(request.document_name) +
                      " has " + FormatCount(available) + " tokens; give at most that");
  }
  const int64_t context = asked ? request.context : std::min({request.default_context, available, std::max<int64_t>(room, 1)});
  if (context > room) return TooLong(request, context, frame, room);
  return context;
}

}  // namespace

Result<Prompt> BuildPrompt(const Tokenizer& tokenizer, const PromptRequest& request) {
  PREHOC_ASSIGN_OR_RETURN(const Pieces pieces, Encode(tokenizer, request));
  Prompt prompt;
  prompt.document_tokens = static_cast<int64_t>(pieces.document.size());
  prompt.document_begin = static_cast<int64_t>(pieces.before.size());
  const int64_t frame = static_cast<int64_t>(pieces.before.size() + pieces.after.size()) + request.max_new_tokens;
  PREHOC_ASSIGN_OR_RETURN(prompt.context, ChooseContext(request, prompt.document_tokens, frame));
  prompt.tokens = pieces.before;
  prompt.tokens.insert(prompt.tokens.end(), pieces.document.begin(), pieces.document.begin() + prompt.context);
  prompt.tokens.insert(prompt.tokens.end(), pieces.after.begin(), pieces.after.end());
  return prompt;
}

}  // namespace prehoc::cli
