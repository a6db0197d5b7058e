// The figures of a run for machines: the schema "prehoc.answer/1" of docs/cli.md.
#pragma once
#include <string>

#include "integrations/cli/figures.h"

namespace prehoc::cli {

inline constexpr char kAnswerSchema[] = "prehoc.answer/1";

// Pretty-printed, ended by a newline; valid UTF-8 whatever the strings hold. Numbers that are not finite become null.
std::string FormatJson(const AnswerFigures& figures);

}  // namespace prehoc::cli
