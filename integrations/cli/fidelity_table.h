// A fidelity run on the terminal.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace prehoc::cli {

// One line a run, the best of each column marked with *: among the selectors that are not the reference, the ceiling or the floor.
// `document` is of the schema "prehoc.fidelity/1"; what it lacks shows as a dash.
std::string FormatFidelityTable(const nlohmann::ordered_json& document);

}  // namespace prehoc::cli
