// `prehoc inspect`: what a disk store holds, whether it is whole, and what repair leaves of it.
#pragma once
#include <ostream>

#include "base/clock.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/options.h"

namespace prehoc::cli {

// Prints to `out`; errors and the progress bar go to `err`. Reads only, beside a process that writes as well, unless
// options.repair. Returns the exit code: 1 if there is no store that can be read, or damage was found and stays.
int RunInspect(const InspectOptions& options, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock);

}  // namespace prehoc::cli
