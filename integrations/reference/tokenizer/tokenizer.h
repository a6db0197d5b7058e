// Text to token ids and back, for byte-level BPE and SentencePiece-style BPE.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "integrations/reference/tokenizer_spec.h"

namespace prehoc::reference {

// Immutable once created: safe from any thread.
class Tokenizer {
 public:
  struct EncodeOptions {
    bool add_special = true;    // BOS and EOS, as the spec says
    bool parse_special = true;  // false: text cannot produce control tokens, whatever it spells
  };

  // Returns kInvalid if the spec contradicts itself (ids out of range, sizes, missing parts) and kCorrupt
  // if its lists are broken (a duplicate token, a merge of unknown tokens, NUL, not UTF-8).
  static Result<std::unique_ptr<Tokenizer>> Create(TokenizerSpec spec);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Returns kInvalid for text that is not UTF-8, naming the byte offset, or longer than 1 GiB.
  // What the vocabulary has neither a token nor bytes nor an unknown token for is left out.
  Result<std::vector<int32_t>> Encode(std::string_view text, EncodeOptions options) const;
  Result<std::vector<int32_t>> Encode(std::string_view text) const;  // with the defaults

  // The bytes of all ids, which need not be UTF-8; less the one leading space that Encode() would put in
  // front again. Ids outside the vocabulary have no bytes. `skip_special` leaves control tokens out.
  std::string Decode(std::span<const int32_t> ids, bool skip_special) const;

  // Raw bytes of one token, leading space included, for streaming; empty outside the vocabulary. A
  // character may be spread over several tokens. Valid as long as the tokenizer.
  std::string_view TokenBytes(int32_t id) const;

  bool IsEndOfGeneration(int32_t id) const;
  // By the text in TokenizerSpec::tokens.
  std::optional<int32_t> FindToken(std::string_view token) const;
  int32_t vocab_size() const;
  const TokenizerSpec& spec() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Control tokens that end a turn in known model families, by their text: for specs whose file names only
// one. Create() falls back on it when eog_ids is empty.
std::vector<int32_t> WellKnownEndOfGenerationIds(const TokenizerSpec& spec);

}  // namespace prehoc::reference
