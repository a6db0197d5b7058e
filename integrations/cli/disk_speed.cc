#include "integrations/cli/disk_speed.h"

#include <fcntl.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include "base/units.h"

namespace prehoc::cli {
namespace {

constexpr size_t kBlock = kMiB;

struct FreeAligned {
  void operator()(std::byte* data) const { std::free(data); }
};
using Buffer = std::unique_ptr<std::byte[], FreeAligned>;

Buffer MakeBuffer() { return Buffer(static_cast<std::byte*>(std::aligned_alloc(4096, kBlock))); }

// The same bytes for the same block, different ones for another: a disk that compresses gains nothing.
void FillBlock(uint64_t block, std::byte* data) {
  std::mt19937_64 random(block + 1);
  for (size_t i = 0; i < kBlock; i += 8) {
    const uint64_t word = random();
    std::memcpy(data + i, &word, 8);
  }
}

// Closes itself.
class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() { if (fd_ >= 0) close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

std::string FileSystemName(uint64_t type) {
  switch (type) {
    case 0xef53: return "ext4";
    case 0x58465342: return "xfs";
    case 0x9123683e: return "btrfs";
    case 0x794c7630: return "overlayfs";
    case 0x01021994: return "tmpfs";
    case 0x2fc12fc1: return "zfs";
    case 0x6969: return "nfs";
    default: return "file system " + std::to_string(type);
  }
}

Status Failed(const std::string& directory, const char* what) {
  return {StatusCode::kIoError, directory + ": " + what + ": " + std::strerror(errno)};
}

// A file without a name where the file system offers that, else one that loses its name at once.
int OpenNameless(const std::string& directory, int flags) {
  const int fd = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT)) return fd;
  std::string name = directory + "/.prehoc-doctor.XXXXXX";
  const int named = mkostemp(name.data(), O_CLOEXEC | flags);
  if (named >= 0) unlink(name.c_str());
  return named;
}

Status WriteAll(int fd, const std::string& directory, uint64_t blocks, double* seconds, const Clock& clock) {
  const Buffer buffer = MakeBuffer();
  if (!buffer) return {StatusCode::kOutOfSpace, "no memory for a buffer of 1 MiB"};
  int64_t nanos = 0;
  for (uint64_t block = 0; block < blocks; ++block) {
    FillBlock(block, buffer.get());
    const int64_t start = clock.NowNanos();
    if (pwrite(fd, buffer.get(), kBlock, static_cast<off_t>(block * kBlock)) != static_cast<ssize_t>(kBlock)) {
      return Failed(directory, "writing failed");
    }
    nanos += clock.NowNanos() - start;
  }
  const int64_t start = clock.NowNanos();
  if (fdatasync(fd) != 0) return Failed(directory, "syncing failed");
  *seconds = static_cast<double>(nanos + clock.NowNanos() - start) * 1e-9;
  return {};
}

// Times the reads alone: a first pass reads, and a second compares.
Status ReadAll(int fd, const std::string& directory, uint64_t blocks, Executor& executor, double* seconds, const Clock& clock) {
  std::atomic<uint64_t> failed{0}, different{0};
  const auto pass = [&](bool compare) {
    const int64_t parts = executor.concurrency();
    executor.ParallelFor(parts, [&](int64_t part) {
      const Buffer buffer = MakeBuffer(), wanted = MakeBuffer();
      for (uint64_t block = static_cast<uint64_t>(part); block < blocks; block += static_cast<uint64_t>(parts)) {
        if (!buffer || !wanted ||
            pread(fd, buffer.get(), kBlock, static_cast<off_t>(block * kBlock)) != static_cast<ssize_t>(kBlock)) {
          ++failed;
          continue;
        }
        if (!compare) continue;
        FillBlock(block, wanted.get());
        different += std::memcmp(buffer.get(), wanted.get(), kBlock) != 0;
      }
    });
  };
  const int64_t start = clock.NowNanos();
  pass(false);
  *seconds = clock.SecondsSince(start);
  pass(true);
  if (failed > 0) return Failed(directory, "reading failed");
  if (different == 0) return {};
  return {StatusCode::kCorrupt, directory + ": " + std::to_string(different) + " of " + std::to_string(blocks) +
                                    " blocks came back other than they were written; check the disk"};
}

}  // namespace

Result<DiskSpeed> MeasureDisk(const std::string& directory, uint64_t bytes, Executor& executor, const Clock& clock) {
  DiskSpeed speed;
  struct statfs info = {};
  if (statfs(directory.c_str(), &info) != 0) return Failed(directory, "not to be examined");
  speed.free_bytes = static_cast<uint64_t>(info.f_bavail) * static_cast<uint64_t>(info.f_bsize);
  speed.file_system = FileSystemName(static_cast<uint64_t>(info.f_type));
  if (speed.free_bytes < 2 * bytes) {
    return {StatusCode::kOutOfSpace, directory + ": only " + FormatBytes(static_cast<double>(speed.free_bytes)) +
                                         " free; free some, or give a smaller --test-size"};
  }
  int fd = OpenNameless(directory, O_DIRECT);
  speed.direct = fd >= 0;
  if (fd < 0 && errno == EINVAL) fd = OpenNameless(directory, 0);  // tmpfs and others have no direct I/O
  if (fd < 0) return Failed(directory, "a file cannot be made");
  const File file(fd);
  const uint64_t blocks = std::max<uint64_t>(bytes / kBlock, 1);
  const auto total = static_cast<double>(blocks * kBlock);
  double seconds = 0;
  PREHOC_RETURN_IF_ERROR(WriteAll(file.fd(), directory, blocks, &seconds, clock));
  speed.write_rate = total / std::max(seconds, 1e-9);
  PREHOC_RETURN_IF_ERROR(ReadAll(file.fd(), directory, blocks, executor, &seconds, clock));
  speed.read_rate = total / std::max(seconds, 1e-9);
  return speed;
}

}  // namespace prehoc::cli
