// LoadModel(): directories and files, what is missing, and what a fingerprint stands for.
#include <gtest/gtest.h>

#include <sys/stat.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "base/executor.h"
#include "integrations/reference/loader/fingerprint.h"
#include "integrations/reference/model.h"
#include "integrations/reference/tokenizer/tokenizer.h"
#include "tests/integrations/loader/model_files.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"

namespace prehoc::reference {
namespace {

// Three byte-level tokens, and one that ends text.
constexpr std::string_view kTokenizerJson = R"({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}, "decoder": {"type": "ByteLevel"},
  "added_tokens": [{"id": 3, "content": "<|endoftext|>", "special": true}, {"id": 4, "content": "<|stop|>", "special": true}]})";

class DirectoryTest : public testing::Test {
 protected:
  DirectoryTest() : tiny_(&rng_) { WriteModel(); }
  void WriteModel(std::string_view more = "") {
    Write("config.json", tiny_.ConfigJson(more));
    WriteFile(dir_.path() + "/model.safetensors", Safetensors(tiny_.tensors));
  }
  void Write(const std::string& name, std::string_view text) { WriteFile(dir_.path() + "/" + name, text); }
  auto Load() { return LoadModel({.path = dir_.path()}); }

  SeededRng rng_;
  TinyModel tiny_;
  TempDir dir_;
};

TEST_F(DirectoryTest, WeightsAreThoseOfTheFile) {
  const auto model = Load();
  ASSERT_OK(model);
  EXPECT_EQ((*model)->config.name, std::filesystem::path(dir_.path()).filename());
  const WeightMatrix& down = (*model)->layers[1].down;
  EXPECT_EQ(Bytes(down.data, down.data + 32 * down.row_bytes), tiny_.Find("model.layers.1.mlp.down_proj.weight")->bytes);
  EXPECT_EQ(BytesOf((*model)->layers[0].attention_norm), tiny_.Find("model.layers.0.input_layernorm.weight")->bytes);
  size_t bytes = 0;
  for (const TestTensor& t : tiny_.tensors) bytes += t.bytes.size();
  EXPECT_EQ((*model)->weight_bytes, bytes);
}

TEST_F(DirectoryTest, ShardsAreTheSameModel) {
  const auto whole = Load();
  std::filesystem::remove(dir_.path() + "/model.safetensors");
  std::string map;
  std::vector<TestTensor> shards[2];
  for (size_t i = 0; i < tiny_.tensors.size(); ++i) {
    const std::string file = i % 2 == 0 ? "s0.safetensors" : "s1.safetensors";
    shards[i % 2].push_back(tiny_.tensors[i]);
    map += (i ? ", \"" : "\"") + tiny_.tensors[i].name + "\": \"" + file + "\"";
  }
  for (int s = 0; s < 2; ++s) WriteFile(dir_.path() + "/s" + std::to_string(s) + ".safetensors", Safetensors(shards[s]));
  Write("model.safetensors.index.json", R"({"weight_map": {)" + map + "}}");
  const auto sharded = Load();
  ASSERT_OK(whole);
  ASSERT_OK(sharded);
  EXPECT_EQ((*whole)->fingerprint, (*sharded)->fingerprint);
}

TEST_F(DirectoryTest, TokenizerAndEndOfGeneration) {
  Write("tokenizer.json", kTokenizerJson);
  Write("generation_config.json", R"({"eos_token_id": [3, 4, 77], "temperature": 0.6})");
  Write("tokenizer_config.json", R"({"eos_token": {"content": "<|endoftext|>"}, "chat_template": "old"})");
  Write("chat_template.jinja", "<|im_start|>");
  const auto model = Load();
  ASSERT_OK(model);
  const TokenizerSpec& spec = (*model)->tokenizer;
  EXPECT_EQ(spec.tokens.size(), 5u);
  EXPECT_EQ(spec.eos_id, 3);
  EXPECT_EQ(spec.eog_ids, (std::vector<int32_t>{3, 4}));
  EXPECT_EQ(spec.chat_template, "<|im_start|>");
  EXPECT_OK(Tokenizer::Create(spec));
}

TEST_F(DirectoryTest, DamagedParts) {
  Write("tokenizer.json", "{");
  EXPECT_STATUS(StatusCode::kCorrupt, "tokenizer.json: not a JSON object", Load());
  Write("tokenizer.json", kTokenizerJson);
  Write("tokenizer_config.json", "[]");
  EXPECT_STATUS(StatusCode::kCorrupt, "tokenizer_config.json", Load());
  Write("tokenizer_config.json", "{}");
  Write("generation_config.json", R"({"eos_token_id": "x"})");
  EXPECT_STATUS(StatusCode::kInvalid, "generation_config.json: 'eos_token_id'", Load());
  Write("generation_config.json", "{}");
  tiny_.vocab = 4;
  WriteModel();
  EXPECT_STATUS(StatusCode::kCorrupt, "tokenizer.json: has 5 tokens, config.json says vocab_size 4", Load());
}

TEST_F(DirectoryTest, MissingParts) {
  std::filesystem::remove(dir_.path() + "/model.safetensors");
  EXPECT_STATUS(StatusCode::kNotFound, "has neither model.safetensors nor", Load());
  std::filesystem::remove(dir_.path() + "/config.json");
  EXPECT_STATUS(StatusCode::kNotFound, "config.json: cannot open", Load());
}

TEST_F(DirectoryTest, TensorsThatDoNotFit) {
  TestTensor* gate = tiny_.Find("model.layers.0.mlp.gate_proj.weight");
  const TestTensor whole = *gate;
  *gate = Floats(whole.name, {32, 48}, std::vector<float>(32 * 48));
  WriteModel();
  EXPECT_STATUS(StatusCode::kCorrupt, "gate_proj.weight' has shape [32, 48], expected [48, 32]", Load());
  *gate = whole;
  gate->dtype = "I32";
  WriteModel();
  EXPECT_STATUS(StatusCode::kUnsupported, "gate_proj.weight' has type I32; supported: F32, F16, BF16", Load());
  *gate = whole;
  WriteModel(R"(, "attention_bias": true)");
  EXPECT_STATUS(StatusCode::kCorrupt, "q_proj.bias' is missing", Load());
  tiny_.tensors.push_back(Floats("model.layers.0.self_attn.q_proj.bias", {32}, std::vector<float>(32)));
  WriteModel();
  EXPECT_STATUS(StatusCode::kUnsupported, "q_proj.bias' [32] has no place", Load());
  tiny_.tensors.back() = Floats("model.layers.0.self_attn.rotary_emb.inv_freq", {4}, std::vector<float>(4));
  WriteModel();
  EXPECT_OK(Load());  // old files carry what the configuration says
  *tiny_.Find("model.norm.weight") = Floats("model.norm.weight", {32}, std::vector<float>(32, NAN));
  WriteModel();
  EXPECT_STATUS(StatusCode::kCorrupt, "'model.norm.weight' is not finite", Load());
}

TEST_F(DirectoryTest, TruncatedWeights) {
  const std::string path = dir_.path() + "/model.safetensors";
  const auto size = std::filesystem::file_size(path);
  for (const auto left : {size - 1, size / 2, uintmax_t{20}, uintmax_t{8}, uintmax_t{0}}) {
    WriteModel();
    std::filesystem::resize_file(path, left);
    EXPECT_EQ(Load().status().code(), StatusCode::kCorrupt) << left;
    EXPECT_TRUE(Load().status().message().starts_with(path)) << Load().status();
  }
}

TEST(LoadModelTest, PathsThatNameNoModel) {
  TempDir dir;
  EXPECT_STATUS(StatusCode::kInvalid, "positions=-1", LoadModel({.path = dir.path(), .positions = -1}));
  EXPECT_STATUS(StatusCode::kInvalid, "no model path", LoadModel({}));
  EXPECT_STATUS(StatusCode::kNotFound, "/none.gguf: cannot open: No such file", LoadModel({.path = dir.path() + "/none.gguf"}));
  EXPECT_STATUS(StatusCode::kNotFound, "config.json", LoadModel({.path = dir.path()}));
  const std::string pipe = dir.path() + "/pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_STATUS(StatusCode::kInvalid, "not a regular file", LoadModel({.path = pipe}));
  const std::string text = dir.path() + "/model.txt";
  WriteFile(text, "hello");
  EXPECT_STATUS(StatusCode::kCorrupt, "does not begin with 'GGUF'", LoadModel({.path = text}));
}

class FingerprintTest : public DirectoryTest {
 protected:
  std::array<uint8_t, 32> Now() {
    const auto model = Load();
    EXPECT_OK(model);
    return model.ok() ? (*model)->fingerprint : std::array<uint8_t, 32>{};
  }
};

TEST_F(FingerprintTest, NamesWhatAModelComputes) {
  const auto first = Now();
  EXPECT_EQ(Now(), first);
  WriteModel(R"(, "rope_theta": 20000)");
  EXPECT_NE(Now(), first);
  WriteModel(R"(, "rope_scaling": {"type": "linear", "factor": 2})");
  EXPECT_NE(Now(), first);
  WriteModel(R"(, "bos_token_id": 1)");
  EXPECT_EQ(Now(), first);
  // One bit of one weight, in a matrix and in a vector.
  for (const char* name : {"model.layers.1.self_attn.v_proj.weight", "model.norm.weight"}) {
    tiny_.Find(name)->bytes[0] ^= std::byte{1};
    WriteModel();
    EXPECT_NE(Now(), first) << name;
    tiny_.Find(name)->bytes[0] ^= std::byte{1};
  }
  // Two layers that change places.
  std::swap(tiny_.Find("model.layers.0.mlp.up_proj.weight")->bytes, tiny_.Find("model.layers.1.mlp.up_proj.weight")->bytes);
  WriteModel();
  EXPECT_NE(Now(), first);
}

TEST_F(FingerprintTest, DoesNotDependOnTheExecutor) {
  const auto model = Load();
  ASSERT_OK(model);
  ManualExecutor one;
  const auto fingerprint = loader::FingerprintOf(**model, one);
  ASSERT_OK(fingerprint);
  EXPECT_EQ(*fingerprint, (*model)->fingerprint);
}

TEST(LoadModelTest, TheDefaultModel) {
  const char* path = std::getenv("PREHOC_TEST_MODEL");
  if (path == nullptr || !std::filesystem::exists(path)) GTEST_SKIP() << "PREHOC_TEST_MODEL names no SmolLM2-135M GGUF file";
  const auto model = LoadModel({.path = path});
  ASSERT_OK(model);
  const ModelConfig& c = (*model)->config;
  EXPECT_EQ(c.layers, 30);
  EXPECT_EQ(c.heads, 9);
  EXPECT_EQ(c.kv_heads, 3);
  EXPECT_EQ(c.head_dim, 64);
  EXPECT_EQ(c.vocab, 49152);
  EXPECT_EQ(c.max_positions, 8192);
  EXPECT_EQ(c.rope_theta, 100000);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ((*model)->layers[29].down.type, WeightType::kQ4_1);
  EXPECT_EQ((*model)->embedding.type, WeightType::kQ8_0);
  const auto tokenizer = Tokenizer::Create((*model)->tokenizer);
  ASSERT_OK(tokenizer);
  EXPECT_TRUE((*tokenizer)->IsEndOfGeneration(*(*tokenizer)->FindToken("<|im_end|>")));
  EXPECT_EQ(*(*tokenizer)->Encode("In the beginning God created"), (std::vector<int32_t>{788, 260, 3616, 1839, 2312}));
}

}  // namespace
}  // namespace prehoc::reference
