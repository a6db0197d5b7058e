// Cuts text into the pieces that byte-level merges never cross, exactly as the families' regexes do.
#pragma once
#include <cstddef>
#include <string_view>

#include "integrations/reference/tokenizer_spec.h"

namespace prehoc::reference {

// End of the piece that starts at `begin`; always past it. Requires valid UTF-8, begin < text.size() at
// a character. Pieces cover the text without gaps. Linear in the piece.
size_t PieceEnd(PreTokenizer pre, std::string_view text, size_t begin);

}  // namespace prehoc::reference
