#include "integrations/reference/loader/safetensors.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "integrations/reference/loader/json.h"
#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxDimensions = 8;
constexpr size_t kMaxShards = 4096;

struct Dtype {
  std::string_view name;
  size_t bits;
  std::optional<WeightType> type;
};
constexpr Dtype kDtypes[] = {
    {"F32", 32, WeightType::kF32}, {"F16", 16, WeightType::kF16}, {"BF16", 16, WeightType::kBF16},
    {"F64", 64, {}}, {"I64", 64, {}}, {"U64", 64, {}}, {"I32", 32, {}}, {"U32", 32, {}}, {"I16", 16, {}},
    {"U16", 16, {}}, {"I8", 8, {}}, {"U8", 8, {}}, {"BOOL", 8, {}}, {"F8_E4M3", 8, {}}, {"F8_E5M2", 8, {}},
    {"F8_E8M0", 8, {}}, {"F4", 4, {}}, {"C64", 64, {}},
};

// A tensor with its place in the data section.
struct Placed {
  Tensor tensor;
  uint64_t begin = 0, end = 0;
};

class HeaderReader {
 public:
  explicit HeaderReader(const MappedFile& file) : path_(file.path()), bytes_(file.bytes()) {}

  // In file order.
  Result<std::vector<Placed>> Read() {
    PREHOC_ASSIGN_OR_RETURN(const std::string_view header, Header());
    PREHOC_ASSIGN_OR_RETURN(const Json json, ParseJsonObject(header, Cat(path_, ": header")));
    std::vector<Placed> placed;
    for (const auto& [name, entry] : json.items()) {
      if (name == "__metadata__") continue;
      PREHOC_ASSIGN_OR_RETURN(auto one, ReadEntry(name, entry));
      placed.push_back(std::move(one));
    }
    std::ranges::sort(placed, [](const Placed& a, const Placed& b) {
      return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
    });
    PREHOC_RETURN_IF_ERROR(CheckTiling(placed));
    return placed;
  }

 private:
  template <class... Parts>
  Status Corrupt(const Parts&... what) const {
    return FileError(StatusCode::kCorrupt, path_, what...);
  }

  Result<std::string_view> Header() {
    if (bytes_.size() < kLengthBytes + 2) return Corrupt("is not a safetensors file: ", bytes_.size(), " bytes");
    uint64_t length = 0;
    for (size_t i = kLengthBytes; i-- > 0;) length = length << 8 | std::to_integer<uint64_t>(bytes_[i]);
    const auto* text = reinterpret_cast<const char*>(bytes_.data()) + kLengthBytes;
    if (length > kMaxJsonBytes || *text != '{') {
      return Corrupt("is not a safetensors file: header of ", length, " bytes, expected JSON of at most ",
                     kMaxJsonBytes);
    }
    if (length > bytes_.size() - kLengthBytes) {
      return Corrupt("header of ", length, " bytes in a file of ", bytes_.size(), ": truncated?");
    }
    data_ = bytes_.subspan(kLengthBytes + static_cast<size_t>(length));
    return std::string_view(text, static_cast<size_t>(length));
  }

  Result<Placed> ReadEntry(const std::string& name, const Json& entry) const {
    const std::string where = Cat("tensor ", Quoted(name));
    if (!entry.is_object()) return Corrupt(where, " is described by something that is no object");
    const JsonFields fields(entry, path_, name + ".");
    PREHOC_ASSIGN_OR_RETURN(const auto dtype, fields.String("dtype"));
    if (!dtype) return Corrupt(where, " has no dtype");
    Placed placed;
    placed.tensor.name = name;
    placed.tensor.file = path_;
    placed.tensor.type_name = dtype->substr(0, 32);
    PREHOC_ASSIGN_OR_RETURN(const uint64_t elements, ReadShape(where, entry, &placed.tensor.shape));
    PREHOC_RETURN_IF_ERROR(ReadOffsets(where, entry, &placed));
    const auto* known = std::ranges::find(kDtypes, *dtype, &Dtype::name);
    if (known == std::end(kDtypes)) return placed;
    placed.tensor.type = known->type;
    uint64_t bits = 0;
    const bool fits = !__builtin_mul_overflow(elements, uint64_t{known->bits}, &bits);
    if (!fits || bits % 8 != 0 || bits / 8 != placed.end - placed.begin) {
      return Corrupt(where, " ", ShapeText(placed.tensor.shape), " of ", known->name, " does not take the ",
                     placed.end - placed.begin, " bytes of its data_offsets");
    }
    return placed;
  }

  Result<uint64_t> ReadShape(const std::string& where, const Json& entry, std::vector<int64_t>* shape) const {
    const auto it = entry.find("shape");
    if (it == entry.end() || !it->is_array() || it->size() > kMaxDimensions) {
      return Corrupt(where, " has no shape of at most ", kMaxDimensions, " dimensions");
    }
    uint64_t elements = 1;
    for (const Json& size : *it) {
      const bool ok = size.is_number_unsigned() && size.get<uint64_t>() >= 1 && size.get<uint64_t>() <= INT64_MAX;
      if (!ok) return Corrupt(where, " has a dimension that is not 1 to 2^63 - 1");
      if (__builtin_mul_overflow(elements, size.get<uint64_t>(), &elements)) {
        return Corrupt(where, " has more elements than 2^64");
      }
      shape->push_back(size.get<int64_t>());
    }
    return elements;
  }

  Status ReadOffsets(const std::string& where, const Json& entry, Placed* placed) const {
    const auto it = entry.find("data_offsets");
    const bool pair = it != entry.end() && it->is_array() && it->size() == 2 && (*it)[0].is_number_unsigned() &&
                      (*it)[1].is_number_unsigned();
    if (!pair) return Corrupt(where, " has no data_offsets [begin, end]");
    placed->begin = (*it)[0].get<uint64_t>();
    placed->end = (*it)[1].get<uint64_t>();
    if (placed->begin > placed->end || placed->end > data_.size()) {
      return Corrupt(where, " lies at ", placed->begin, " to ", placed->end, " of ", data_.size(),
                     " bytes of data: truncated?");
    }
    placed->tensor.data = data_.subspan(static_cast<size_t>(placed->begin), static_cast<size_t>(placed->end - placed->begin));
    return {};
  }

  Status CheckTiling(const std::vector<Placed>& placed) const {
    uint64_t at = 0;
    for (const Placed& p : placed) {
      if (p.begin != at) {
        return Corrupt("tensor ", Quoted(p.tensor.name), " begins at byte ", p.begin, " of the data, the one before ends at ",
                       at, p.begin < at ? ": they overlap" : ": a gap, which the format does not allow");
      }
      at = p.end;
    }
    if (at == data_.size()) return {};
    return Corrupt("has ", data_.size() - at, " bytes after its last tensor, which the format does not allow");
  }

  const std::string& path_;
  std::span<const std::byte> bytes_, data_;
};

// A plain name of a .safetensors file: nothing that leads to another directory.
bool IsShardName(std::string_view name) {
  constexpr std::string_view kSuffix = ".safetensors";
  return name.size() > kSuffix.size() && name.ends_with(kSuffix) && name.size() <= 255 && name.front() != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

Result<std::map<std::string, std::string>> ReadIndex(const std::string& path) {
  PREHOC_ASSIGN_OR_RETURN(const Json json, ReadJsonFile(path));
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) {
    return FileError(StatusCode::kCorrupt, path, "has no 'weight_map'");
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string() || !IsShardName(shard.get_ref<const std::string&>())) {
      return FileError(StatusCode::kCorrupt, path, "tensor ", Quoted(tensor), " is in ",
                       Quoted(shard.is_string() ? shard.get_ref<const std::string&>() : "?"),
                       ", expected the name of a .safetensors file in the same directory");
    }
    shard_of.emplace(tensor, shard.get<std::string>());
  }
  return shard_of;
}

Status OpenShards(const std::string& directory, const std::string& index_path, SafetensorsFiles* out) {
  PREHOC_ASSIGN_OR_RETURN(const auto shard_of, ReadIndex(index_path));
  std::map<std::string, std::string> path_of;  // by shard
  for (const auto& [tensor, shard] : shard_of) path_of.emplace(shard, directory + "/" + shard);
  if (path_of.size() > kMaxShards) {
    return FileError(StatusCode::kCorrupt, index_path, "lists ", path_of.size(), " files, the limit is ", kMaxShards);
  }
  for (const auto& [shard, path] : path_of) {
    auto file = MappedFile::Open(path);
    if (!file.ok()) return file.status().WithContext(index_path + ": listed shard");
    PREHOC_RETURN_IF_ERROR(AddSafetensors(*file, &out->tensors));
    out->files.push_back(std::move(file).value());
  }
  for (const auto& [name, shard] : shard_of) {
    const Tensor* tensor = out->tensors.Find(name);
    if (tensor == nullptr || tensor->file != path_of.at(shard)) {
      return FileError(StatusCode::kCorrupt, index_path, "tensor ", Quoted(name), " is not in ", Quoted(shard),
                       tensor == nullptr ? std::string() : " but in " + Quoted(tensor->file));
    }
  }
  return {};
}

}  // namespace

Status AddSafetensors(const std::shared_ptr<const MappedFile>& file, TensorTable* tensors) {
  PREHOC_ASSIGN_OR_RETURN(auto placed, HeaderReader(*file).Read());
  for (Placed& p : placed) PREHOC_RETURN_IF_ERROR(tensors->Add(std::move(p.tensor)));
  return {};
}

Result<SafetensorsFiles> OpenSafetensors(const std::string& directory) {
  const std::string single = directory + "/model.safetensors", index = single + ".index.json";
  std::error_code error;
  if (std::filesystem::exists(single, error)) {
    SafetensorsFiles out{TensorTable(single), {}};
    PREHOC_ASSIGN_OR_RETURN(auto file, MappedFile::Open(single));
    PREHOC_RETURN_IF_ERROR(AddSafetensors(file, &out.tensors));
    out.files.push_back(std::move(file));
    return out;
  }
  if (!std::filesystem::exists(index, error)) {
    return FileError(StatusCode::kNotFound, directory,
                     "has neither model.safetensors nor model.safetensors.index.json; other weight files must be "
                     "saved as safetensors first");
  }
  SafetensorsFiles out{TensorTable(index), {}};
  PREHOC_RETURN_IF_ERROR(OpenShards(directory, index, &out));
  return out;
}

}  // namespace prehoc::reference::loader
