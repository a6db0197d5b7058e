// `prehoc answer`: from the command line to the answer and its table.
#pragma once
#include <ostream>

#include "base/clock.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/options.h"

namespace prehoc::cli {

// Streams the answer to `out`, then the table; progress and notes go to `err`. Returns the exit code (exit_code.h);
// an error is one line on `err`. SIGINT and SIGTERM stop it at the next token.
int RunAnswer(const AnswerOptions& options, const Environment& environment, std::ostream& out, std::ostream& err,
              const Clock& clock);

}  // namespace prehoc::cli
