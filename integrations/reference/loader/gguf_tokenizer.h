// tokenizer.ggml.* metadata as a TokenizerSpec.
#pragma once
#include "base/result.h"
#include "integrations/reference/loader/gguf_file.h"
#include "integrations/reference/tokenizer_spec.h"

namespace prehoc::reference::loader {

// A file without tokenizer.ggml.model yields a spec without tokens. Returns kUnsupported (model, pre-tokenizer)
// or kCorrupt (lengths that disagree, ids outside the vocabulary).
Result<TokenizerSpec> GgufTokenizer(const GgufFile& gguf);

}  // namespace prehoc::reference::loader
