// Pieces of immutable files, read past the page cache.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>

#include "base/result.h"

namespace prehoc {

// Memory as direct I/O wants it. Grows, never shrinks.
class AlignedBuffer {
 public:
  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  // False if the system has no memory left. What was in it is gone.
  [[nodiscard]] bool Reserve(size_t bytes);

 private:
  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  std::unique_ptr<std::byte[], Free> data_;
  size_t size_ = 0;
};

// Safe from any thread. Keeps its file readable, and its bytes on disk, even after the file was deleted.
class DirectFile {
 public:
  // `direct` asks for O_DIRECT. Returns kNotFound or kIoError.
  static Result<std::shared_ptr<const DirectFile>> Open(const std::string& path, bool direct);
  ~DirectFile();
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  // The bytes [offset, offset + bytes) of the file, read with one system call into `scratch` and valid as long as that
  // is left alone. Returns kCorrupt (the file ends before), kIoError, kOutOfSpace (memory for `scratch`).
  Result<std::span<const std::byte>> Read(uint64_t offset, size_t bytes, AlignedBuffer* scratch) const;

  // Reads the page before `offset` into `scratch`, and the bytes from there on into `out`, with one system call.
  // Requires that offset, size and address of `out` are multiples of 4096, and offset > 0. Returns the page before;
  // codes as Read().
  Result<std::span<std::byte>> ReadInPlace(uint64_t offset, std::span<std::byte> out, AlignedBuffer* scratch) const;

  // False once the file was deleted: its bytes go when this object dies.
  bool has_name() const;

 private:
  explicit DirectFile(int fd) : fd_(fd) {}
  const int fd_;
};

}  // namespace prehoc
