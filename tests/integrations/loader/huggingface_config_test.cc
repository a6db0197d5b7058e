// config.json: old and new spellings, the defaults of each model type, and refusals.
#include "integrations/reference/loader/huggingface_config.h"

#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

using Type = RopeScaling::Type;

// Shapes that need saying; `more` begins with a comma.
std::string Config(std::string_view type, std::string_view more = "") {
  return R"({"model_type": ")" + std::string(type) + R"(", "hidden_size": 64, "intermediate_size": 96,)"
         R"( "num_hidden_layers": 4, "num_attention_heads": 32, "vocab_size": 100)" + std::string(more) + "}";
}
Result<loader::HuggingFaceConfig> Read(std::string_view type, std::string_view more = "") {
  return loader::ReadHuggingFaceConfig(Config(type, more), "config.json");
}

TEST(HuggingFaceConfigTest, DefaultsOfEachType) {
  const auto llama = Read("llama"), mistral = Read("mistral"), qwen2 = Read("qwen2"), qwen3 = Read("qwen3");
  for (const auto* config : {&llama, &mistral, &qwen2, &qwen3}) {
    ASSERT_OK(*config);
    EXPECT_EQ((*config)->model.rms_eps, 1e-6f);
    EXPECT_EQ((*config)->model.rope_theta, 10000);
    EXPECT_EQ((*config)->model.rope_layout, RopeLayout::kHalf);
    EXPECT_EQ((*config)->model.rope_scaling.type, Type::kNone);
    EXPECT_FALSE((*config)->model.tied_embeddings);
    EXPECT_TRUE((*config)->eos_ids.empty());
  }
  EXPECT_EQ(llama->model.kv_heads, 32);
  EXPECT_EQ(mistral->model.kv_heads, 8);
  EXPECT_EQ(qwen2->model.kv_heads, 32);
  EXPECT_EQ(llama->model.head_dim, 2);
  EXPECT_EQ(qwen3->model.head_dim, 128);
  EXPECT_EQ(llama->model.max_positions, 2048);
  EXPECT_EQ(mistral->model.max_positions, 131072);
  EXPECT_EQ(mistral->model.sliding_window, 4096);
  EXPECT_EQ(qwen2->model.sliding_window, 0);
  EXPECT_EQ(llama->parts.qkv_bias, loader::Presence::kAbsent);
  EXPECT_EQ(qwen2->parts.qkv_bias, loader::Presence::kRequired);
  EXPECT_EQ(qwen2->parts.o_bias, loader::Presence::kAbsent);
  EXPECT_EQ(qwen3->parts.qk_norm, loader::Presence::kRequired);
}

TEST(HuggingFaceConfigTest, FieldsAreRead) {
  const auto c = Read("llama", R"(, "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    "max_position_embeddings": 8192, "attention_bias": true, "rope_theta": 100000, "bos_token_id": 1,
    "eos_token_id": [2, 7], "sliding_window": 9, "hidden_act": "silu", "mlp_bias": false)");
  ASSERT_OK(c);
  EXPECT_EQ(c->model.kv_heads, 4);
  EXPECT_EQ(c->model.head_dim, 16);
  EXPECT_EQ(c->model.rms_eps, 1e-5f);
  EXPECT_EQ(c->model.max_positions, 8192);
  EXPECT_EQ(c->model.rope_theta, 100000);
  EXPECT_TRUE(c->model.tied_embeddings);
  EXPECT_EQ(c->model.sliding_window, 0);  // Llama has none
  EXPECT_EQ(c->parts.qkv_bias, loader::Presence::kRequired);
  EXPECT_EQ(c->parts.o_bias, loader::Presence::kRequired);
  EXPECT_EQ(c->bos_id, 1);
  EXPECT_EQ(c->eos_ids, (std::vector<int64_t>{2, 7}));
  // Null is absent, and one end-of-text id is a list of one.
  const auto nulls = Read("mistral", R"(, "head_dim": null, "rope_scaling": null, "sliding_window": null, "eos_token_id": 2)");
  ASSERT_OK(nulls);
  EXPECT_EQ(nulls->model.sliding_window, 0);
  EXPECT_EQ(nulls->eos_ids, std::vector<int64_t>{2});
  // Mistral's layers have no biases, whatever the file says.
  EXPECT_EQ(Read("mistral", R"(, "attention_bias": true)")->parts.qkv_bias, loader::Presence::kAbsent);
}

struct Spelling {
  const char* old_style;
  const char* new_style;
};

TEST(HuggingFaceConfigTest, BothSpellingsOfRope) {
  const Spelling spellings[] = {
      {R"("rope_theta": 5e5)", R"("rope_parameters": {"rope_type": "default", "rope_theta": 5e5})"},
      {R"("rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2})",
       R"("rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})"},
      {R"("rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512})",
       R"("rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000, "original_max_position_embeddings": 512})"},
  };
  for (const Spelling& s : spellings) {
    const auto a = Read("llama", "," + std::string(s.old_style)), b = Read("llama", "," + std::string(s.new_style));
    ASSERT_OK(a);
    ASSERT_OK(b);
    EXPECT_EQ(a->model.rope_theta, 5e5);
    EXPECT_EQ(b->model.rope_theta, 5e5);
    EXPECT_EQ(a->model.rope_scaling.type, b->model.rope_scaling.type);
    EXPECT_EQ(a->model.rope_scaling.factor, b->model.rope_scaling.factor);
    EXPECT_EQ(a->model.rope_scaling.original_max_positions, b->model.rope_scaling.original_max_positions);
  }
}

TEST(HuggingFaceConfigTest, EveryScaling) {
  const auto rope = [](std::string_view fields, std::string_view beside = "") {
    auto c = Read("llama", R"(, "head_dim": 4, "max_position_embeddings": 4096, "rope_scaling": {)" + std::string(fields) + "}" +
                               std::string(beside));
    EXPECT_OK(c);
    return c.ok() ? c->model : ModelConfig{};
  };
  const auto dynamic = rope(R"("type": "dynamic", "factor": 2.5)");
  EXPECT_EQ(dynamic.rope_scaling.type, Type::kDynamic);
  EXPECT_EQ(dynamic.rope_scaling.original_max_positions, 4096);
  EXPECT_EQ(dynamic.max_positions, 10240);

  const auto yarn = rope(R"("rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2,
    "attention_factor": 0.5, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": false)").rope_scaling;
  EXPECT_EQ(yarn.type, Type::kYarn);
  EXPECT_EQ(yarn.factor, 8);
  EXPECT_EQ(yarn.beta_fast, 16);
  EXPECT_EQ(yarn.beta_slow, 2);
  EXPECT_EQ(yarn.attention_factor, 0.5);
  EXPECT_EQ(yarn.mscale, 0.7);
  EXPECT_EQ(yarn.mscale_all_dim, 0.9);
  EXPECT_FALSE(yarn.truncate);
  const auto plain = rope(R"("rope_type": "yarn", "original_max_position_embeddings": 512, "beta_fast": 0)").rope_scaling;
  EXPECT_EQ(plain.factor, 8);  // 4096 / 512
  EXPECT_EQ(plain.beta_fast, 32);
  EXPECT_EQ(plain.beta_slow, 1);
  EXPECT_EQ(plain.attention_factor, std::nullopt);

  const auto llama3 = rope(R"("rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 1024)").rope_scaling;
  EXPECT_EQ(llama3.type, Type::kLlama3);
  EXPECT_EQ(llama3.factor, 32);
  EXPECT_EQ(llama3.low_freq_factor, 1);
  EXPECT_EQ(llama3.high_freq_factor, 4);
  EXPECT_EQ(llama3.original_max_positions, 1024);

  const auto longrope = rope(R"("type": "longrope", "short_factor": [1, 1.5], "long_factor": [2, 4])",
                             R"(, "original_max_position_embeddings": 1024)").rope_scaling;
  EXPECT_EQ(longrope.type, Type::kLongRope);
  EXPECT_EQ(longrope.factor, 4);
  EXPECT_EQ(longrope.short_factor, (std::vector<double>{1, 1.5}));
  EXPECT_EQ(longrope.long_factor, (std::vector<double>{2, 4}));
}

TEST(HuggingFaceConfigTest, SlidingWindows) {
  const auto window = [](std::string_view type, std::string_view more) -> int64_t {
    const auto c = Read(type, R"(, "max_position_embeddings": 1000)" + std::string(more));
    EXPECT_OK(c);
    return c.ok() ? c->model.sliding_window : -1;
  };
  EXPECT_EQ(window("mistral", R"(, "sliding_window": 100)"), 100);
  EXPECT_EQ(window("mistral", R"(, "sliding_window": 1000)"), 0);  // never reached
  EXPECT_EQ(window("qwen2", R"(, "sliding_window": 100)"), 0);
  EXPECT_EQ(window("qwen2", R"(, "sliding_window": 100, "use_sliding_window": false, "max_window_layers": 0)"), 0);
  EXPECT_EQ(window("qwen2", R"(, "sliding_window": 100, "use_sliding_window": true)"), 0);  // from layer 28 of 4 on
  EXPECT_EQ(window("qwen2", R"(, "sliding_window": 100, "use_sliding_window": true, "max_window_layers": 0)"), 100);
  const std::string full = R"("full_attention")", sliding = R"("sliding_attention")";
  const auto layers = [](const std::string& a, const std::string& b) {
    return R"(, "layer_types": [)" + a + "," + b + "," + b + "," + b + "]";
  };
  EXPECT_EQ(window("qwen3", R"(, "sliding_window": 100, "use_sliding_window": true)" + layers(sliding, sliding)), 100);
  EXPECT_EQ(window("qwen3", layers(full, full)), 0);
  EXPECT_STATUS(StatusCode::kUnsupported, "a sliding window in 3 of 4 layers",
                Read("qwen2", R"(, "sliding_window": 100, "use_sliding_window": true)" + layers(full, sliding)));
  EXPECT_STATUS(StatusCode::kUnsupported, "a sliding window in 1 of 4 layers",
                Read("qwen2", R"(, "sliding_window": 100, "use_sliding_window": true, "max_window_layers": 3)"));
  EXPECT_STATUS(StatusCode::kInvalid, "without a 'sliding_window'", Read("qwen2", layers(full, sliding)));
  EXPECT_STATUS(StatusCode::kInvalid, "1 entries for 4 layers", Read("qwen2", R"(, "layer_types": ["full_attention"])"));
  EXPECT_STATUS(StatusCode::kUnsupported, "other kinds", Read("qwen2", layers(full, R"("linear_attention")")));
}

TEST(HuggingFaceConfigTest, Refusals) {
  EXPECT_STATUS(StatusCode::kUnsupported, "'gpt2'; supported: llama, mistral, qwen2, qwen3", Read("gpt2"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'hidden_act' is 'gelu'", Read("llama", R"(, "hidden_act": "gelu")"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'mlp_bias'", Read("llama", R"(, "mlp_bias": true)"));
  EXPECT_STATUS(StatusCode::kUnsupported, "quantised", Read("llama", R"(, "quantization_config": {"bits": 4})"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'partial_rotary_factor' is 0.5", Read("llama", R"(, "partial_rotary_factor": 0.5)"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'rope_scaling.rope_type' is 'mrope'; supported: default",
                Read("llama", R"(, "rope_scaling": {"type": "mrope"})"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'rope_parameters.full_attention' describes RoPE for some layers",
                Read("llama", R"(, "rope_parameters": {"full_attention": {"rope_type": "default"}})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'rope_scaling.factor' is missing", Read("llama", R"(, "rope_scaling": {"type": "linear"})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'rope_scaling.factor' is -1", Read("llama", R"(, "rope_scaling": {"type": "linear", "factor": -1})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'rope_scaling.high_freq_factor' is missing",
                Read("llama", R"(, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1})"));
  EXPECT_STATUS(StatusCode::kInvalid, "longrope has 3 factors, expected 1",
                Read("llama", R"(, "rope_scaling": {"rope_type": "longrope", "short_factor": [1,1,1], "long_factor": [1,1,1]})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'hidden_size' is not an integer",
                loader::ReadHuggingFaceConfig(R"({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 6.5})", "c"));
  EXPECT_OK(Read("llama", R"(, "transformers_version": "9", "use_cache": true)"));  // of no concern
  EXPECT_STATUS(StatusCode::kInvalid, "'num_key_value_heads' is 0, expected 1 to", Read("llama", R"(, "num_key_value_heads": 0)"));
  EXPECT_STATUS(StatusCode::kInvalid, "32 heads are not a multiple of 5", Read("llama", R"(, "num_key_value_heads": 5)"));
  EXPECT_STATUS(StatusCode::kInvalid, "head size 3 is odd", Read("llama", R"(, "head_dim": 3)"));
  EXPECT_STATUS(StatusCode::kInvalid, "'rms_norm_eps' is not a finite number", Read("llama", R"(, "rms_norm_eps": "x")"));
  EXPECT_STATUS(StatusCode::kInvalid, "epsilon is 2", Read("llama", R"(, "rms_norm_eps": 2)"));
  EXPECT_STATUS(StatusCode::kInvalid, "'eos_token_id' is 99999999999", Read("llama", R"(, "eos_token_id": [1, 99999999999])"));
  EXPECT_STATUS(StatusCode::kInvalid, "'max_position_embeddings' is 18446744073709551615",
                Read("llama", R"(, "max_position_embeddings": 18446744073709551615)"));
  EXPECT_STATUS(StatusCode::kCorrupt, "not a JSON object", loader::ReadHuggingFaceConfig("", "c"));
  EXPECT_STATUS(StatusCode::kCorrupt, "not a JSON object", loader::ReadHuggingFaceConfig("[1]", "c"));
  EXPECT_STATUS(StatusCode::kCorrupt, "'model_type' appears twice", Read("llama", R"(, "model_type": "qwen2")"));
  EXPECT_STATUS(StatusCode::kCorrupt, "nests deeper than 32", Read("llama", ", \"x\": " + std::string(4000, '[')));
  EXPECT_STATUS(StatusCode::kInvalid, "'model_type' is missing", loader::ReadHuggingFaceConfig("{}", "c"));
}

TEST(ConfigOverridesTest, ReplaceWhatTheyName) {
  ModelConfig config = Read("llama", R"(, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2})")->model;
  config.rope_freq_factors = {1};
  ModelConfig theta = config, rope = config;
  ASSERT_OK(loader::ApplyConfigOverrides(R"({"rope_theta": 1e6, "max_position_embeddings": 4096})", "o", &theta));
  EXPECT_EQ(theta.rope_theta, 1e6);
  EXPECT_EQ(theta.max_positions, 4096);
  EXPECT_EQ(theta.rope_scaling.type, Type::kLinear);
  ASSERT_OK(loader::ApplyConfigOverrides(R"({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}})", "o", &rope));
  EXPECT_EQ(rope.rope_theta, 1e7);
  EXPECT_EQ(rope.rope_scaling.type, Type::kNone);
  EXPECT_TRUE(rope.rope_freq_factors.empty());
}

TEST(ConfigOverridesTest, AnErrorChangesNothing) {
  ModelConfig config = Read("llama")->model;
  EXPECT_STATUS(StatusCode::kUnsupported, "'hidden_size' cannot be overridden; supported: rope_theta",
                loader::ApplyConfigOverrides(R"({"rope_theta": 1e6, "hidden_size": 3})", "o", &config));
  EXPECT_STATUS(StatusCode::kInvalid, "RoPE theta is -1",
                loader::ApplyConfigOverrides(R"({"max_position_embeddings": 7, "rope_theta": -1})", "o", &config));
  EXPECT_EQ(config.rope_theta, 10000);
  EXPECT_EQ(config.max_positions, 2048);
}

}  // namespace
}  // namespace prehoc::reference
