#include "integrations/reference/loader/json.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

// Watches a parse: what nests too deep is dropped as it comes, and the first fault is kept.
class Watcher {
 public:
  bool operator()(int depth, Json::parse_event_t event, Json& value) {
    switch (event) {
      case Json::parse_event_t::object_start:
      case Json::parse_event_t::array_start:
        if (event == Json::parse_event_t::object_start) keys_.emplace_back();
        if (depth >= kMaxJsonNesting) Fault(Cat("nests deeper than ", kMaxJsonNesting));
        return depth < kMaxJsonNesting;
      case Json::parse_event_t::key: {
        const std::string& key = value.get_ref<const std::string&>();
        if (!keys_.empty() && !keys_.back().insert(key).second) Fault(Cat("key ", Quoted(key), " appears twice"));
        return true;
      }
      case Json::parse_event_t::object_end:
        if (!keys_.empty()) keys_.pop_back();
        return true;
      default: return true;
    }
  }
  const std::string& fault() const { return fault_; }

 private:
  void Fault(std::string what) {
    if (fault_.empty()) fault_ = std::move(what);
  }
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
  std::string fault_;
};

}  // namespace

Result<Json> ParseJsonObject(std::string_view text, std::string_view file) {
  if (text.size() > kMaxJsonBytes) {
    return FileError(StatusCode::kCorrupt, file, text.size(), " bytes of JSON, the limit is ", kMaxJsonBytes);
  }
  Watcher watcher;
  Json json = Json::parse(
      text, [&](int depth, Json::parse_event_t event, Json& value) { return watcher(depth, event, value); },
      /*allow_exceptions=*/false);
  if (!watcher.fault().empty()) return FileError(StatusCode::kCorrupt, file, watcher.fault());
  if (!json.is_object()) return FileError(StatusCode::kCorrupt, file, "is not a JSON object: truncated?");
  return json;
}

Result<Json> ReadJsonFile(const std::string& path) {
  PREHOC_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxJsonBytes));
  return ParseJsonObject(text, path);
}

const Json* JsonFields::Find(const char* key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

bool JsonFields::Names(const char* key) const { return object_->contains(key); }

Status JsonFields::WrongType(const char* key, std::string_view expected) const {
  return FileError(StatusCode::kInvalid, file_, Quoted(NameOf(key)), " is not ", expected);
}

Result<std::optional<int64_t>> JsonFields::Integer(const char* key, int64_t min, int64_t max) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<int64_t>();
  if (!value->is_number_integer()) return WrongType(key, "an integer");
  const bool fits = !value->is_number_unsigned() || value->get<uint64_t>() <= uint64_t{INT64_MAX};
  const int64_t integer = fits ? value->get<int64_t>() : 0;
  if (!fits || integer < min || integer > max) {
    return FileError(StatusCode::kInvalid, file_, Quoted(NameOf(key)), " is ", value->dump(), ", expected ", min,
                     " to ", max);
  }
  return std::optional(integer);
}

Result<std::optional<double>> JsonFields::Float(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<double>();
  if (!value->is_number() || !std::isfinite(value->get<double>())) return WrongType(key, "a finite number");
  return std::optional(value->get<double>());
}

Result<std::optional<bool>> JsonFields::Bool(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<bool>();
  if (!value->is_boolean()) return WrongType(key, "true or false");
  return std::optional(value->get<bool>());
}

Result<std::optional<std::string>> JsonFields::String(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<std::string>();
  if (!value->is_string()) return WrongType(key, "a string");
  return std::optional(value->get<std::string>());
}

Result<std::optional<std::vector<std::string>>> JsonFields::Strings(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<std::vector<std::string>>();
  std::vector<std::string> strings;
  if (!value->is_array()) return WrongType(key, "a list of strings");
  for (const Json& element : *value) {
    if (!element.is_string()) return WrongType(key, "a list of strings");
    strings.push_back(element.get<std::string>());
  }
  return std::optional(std::move(strings));
}

Result<std::optional<std::vector<double>>> JsonFields::Floats(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<std::vector<double>>();
  std::vector<double> floats;
  if (!value->is_array()) return WrongType(key, "a list of finite numbers");
  for (const Json& element : *value) {
    if (!element.is_number() || !std::isfinite(element.get<double>())) return WrongType(key, "a list of finite numbers");
    floats.push_back(element.get<double>());
  }
  return std::optional(std::move(floats));
}

Result<std::vector<int64_t>> JsonFields::IntegerOrList(const char* key, int64_t min, int64_t max) const {
  const Json* value = Find(key);
  std::vector<int64_t> integers;
  if (value == nullptr) return integers;
  if (!value->is_array()) {
    PREHOC_ASSIGN_OR_RETURN(const auto one, Integer(key, min, max));
    integers.push_back(*one);
    return integers;
  }
  for (const Json& element : *value) {
    const Json wrapped = {{key, element}};
    PREHOC_ASSIGN_OR_RETURN(const auto one, JsonFields(wrapped, file_, prefix_).Integer(key, min, max));
    if (!one) return WrongType(key, "an integer or a list of integers");
    integers.push_back(*one);
  }
  return integers;
}

Result<std::optional<JsonFields>> JsonFields::Object(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::optional<JsonFields>();
  if (!value->is_object()) return WrongType(key, "an object");
  return std::optional(JsonFields(*value, file_, NameOf(key) + "."));
}

std::vector<std::string> JsonFields::Keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object_->items()) keys.push_back(key);
  return keys;
}

}  // namespace prehoc::reference::loader
