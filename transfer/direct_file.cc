#include "transfer/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/check.h"
#include "base/units.h"

namespace prehoc {
namespace {
constexpr uint64_t kAlignment = 4096;  // the largest logical block of disks in use
}  // namespace

bool AlignedBuffer::Reserve(size_t bytes) {
  if (bytes <= size_) return true;
  const size_t rounded = RoundUp(bytes, kAlignment);
  data_.reset();
  size_ = 0;
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded)));
  if (data_ == nullptr) return false;
  size_ = rounded;
  return true;
}

Result<std::shared_ptr<const DirectFile>> DirectFile::Open(const std::string& path, bool direct) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0));
  if (fd < 0) {
    return {errno == ENOENT ? StatusCode::kNotFound : StatusCode::kIoError, path + ": " + std::strerror(errno)};
  }
  return std::shared_ptr<const DirectFile>(new DirectFile(fd));
}

DirectFile::~DirectFile() { ::close(fd_); }

Result<std::span<const std::byte>> DirectFile::Read(uint64_t offset, size_t bytes, AlignedBuffer* scratch) const {
  const uint64_t begin = offset / kAlignment * kAlignment;
  const size_t before = static_cast<size_t>(offset - begin);
  const size_t window = RoundUp(before + bytes, kAlignment);
  if (!scratch->Reserve(window)) {
    return {StatusCode::kOutOfSpace, "no memory to read " + FormatBytes(static_cast<double>(window))};
  }
  for (size_t done = 0; done < before + bytes;) {
    // A read that a signal cut short goes on at an aligned place, or direct I/O would refuse it.
    done = done / kAlignment * kAlignment;
    const ssize_t n = ::pread(fd_, scratch->data() + done, window - done, static_cast<off_t>(begin + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return {StatusCode::kIoError, std::string("read: ") + std::strerror(errno)};
    if (n == 0 || (static_cast<size_t>(n) < kAlignment && done + static_cast<size_t>(n) < before + bytes)) {
      return {StatusCode::kCorrupt, "the file ends before byte " + std::to_string(offset + bytes)};
    }
    done += static_cast<size_t>(n);
  }
  return std::span<const std::byte>(scratch->data() + before, bytes);
}

Result<std::span<std::byte>> DirectFile::ReadInPlace(uint64_t offset, std::span<std::byte> out,
                                                     AlignedBuffer* scratch) const {
  PREHOC_CHECK(offset > 0 && offset % kAlignment == 0 && out.size() % kAlignment == 0);
  if (!scratch->Reserve(kAlignment)) return {StatusCode::kOutOfSpace, "no memory to read a page"};
  const iovec parts[2] = {{scratch->data(), kAlignment}, {out.data(), out.size()}};
  ssize_t n = 0;
  do {
    n = ::preadv(fd_, parts, 2, static_cast<off_t>(offset - kAlignment));
  } while (n < 0 && errno == EINTR);
  if (n < 0) return {StatusCode::kIoError, std::string("read: ") + std::strerror(errno)};
  if (static_cast<size_t>(n) != kAlignment + out.size()) {
    return {StatusCode::kCorrupt, "the file ends before byte " + std::to_string(offset + out.size())};
  }
  return std::span<std::byte>(scratch->data(), kAlignment);
}

bool DirectFile::has_name() const {
  struct stat info {};
  return ::fstat(fd_, &info) == 0 && info.st_nlink > 0;
}

}  // namespace prehoc
