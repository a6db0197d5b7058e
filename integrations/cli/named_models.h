// Models that the command knows by name, and what any --model and --lora mean as paths.
#pragma once
#include <string>

#include "base/result.h"
#include "integrations/cli/environment.h"

namespace prehoc::cli {

struct ModelPaths {
  std::string path;  // a .gguf file or a directory; exists
  std::string lora;  // exists, or empty
};

// kNotFound: the file of a named model has not been fetched (names the script that does), or a path does not exist.
// kInvalid: neither a name nor a path, or --lora with a name that brings its own.
Result<ModelPaths> ResolveModel(const std::string& model, const std::string& lora, const Environment& environment);

}  // namespace prehoc::cli
