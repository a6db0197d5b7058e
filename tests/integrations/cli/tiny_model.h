// A small whole model on disk for tests of the command: random weights, a real tokenizer, two layers.
#pragma once
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/rng.h"
#include "tests/integrations/loader/model_files.h"
#include "tests/support/source_paths.h"

namespace prehoc::cli {

struct TinyShape {
  int32_t layers = 2, heads = 4, kv_heads = 2, head_dim = 16, hidden = 64, intermediate = 96, vocab = 4008;
  int64_t positions = 4096;
};

// Weights of variance 1 / inputs keep activations, and so attention, alive: a wrong row changes the answer.
inline std::vector<reference::TestTensor> TinyWeights(const TinyShape& shape, uint64_t seed) {
  Rng rng(seed);
  std::vector<reference::TestTensor> tensors;
  const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols, double gain) {
    tensors.push_back(reference::Floats(name, {rows, cols}, rng.Normals(static_cast<size_t>(rows * cols), gain / std::sqrt(static_cast<double>(cols)))));
  };
  const auto norm = [&](const std::string& name) {
    tensors.push_back(reference::Floats(name, {shape.hidden}, std::vector<float>(static_cast<size_t>(shape.hidden), 1.0f)));
  };
  const int64_t q = int64_t{shape.heads} * shape.head_dim, kv = int64_t{shape.kv_heads} * shape.head_dim;
  matrix("model.embed_tokens.weight", shape.vocab, shape.hidden, 8);
  matrix("lm_head.weight", shape.vocab, shape.hidden, 2);
  norm("model.norm.weight");
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    norm(prefix + "input_layernorm.weight");
    norm(prefix + "post_attention_layernorm.weight");
    matrix(prefix + "self_attn.q_proj.weight", q, shape.hidden, 3);
    matrix(prefix + "self_attn.k_proj.weight", kv, shape.hidden, 3);
    matrix(prefix + "self_attn.v_proj.weight", kv, shape.hidden, 1);
    matrix(prefix + "self_attn.o_proj.weight", shape.hidden, q, 2);
    matrix(prefix + "mlp.gate_proj.weight", shape.intermediate, shape.hidden, 1);
    matrix(prefix + "mlp.up_proj.weight", shape.intermediate, shape.hidden, 1);
    matrix(prefix + "mlp.down_proj.weight", shape.hidden, shape.intermediate, 1);
  }
  return tensors;
}

// Writes a Hugging Face directory that `--model` takes. Other seeds are other models of the same shape.
inline void WriteTinyModel(const std::string& directory, uint64_t seed, const TinyShape& shape = {}) {
  std::filesystem::create_directories(directory);
  const nlohmann::json config = {
      {"model_type", "llama"}, {"architectures", {"LlamaForCausalLM"}}, {"hidden_size", shape.hidden},
      {"intermediate_size", shape.intermediate}, {"num_hidden_layers", shape.layers}, {"num_attention_heads", shape.heads},
      {"num_key_value_heads", shape.kv_heads}, {"head_dim", shape.head_dim}, {"vocab_size", shape.vocab}, {"rms_norm_eps", 1e-5},
      {"max_position_embeddings", shape.positions}, {"tie_word_embeddings", false}, {"eos_token_id", 4002}};
  reference::WriteFile(directory + "/config.json", config.dump());
  reference::WriteFile(directory + "/model.safetensors", reference::Safetensors(TinyWeights(shape, seed)));
  std::filesystem::copy_file(GoldenPath("/tokenizers/qwen2.tokenizer.json"), directory + "/tokenizer.json");
}

}  // namespace prehoc::cli
