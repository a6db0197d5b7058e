// The runs of one question: with the selector that was asked for, and densely to compare.
#pragma once
#include <memory>
#include <ostream>

#include "base/clock.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/figures.h"
#include "integrations/cli/log.h"
#include "integrations/cli/metrics.h"
#include "integrations/cli/options.h"
#include "integrations/cli/prompt.h"
#include "integrations/reference/model.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::cli {

// Everything outlives the runs.
struct RunTask {
  const AnswerOptions& options;
  const Environment& environment;
  const std::shared_ptr<const reference::Model>& model;
  const reference::Tokenizer& tokenizer;
  const Prompt& prompt;
  const KernelTable* kernels;  // null = the fastest
  std::ostream& out;           // the answer, as it comes
  std::ostream& err;           // progress and warnings
  const Clock& clock;
  Log& log;
  Tracer* tracer = nullptr;       // of the run that was asked for, not of the dense one; or null
  MetricsFile* metrics = nullptr; // kept up to date while that run lasts; or null
};

// Streams the answer, then compares with dense attention if that was asked for. Fills `selected`, `answer`, `threads` and
// `peak_resident_bytes` of `figures`, and `dense`, `agreement` and `dense_answer` with the comparison; reads its model and
// prompt. Stops at the next token once InterruptGuard::Requested(); what is whole has then been stored, and there is no
// comparison. Errors as in exit_code.h.
Status RunAll(const RunTask& task, AnswerFigures* figures);

}  // namespace prehoc::cli
