#include "tests/integrations/loader/model_files.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/half.h"

namespace prehoc::reference {
namespace {

size_t ElementsOf(const std::vector<int64_t>& shape) {
  size_t n = 1;
  for (const int64_t size : shape) n *= static_cast<size_t>(size);
  return n;
}

void AppendString(Bytes* bytes, std::string_view text) {
  Append(bytes, uint64_t{text.size()});
  AppendText(bytes, text);
}

}  // namespace

void AppendText(Bytes* bytes, std::string_view text) {
  const auto* p = reinterpret_cast<const std::byte*>(text.data());
  bytes->insert(bytes->end(), p, p + text.size());
}

Bytes BytesOf(const std::vector<float>& values) {
  Bytes bytes;
  for (const float v : values) Append(&bytes, v);
  return bytes;
}

Bytes HalvesOf(const std::vector<float>& values) {
  Bytes bytes;
  for (const float v : values) Append(&bytes, FloatToHalf(v));
  return bytes;
}

void WriteFile(const std::string& path, const Bytes& bytes) {
  WriteFile(path, std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
}

void WriteFile(const std::string& path, std::string_view text) {
  std::ofstream file(path, std::ios::binary);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  EXPECT_TRUE(file.good()) << path;
}

std::shared_ptr<const loader::MappedFile> InMemory(Bytes bytes) {
  return loader::MappedFile::FromBytes("test", std::move(bytes));
}

TestTensor Floats(std::string name, std::vector<int64_t> shape, std::vector<float> values) {
  EXPECT_EQ(values.size(), ElementsOf(shape)) << name;
  return {std::move(name), "F32", std::move(shape), BytesOf(values)};
}

TestTensor RandomFloats(std::string name, std::vector<int64_t> shape, Rng* rng) {
  const size_t n = ElementsOf(shape);
  return Floats(std::move(name), std::move(shape), rng->Normals(n, 0.1));
}

Bytes Safetensors(const std::vector<TestTensor>& tensors) {
  nlohmann::json header;
  header["__metadata__"] = {{"format", "pt"}};
  Bytes data;
  for (const TestTensor& t : tensors) {
    const size_t begin = data.size();
    data.insert(data.end(), t.bytes.begin(), t.bytes.end());
    header[t.name] = {{"dtype", t.dtype}, {"shape", t.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return SafetensorsWithHeader(text, data);
}

Bytes SafetensorsWithHeader(std::string_view header, const Bytes& data) {
  Bytes bytes;
  AppendString(&bytes, header);
  bytes.insert(bytes.end(), data.begin(), data.end());
  return bytes;
}

GgufBuilder& GgufBuilder::Metadata(std::string_view key, uint32_t type, const Bytes& payload) {
  AppendString(&metadata_, key);
  Append(&metadata_, type);
  metadata_.insert(metadata_.end(), payload.begin(), payload.end());
  ++num_metadata_;
  return *this;
}

GgufBuilder& GgufBuilder::U32(std::string_view key, uint32_t value) {
  Bytes payload;
  Append(&payload, value);
  return Metadata(key, 4, payload);
}

GgufBuilder& GgufBuilder::F32(std::string_view key, float value) {
  Bytes payload;
  Append(&payload, value);
  return Metadata(key, 6, payload);
}

GgufBuilder& GgufBuilder::Bool(std::string_view key, bool value) {
  return Metadata(key, 7, {std::byte{value}});
}

GgufBuilder& GgufBuilder::String(std::string_view key, std::string_view value) {
  Bytes payload;
  AppendString(&payload, value);
  return Metadata(key, 8, payload);
}

GgufBuilder& GgufBuilder::Strings(std::string_view key, const std::vector<std::string>& values) {
  Bytes payload;
  Append(&payload, uint32_t{8});
  Append(&payload, uint64_t{values.size()});
  for (const std::string& v : values) AppendString(&payload, v);
  return Metadata(key, 9, payload);
}

GgufBuilder& GgufBuilder::Tensor(std::string_view name, uint32_t ggml_type, const std::vector<int64_t>& shape,
                                 const Bytes& data) {
  tensors_.push_back({std::string(name), ggml_type, shape, data});
  return *this;
}

GgufBuilder& GgufBuilder::Tensor(const TestTensor& tensor) {
  const std::map<std::string, uint32_t> types = {{"F32", 0}, {"F16", 1}, {"BF16", 30}};
  return Tensor(tensor.name, types.at(tensor.dtype), tensor.shape, tensor.bytes);
}

Bytes GgufBuilder::Build() const {
  Bytes bytes;
  AppendText(&bytes, "GGUF");
  Append(&bytes, version);
  Append(&bytes, claimed_tensors.value_or(tensors_.size()));
  Append(&bytes, claimed_metadata.value_or(num_metadata_));
  bytes.insert(bytes.end(), metadata_.begin(), metadata_.end());
  Bytes data;
  for (const Entry& t : tensors_) {
    data.resize((data.size() + alignment - 1) / alignment * alignment);
    AppendString(&bytes, t.name);
    Append(&bytes, static_cast<uint32_t>(t.shape.size()));
    for (auto size = t.shape.rbegin(); size != t.shape.rend(); ++size) Append(&bytes, *size);
    Append(&bytes, t.type);
    Append(&bytes, claimed_offset ? claimed_offset(data.size()) : uint64_t{data.size()});
    data.insert(data.end(), t.data.begin(), t.data.end());
  }
  bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
  bytes.insert(bytes.end(), data.begin(), data.end());
  return bytes;
}

TinyModel::TinyModel(Rng* rng) {
  const int64_t q = int64_t{heads} * head_dim, kv = int64_t{kv_heads} * head_dim;
  const auto add = [&](std::string name, std::vector<int64_t> shape) {
    tensors.push_back(RandomFloats(std::move(name), std::move(shape), rng));
  };
  add("model.embed_tokens.weight", {vocab, hidden});
  add("model.norm.weight", {hidden});
  for (int32_t layer = 0; layer < layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix + "input_layernorm.weight", {hidden});
    add(prefix + "post_attention_layernorm.weight", {hidden});
    add(prefix + "self_attn.q_proj.weight", {q, hidden});
    add(prefix + "self_attn.k_proj.weight", {kv, hidden});
    add(prefix + "self_attn.v_proj.weight", {kv, hidden});
    add(prefix + "self_attn.o_proj.weight", {hidden, q});
    add(prefix + "mlp.gate_proj.weight", {intermediate, hidden});
    add(prefix + "mlp.up_proj.weight", {intermediate, hidden});
    add(prefix + "mlp.down_proj.weight", {hidden, intermediate});
  }
}

TestTensor* TinyModel::Find(std::string_view name) {
  for (TestTensor& t : tensors) {
    if (t.name == name) return &t;
  }
  return nullptr;
}

std::string TinyModel::ConfigJson(std::string_view more) const {
  nlohmann::json json = {{"model_type", "llama"}, {"hidden_size", hidden}, {"intermediate_size", intermediate},
                         {"num_hidden_layers", layers}, {"num_attention_heads", heads}, {"head_dim", head_dim},
                         {"num_key_value_heads", kv_heads}, {"vocab_size", vocab}, {"rms_norm_eps", 1e-5},
                         {"max_position_embeddings", 256}, {"tie_word_embeddings", true}};
  std::string text = json.dump();
  text.pop_back();
  return text + std::string(more) + "}";
}

GgufBuilder TinyModel::Gguf() const {
  GgufBuilder out;
  out.String("general.architecture", "llama").String("general.name", "tiny");
  out.U32("llama.block_count", static_cast<uint32_t>(layers)).U32("llama.embedding_length", static_cast<uint32_t>(hidden));
  out.U32("llama.feed_forward_length", static_cast<uint32_t>(intermediate)).U32("llama.context_length", 256);
  out.U32("llama.attention.head_count", static_cast<uint32_t>(heads));
  out.U32("llama.attention.head_count_kv", static_cast<uint32_t>(kv_heads));
  out.F32("llama.attention.layer_norm_rms_epsilon", 1e-5f);
  const std::map<std::string, std::string> parts = {
      {"input_layernorm", "attn_norm"}, {"post_attention_layernorm", "ffn_norm"}, {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"}, {"self_attn.o_proj", "attn_output"},
      {"mlp.gate_proj", "ffn_gate"}, {"mlp.up_proj", "ffn_up"}, {"mlp.down_proj", "ffn_down"}};
  for (TestTensor t : tensors) {
    if (t.name == "model.embed_tokens.weight") {
      t.name = "token_embd.weight";
    } else if (t.name == "model.norm.weight") {
      t.name = "output_norm.weight";
    } else {
      const std::string rest = t.name.substr(std::strlen("model.layers."));
      const size_t dot = rest.find('.');
      const std::string part = rest.substr(dot + 1, rest.size() - dot - 1 - std::strlen(".weight"));
      const bool rotated = part == "self_attn.q_proj" || part == "self_attn.k_proj";
      const size_t row_bytes = static_cast<size_t>(t.shape.back()) * 4, d = static_cast<size_t>(head_dim);
      Bytes rows = t.bytes;
      for (size_t row = 0; rotated && row < rows.size() / row_bytes; ++row) {
        // Element (head, half, pair) goes to (head, pair, half).
        const size_t head = row / d, half = row % d / (d / 2), pair = row % (d / 2);
        std::memcpy(&rows[(head * d + 2 * pair + half) * row_bytes], &t.bytes[row * row_bytes], row_bytes);
      }
      t.bytes = rows;
      t.name = "blk." + rest.substr(0, dot) + "." + parts.at(part) + ".weight";
    }
    out.Tensor(t);
  }
  return out;
}

}  // namespace prehoc::reference
