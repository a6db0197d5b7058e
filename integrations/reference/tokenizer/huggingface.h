// Reads Hugging Face's tokenizer.json and tokenizer_config.json.
#pragma once
#include <string_view>

#include "base/result.h"
#include "integrations/reference/tokenizer_spec.h"

namespace prehoc::reference {

// `tokenizer_config_json` may be empty: then there is no chat template, and of the named ids only those
// that the post-processor puts around text are known. Bytes may be hostile.
// Returns kCorrupt for what is not such a file, kUnsupported for a part of a pipeline that we cannot run
// exactly, naming it and what is supported. A spec that is returned has still to pass Tokenizer::Create().
Result<TokenizerSpec> TokenizerSpecFromHuggingFace(std::string_view tokenizer_json,
                                                   std::string_view tokenizer_config_json);

}  // namespace prehoc::reference
