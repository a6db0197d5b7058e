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
  bool nfc = false;                 // normalise to NFC first
  std::string chat_template;        // Jinja source as stored; only recognised, never interpreted
};

}  // namespace prehoc::reference
