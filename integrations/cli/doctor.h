// `prehoc doctor`: what this machine offers, what of it will be used, and why.
#pragma once
#include <ostream>

#include "base/clock.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/options.h"

namespace prehoc::cli {

// Prints to `out`. Returns the exit code: 1, and a line on `err`, if something that is needed does not work.
int RunDoctor(const DoctorOptions& options, const Environment& environment, std::ostream& out, std::ostream& err,
              const Clock& clock);

}  // namespace prehoc::cli
