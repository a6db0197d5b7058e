// The figures of a run for people.
#pragma once
#include <string>

#include "integrations/cli/figures.h"

namespace prehoc::cli {

// Several lines, the last one ended. See docs/cli.md for what each figure means.
std::string FormatFigures(const AnswerFigures& figures);

}  // namespace prehoc::cli
