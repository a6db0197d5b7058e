#include "integrations/cli/fidelity_tasks.h"

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <string_view>
#include <utility>

#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/reference/tokenizer/chat.h"

namespace prehoc::cli {
namespace {
using reference::ChatTemplate;
using reference::Tokenizer;
using Tokens = std::vector<int32_t>;

constexpr std::array<std::string_view, 32> kAdjectives = {
    "amber", "ancient", "bitter", "yellow", "bright", "broken", "calm", "clever", "purple", "crimson", "orange", "eager",
    "fading", "gentle", "golden", "frozen", "sunny", "silent", "icy", "jolly", "lonely", "mellow", "narrow", "nimble",
    "scarlet", "quiet", "rustic", "silver", "solemn", "stormy", "tender", "velvet"};
constexpr std::array<std::string_view, 32> kNouns = {
    "anchor", "badger", "basket", "beacon", "bridge", "candle", "canyon", "castle", "cedar", "compass", "falcon", "feather",
    "forest", "garden", "hammer", "harbor", "island", "kettle", "ladder", "lantern", "meadow", "mirror", "orchard", "otter",
    "pebble", "pillow", "raven", "river", "saddle", "temple", "tunnel", "window"};
constexpr std::array<std::string_view, 24> kCities = {
    "Brussels", "Berlin", "Boston", "Cairo", "Chicago", "Denver", "Dublin", "Geneva", "Havana", "Lima", "Lisbon", "London",
    "Madrid", "Milan", "Moscow", "Oslo", "Paris", "Prague", "Warsaw", "Rome", "Seoul", "Sydney", "Tokyo", "Vienna"};

enum class Kind { kNumber, kPassword, kCity };
constexpr std::array<std::string_view, 3> kKindNames = {"number", "password", "city"};

struct Fact {
  Kind kind = Kind::kNumber;
  std::string key, value;
  bool asked = true;
  double depth = 0;

  std::string Before() const {
    switch (kind) {
      case Kind::kNumber: return "The special magic number for the " + key + " is ";
      case Kind::kPassword: return "The password of the " + key + " is ";
      case Kind::kCity: return "The owner of the " + key + " lives in ";
    }
    return "";
  }
  std::string Sentence() const { return Before() + value + "."; }
  std::string Question() const {
    switch (kind) {
      case Kind::kNumber: return "What is the special magic number for the " + key + "?";
      case Kind::kPassword: return "What is the password of the " + key + "?";
      case Kind::kCity: return "In which city does the owner of the " + key + " live?";
    }
    return "";
  }
};

// What stands between the turns, by template.
struct Turns {
  std::string before_user, after_user, after_answer;
};
Turns TurnsOf(const Tokenizer& tokenizer) {
  const ChatTemplate chat = reference::DetectChatTemplate(tokenizer.spec());
  const reference::ChatParts parts = reference::MakeChatParts(chat, "");
  switch (chat) {
    case ChatTemplate::kChatMl: return {parts.before_user, parts.after_user, "<|im_end|>\n"};
    case ChatTemplate::kLlama3: return {parts.before_user, parts.after_user, "<|eot_id|>"};
    case ChatTemplate::kLlama2:
    case ChatTemplate::kMistral: return {parts.before_user, parts.after_user, "</s>"};
    case ChatTemplate::kNone: break;
  }
  return {"Question: ", "\nAnswer: ", "\n\n"};
}

class Builder {
 public:
  Builder(const Tokenizer& tokenizer, const TaskRequest& request)
      : tokenizer_(tokenizer), request_(request), turns_(TurnsOf(tokenizer)),
        random_(request.seed * 1000003 + static_cast<uint64_t>(request.task) * 1009 + static_cast<uint64_t>(request.set)) {}

  Result<TaskContext> Build() {
    DrawFacts();
    PREHOC_RETURN_IF_ERROR(Hide());
    PREHOC_RETURN_IF_ERROR(request_.task == FidelityTask::kExtract ? AskForAll() : AskForEach());
    return std::move(context_);
  }

 private:
  int64_t Draw(int64_t below) {  // std::uniform_int_distribution differs between libraries
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(below));
  }
  template <size_t N>
  std::string_view Pick(const std::array<std::string_view, N>& words) { return words[static_cast<size_t>(Draw(static_cast<int64_t>(N)))]; }

  std::string Value(Kind kind) {
    switch (kind) {
      case Kind::kNumber: return std::to_string(1'000'000 + Draw(9'000'000));
      case Kind::kPassword: return std::string(Pick(kAdjectives)) + "-" + std::string(Pick(kNouns)) + "-" + std::to_string(10 + Draw(90));
      case Kind::kCity: return std::string(Pick(kCities));
    }
    return "";
  }

  // A name that no other fact has; with `words` > 0 of the first so many words only, so that names are near each other.
  std::string Key(int64_t words) {
    for (;;) {
      const int64_t of_adjectives = words > 0 ? words : static_cast<int64_t>(kAdjectives.size());
      const int64_t of_nouns = words > 0 ? words : static_cast<int64_t>(kNouns.size());
      const auto adjective = static_cast<size_t>((offset_ + Draw(of_adjectives)) % static_cast<int64_t>(kAdjectives.size()));
      const auto noun = static_cast<size_t>((offset_ + Draw(of_nouns)) % static_cast<int64_t>(kNouns.size()));
      std::string key = std::string(kAdjectives[adjective]) + " " + std::string(kNouns[noun]);
      if (keys_.insert(key).second) return key;
    }
  }

  void DrawFacts() {
    offset_ = Draw(static_cast<int64_t>(kAdjectives.size()));
    const auto add = [&](Kind kind, std::string key, bool asked) { facts_.push_back({kind, std::move(key), Value(kind), asked, 0}); };
    switch (request_.task) {
      case FidelityTask::kNeedle:
        for (int i = 0; i < 8; ++i) add(static_cast<Kind>(i % 3), Key(0), true);
        break;
      case FidelityTask::kMultiKey:
        for (int i = 0; i < 32; ++i) add(Kind::kNumber, Key(7), i % 4 == 1);
        break;
      case FidelityTask::kMultiValue: {
        std::array<std::string, 3> keys;
        for (std::string& key : keys) key = Key(0);
        for (int i = 0; i < 9; ++i) add(static_cast<Kind>((i + i / 3) % 3), keys[static_cast<size_t>(i % 3)], true);
        break;
      }
      case FidelityTask::kExtract:
        for (int i = 0; i < 16; ++i) add(Kind::kNumber, Key(0), true);
        break;
    }
  }

  Result<Tokens> Encode(const std::string& text, bool trusted) const {
    return tokenizer_.Encode(text, {.add_special = false, .parse_special = trusted});
  }

  bool EndsASentence(int32_t token) const {
    const std::string_view bytes = tokenizer_.TokenBytes(token);
    return bytes.ends_with('\n') || bytes.ends_with('.') || bytes.ends_with(".\n");
  }

  // Facts at even depths, each at the next end of a sentence or line, in the order of facts_.
  Status Hide() {
    std::vector<Tokens> hidden;
    int64_t hidden_tokens = 0;
    for (const Fact& fact : facts_) {
      PREHOC_ASSIGN_OR_RETURN(Tokens tokens, Encode(" " + fact.Sentence() + "\n", false));
      hidden_tokens += static_cast<int64_t>(tokens.size());
      hidden.push_back(std::move(tokens));
    }
    Tokens& prompt = context_.prompt;
    if (tokenizer_.spec().add_bos && tokenizer_.spec().bos_id >= 0) prompt.push_back(tokenizer_.spec().bos_id);
    const int64_t of_document = request_.context - hidden_tokens - static_cast<int64_t>(prompt.size());
    const std::string flag = "--tasks " + std::string(FidelityTaskName(request_.task)) + ": ";
    if (of_document < 2 * hidden_tokens) {
      return UsageError(flag + "a context of " + FormatCount(request_.context) + " tokens leaves too little text between " +
                        FormatCount(static_cast<int64_t>(facts_.size())) + " facts; give --context " + FormatCount(3 * hidden_tokens + 1) + " or more");
    }
    if (of_document > static_cast<int64_t>(request_.document.size())) {
      return UsageError(flag + "the document has " + FormatCount(static_cast<int64_t>(request_.document.size())) + " tokens and " +
                        FormatCount(of_document) + " are needed; give a smaller --context");
    }
    const auto count = static_cast<int64_t>(facts_.size());
    size_t next = 0;
    for (int64_t i = 0; i < of_document; ++i) {
      prompt.push_back(request_.document[static_cast<size_t>(i)]);
      if (next == facts_.size()) continue;
      const int64_t from = of_document * (2 * static_cast<int64_t>(next) + 1) / (2 * count);
      // Within 60 tokens a sentence ends, or the fact stands where none does.
      if (i < from || (!EndsASentence(prompt.back()) && i < from + std::min<int64_t>(60, of_document / (3 * count)))) continue;
      facts_[next].depth = static_cast<double>(prompt.size()) / static_cast<double>(request_.context);
      prompt.insert(prompt.end(), hidden[next].begin(), hidden[next].end());
      ++next;
    }
    return next == facts_.size() ? Status() : Status(StatusCode::kInvalid, flag + "a fact found no place");
  }

  Status Append(const std::string& text, bool trusted) {
    PREHOC_ASSIGN_OR_RETURN(const Tokens tokens, Encode(text, trusted));
    context_.stream.insert(context_.stream.end(), tokens.begin(), tokens.end());
    return {};
  }

  // An answer as one text; where each value lies in it is found by bytes.
  Status AppendAnswer(const std::vector<const Fact*>& facts) {
    std::string text;
    std::vector<std::pair<size_t, size_t>> spans;
    for (const Fact* fact : facts) {
      if (!text.empty()) text += " ";
      text += fact->Before();
      spans.emplace_back(text.size(), text.size() + fact->value.size());
      text += fact->value + ".";
    }
    PREHOC_ASSIGN_OR_RETURN(const Tokens tokens, Encode(text, false));
    std::vector<TaskContext::Item> items(facts.size());
    size_t at = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const size_t end = at + tokenizer_.TokenBytes(tokens[i]).size();
      for (size_t f = 0; f < facts.size(); ++f) {
        // A leading blank belongs to the value's first token where the tokenizer has it so.
        if (end <= spans[f].first || at >= spans[f].second) continue;
        const auto index = static_cast<int64_t>(context_.stream.size() + i);
        if (items[f].end == 0) items[f].begin = index;
        items[f].end = index + 1;
      }
      at = end;
    }
    for (size_t f = 0; f < facts.size(); ++f) {
      items[f].depth = facts[f]->depth;
      items[f].kind = kKindNames[static_cast<size_t>(facts[f]->kind)];
      context_.items.push_back(items[f]);
    }
    context_.stream.insert(context_.stream.end(), tokens.begin(), tokens.end());
    return {};
  }

  Status Ask(const std::string& question, const std::vector<const Fact*>& facts) {
    PREHOC_RETURN_IF_ERROR(Append(turns_.before_user, true));
    PREHOC_RETURN_IF_ERROR(Append(question, false));
    PREHOC_RETURN_IF_ERROR(Append(turns_.after_user, true));
    PREHOC_RETURN_IF_ERROR(AppendAnswer(facts));
    return Append(turns_.after_answer, true);
  }

  // In an order of its own, so that the next fact is never simply the next one in the text.
  Status AskForEach() {
    std::vector<const Fact*> asked;
    for (const Fact& fact : facts_) {
      if (fact.asked) asked.push_back(&fact);
    }
    for (size_t i = asked.size(); i > 1; --i) std::swap(asked[i - 1], asked[static_cast<size_t>(Draw(static_cast<int64_t>(i)))]);
    for (const Fact* fact : asked) PREHOC_RETURN_IF_ERROR(Ask(fact->Question(), {fact}));
    return {};
  }

  Status AskForAll() {
    std::vector<const Fact*> all;
    for (const Fact& fact : facts_) all.push_back(&fact);
    return Ask("List every special magic number of the text, in the order in which they stand there.", all);
  }

  const Tokenizer& tokenizer_;
  const TaskRequest& request_;
  const Turns turns_;
  std::mt19937_64 random_;
  int64_t offset_ = 0;
  std::set<std::string> keys_;
  std::vector<Fact> facts_;
  TaskContext context_;
};

}  // namespace

Result<TaskContext> BuildTask(const Tokenizer& tokenizer, const TaskRequest& request) { return Builder(tokenizer, request).Build(); }

}  // namespace prehoc::cli
