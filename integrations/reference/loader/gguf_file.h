// GGUF containers, versions 2 and 3: metadata and tensors, in place.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/loader/tensor_table.h"

namespace prehoc::reference::loader {

enum class GgufType : uint32_t {
  kU8 = 0, kI8 = 1, kU16 = 2, kI16 = 3, kU32 = 4, kI32 = 5, kF32 = 6, kBool = 7, kString = 8, kArray = 9,
  kU64 = 10, kI64 = 11, kF64 = 12,
};

// A value as it lies in the file, checked to be complete. Arrays hold scalars or strings, never arrays.
struct GgufValue {
  GgufType type = GgufType::kU8;  // of the elements, for an array
  bool is_array = false;
  uint64_t count = 1;
  std::span<const std::byte> bytes;  // of the value, or of all elements
};

class GgufFile {
 public:
  // The file's structure; no tensor byte is read. Every tensor lies wholly within the file, at the file's
  // alignment. Returns kCorrupt or kUnsupported (version, byte order).
  // Metadata values stay in the file; the table of names is the only allocation.
  static Result<GgufFile> Parse(std::shared_ptr<const MappedFile> file);

  const std::string& path() const { return file_->path(); }
  const std::shared_ptr<const MappedFile>& file() const { return file_; }
  uint32_t version() const { return version_; }
  bool Has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }

  // The value of a key, or nothing if the key is absent; kCorrupt if it is there with another type or out of
  // the range asked for. Integers may be stored at any width, floats as f32 or f64.
  Result<std::optional<int64_t>> Integer(std::string_view key, int64_t min, int64_t max) const;
  Result<std::optional<double>> Float(std::string_view key) const;  // finite
  Result<std::optional<bool>> Bool(std::string_view key) const;
  Result<std::optional<std::string>> String(std::string_view key) const;
  Result<std::optional<std::vector<std::string>>> Strings(std::string_view key) const;
  Result<std::optional<std::vector<int64_t>>> Integers(std::string_view key) const;
  Result<std::optional<std::vector<float>>> Floats(std::string_view key) const;  // finite

  TensorTable& tensors() { return tensors_; }
  const TensorTable& tensors() const { return tensors_; }

 private:
  explicit GgufFile(std::shared_ptr<const MappedFile> file) : file_(std::move(file)), tensors_(file_->path()) {}
  const GgufValue* Find(std::string_view key) const;
  Status WrongType(std::string_view key, std::string_view expected) const;

  std::shared_ptr<const MappedFile> file_;
  uint32_t version_ = 0;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  TensorTable tensors_;
};

}  // namespace prehoc::reference::loader
