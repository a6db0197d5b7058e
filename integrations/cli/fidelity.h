// The command `prehoc fidelity`.
#pragma once
#include <ostream>

#include "base/clock.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/fidelity_plan.h"

namespace prehoc::cli {

inline constexpr char kFidelitySchema[] = "prehoc.fidelity/1";

// Returns the exit code. The table goes to `out`, progress and errors to `err`. After every run the JSON file is written
// anew, whole and marked incomplete until the last one; the same command goes on from there.
int RunFidelity(const FidelityOptions& options, const Environment& environment, std::ostream& out, std::ostream& err,
                const Clock& clock);

}  // namespace prehoc::cli
