// Small JSON files with untrusted contents: bounded, without duplicate keys, read field by field with the file named.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace prehoc::reference::loader {

using Json = nlohmann::json;

constexpr size_t kMaxJsonBytes = size_t{16} << 20;  // configurations, indexes, headers; not vocabularies
constexpr int kMaxJsonNesting = 32;

// Returns kCorrupt for text that is no JSON object, is larger or nests deeper than the limits, or names a key twice.
// `file` begins the message.
Result<Json> ParseJsonObject(std::string_view text, std::string_view file);
Result<Json> ReadJsonFile(const std::string& path);  // also as MappedFile::Open()

// The members of one object. A member that is absent or null reads as nothing; one that is there with another type
// or out of the range asked for is kInvalid. Refers to the object and copies the names.
class JsonFields {
 public:
  JsonFields(const Json& object, std::string_view file, std::string_view prefix = "")
      : object_(&object), file_(file), prefix_(prefix) {}

  bool Has(const char* key) const { return Find(key) != nullptr; }
  bool Names(const char* key) const;  // also if null
  Result<std::optional<int64_t>> Integer(const char* key, int64_t min, int64_t max) const;
  Result<std::optional<double>> Float(const char* key) const;  // integers too
  Result<std::optional<bool>> Bool(const char* key) const;
  Result<std::optional<std::string>> String(const char* key) const;
  Result<std::optional<std::vector<std::string>>> Strings(const char* key) const;
  Result<std::optional<std::vector<double>>> Floats(const char* key) const;
  // One integer or a list of them.
  Result<std::vector<int64_t>> IntegerOrList(const char* key, int64_t min, int64_t max) const;
  Result<std::optional<JsonFields>> Object(const char* key) const;
  std::vector<std::string> Keys() const;

  const std::string& file() const { return file_; }
  // "rope_scaling.factor"
  std::string NameOf(std::string_view key) const { return prefix_ + std::string(key); }

 private:
  const Json* Find(const char* key) const;  // null if absent or null
  Status WrongType(const char* key, std::string_view expected) const;

  const Json* object_;
  std::string file_, prefix_;
};

}  // namespace prehoc::reference::loader
