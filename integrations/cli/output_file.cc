#include "integrations/cli/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

namespace prehoc::cli {

OutputFile::OutputFile(std::string name, std::string path, std::string temporary, int fd)
    : name_(std::move(name)), path_(std::move(path)), temporary_(std::move(temporary)), fd_(fd) {}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : name_(std::move(other.name_)), path_(std::move(other.path_)), temporary_(std::move(other.temporary_)),
      fd_(std::exchange(other.fd_, -1)) {}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  close(fd_);
  unlink(temporary_.c_str());
}

Result<OutputFile> OutputFile::Create(const std::string& flag, const std::string& path) {
  const std::string name = flag + " " + path;
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return {StatusCode::kIoError, name + ": a directory; give the name of a file"};
  }
  std::string temporary = path + ".XXXXXX";
  const int fd = mkostemp(temporary.data(), O_CLOEXEC);
  if (fd < 0) {
    return {StatusCode::kIoError, name + ": " + std::strerror(errno) + "; give a file in a directory that can be written to"};
  }
  return OutputFile(name, path, std::move(temporary), fd);
}

Status OutputFile::Error(const char* what) const {
  return {StatusCode::kIoError, name_ + ": " + what + ": " + std::strerror(errno)};
}

Status OutputFile::Commit(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(fd_, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return Error("writing failed");
    text.remove_prefix(static_cast<size_t>(written));
  }
  if (fchmod(fd_, 0644) != 0 || fsync(fd_) != 0) return Error("writing failed");
  if (rename(temporary_.c_str(), path_.c_str()) != 0) return Error("renaming failed");
  close(std::exchange(fd_, -1));
  return {};
}

}  // namespace prehoc::cli
