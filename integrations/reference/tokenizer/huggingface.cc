#include "integrations/reference/tokenizer/huggingface.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "integrations/reference/tokenizer/byte_alphabet.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::reference {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxFileBytes = size_t{128} << 20;
constexpr int kMaxNesting = 64;
constexpr size_t kMaxTokens = size_t{1} << 22;
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";

constexpr std::string_view kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Regex =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

Status Corrupt(std::string message) { return {StatusCode::kCorrupt, "tokenizer.json: " + std::move(message)}; }
Status Unsupported(std::string message) { return {StatusCode::kUnsupported, "tokenizer.json: " + std::move(message)}; }

std::string Shown(std::string text) {
  constexpr size_t kShown = 160;
  if (text.size() > kShown) text = text.substr(0, kShown) + "...";
  std::replace_if(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x20 || c == 0x7f; }, '?');
  return text;
}
std::string Shown(const Json& json) { return Shown(json.dump(-1, ' ', true, Json::error_handler_t::replace)); }

// Depth outside strings, before a parser gets to build it.
bool NestsTooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxNesting) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

Result<Json> ParseObject(std::string_view text) {
  if (text.size() > kMaxFileBytes) return Corrupt("file of " + std::to_string(text.size()) + " bytes is too large");
  if (NestsTooDeep(text)) return Corrupt("nested deeper than " + std::to_string(kMaxNesting));
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Corrupt("not a JSON object");
  return json;
}

// Null where `json` is no object, has no such member, or the member is null.
const Json* Member(const Json& json, const char* key) {
  if (!json.is_object()) return nullptr;
  const auto it = json.find(key);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}
std::string StringOr(const Json& json, const char* key, std::string fallback) {
  const Json* member = Member(json, key);
  return member != nullptr && member->is_string() ? member->get<std::string>() : fallback;
}
bool BoolOr(const Json& json, const char* key, bool fallback) {
  const Json* member = Member(json, key);
  return member != nullptr && member->is_boolean() ? member->get<bool>() : fallback;
}
std::string TypeOf(const Json& json) { return StringOr(json, "type", ""); }

Result<int32_t> TokenId(const Json& json, const std::string& what) {
  const bool ok = json.is_number_integer() && json >= 0 && json < static_cast<int64_t>(kMaxTokens);
  if (!ok) return Corrupt(what + " has the id " + Shown(json));
  return json.get<int32_t>();
}

// {"type": "Sequence", `list`: [...]} as its parts, anything else as itself, null as nothing.
std::vector<const Json*> Parts(const Json* json, const char* list) {
  if (json == nullptr) return {};
  if (TypeOf(*json) != "Sequence") return {json};
  std::vector<const Json*> parts;
  const Json* members = Member(*json, list);
  if (members == nullptr || !members->is_array()) return {json};
  for (const Json& member : *members) {
    for (const Json* part : Parts(&member, list)) parts.push_back(part);
  }
  return parts;
}

bool ReplacesSpaces(const Json& json, std::string_view from, std::string_view to) {
  const Json* pattern = Member(json, "pattern");
  return TypeOf(json) == "Replace" && pattern != nullptr && StringOr(*pattern, "String", "") == from &&
         StringOr(json, "content", "") == to;
}

class Reader {
 public:
  Reader(const Json& root, const Json& config) : root_(root), config_(config) {}

  Result<TokenizerSpec> Read() {
    PREHOC_RETURN_IF_ERROR(ReadPipeline());
    PREHOC_RETURN_IF_ERROR(ReadModel());
    PREHOC_RETURN_IF_ERROR(ReadAddedTokens());
    PREHOC_RETURN_IF_ERROR(FindByteTokens());
    PREHOC_RETURN_IF_ERROR(CheckDecoder());
    PREHOC_RETURN_IF_ERROR(ReadConfig());
    PREHOC_RETURN_IF_ERROR(ReadPostProcessor());
    spec_.eog_ids = WellKnownEndOfGenerationIds(spec_);
    if (spec_.eos_id >= 0 && std::find(spec_.eog_ids.begin(), spec_.eog_ids.end(), spec_.eos_id) == spec_.eog_ids.end()) {
      spec_.eog_ids.push_back(spec_.eos_id);
    }
    return std::move(spec_);
  }

 private:
  Status ReadPipeline() {
    const auto pre = Parts(Member(root_, "pre_tokenizer"), "pretokenizers");
    const bool byte_level = std::any_of(pre.begin(), pre.end(), [](const Json* p) { return TypeOf(*p) == "ByteLevel"; });
    spec_.kind = byte_level ? TokenizerKind::kByteLevelBpe : TokenizerKind::kSentencePieceBpe;
    if (!byte_level) return ReadSentencePiecePipeline(pre);
    PREHOC_RETURN_IF_ERROR(ReadByteLevelPreTokenizer(pre));
    for (const Json* part : Parts(Member(root_, "normalizer"), "normalizers")) {
      if (TypeOf(*part) != "NFC") {
        return Unsupported("normalizer " + Shown(*part) + "; with a byte-level pre-tokenizer NFC or none is supported");
      }
      spec_.nfc = true;
    }
    return {};
  }

  Status ReadByteLevelPreTokenizer(const std::vector<const Json*>& pre) {
    const auto refuse = [](const Json& part) {
      return Unsupported("pre-tokenizer " + Shown(part) +
                         "; supported are ByteLevel alone (GPT-2), after Digits (SmolLM2), and after Split by the "
                         "regex of GPT-2, Llama 3 or Qwen2");
    };
    const Json& last = *pre.back();
    if (TypeOf(last) != "ByteLevel" || BoolOr(last, "add_prefix_space", true)) return refuse(last);
    const bool gpt2_regex = BoolOr(last, "use_regex", true);
    if (pre.size() == 1) {
      spec_.pre = gpt2_regex ? PreTokenizer::kGpt2 : PreTokenizer::kNone;
      return {};
    }
    const Json& first = *pre.front();
    if (pre.size() != 2) return refuse(*pre[1]);
    if (TypeOf(first) == "Digits" && BoolOr(first, "individual_digits", false) && gpt2_regex) {
      spec_.pre = PreTokenizer::kSmolLm;
      return {};
    }
    const Json* pattern = Member(first, "pattern");
    const bool plain_split = TypeOf(first) == "Split" && pattern != nullptr && !gpt2_regex &&
                             StringOr(first, "behavior", "") == "Isolated" && !BoolOr(first, "invert", false);
    if (!plain_split) return refuse(first);
    const std::string regex = StringOr(*pattern, "Regex", "");
    if (regex == kGpt2Regex) {
      spec_.pre = PreTokenizer::kGpt2;
    } else if (regex == kLlama3Regex) {
      spec_.pre = PreTokenizer::kLlama3;
    } else if (regex == kQwen2Regex) {
      spec_.pre = PreTokenizer::kQwen2;
    } else {
      return refuse(first);
    }
    return {};
  }

  Status ReadSentencePiecePipeline(const std::vector<const Json*>& pre) {
    spec_.pre = PreTokenizer::kNone;
    bool marks_spaces = false;
    for (const Json* part : Parts(Member(root_, "normalizer"), "normalizers")) {
      if (TypeOf(*part) == "Prepend" && StringOr(*part, "prepend", "") == kSpaceMark && !spec_.add_space_prefix && !marks_spaces) {
        spec_.add_space_prefix = true;
        spec_.space_prefix = SpacePrefix::kEverySegment;
      } else if (ReplacesSpaces(*part, " ", kSpaceMark)) {
        marks_spaces = true;
      } else {
        return Unsupported("normalizer " + Shown(*part) + "; without a byte-level pre-tokenizer Prepend U+2581 and "
                           "Replace of spaces by U+2581 are supported");
      }
    }
    if (pre.empty() && marks_spaces) return {};
    const bool metaspace = pre.size() == 1 && TypeOf(*pre[0]) == "Metaspace" && !spec_.add_space_prefix && !marks_spaces;
    if (!metaspace) {
      return Unsupported("pre-tokenizer " + (pre.empty() ? "null" : Shown(*pre[0])) +
                         "; supported are ByteLevel kinds, Metaspace, and none where the normalizer marks spaces");
    }
    return ReadMetaspace(*pre[0]);
  }

  Status ReadMetaspace(const Json& metaspace) {
    const std::string fallback = BoolOr(metaspace, "add_prefix_space", true) ? "always" : "never";
    const std::string scheme = StringOr(metaspace, "prepend_scheme", fallback);
    const bool known = scheme == "always" || scheme == "first" || scheme == "never";
    if (!known || StringOr(metaspace, "replacement", "") != kSpaceMark || BoolOr(metaspace, "split", true)) {
      return Unsupported("pre-tokenizer " + Shown(metaspace) + "; Metaspace is supported with U+2581 and split=false");
    }
    spec_.add_space_prefix = scheme != "never";
    spec_.space_prefix = scheme == "first" ? SpacePrefix::kFirstSegmentUnlessSpace : SpacePrefix::kEverySegmentUnlessSpace;
    return {};
  }

  Status ReadModel() {
    const Json* model = Member(root_, "model");
    if (model == nullptr || !model->is_object()) return Corrupt("no model");
    const std::string type = StringOr(*model, "type", "BPE");
    if (type != "BPE") return Unsupported("model " + Shown(type) + "; BPE is supported");
    const Json* dropout = Member(*model, "dropout");
    if (dropout != nullptr && *dropout != 0) return Unsupported("dropout " + Shown(*dropout) + "; none is supported");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (!StringOr(*model, key, "").empty()) return Unsupported(std::string(key) + "; none is supported");
    }
    spec_.ignore_merges = BoolOr(*model, "ignore_merges", false);
    byte_fallback_ = BoolOr(*model, "byte_fallback", false);
    fuse_unk_ = BoolOr(*model, "fuse_unk", false);
    unk_token_ = StringOr(*model, "unk_token", "");
    PREHOC_RETURN_IF_ERROR(ReadVocab(Member(*model, "vocab")));
    return ReadMerges(Member(*model, "merges"));
  }

  Status SetToken(int32_t id, std::string token, TokenType type) {
    const size_t at = static_cast<size_t>(id);
    // Holes are filled later, if at all; a lone huge id is no reason to reserve for it.
    constexpr size_t kMaxHole = 1 << 16;
    if (at >= spec_.tokens.size() + kMaxHole) return Corrupt("id " + std::to_string(id) + " is far beyond the others");
    if (at >= spec_.tokens.size()) {
      spec_.tokens.resize(at + 1);
      spec_.types.resize(at + 1, TokenType::kUnused);
    }
    if (!spec_.tokens[at].empty() && spec_.tokens[at] != token) return Corrupt("two tokens have the id " + std::to_string(id));
    spec_.tokens[at] = std::move(token);
    spec_.types[at] = type;
    return {};
  }

  Status ReadVocab(const Json* vocab) {
    if (vocab == nullptr || !vocab->is_object() || vocab->empty()) return Corrupt("no vocabulary");
    if (vocab->size() > kMaxTokens) return Corrupt(std::to_string(vocab->size()) + " tokens are too many");
    std::vector<std::pair<int32_t, const std::string*>> by_id;
    for (const auto& [token, json] : vocab->get_ref<const Json::object_t&>()) {
      PREHOC_ASSIGN_OR_RETURN(const int32_t id, TokenId(json, "token " + Shown(token)));
      by_id.emplace_back(id, &token);
    }
    std::sort(by_id.begin(), by_id.end());
    for (const auto& [id, token] : by_id) PREHOC_RETURN_IF_ERROR(SetToken(id, *token, TokenType::kNormal));
    return {};
  }

  Status ReadMerges(const Json* merges) {
    if (merges == nullptr || !merges->is_array()) return Corrupt("no merges");
    spec_.merges.reserve(merges->size());
    for (const Json& merge : *merges) {
      const auto bad = [&] { return Corrupt("merge " + std::to_string(spec_.merges.size()) + " is " + Shown(merge)); };
      if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        spec_.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
        continue;
      }
      if (!merge.is_string()) return bad();
      const std::string& text = merge.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) return bad();
      spec_.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    }
    return {};
  }

  Status ReadAddedTokens() {
    const Json* added = Member(root_, "added_tokens");
    if (added == nullptr) return {};
    if (!added->is_array()) return Corrupt("added_tokens is no list");
    for (const Json& token : *added) {
      const std::string content = StringOr(token, "content", "");
      const Json* id_json = Member(token, "id");
      if (content.empty() || id_json == nullptr) return Corrupt("added token " + Shown(token));
      PREHOC_ASSIGN_OR_RETURN(const int32_t id, TokenId(*id_json, "added token " + Shown(content)));
      if (BoolOr(token, "single_word", false)) {
        return Unsupported("added token " + Shown(content) + " with single_word; only without is supported");
      }
      const bool special = BoolOr(token, "special", false);
      PREHOC_RETURN_IF_ERROR(SetToken(id, content, special ? TokenType::kControl : TokenType::kUserDefined));
      spec_.added.push_back({id, special, BoolOr(token, "lstrip", false), BoolOr(token, "rstrip", false),
                             BoolOr(token, "normalized", !special)});
    }
    return {};
  }

  Status FindByteTokens() {
    spec_.unk_id = unk_token_.empty() ? -1 : Find(unk_token_);
    if (!unk_token_.empty() && spec_.unk_id < 0) return Corrupt("unk_token " + Shown(unk_token_) + " is not a token");
    if (spec_.kind == TokenizerKind::kByteLevelBpe) {
      if (byte_fallback_) return Unsupported("byte_fallback with a byte-level pre-tokenizer");
      return unk_token_.empty() || HasAllBytes() ? Status() : Unsupported("unk_token with a byte-level vocabulary that lacks bytes");
    }
    std::vector<size_t> bytes;
    for (size_t id = 0; byte_fallback_ && id < spec_.tokens.size(); ++id) {
      const std::string& token = spec_.tokens[id];
      const bool shaped = token.size() == 6 && token.starts_with("<0x") && token[5] == '>' &&
                          std::string_view("0123456789ABCDEF").find(token[3]) != std::string_view::npos &&
                          std::string_view("0123456789ABCDEF").find(token[4]) != std::string_view::npos;
      if (shaped) bytes.push_back(id);
    }
    if (bytes.empty() && !unk_token_.empty() && !fuse_unk_) {
      return Unsupported("fuse_unk=false without byte tokens; true is supported");
    }
    for (const size_t id : bytes) spec_.types[id] = TokenType::kByte;
    return {};
  }

  bool HasAllBytes() const {
    const std::unordered_set<std::string_view> tokens(spec_.tokens.begin(), spec_.tokens.end());
    for (int byte = 0; byte < 256; ++byte) {
      if (!tokens.contains(PrintableOfBytes(std::string(1, static_cast<char>(byte))))) return false;
    }
    return true;
  }

  Status CheckDecoder() const {
    const auto parts = Parts(Member(root_, "decoder"), "decoders");
    const bool byte_level = spec_.kind == TokenizerKind::kByteLevelBpe;
    bool strips = parts.empty();
    for (const Json* part : parts) {
      const std::string type = TypeOf(*part);
      const bool strip = type == "Strip" && StringOr(*part, "content", "") == " " && Member(*part, "start") != nullptr &&
                         *Member(*part, "start") == 1 && (Member(*part, "stop") == nullptr || *Member(*part, "stop") == 0);
      const bool known = byte_level ? type == "ByteLevel"
                                    : strip || type == "ByteFallback" || type == "Fuse" || type == "Metaspace" ||
                                          ReplacesSpaces(*part, kSpaceMark, " ");
      if (!known) {
        return Unsupported("decoder " + Shown(*part) + (byte_level ? "; ByteLevel is supported" :
                           "; Replace U+2581, ByteFallback, Fuse, Strip and Metaspace are supported"));
      }
      strips = strips || strip || type == "Metaspace";
    }
    if (!byte_level && !parts.empty() && strips != spec_.add_space_prefix) {
      return Unsupported(strips ? "a decoder that strips a space that nothing adds" : "a decoder that keeps the added space");
    }
    return {};
  }

  // A name in tokenizer_config.json is a string or {"content": string}.
  int32_t NamedId(const char* key) const {
    const Json* name = Member(config_, key);
    if (name == nullptr) return -1;
    return Find(name->is_string() ? name->get<std::string>() : StringOr(*name, "content", ""));
  }

  Status ReadConfig() {
    spec_.bos_id = NamedId("bos_token");
    spec_.eos_id = NamedId("eos_token");
    spec_.pad_id = NamedId("pad_token");
    spec_.add_bos = BoolOr(config_, "add_bos_token", false) && spec_.bos_id >= 0;
    spec_.add_eos = BoolOr(config_, "add_eos_token", false) && spec_.eos_id >= 0;
    const Json* chat = Member(config_, "chat_template");
    if (chat != nullptr && chat->is_string()) spec_.chat_template = chat->get<std::string>();
    if (chat != nullptr && chat->is_array()) {
      for (const Json& named : *chat) {
        if (StringOr(named, "name", "") == "default") spec_.chat_template = StringOr(named, "template", "");
      }
    }
    return {};
  }

  Status ReadPostProcessor() {
    for (const Json* part : Parts(Member(root_, "post_processor"), "processors")) {
      const std::string type = TypeOf(*part);
      if (type == "ByteLevel") continue;  // moves offsets only
      if (type != "TemplateProcessing") {
        return Unsupported("post-processor " + Shown(*part) + "; ByteLevel and TemplateProcessing are supported");
      }
      PREHOC_RETURN_IF_ERROR(ReadTemplate(*part));
    }
    return {};
  }

  // [BOS] A [EOS]. The file's template outranks the config's flags.
  Status ReadTemplate(const Json& processor) {
    const Json* single = Member(processor, "single");
    if (single == nullptr || !single->is_array()) return Corrupt("a post-processor template without \"single\"");
    const auto refuse = [&] {
      return Unsupported("post-processor template " + Shown(*single) + "; at most one token before and after A is supported");
    };
    spec_.add_bos = spec_.add_eos = false;
    bool after_text = false;
    for (const Json& item : *single) {
      const Json* special = Member(item, "SpecialToken");
      if (special == nullptr) {
        const Json* sequence = Member(item, "Sequence");
        if (sequence == nullptr || StringOr(*sequence, "id", "") != "A" || after_text) return refuse();
        after_text = true;
        continue;
      }
      bool& adds = after_text ? spec_.add_eos : spec_.add_bos;
      if (adds) return refuse();
      adds = true;
      PREHOC_ASSIGN_OR_RETURN((after_text ? spec_.eos_id : spec_.bos_id), TemplateId(processor, StringOr(*special, "id", "")));
    }
    return after_text ? Status() : refuse();
  }

  static Result<int32_t> TemplateId(const Json& processor, const std::string& name) {
    const Json* specials = Member(processor, "special_tokens");
    const Json* special = specials == nullptr ? nullptr : Member(*specials, name.c_str());
    const Json* ids = special == nullptr ? nullptr : Member(*special, "ids");
    if (ids == nullptr || !ids->is_array() || ids->size() != 1) return Corrupt("template token " + Shown(name) + " has no single id");
    return TokenId(ids->front(), "template token " + Shown(name));
  }

  int32_t Find(std::string_view token) const {
    const auto it = std::find(spec_.tokens.begin(), spec_.tokens.end(), token);
    return it == spec_.tokens.end() || token.empty() ? -1 : static_cast<int32_t>(it - spec_.tokens.begin());
  }

  const Json& root_;
  const Json& config_;
  TokenizerSpec spec_;
  std::string unk_token_;
  bool byte_fallback_ = false, fuse_unk_ = false;
};

}  // namespace

Result<TokenizerSpec> TokenizerSpecFromHuggingFace(std::string_view tokenizer_json,
                                                   std::string_view tokenizer_config_json) {
  PREHOC_ASSIGN_OR_RETURN(const Json root, ParseObject(tokenizer_json));
  Json config = Json::object();
  if (!tokenizer_config_json.empty()) {
    auto parsed = ParseObject(tokenizer_config_json);
    if (!parsed.ok()) return parsed.status().WithContext("tokenizer_config.json");
    config = std::move(parsed).value();
  }
  return Reader(root, config).Read();
}

}  // namespace prehoc::reference
