// `prehoc torture`: faults on purpose below the cache, on the operator's own disk.
#pragma once
#include <ostream>

#include "base/clock.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/options.h"

namespace prehoc::cli {

// Prints a table to `out`. Returns the exit code: 1, with a line on `err`, if anything wrong came back.
int RunTortureCommand(const TortureFlags& flags, const Environment& environment, std::ostream& out, std::ostream& err, const Clock& clock);

}  // namespace prehoc::cli
