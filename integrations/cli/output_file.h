// A file that appears whole or not at all.
#pragma once
#include <string>
#include <string_view>

#include "base/result.h"

namespace prehoc::cli {

// Takes a temporary name beside `path` at once, so that a place that cannot be written to is known before the work
// begins; the file gets its name in Commit(). Without Commit() nothing stays.
class OutputFile {
 public:
  // kIoError, naming `flag` and the path.
  static Result<OutputFile> Create(const std::string& flag, const std::string& path);
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;
  ~OutputFile();

  Status Commit(std::string_view text);

 private:
  OutputFile(std::string name, std::string path, std::string temporary, int fd);
  Status Error(const char* what) const;
  std::string name_, path_, temporary_;
  int fd_ = -1;
};

}  // namespace prehoc::cli
