// The figures of a fidelity run for people: one HTML page that needs no network and no other file.
#pragma once
#include <string>
#include <string_view>

namespace prehoc::cli {

// The page over `json`, a document of the schema "prehoc.fidelity/1" (docs/fidelity.md) in valid UTF-8.
// The text is carried as it is, but that each `<` becomes \u003c, so that no string in it can end the block that holds
// it. What the document lacks the page says in place of the plot; a text that is no JSON it shows as an error.
std::string FormatFidelityReport(std::string_view json);

}  // namespace prehoc::cli
