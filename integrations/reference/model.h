// A Llama-family model in memory: configuration, weights as stored (quantised blocks stay quantised), tokenizer spec.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "integrations/reference/tokenizer_spec.h"

namespace prehoc::reference {

// Storage of a weight matrix. Block layouts as in the GGUF format; rows are contiguous, a row is a whole
// number of blocks (32 elements for Q8_0, Q4_0, Q4_1; 256 for Q4_K, Q6_K).
enum class WeightType : uint8_t { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1, kQ4_K, kQ6_K };
std::string_view WeightTypeName(WeightType type);
// Bytes of one row of `cols` elements. Returns kInvalid if cols is not a whole number of blocks.
Result<size_t> WeightRowBytes(WeightType type, int64_t cols);
// Expands `row` [cols] to fp32; exact for every type.
void DequantizeRow(WeightType type, const std::byte* row, int64_t cols, float* out);

// y = W x with W [rows, cols]: rows = output features. Does not own its bytes: Model does.
struct WeightMatrix {
  WeightType type = WeightType::kF32;
  int64_t rows = 0, cols = 0;
  const std::byte* data = nullptr;  // null = absent
  size_t row_bytes = 0;
  const std::byte* row(int64_t r) const { return data + static_cast<size_t>(r) * row_bytes; }
  explicit operator bool() const { return data != nullptr; }
};

enum class RopeLayout : uint8_t {
  kHalf,         // pairs (i, i + d/2): Hugging Face; GGUF of Qwen
  kInterleaved,  // pairs (2i, 2i + 1): GGUF of the llama architecture (its Q and K rows are permuted to match)
};

// Only `theta` matters for kNone. Formulas as in transformers' modeling_rope_utils.
struct RopeScaling {
  enum class Type : uint8_t { kNone, kLinear, kDynamic, kYarn, kLlama3, kLongRope } type = Type::kNone;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;        // llama3
  int64_t original_max_positions = 0;                       // llama3, yarn, dynamic, longrope
  double beta_fast = 32, beta_slow = 1;                     // yarn
  std::optional<double> attention_factor;                   // yarn, longrope
  double mscale = 0, mscale_all_dim = 0;                    // yarn
  bool truncate = true;                                     // yarn
  std::vector<double> short_factor, long_factor;            // longrope, [rotary_dim / 2]
};

struct ModelConfig {
  std::string architecture;  // "llama", "mistral", "qwen2", "qwen3"
  std::string name;          // for people
  int32_t layers = 0, heads = 0, kv_heads = 0, head_dim = 0, hidden = 0, intermediate = 0, vocab = 0;
  int64_t max_positions = 0;  // [tokens]; of dynamic RoPE scaling: as far as it stretches
  float rms_eps = 1e-5f;
  double rope_theta = 10000;
  RopeLayout rope_layout = RopeLayout::kHalf;
  RopeScaling rope_scaling;
  std::vector<float> rope_freq_factors;  // GGUF's rope_freqs.weight [head_dim / 2]: inverse frequencies are divided by it; or empty
  bool tied_embeddings = false;
  int64_t sliding_window = 0;  // 0 = none
};

struct LayerWeights {
  WeightMatrix q, k, v, o, gate, up, down;
  std::vector<float> attention_norm, ffn_norm;  // [hidden]
  std::vector<float> q_bias, k_bias, v_bias, o_bias;  // or empty
  std::vector<float> q_norm, k_norm;            // [head_dim] or empty (QK norm, applied per head before RoPE)
};

// Immutable after loading; shared by engines. Maps the file where it can, so loading costs no copy.
struct Model {
  ModelConfig config;
  TokenizerSpec tokenizer;
  WeightMatrix embedding;  // [vocab, hidden]
  WeightMatrix output;     // [vocab, hidden]; the embedding when tied
  std::vector<float> output_norm;  // [hidden]
  std::vector<LayerWeights> layers;
  // SHA-256 over the configuration and every weight byte as used (adapters included): two models with the
  // same fingerprint write the same K and V.
  std::array<uint8_t, 32> fingerprint{};
  size_t weight_bytes = 0;
  std::vector<std::shared_ptr<const void>> owners;  // mapped files and converted buffers
};

struct LoadOptions {
  std::string path;  // a .gguf file, or a directory with config.json, *.safetensors and tokenizer.json
  std::string lora;  // a PEFT adapter directory (adapter_config.json, adapter_model.safetensors), merged at load; or empty.
                     // Its config_overrides.json, where present, is applied to the configuration.
  std::function<void(double fraction)> progress;  // may be empty
  int64_t positions = 0;  // that it takes, whatever it was made for (another fingerprint then); 0 = the model's. Fewer than 1 are kInvalid
};

// Returns kNotFound (no such file), kInvalid or kCorrupt (what is wrong, where, what to do), kUnsupported
// (architecture or type; names the supported ones). Reads nothing outside the given paths.
Result<std::shared_ptr<const Model>> LoadModel(const LoadOptions& options);

}  // namespace prehoc::reference
