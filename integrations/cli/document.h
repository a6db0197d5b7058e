// The text that questions are asked about.
#pragma once
#include <string>

#include "base/result.h"
#include "integrations/cli/environment.h"

namespace prehoc::cli {

struct Document {
  std::string path;
  std::string text;  // UTF-8, without a byte order mark
};

// Reads `path`; empty = the King James text in the cache directory. kNotFound (and what fetches the default),
// kIoError, kCorrupt (not UTF-8: the byte offset; empty), kUnsupported (a directory, over 1 GiB).
Result<Document> ReadDocument(const std::string& path, const Environment& environment);

}  // namespace prehoc::cli
