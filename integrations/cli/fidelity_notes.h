// What the figures of a fidelity run say, in sentences.
#pragma once
#include <nlohmann/json_fwd.hpp>

namespace prehoc::cli {

// [{title, text}] for `document` of the schema "prehoc.fidelity/1". Says only what its numbers bear out; empty while there is only
// the dense run.
nlohmann::ordered_json FidelityNotes(const nlohmann::ordered_json& document);

}  // namespace prehoc::cli
