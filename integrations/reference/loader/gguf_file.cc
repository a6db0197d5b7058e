#include "integrations/reference/loader/gguf_file.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF files are read in place, little-endian");

constexpr size_t kMaxKeyBytes = 65535;  // the format's own limit
constexpr size_t kMaxTensorNameBytes = 255;
constexpr uint64_t kMaxMetadata = 1u << 16;
constexpr uint64_t kMaxTensors = 1u << 18;
constexpr uint64_t kMaxAlignment = 1u << 20;
// Least bytes of an entry: bounds what a count may claim before anything is allocated for it.
constexpr uint64_t kMinMetadataBytes = 8 + 4 + 1;
constexpr uint64_t kMinTensorBytes = 8 + 4 + 8 + 4 + 8;

struct GgmlType {
  uint32_t id;
  const char* name;
  std::optional<WeightType> type;
};
constexpr GgmlType kGgmlTypes[] = {
    {0, "F32", WeightType::kF32},    {1, "F16", WeightType::kF16},    {2, "Q4_0", WeightType::kQ4_0},
    {3, "Q4_1", WeightType::kQ4_1},  {6, "Q5_0", {}},                 {7, "Q5_1", {}},
    {8, "Q8_0", WeightType::kQ8_0},  {9, "Q8_1", {}},                 {10, "Q2_K", {}},
    {11, "Q3_K", {}},                {12, "Q4_K", WeightType::kQ4_K}, {13, "Q5_K", {}},
    {14, "Q6_K", WeightType::kQ6_K}, {15, "Q8_K", {}},                {16, "IQ2_XXS", {}},
    {17, "IQ2_XS", {}},              {18, "IQ3_XXS", {}},             {19, "IQ1_S", {}},
    {20, "IQ4_NL", {}},              {21, "IQ3_S", {}},               {22, "IQ2_S", {}},
    {23, "IQ4_XS", {}},              {24, "I8", {}},                  {25, "I16", {}},
    {26, "I32", {}},                 {27, "I64", {}},                 {28, "F64", {}},
    {29, "IQ1_M", {}},               {30, "BF16", WeightType::kBF16}, {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},               {39, "MXFP4", {}},
};

size_t ScalarBytes(GgufType type) {
  switch (type) {
    case GgufType::kU8: case GgufType::kI8: case GgufType::kBool: return 1;
    case GgufType::kU16: case GgufType::kI16: return 2;
    case GgufType::kU32: case GgufType::kI32: case GgufType::kF32: return 4;
    case GgufType::kU64: case GgufType::kI64: case GgufType::kF64: return 8;
    case GgufType::kString: case GgufType::kArray: break;
  }
  return 0;
}

template <class T>
T Load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Moves through the file; whoever asks for more than there is gets nothing, and parsing ends.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}
  size_t offset() const { return offset_; }
  size_t left() const { return bytes_.size() - offset_; }

  std::optional<std::span<const std::byte>> Take(uint64_t n) {
    if (n > left()) return std::nullopt;
    const auto taken = bytes_.subspan(offset_, static_cast<size_t>(n));
    offset_ += static_cast<size_t>(n);
    return taken;
  }
  template <class T>
  std::optional<T> Scalar() {
    const auto taken = Take(sizeof(T));
    if (!taken) return std::nullopt;
    return Load<T>(taken->data());
  }
  std::optional<std::string_view> String() {
    const auto length = Scalar<uint64_t>();
    if (!length) return std::nullopt;
    const auto taken = Take(*length);
    if (!taken) return std::nullopt;
    return std::string_view(reinterpret_cast<const char*>(taken->data()), taken->size());
  }

 private:
  std::span<const std::byte> bytes_;
  size_t offset_ = 0;
};

class Parser {
 public:
  explicit Parser(const MappedFile& file) : path_(file.path()), bytes_(file.bytes()), cursor_(file.bytes()) {}

  struct Header {
    uint32_t version = 0;
    uint64_t tensors = 0, metadata = 0;
  };

  Result<Header> ReadHeader() {
    const auto magic = cursor_.Take(4);
    if (!magic || std::memcmp(magic->data(), "GGUF", 4) != 0) {
      return Corrupt("is not a GGUF file: it does not begin with 'GGUF'");
    }
    Header header;
    const auto version = cursor_.Scalar<uint32_t>();
    if (!version) return Truncated("header");
    header.version = *version;
    if (header.version == 0x02000000u || header.version == 0x03000000u) {
      return FileError(StatusCode::kUnsupported, path_, "is a big-endian GGUF file; only little-endian is supported");
    }
    if (header.version != 2 && header.version != 3) {
      return FileError(StatusCode::kUnsupported, path_, "has GGUF version ", header.version, "; supported: 2, 3");
    }
    const auto tensors = cursor_.Scalar<uint64_t>();
    const auto metadata = cursor_.Scalar<uint64_t>();
    if (!tensors || !metadata) return Truncated("header");
    header.tensors = *tensors;
    header.metadata = *metadata;
    PREHOC_RETURN_IF_ERROR(CheckCount("metadata entries", header.metadata, kMaxMetadata, kMinMetadataBytes));
    PREHOC_RETURN_IF_ERROR(CheckCount("tensors", header.tensors, kMaxTensors, kMinTensorBytes));
    return header;
  }

  Result<std::pair<std::string, GgufValue>> ReadMetadata(uint64_t index) {
    const auto key = cursor_.String();
    if (!key) return Truncated(Cat("key of metadata entry ", index));
    if (key->empty() || key->size() > kMaxKeyBytes) {
      return Corrupt("metadata entry ", index, " has a key of ", key->size(), " bytes, the limit is ", kMaxKeyBytes);
    }
    const auto type = cursor_.Scalar<uint32_t>();
    if (!type) return Truncated(Cat("metadata ", Quoted(*key)));
    GgufValue value;
    value.type = static_cast<GgufType>(*type);
    if (value.type == GgufType::kArray) {
      const auto element = cursor_.Scalar<uint32_t>();
      const auto count = cursor_.Scalar<uint64_t>();
      if (!element || !count) return Truncated(Cat("metadata ", Quoted(*key)));
      value.is_array = true;
      value.type = static_cast<GgufType>(*element);
      value.count = *count;
      if (value.type == GgufType::kArray) return Corrupt("metadata ", Quoted(*key), " is an array of arrays");
    }
    if (value.type > GgufType::kF64) {
      return Corrupt("metadata ", Quoted(*key), " has the unknown type ", static_cast<uint32_t>(value.type));
    }
    PREHOC_RETURN_IF_ERROR(ReadPayload(*key, &value));
    return std::pair(std::string(*key), value);
  }

  struct TensorInfo {
    Tensor tensor;
    uint64_t offset = 0, bytes = 0;  // within the data section
  };
  Result<TensorInfo> ReadTensorInfo(uint64_t index) {
    const auto name = cursor_.String();
    if (!name) return Truncated(Cat("name of tensor ", index));
    if (name->empty() || name->size() > kMaxTensorNameBytes) {
      return Corrupt("tensor ", index, " has a name of ", name->size(), " bytes, the limit is ", kMaxTensorNameBytes);
    }
    const std::string where = Cat("tensor ", Quoted(*name));
    TensorInfo info;
    info.tensor.name = *name;
    info.tensor.file = path_;
    const auto dims = cursor_.Scalar<uint32_t>();
    if (!dims) return Truncated(where);
    if (*dims < 1 || *dims > 4) return Corrupt(where, " has ", *dims, " dimensions, expected 1 to 4");
    uint64_t rows = 1;
    uint64_t cols = 0;
    for (uint32_t d = 0; d < *dims; ++d) {
      const auto size = cursor_.Scalar<uint64_t>();
      if (!size) return Truncated(where);
      if (*size == 0 || *size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Corrupt(where, " has a dimension of ", *size);
      }
      if (d == 0) cols = *size;
      else if (__builtin_mul_overflow(rows, *size, &rows)) return Corrupt(where, " has more elements than 2^64");
      // The format writes the innermost dimension first.
      info.tensor.shape.insert(info.tensor.shape.begin(), static_cast<int64_t>(*size));
    }
    const auto type = cursor_.Scalar<uint32_t>();
    const auto offset = cursor_.Scalar<uint64_t>();
    if (!type || !offset) return Truncated(where);
    info.offset = *offset;
    info.tensor.type_name = Cat("number ", *type);
    for (const GgmlType& known : kGgmlTypes) {
      if (known.id == *type) {
        info.tensor.type_name = known.name;
        info.tensor.type = known.type;
      }
    }
    if (info.tensor.type) {
      const auto row_bytes = WeightRowBytes(*info.tensor.type, static_cast<int64_t>(cols));
      if (!row_bytes.ok()) return Corrupt(where, ": ", row_bytes.status().message());
      if (__builtin_mul_overflow(static_cast<uint64_t>(*row_bytes), rows, &info.bytes)) {
        return Corrupt(where, " has more bytes than 2^64");
      }
    }
    return info;
  }

  Status PlaceTensor(uint64_t data_start, uint64_t alignment, TensorInfo* info) {
    if (info->offset % alignment != 0) {
      return Corrupt("tensor ", Quoted(info->tensor.name), " lies at offset ", info->offset,
                     ", which is not a multiple of the alignment ", alignment);
    }
    uint64_t begin = 0;
    uint64_t end = 0;
    if (__builtin_add_overflow(data_start, info->offset, &begin) || __builtin_add_overflow(begin, info->bytes, &end) ||
        end > bytes_.size()) {
      return Corrupt("tensor ", Quoted(info->tensor.name), " needs ", info->bytes, " bytes at offset ", info->offset,
                     " of the data, the file has ", bytes_.size(), " bytes: truncated?");
    }
    info->tensor.data = bytes_.subspan(static_cast<size_t>(begin), static_cast<size_t>(info->bytes));
    return {};
  }

  size_t offset() const { return cursor_.offset(); }
  template <class... Parts>
  Status Corrupt(const Parts&... what) const {
    return FileError(StatusCode::kCorrupt, path_, what...);
  }

 private:
  Status Truncated(std::string_view where) const {
    return Corrupt("ends within the ", where, ": truncated, or a length is wrong");
  }
  Status CheckCount(std::string_view what, uint64_t count, uint64_t limit, uint64_t least_bytes) const {
    if (count > limit) return Corrupt("claims ", count, " ", what, ", the limit is ", limit);
    if (count > cursor_.left() / least_bytes) {
      return Corrupt("claims ", count, " ", what, ", more than its ", bytes_.size(), " bytes can hold");
    }
    return {};
  }

  Status ReadPayload(std::string_view key, GgufValue* value) {
    const size_t begin = cursor_.offset();
    if (value->type == GgufType::kString) {
      for (uint64_t i = 0; i < value->count; ++i) {
        if (!cursor_.String()) return Truncated(Cat("metadata ", Quoted(key)));
      }
    } else {
      uint64_t bytes = 0;
      if (__builtin_mul_overflow(value->count, uint64_t{ScalarBytes(value->type)}, &bytes) || !cursor_.Take(bytes)) {
        return Truncated(Cat("metadata ", Quoted(key)));
      }
    }
    value->bytes = bytes_.subspan(begin, cursor_.offset() - begin);
    return {};
  }

  const std::string& path_;
  std::span<const std::byte> bytes_;
  Cursor cursor_;
};

std::optional<int64_t> IntegerAt(const GgufValue& value, uint64_t i) {
  const std::byte* p = value.bytes.data() + i * ScalarBytes(value.type);
  switch (value.type) {
    case GgufType::kU8: return Load<uint8_t>(p);
    case GgufType::kI8: return Load<int8_t>(p);
    case GgufType::kU16: return Load<uint16_t>(p);
    case GgufType::kI16: return Load<int16_t>(p);
    case GgufType::kU32: return Load<uint32_t>(p);
    case GgufType::kI32: return Load<int32_t>(p);
    case GgufType::kI64: return Load<int64_t>(p);
    case GgufType::kU64: {
      const auto v = Load<uint64_t>(p);
      if (v > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
      return static_cast<int64_t>(v);
    }
    default: return std::nullopt;
  }
}

bool IsInteger(GgufType type) {
  return ScalarBytes(type) != 0 && type != GgufType::kBool && type != GgufType::kF32 && type != GgufType::kF64;
}

std::optional<double> FloatAt(const GgufValue& value, uint64_t i) {
  const std::byte* p = value.bytes.data() + i * ScalarBytes(value.type);
  if (value.type == GgufType::kF32) return Load<float>(p);
  if (value.type == GgufType::kF64) return Load<double>(p);
  return std::nullopt;
}

}  // namespace

Result<GgufFile> GgufFile::Parse(std::shared_ptr<const MappedFile> file) {
  GgufFile gguf(std::move(file));
  Parser parser(*gguf.file_);
  PREHOC_ASSIGN_OR_RETURN(const Parser::Header header, parser.ReadHeader());
  gguf.version_ = header.version;
  for (uint64_t i = 0; i < header.metadata; ++i) {
    PREHOC_ASSIGN_OR_RETURN(auto entry, parser.ReadMetadata(i));
    const auto [it, is_new] = gguf.metadata_.insert(std::move(entry));
    if (!is_new) return parser.Corrupt("metadata ", Quoted(it->first), " appears twice");
  }
  PREHOC_ASSIGN_OR_RETURN(const auto alignment_key, gguf.Integer("general.alignment", 8, kMaxAlignment));
  const auto alignment = static_cast<uint64_t>(alignment_key.value_or(32));
  if (!std::has_single_bit(alignment)) return parser.Corrupt("alignment ", alignment, " is not a power of two");

  std::vector<Parser::TensorInfo> infos;
  for (uint64_t i = 0; i < header.tensors; ++i) {
    PREHOC_ASSIGN_OR_RETURN(auto info, parser.ReadTensorInfo(i));
    infos.push_back(std::move(info));
  }
  const uint64_t data_start = (uint64_t{parser.offset()} + alignment - 1) / alignment * alignment;
  for (auto& info : infos) {
    PREHOC_RETURN_IF_ERROR(parser.PlaceTensor(data_start, alignment, &info));
    PREHOC_RETURN_IF_ERROR(gguf.tensors_.Add(std::move(info.tensor)));
  }
  return gguf;
}

const GgufValue* GgufFile::Find(std::string_view key) const {
  const auto it = metadata_.find(key);
  return it == metadata_.end() ? nullptr : &it->second;
}

Status GgufFile::WrongType(std::string_view key, std::string_view expected) const {
  return FileError(StatusCode::kCorrupt, path(), "metadata ", Quoted(key), " is not ", expected);
}

Result<std::optional<int64_t>> GgufFile::Integer(std::string_view key, int64_t min, int64_t max) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<int64_t>();
  if (value->is_array) {
    return FileError(StatusCode::kUnsupported, path(), "metadata ", Quoted(key),
                     " is an array (a value per layer); supported: one integer for all layers");
  }
  if (!IsInteger(value->type)) return WrongType(key, "an integer");
  const auto integer = IntegerAt(*value, 0);
  if (!integer || *integer < min || *integer > max) {
    return FileError(StatusCode::kCorrupt, path(), "metadata ", Quoted(key), " is ",
                     integer ? std::to_string(*integer) : "above 2^63", ", expected ", min, " to ", max);
  }
  return integer;
}

Result<std::optional<double>> GgufFile::Float(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<double>();
  if (value->is_array) return WrongType(key, "a float");
  const auto number = FloatAt(*value, 0);
  if (!number || !std::isfinite(*number)) return WrongType(key, "a finite float");
  return number;
}

Result<std::optional<bool>> GgufFile::Bool(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<bool>();
  if (value->is_array || value->type != GgufType::kBool) return WrongType(key, "a bool");
  return std::optional(value->bytes[0] != std::byte{0});
}

Result<std::optional<std::string>> GgufFile::String(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<std::string>();
  if (value->is_array || value->type != GgufType::kString) return WrongType(key, "a string");
  return std::optional(std::string(*Cursor(value->bytes).String()));
}

Result<std::optional<std::vector<std::string>>> GgufFile::Strings(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<std::vector<std::string>>();
  if (!value->is_array || value->type != GgufType::kString) return WrongType(key, "an array of strings");
  std::vector<std::string> strings;
  strings.reserve(static_cast<size_t>(value->count));
  Cursor cursor(value->bytes);
  for (uint64_t i = 0; i < value->count; ++i) strings.emplace_back(*cursor.String());
  return std::optional(std::move(strings));
}

Result<std::optional<std::vector<int64_t>>> GgufFile::Integers(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<std::vector<int64_t>>();
  if (!value->is_array || !IsInteger(value->type)) return WrongType(key, "an array of integers");
  std::vector<int64_t> integers;
  integers.reserve(static_cast<size_t>(value->count));
  for (uint64_t i = 0; i < value->count; ++i) {
    const auto integer = IntegerAt(*value, i);
    if (!integer) return WrongType(key, "an array of integers below 2^63");
    integers.push_back(*integer);
  }
  return std::optional(std::move(integers));
}

Result<std::optional<std::vector<float>>> GgufFile::Floats(std::string_view key) const {
  const GgufValue* value = Find(key);
  if (value == nullptr) return std::optional<std::vector<float>>();
  if (!value->is_array || (value->type != GgufType::kF32 && value->type != GgufType::kF64)) {
    return WrongType(key, "an array of floats");
  }
  std::vector<float> floats;
  floats.reserve(static_cast<size_t>(value->count));
  for (uint64_t i = 0; i < value->count; ++i) {
    const auto number = static_cast<float>(*FloatAt(*value, i));
    if (!std::isfinite(number)) return WrongType(key, "an array of finite floats");
    floats.push_back(number);
  }
  return std::optional(std::move(floats));
}

}  // namespace prehoc::reference::loader
