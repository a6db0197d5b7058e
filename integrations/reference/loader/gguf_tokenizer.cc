#include "integrations/reference/loader/gguf_tokenizer.h"

#include <algorithm>
#include <array>

#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

struct NamedPreTokenizer {
  std::string_view name;
  PreTokenizer pre;
};
constexpr NamedPreTokenizer kPreTokenizers[] = {
    {"default", PreTokenizer::kGpt2},     {"gpt-2", PreTokenizer::kGpt2},    {"smollm", PreTokenizer::kSmolLm},
    {"llama-bpe", PreTokenizer::kLlama3}, {"llama3", PreTokenizer::kLlama3}, {"llama-v3", PreTokenizer::kLlama3},
    {"qwen2", PreTokenizer::kQwen2},      {"deepseek-r1-qwen", PreTokenizer::kQwen2},
};

// Control tokens that end a turn in the chat formats of the supported families.
constexpr std::string_view kEndOfTurn[] = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>",
                                           "<|end_of_text|>", "</s>"};

class Reader {
 public:
  explicit Reader(const GgufFile& gguf) : gguf_(gguf) {}

  Result<TokenizerSpec> Read() {
    PREHOC_ASSIGN_OR_RETURN(const auto model, gguf_.String("tokenizer.ggml.model"));
    if (!model || *model == "no_vocab") return TokenizerSpec{};
    PREHOC_RETURN_IF_ERROR(ReadKind(*model));
    PREHOC_RETURN_IF_ERROR(ReadVocabulary());
    PREHOC_RETURN_IF_ERROR(ReadMerges());
    PREHOC_RETURN_IF_ERROR(ReadSpecialTokens());
    PREHOC_ASSIGN_OR_RETURN(const auto chat, gguf_.String("tokenizer.chat_template"));
    spec_.chat_template = chat.value_or("");
    return std::move(spec_);
  }

 private:
  bool IsSentencePiece() const { return spec_.kind == TokenizerKind::kSentencePieceBpe; }

  Status ReadKind(const std::string& model) {
    if (model == "llama") {
      spec_.kind = TokenizerKind::kSentencePieceBpe;
      spec_.pre = PreTokenizer::kNone;
      return {};
    }
    if (model != "gpt2") {
      return FileError(StatusCode::kUnsupported, gguf_.path(), "tokenizer model ", Quoted(model),
                       "; supported: gpt2, llama");
    }
    spec_.kind = TokenizerKind::kByteLevelBpe;
    PREHOC_ASSIGN_OR_RETURN(const auto pre, gguf_.String("tokenizer.ggml.pre"));
    const std::string name = pre.value_or("default");
    for (const auto& known : kPreTokenizers) {
      if (known.name != name) continue;
      spec_.pre = known.pre;
      spec_.ignore_merges = known.pre == PreTokenizer::kLlama3;
      spec_.nfc = known.pre == PreTokenizer::kQwen2;
      return {};
    }
    return FileError(StatusCode::kUnsupported, gguf_.path(), "pre-tokenizer ", Quoted(name),
                     "; supported: default, gpt-2, smollm, llama-bpe, qwen2");
  }

  Status ReadVocabulary() {
    PREHOC_ASSIGN_OR_RETURN(auto tokens, gguf_.Strings("tokenizer.ggml.tokens"));
    if (!tokens || tokens->empty()) return Corrupt("metadata 'tokenizer.ggml.tokens' is missing or empty");
    spec_.tokens = *std::move(tokens);
    spec_.types.assign(spec_.tokens.size(), TokenType::kNormal);
    PREHOC_ASSIGN_OR_RETURN(const auto types, gguf_.Integers("tokenizer.ggml.token_type"));
    if (types) {
      PREHOC_RETURN_IF_ERROR(CheckLength("tokenizer.ggml.token_type", types->size()));
      for (size_t i = 0; i < types->size(); ++i) {
        const int64_t type = (*types)[i];
        if (type < 1 || type > 6) return Corrupt("token ", i, " has type ", type, ", expected 1 to 6");
        spec_.types[i] = static_cast<TokenType>(type);
      }
    }
    if (!IsSentencePiece()) return {};
    PREHOC_ASSIGN_OR_RETURN(auto scores, gguf_.Floats("tokenizer.ggml.scores"));
    if (!scores) return Corrupt("metadata 'tokenizer.ggml.scores' is missing");
    PREHOC_RETURN_IF_ERROR(CheckLength("tokenizer.ggml.scores", scores->size()));
    spec_.scores = *std::move(scores);
    return {};
  }

  Status ReadMerges() {
    if (IsSentencePiece()) return {};
    PREHOC_ASSIGN_OR_RETURN(const auto merges, gguf_.Strings("tokenizer.ggml.merges"));
    if (!merges) return Corrupt("metadata 'tokenizer.ggml.merges' is missing");
    spec_.merges.reserve(merges->size());
    for (const std::string& merge : *merges) {
      // A part may begin with no space of its own: byte-level text writes spaces as another character.
      const size_t space = merge.find(' ', 1);
      if (space == std::string::npos || space + 1 == merge.size()) {
        return Corrupt("merge ", spec_.merges.size(), " ", Quoted(merge), " is not two parts with a space between");
      }
      spec_.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
    }
    return {};
  }

  Status ReadId(std::string_view key, int32_t fallback, int32_t* id) {
    // Some writers store "no such token" as -1 or as the largest u32.
    PREHOC_ASSIGN_OR_RETURN(const auto value, gguf_.Integer(key, -1, 0xffffffffll));
    const auto size = static_cast<int64_t>(spec_.tokens.size());
    if (!value) {
      *id = fallback < size ? fallback : -1;
    } else if (*value == -1 || *value == 0xffffffffll) {
      *id = -1;
    } else if (*value >= size) {
      return Corrupt("metadata ", Quoted(key), " is ", *value, ", the vocabulary has ", size, " tokens");
    } else {
      *id = static_cast<int32_t>(*value);
    }
    return {};
  }

  Status ReadSpecialTokens() {
    // What the format's first tokenizer assumed, and files of that time leave out.
    const bool spm = IsSentencePiece();
    PREHOC_RETURN_IF_ERROR(ReadId("tokenizer.ggml.bos_token_id", spm ? 1 : -1, &spec_.bos_id));
    PREHOC_RETURN_IF_ERROR(ReadId("tokenizer.ggml.eos_token_id", spm ? 2 : -1, &spec_.eos_id));
    PREHOC_RETURN_IF_ERROR(ReadId("tokenizer.ggml.unknown_token_id", spm ? 0 : -1, &spec_.unk_id));
    PREHOC_RETURN_IF_ERROR(ReadId("tokenizer.ggml.padding_token_id", -1, &spec_.pad_id));
    PREHOC_ASSIGN_OR_RETURN(const auto add_bos, gguf_.Bool("tokenizer.ggml.add_bos_token"));
    PREHOC_ASSIGN_OR_RETURN(const auto add_eos, gguf_.Bool("tokenizer.ggml.add_eos_token"));
    PREHOC_ASSIGN_OR_RETURN(const auto add_space, gguf_.Bool("tokenizer.ggml.add_space_prefix"));
    spec_.add_bos = add_bos.value_or(spm || spec_.pre == PreTokenizer::kLlama3) && spec_.bos_id >= 0;
    spec_.add_eos = add_eos.value_or(false) && spec_.eos_id >= 0;
    spec_.add_space_prefix = add_space.value_or(spm);
    return ReadEndOfTurn();
  }

  Status ReadEndOfTurn() {
    std::vector<int32_t>& ids = spec_.eog_ids;
    for (const std::string_view key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
      int32_t id = -1;
      PREHOC_RETURN_IF_ERROR(ReadId(key, -1, &id));
      if (id >= 0) ids.push_back(id);
    }
    if (spec_.eos_id >= 0) ids.push_back(spec_.eos_id);
    for (size_t i = 0; i < spec_.tokens.size(); ++i) {
      const bool ends = spec_.types[i] == TokenType::kControl &&
                        std::ranges::find(kEndOfTurn, spec_.tokens[i]) != std::end(kEndOfTurn);
      if (ends) ids.push_back(static_cast<int32_t>(i));
    }
    std::ranges::sort(ids);
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    return {};
  }

  Status CheckLength(std::string_view key, size_t length) const {
    if (length == spec_.tokens.size()) return {};
    return Corrupt("metadata ", Quoted(key), " has ", length, " entries for ", spec_.tokens.size(), " tokens");
  }
  template <class... Parts>
  Status Corrupt(const Parts&... what) const {
    return FileError(StatusCode::kCorrupt, gguf_.path(), what...);
  }

  const GgufFile& gguf_;
  TokenizerSpec spec_;
};

}  // namespace

Result<TokenizerSpec> GgufTokenizer(const GgufFile& gguf) { return Reader(gguf).Read(); }

}  // namespace prehoc::reference::loader
