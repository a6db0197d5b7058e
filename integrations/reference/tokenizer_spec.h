// What a model file says about its tokenizer; filled by the loaders, turned into a Tokenizer by tokenizer.h.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace prehoc::reference {

enum class TokenizerKind {
  kByteLevelBpe,    // GPT-2 style: regex pre-split, bytes as printable code points, ranked merges
  kSentencePieceBpe,  // Llama 2 / Mistral: U+2581 for spaces, scores or merges, byte fallback
};

// How text is cut before byte-level merges. Names as GGUF's tokenizer.ggml.pre where one exists.
enum class PreTokenizer {
  kNone,
  kGpt2,     // GPT-2's pattern
  kSmolLm,   // each digit alone, then GPT-2's pattern
  kLlama3,   // groups of up to three digits, case-insensitive contractions
  kQwen2,    // as Llama 3 with single digits; text is NFC-normalised
};

enum class TokenType : uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

// Which pieces of text between special tokens get a space in front, where add_space_prefix says so.
enum class SpacePrefix : uint8_t {
  kEverySegment,             // Llama 2
  kEverySegmentUnlessSpace,  // unless it starts with one
  kFirstSegmentUnlessSpace,  // only at the start of the text: Mistral's newer files
};

// A token that is matched in the text before anything else cuts it.
struct AddedToken {
  int32_t id = -1;
  bool special = false;     // a control token: text may be told not to produce it
  bool lstrip = false;      // takes whitespace to its left along
  bool rstrip = false;      // and to its right
  bool normalized = false;  // matched after normalisation, not in the raw text
};

struct TokenizerSpec {
  TokenizerKind kind = TokenizerKind::kByteLevelBpe;
  PreTokenizer pre = PreTokenizer::kGpt2;
  std::vector<std::string> tokens;  // [vocab], UTF-8 as stored in the file (byte-level tokens in their printable form)
  std::vector<TokenType> types;     // [vocab]; control and user-defined ones are matched before anything else
  std::vector<float> scores;        // [vocab] or empty; SentencePiece ranks
  std::vector<std::pair<std::string, std::string>> merges;  // in rank order; may be empty for SentencePiece (use scores)
  int32_t bos_id = -1, eos_id = -1, unk_id = -1, pad_id = -1;  // -1 = none
  std::vector<int32_t> eog_ids;     // every id that ends a turn (eos, <|im_end|>, <|eot_id|>)
  bool add_bos = false, add_eos = false;
  bool add_space_prefix = false;    // SentencePiece: a space before the first word
  SpacePrefix space_prefix = SpacePrefix::kEverySegment;
  bool ignore_merges = false;       // a word that is a token is that token, whatever the merges say: Llama 3
  std::vector<AddedToken> added;    // empty: control, unknown and user-defined tokens, matched in the raw text
  bool nfc = false;                 // normalise to NFC first
  std::string chat_template;        // Jinja source as stored; only recognised, never interpreted
};

}  // namespace prehoc::reference
