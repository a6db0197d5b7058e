// Writes GGUF and safetensors files byte by byte, so that tests can spoil any part of them, and small whole models.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/rng.h"
#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

using Bytes = std::vector<std::byte>;

template <class T>
void Append(Bytes* bytes, const T& value) {
  const auto* p = reinterpret_cast<const std::byte*>(&value);
  bytes->insert(bytes->end(), p, p + sizeof value);
}
void AppendText(Bytes* bytes, std::string_view text);  // as it is
Bytes BytesOf(const std::vector<float>& values);
Bytes HalvesOf(const std::vector<float>& values);

void WriteFile(const std::string& path, const Bytes& bytes);
void WriteFile(const std::string& path, std::string_view text);
std::shared_ptr<const loader::MappedFile> InMemory(Bytes bytes);  // named "test"

// A tensor as a test sees it: shape outermost first.
struct TestTensor {
  std::string name, dtype;  // as safetensors: F32, F16, BF16
  std::vector<int64_t> shape;
  Bytes bytes;
};
TestTensor Floats(std::string name, std::vector<int64_t> shape, std::vector<float> values);
TestTensor RandomFloats(std::string name, std::vector<int64_t> shape, Rng* rng);

// Header and data one after another, as the format wants them.
Bytes Safetensors(const std::vector<TestTensor>& tensors);
Bytes SafetensorsWithHeader(std::string_view header, const Bytes& data);

// Metadata and tensors in the order given; every method returns the builder.
class GgufBuilder {
 public:
  GgufBuilder& Metadata(std::string_view key, uint32_t type, const Bytes& payload);
  GgufBuilder& U32(std::string_view key, uint32_t value);
  GgufBuilder& F32(std::string_view key, float value);
  GgufBuilder& Bool(std::string_view key, bool value);
  GgufBuilder& String(std::string_view key, std::string_view value);
  GgufBuilder& Strings(std::string_view key, const std::vector<std::string>& values);
  GgufBuilder& Tensor(std::string_view name, uint32_t ggml_type, const std::vector<int64_t>& shape, const Bytes& data);
  GgufBuilder& Tensor(const TestTensor& tensor);
  Bytes Build() const;

  uint32_t version = 3, alignment = 32;
  // The next Build() writes these counts and offsets instead of the true ones, where they are set.
  std::optional<uint64_t> claimed_tensors, claimed_metadata;
  std::function<uint64_t(uint64_t offset)> claimed_offset;

 private:
  struct Entry {
    std::string name;
    uint32_t type;
    std::vector<int64_t> shape;
    Bytes data;
  };
  Bytes metadata_;
  uint64_t num_metadata_ = 0;
  std::vector<Entry> tensors_;
};

// A whole tiny model with Hugging Face's names and row order; F32.
struct TinyModel {
  int32_t layers = 2, heads = 4, kv_heads = 2, head_dim = 8, hidden = 32, intermediate = 48, vocab = 40;
  std::vector<TestTensor> tensors;  // tied embeddings

  explicit TinyModel(Rng* rng);
  TestTensor* Find(std::string_view name);  // null if there is none
  std::string ConfigJson(std::string_view more = "") const;  // `more` begins with a comma
  // The same model as a GGUF file of the llama architecture: other names, Q and K rows interleaved.
  GgufBuilder Gguf() const;
};

}  // namespace prehoc::reference
