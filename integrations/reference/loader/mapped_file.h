// The bytes of a file, mapped read-only; they stay where they are for as long as anyone holds the object.
#pragma once
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"

namespace prehoc::reference::loader {

class MappedFile {
 public:
  // Returns kNotFound (no such file), kInvalid (not a regular file) or kIoError. An empty file maps to no bytes.
  // A file that shrinks while mapped kills its reader, as with every mapping: replace files, do not truncate them.
  static Result<std::shared_ptr<const MappedFile>> Open(const std::string& path);
  // Bytes that are in memory already, under a name for messages.
  static std::shared_ptr<const MappedFile> FromBytes(std::string name, std::vector<std::byte> bytes);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  MappedFile() = default;
  std::string path_;
  std::span<const std::byte> bytes_;
  std::vector<std::byte> owned_;
  void* mapping_ = nullptr;
};

// The whole of a small text file. Returns as Open(), and kInvalid past `limit` bytes.
Result<std::string> ReadTextFile(const std::string& path, size_t limit);

}  // namespace prehoc::reference::loader
