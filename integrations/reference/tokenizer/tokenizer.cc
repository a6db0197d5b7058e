#include "integrations/reference/tokenizer/tokenizer.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "integrations/reference/tokenizer/added_tokens.h"
#include "integrations/reference/tokenizer/bpe.h"
#include "integrations/reference/tokenizer/byte_alphabet.h"
#include "integrations/reference/tokenizer/pre_tokenize.h"
#include "integrations/reference/tokenizer/unicode.h"

namespace prehoc::reference {
namespace {

constexpr size_t kMaxTokens = size_t{1} << 22;
constexpr size_t kMaxMerges = size_t{1} << 22;
constexpr size_t kMaxTokenBytes = 1024;
constexpr size_t kMaxTextBytes = size_t{1} << 30;  // positions fit 32 bits, with room for normalisation
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, SentencePiece's space

Status Invalid(std::string message) { return {StatusCode::kInvalid, "tokenizer: " + std::move(message)}; }
Status Corrupt(std::string message) { return {StatusCode::kCorrupt, "tokenizer: " + std::move(message)}; }
size_t Index(int32_t id) { return static_cast<size_t>(id); }

std::string Named(size_t id) { return "token " + std::to_string(id); }
// Cut short, and on one line whatever the token is.
std::string Quoted(std::string_view text) {
  constexpr size_t kShown = 60;
  std::string shown(text.substr(0, kShown));
  std::replace_if(shown.begin(), shown.end(), [](char c) { return static_cast<uint8_t>(c) < 0x20 || c == 0x7f; }, '?');
  return "\"" + shown + (text.size() > kShown ? "...\"" : "\"");
}

// <0x41> is the byte token of A.
std::optional<uint8_t> ByteOfToken(std::string_view token) {
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  const int high = digit(token[3]), low = digit(token[4]);
  if (high < 0 || low < 0) return std::nullopt;
  return static_cast<uint8_t>(high * 16 + low);
}

std::string MarkSpaces(std::string_view text) {
  std::string out;
  out.reserve(text.size() + text.size() / 2);
  for (const char c : text) {
    if (c == ' ') {
      out += kSpaceMark;
    } else {
      out.push_back(c);
    }
  }
  return out;
}

std::string UnmarkSpaces(std::string_view text) {
  std::string out;
  for (size_t pos = 0; pos < text.size();) {
    const bool mark = text.substr(pos).starts_with(kSpaceMark);
    out.push_back(mark ? ' ' : text[pos]);
    pos += mark ? kSpaceMark.size() : 1;
  }
  return out;
}

Status CheckLists(const TokenizerSpec& spec) {
  const size_t vocab = spec.tokens.size();
  if (vocab == 0) return Invalid("no tokens");
  if (vocab > kMaxTokens) return Invalid(std::to_string(vocab) + " tokens, more than " + std::to_string(kMaxTokens));
  if (spec.merges.size() > kMaxMerges) {
    return Invalid(std::to_string(spec.merges.size()) + " merges, more than " + std::to_string(kMaxMerges));
  }
  if (!spec.types.empty() && spec.types.size() != vocab) {
    return Invalid(std::to_string(spec.types.size()) + " token types for " + std::to_string(vocab) + " tokens");
  }
  if (!spec.scores.empty() && spec.scores.size() != vocab) {
    return Invalid(std::to_string(spec.scores.size()) + " token scores for " + std::to_string(vocab) + " tokens");
  }
  for (size_t i = 0; i < spec.types.size(); ++i) {
    if (spec.types[i] < TokenType::kNormal || spec.types[i] > TokenType::kByte) {
      return Corrupt(Named(i) + " has the unknown type " + std::to_string(static_cast<int>(spec.types[i])));
    }
  }
  for (size_t i = 0; i < spec.scores.size(); ++i) {
    if (std::isnan(spec.scores[i])) return Corrupt(Named(i) + " has a score that is not a number");
  }
  return {};
}

Status CheckIds(const TokenizerSpec& spec) {
  const auto in_vocab = [&](int32_t id) { return id >= 0 && Index(id) < spec.tokens.size(); };
  const std::pair<const char*, int32_t> named[] = {
      {"bos", spec.bos_id}, {"eos", spec.eos_id}, {"unk", spec.unk_id}, {"pad", spec.pad_id}};
  const auto outside = [&](std::string_view name, int32_t id) {
    return Invalid(std::string(name) + " id " + std::to_string(id) + " is outside the " +
                   std::to_string(spec.tokens.size()) + " tokens");
  };
  for (const auto& [name, id] : named) {
    if (id != -1 && !in_vocab(id)) return outside(name, id);
  }
  for (const int32_t id : spec.eog_ids) {
    if (!in_vocab(id)) return outside("end-of-generation", id);
  }
  for (const AddedToken& added : spec.added) {
    if (!in_vocab(added.id)) return outside("added token", added.id);
    if (spec.tokens[Index(added.id)].empty()) return Invalid("added token " + std::to_string(added.id) + " is empty");
  }
  if (spec.add_bos && spec.bos_id < 0) return Invalid("add_bos without a bos id");
  if (spec.add_eos && spec.eos_id < 0) return Invalid("add_eos without an eos id");
  return {};
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerSpec s) : spec(std::move(s)) {}

  // Construction, in this order.
  Status IndexTokens();
  Status IndexBytes();
  Status IndexMerges();
  Status IndexScores();
  void IndexAdded();
  void IndexEndOfGeneration();

  // Words recur: a text's distinct ones are merged once.
  struct WordCache {
    struct Hash {
      using is_transparent = void;
      size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
    };
    std::unordered_map<std::string, std::vector<int32_t>, Hash, std::equal_to<>> words;
  };
  struct Job {
    bool parse_special;
    std::vector<int32_t>* out;
    WordCache cache;
  };
  void EncodeSegment(std::string_view segment, bool first, Job* job) const;
  void EncodePart(std::string_view part, bool first, Job* job) const;
  void EncodeWord(std::string_view word, Job* job) const;
  void AppendCharacters(std::string_view word, std::vector<int32_t>* ids) const;
  std::vector<int32_t> MergedWord(std::string_view word) const;
  std::string Normalized(std::string_view segment) const;
  size_t WordEnd(std::string_view part, size_t begin) const;

  bool is_sentence_piece() const { return spec.kind == TokenizerKind::kSentencePieceBpe; }
  TokenType type(size_t id) const { return spec.types.empty() ? TokenType::kNormal : spec.types[id]; }
  bool IsSkipped(size_t id) const { return type(id) == TokenType::kControl || type(id) == TokenType::kUnknown; }
  // Whether text may become this token without spelling a special token's name.
  bool IsWordPart(size_t id) const { return !IsSkipped(id) && type(id) != TokenType::kByte; }

  const TokenizerSpec spec;
  std::unordered_map<std::string_view, int32_t> by_text;  // views of spec.tokens
  std::unordered_map<std::string_view, int32_t> by_bytes;  // byte-level words; views of `bytes`
  std::vector<std::string> bytes;                          // [vocab]
  std::array<int32_t, 256> byte_ids{};                     // -1 = none
  bool has_byte_ids = false;
  MergeTable merges;
  bool merges_cross_words = false;  // SentencePiece: some merge has a space mark inside
  AddedTokenMatcher raw_added, normalized_added;
  std::unordered_set<int32_t> end_of_generation;
};

Status Tokenizer::Impl::IndexTokens() {
  by_text.reserve(spec.tokens.size());
  for (size_t i = 0; i < spec.tokens.size(); ++i) {
    const std::string& token = spec.tokens[i];
    if (token.empty() && type(i) == TokenType::kUnused) continue;  // a hole in the numbering
    if (token.empty()) return Corrupt(Named(i) + " is empty");
    if (token.size() > kMaxTokenBytes) return Corrupt(Named(i) + " has " + std::to_string(token.size()) + " bytes");
    if (token.find('\0') != std::string::npos) return Corrupt(Named(i) + " contains NUL");
    if (FindInvalidUtf8(token)) return Corrupt(Named(i) + " is not UTF-8");
    const auto [it, added] = by_text.emplace(token, static_cast<int32_t>(i));
    if (!added) return Corrupt("tokens " + std::to_string(it->second) + " and " + std::to_string(i) + " are both " + Quoted(token));
  }
  return {};
}

Status Tokenizer::Impl::IndexBytes() {
  bytes.resize(spec.tokens.size());
  byte_ids.fill(-1);
  int num_bytes = 0;
  for (size_t i = 0; i < spec.tokens.size(); ++i) {
    const std::string& token = spec.tokens[i];
    bytes[i] = token;
    if (is_sentence_piece()) {
      if (type(i) == TokenType::kNormal || type(i) == TokenType::kUserDefined) bytes[i] = UnmarkSpaces(token);
      if (type(i) != TokenType::kByte) continue;
      const auto byte = ByteOfToken(token);
      if (!byte) return Corrupt(Named(i) + " is a byte token but reads " + Quoted(token) + ", not <0xHH>");
      bytes[i].assign(1, static_cast<char>(*byte));
      byte_ids[*byte] = static_cast<int32_t>(i);
      ++num_bytes;
    } else if (type(i) == TokenType::kNormal && !token.empty()) {
      auto raw = BytesOfPrintable(token);
      if (!raw) continue;  // plain text among the normal tokens: no piece can become it
      bytes[i] = *std::move(raw);
      by_bytes.emplace(bytes[i], static_cast<int32_t>(i));
      if (bytes[i].size() != 1) continue;
      byte_ids[static_cast<uint8_t>(bytes[i][0])] = static_cast<int32_t>(i);
      ++num_bytes;
    }
  }
  has_byte_ids = num_bytes != 0;
  if (is_sentence_piece() && has_byte_ids && num_bytes != 256) {
    return Invalid(std::to_string(num_bytes) + " of 256 byte tokens; give all or none");
  }
  if (!is_sentence_piece() && !has_byte_ids) return Invalid("no token stands for a single byte");
  return {};
}

Status Tokenizer::Impl::IndexMerges() {
  const auto crosses = [](std::string_view left, std::string_view right) {
    return right.starts_with(kSpaceMark) && !left.ends_with(kSpaceMark);
  };
  for (size_t rank = 0; rank < spec.merges.size(); ++rank) {
    const auto& [left, right] = spec.merges[rank];
    const std::string name = "merge " + std::to_string(rank);
    const auto left_id = by_text.find(left), right_id = by_text.find(right), result = by_text.find(left + right);
    for (const auto& [it, text] : {std::pair(left_id, left), std::pair(right_id, right), std::pair(result, left + right)}) {
      if (it == by_text.end()) return Corrupt(name + ": " + Quoted(text) + " is not a token");
    }
    if (!IsWordPart(Index(result->second))) continue;
    if (!merges.Add(left_id->second, right_id->second, static_cast<int32_t>(rank), result->second)) {
      return Corrupt(name + " repeats " + Quoted(left + " " + right));
    }
    merges_cross_words = merges_cross_words || crosses(left, right);
  }
  return {};
}

// Scores rank results, merges rank pairs: each way to cut a token in two known ones is a pair of its rank.
Status Tokenizer::Impl::IndexScores() {
  if (spec.scores.empty()) return Invalid("a SentencePiece vocabulary needs merges or scores");
  std::vector<float> order(spec.scores);
  std::sort(order.begin(), order.end(), std::greater<>());
  order.erase(std::unique(order.begin(), order.end()), order.end());
  for (size_t id = 0; id < spec.tokens.size(); ++id) {
    if (!IsWordPart(id)) continue;
    const std::string_view token = spec.tokens[id];
    const auto rank = std::lower_bound(order.begin(), order.end(), spec.scores[id], std::greater<>()) - order.begin();
    for (size_t cut = 1; cut < token.size(); ++cut) {
      if ((static_cast<uint8_t>(token[cut]) & 0xC0) == 0x80) continue;
      const auto left = by_text.find(token.substr(0, cut)), right = by_text.find(token.substr(cut));
      if (left == by_text.end() || right == by_text.end()) continue;
      if (!IsWordPart(Index(left->second)) || !IsWordPart(Index(right->second))) continue;
      static_cast<void>(merges.Add(left->second, right->second, static_cast<int32_t>(rank), static_cast<int32_t>(id)));
      merges_cross_words = merges_cross_words ||
                           (right->first.starts_with(kSpaceMark) && !left->first.ends_with(kSpaceMark));
    }
  }
  return {};
}

void Tokenizer::Impl::IndexAdded() {
  std::vector<AddedToken> added = spec.added;
  if (added.empty()) {
    for (size_t i = 0; i < spec.types.size(); ++i) {
      const bool is_added = IsSkipped(i) || type(i) == TokenType::kUserDefined;
      if (is_added && !spec.tokens[i].empty()) added.push_back({static_cast<int32_t>(i), IsSkipped(i)});
    }
  }
  for (const AddedToken& token : added) {
    const std::string& text = spec.tokens[Index(token.id)];
    AddedTokenMatcher& matcher = token.normalized ? normalized_added : raw_added;
    matcher.Add({token.normalized ? Normalized(text) : text, token.id, token.special, token.lstrip, token.rstrip});
  }
}

void Tokenizer::Impl::IndexEndOfGeneration() {
  end_of_generation.insert(spec.eog_ids.begin(), spec.eog_ids.end());
  if (spec.eog_ids.empty()) {
    for (const int32_t id : WellKnownEndOfGenerationIds(spec)) end_of_generation.insert(id);
  }
  if (spec.eos_id >= 0) end_of_generation.insert(spec.eos_id);
}

std::string Tokenizer::Impl::Normalized(std::string_view segment) const {
  std::string text = spec.nfc ? ToNfc(segment) : std::string(segment);
  const bool prefix = is_sentence_piece() && spec.add_space_prefix && spec.space_prefix == SpacePrefix::kEverySegment;
  return prefix && !text.empty() ? MarkSpaces(" " + text) : text;
}

void Tokenizer::Impl::EncodeSegment(std::string_view segment, bool first, Job* job) const {
  const std::string text = Normalized(segment);
  size_t pos = 0;
  while (const auto match = normalized_added.Next(text, pos, job->parse_special)) {
    EncodePart(std::string_view(text).substr(pos, match->begin - pos), first && pos == 0, job);
    job->out->push_back(match->id);
    pos = match->end;
  }
  EncodePart(std::string_view(text).substr(pos), first && pos == 0, job);
}

void Tokenizer::Impl::EncodePart(std::string_view part, bool first, Job* job) const {
  if (part.empty()) return;
  std::string marked;
  if (is_sentence_piece()) {
    marked = MarkSpaces(part);
    const bool prefix = spec.add_space_prefix && (spec.space_prefix == SpacePrefix::kEverySegmentUnlessSpace ||
                                                  (spec.space_prefix == SpacePrefix::kFirstSegmentUnlessSpace && first));
    if (prefix && !marked.starts_with(kSpaceMark)) marked.insert(0, kSpaceMark);
    part = marked;
  }
  for (size_t begin = 0; begin < part.size();) {
    const size_t end = WordEnd(part, begin);
    EncodeWord(part.substr(begin, end - begin), job);
    begin = end;
  }
}

// SentencePiece text is one word, but where no merge joins a word with the next space they can be merged
// one by one: space marks, then what follows up to the next.
size_t Tokenizer::Impl::WordEnd(std::string_view part, size_t begin) const {
  if (!is_sentence_piece()) return PieceEnd(spec.pre, part, begin);
  if (merges_cross_words) return part.size();
  size_t pos = begin;
  while (part.substr(pos).starts_with(kSpaceMark)) pos += kSpaceMark.size();
  return std::min(part.find(kSpaceMark, pos), part.size());
}

void Tokenizer::Impl::EncodeWord(std::string_view word, Job* job) const {
  constexpr size_t kMaxCachedWord = 64, kMaxCachedWords = size_t{1} << 16;
  const auto append = [&](const std::vector<int32_t>& ids) { job->out->insert(job->out->end(), ids.begin(), ids.end()); };
  if (word.size() > kMaxCachedWord) {
    append(MergedWord(word));
    return;
  }
  auto& words = job->cache.words;
  auto it = words.find(word);
  if (it == words.end()) {
    if (words.size() >= kMaxCachedWords) words.clear();
    it = words.emplace(word, MergedWord(word)).first;
  }
  append(it->second);
}

std::vector<int32_t> Tokenizer::Impl::MergedWord(std::string_view word) const {
  if (spec.ignore_merges) {
    const auto& whole = is_sentence_piece() ? by_text : by_bytes;
    const auto it = whole.find(word);
    if (it != whole.end() && IsWordPart(Index(it->second))) return {it->second};
  }
  std::vector<int32_t> ids;
  AppendCharacters(word, &ids);
  merges.Apply(&ids);
  return ids;
}

void Tokenizer::Impl::AppendCharacters(std::string_view word, std::vector<int32_t>* ids) const {
  const auto append_bytes = [&](std::string_view characters) {
    for (const char c : characters) {
      const int32_t id = byte_ids[static_cast<uint8_t>(c)];
      if (id >= 0) ids->push_back(id);
    }
  };
  if (!is_sentence_piece()) {
    append_bytes(word);
    return;
  }
  bool after_unknown = false;
  for (size_t pos = 0; pos < word.size();) {
    const std::string_view character = word.substr(pos, DecodeUtf8(word, pos).length);
    pos += character.size();
    const auto it = by_text.find(character);
    const bool known = it != by_text.end() && IsWordPart(Index(it->second));
    if (known) {
      ids->push_back(it->second);
    } else if (has_byte_ids) {
      append_bytes(character);
    } else if (spec.unk_id >= 0 && !after_unknown) {
      ids->push_back(spec.unk_id);  // one for a whole run
    }
    after_unknown = !known && !has_byte_ids;
  }
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::Create(TokenizerSpec spec) {
  PREHOC_RETURN_IF_ERROR(CheckLists(spec));
  PREHOC_RETURN_IF_ERROR(CheckIds(spec));
  auto impl = std::make_unique<Impl>(std::move(spec));
  PREHOC_RETURN_IF_ERROR(impl->IndexTokens());
  PREHOC_RETURN_IF_ERROR(impl->IndexBytes());
  if (impl->is_sentence_piece() && impl->spec.merges.empty()) {
    PREHOC_RETURN_IF_ERROR(impl->IndexScores());
  } else {
    PREHOC_RETURN_IF_ERROR(impl->IndexMerges());
  }
  // A run of unknown characters may go on over a space mark that is unknown itself.
  if (impl->is_sentence_piece() && !impl->by_text.contains(kSpaceMark)) impl->merges_cross_words = true;
  impl->IndexAdded();
  impl->IndexEndOfGeneration();
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text) const { return Encode(text, EncodeOptions{}); }

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, EncodeOptions options) const {
  if (text.size() > kMaxTextBytes) return Invalid("text of " + std::to_string(text.size()) + " bytes is longer than 1 GiB");
  if (const auto at = FindInvalidUtf8(text)) return Invalid("text is not UTF-8 at byte " + std::to_string(*at));
  const TokenizerSpec& spec = impl_->spec;
  std::vector<int32_t> ids;
  Impl::Job job{options.parse_special, &ids, {}};
  if (options.add_special && spec.add_bos) ids.push_back(spec.bos_id);
  size_t pos = 0;
  while (const auto match = impl_->raw_added.Next(text, pos, options.parse_special)) {
    impl_->EncodeSegment(text.substr(pos, match->begin - pos), pos == 0, &job);
    ids.push_back(match->id);
    pos = match->end;
  }
  impl_->EncodeSegment(text.substr(pos), pos == 0, &job);
  if (options.add_special && spec.add_eos) ids.push_back(spec.eos_id);
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string out;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size() || (skip_special && impl_->IsSkipped(Index(id)))) continue;
    out += impl_->bytes[Index(id)];
  }
  const bool strip = impl_->is_sentence_piece() && impl_->spec.add_space_prefix && out.starts_with(' ');
  return strip ? out.substr(1) : out;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return impl_->bytes[Index(id)];
}

bool Tokenizer::IsEndOfGeneration(int32_t id) const { return impl_->end_of_generation.contains(id); }

std::optional<int32_t> Tokenizer::FindToken(std::string_view token) const {
  const auto it = impl_->by_text.find(token);
  return it == impl_->by_text.end() ? std::nullopt : std::optional(it->second);
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->spec.tokens.size()); }
const TokenizerSpec& Tokenizer::spec() const { return impl_->spec; }

std::vector<int32_t> WellKnownEndOfGenerationIds(const TokenizerSpec& spec) {
  static const std::unordered_set<std::string_view> kNames = {
      "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "</s>", "<end_of_turn>"};
  std::vector<int32_t> ids;
  for (size_t i = 0; i < spec.types.size() && i < spec.tokens.size(); ++i) {
    if (spec.types[i] == TokenType::kControl && kNames.contains(spec.tokens[i])) ids.push_back(static_cast<int32_t>(i));
  }
  return ids;
}

}  // namespace prehoc::reference
