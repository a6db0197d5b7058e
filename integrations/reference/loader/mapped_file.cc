#include "integrations/reference/loader/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

Status SystemError(const std::string& path, const char* doing) {
  const int error = errno;
  const StatusCode code = (error == ENOENT || error == ENOTDIR) ? StatusCode::kNotFound : StatusCode::kIoError;
  return FileError(code, path, doing, ": ", std::strerror(error));
}

struct Descriptor {
  int fd = -1;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

Result<std::shared_ptr<const MappedFile>> MappedFile::Open(const std::string& path) {
  // Without O_NONBLOCK a named pipe would wait here for its writer.
  Descriptor descriptor{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (descriptor.fd < 0) return SystemError(path, "cannot open");
  struct stat info {};
  if (fstat(descriptor.fd, &info) != 0) return SystemError(path, "cannot stat");
  if (!S_ISREG(info.st_mode)) return FileError(StatusCode::kInvalid, path, "is not a regular file");
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = path;
  const size_t size = static_cast<size_t>(info.st_size);
  if (size > 0) {
    void* mapping = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor.fd, 0);
    if (mapping == MAP_FAILED) return SystemError(path, "cannot map");
    file->mapping_ = mapping;
    file->bytes_ = {static_cast<const std::byte*>(mapping), size};
  }
  return std::shared_ptr<const MappedFile>(std::move(file));
}

std::shared_ptr<const MappedFile> MappedFile::FromBytes(std::string name, std::vector<std::byte> bytes) {
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = std::move(name);
  file->owned_ = std::move(bytes);
  file->bytes_ = file->owned_;
  return file;
}

MappedFile::~MappedFile() {
  if (mapping_ != nullptr) munmap(mapping_, bytes_.size());
}

Result<std::string> ReadTextFile(const std::string& path, size_t limit) {
  PREHOC_ASSIGN_OR_RETURN(const auto file, MappedFile::Open(path));
  const auto bytes = file->bytes();
  if (bytes.size() > limit) {
    return FileError(StatusCode::kInvalid, path, "has ", bytes.size(), " bytes, the limit is ", limit);
  }
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace prehoc::reference::loader
