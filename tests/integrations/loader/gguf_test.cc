// GGUF files: a model as written, and what each kind of damage is called.
#include <gtest/gtest.h>

#include "integrations/reference/loader/gguf_file.h"
#include "integrations/reference/loader/gguf_model.h"
#include "tests/integrations/loader/model_files.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

Result<loader::GgufFile> Parse(const GgufBuilder& builder) { return loader::GgufFile::Parse(InMemory(builder.Build())); }
auto Load(const GgufBuilder& builder) { return loader::LoadGguf(InMemory(builder.Build())); }

class GgufTest : public testing::Test {
 protected:
  GgufTest() : tiny_(&rng_) {}
  SeededRng rng_;
  TinyModel tiny_;
};

TEST_F(GgufTest, AModelIsUsedInPlace) {
  const auto file = InMemory(tiny_.Gguf().Build());
  const auto model = loader::LoadGguf(file);
  ASSERT_OK(model);
  const ModelConfig& c = (*model)->config;
  EXPECT_EQ(c.architecture, "llama");
  EXPECT_EQ(c.name, "tiny");
  EXPECT_EQ(c.layers, 2);
  EXPECT_EQ(c.heads, 4);
  EXPECT_EQ(c.kv_heads, 2);
  EXPECT_EQ(c.head_dim, 8);
  EXPECT_EQ(c.vocab, 40);
  EXPECT_EQ(c.max_positions, 256);
  EXPECT_EQ(c.rope_layout, RopeLayout::kInterleaved);
  EXPECT_TRUE(c.tied_embeddings);
  EXPECT_EQ((*model)->output.data, (*model)->embedding.data);
  const WeightMatrix& up = (*model)->layers[1].up;
  EXPECT_GE(up.data, file->bytes().data());
  EXPECT_LT(up.data, file->bytes().data() + file->bytes().size());
  EXPECT_EQ(Bytes(up.data, up.data + 48 * up.row_bytes), tiny_.Find("model.layers.1.mlp.up_proj.weight")->bytes);
  EXPECT_TRUE((*model)->tokenizer.tokens.empty());
}

TEST_F(GgufTest, MetadataOfEveryWidth) {
  Bytes u64, i8{std::byte{0xfb}}, f64;
  Append(&u64, uint64_t{1} << 63);
  Append(&f64, 0.25);
  GgufBuilder builder;
  builder.U32("a", 7).Metadata("b", 10, u64).Metadata("c", 1, i8).Metadata("d", 12, f64).Bool("e", true);
  builder.Strings("f", {"x", "", "yz"});
  const auto gguf = Parse(builder);
  ASSERT_OK(gguf);
  EXPECT_EQ(**gguf->Integer("a", 0, 9), 7);
  EXPECT_STATUS(StatusCode::kCorrupt, "'a' is 7, expected 0 to 6", gguf->Integer("a", 0, 6));
  EXPECT_STATUS(StatusCode::kCorrupt, "'b' is above 2^63", gguf->Integer("b", 0, INT64_MAX));
  EXPECT_EQ(**gguf->Integer("c", -9, 9), -5);
  EXPECT_EQ(**gguf->Float("d"), 0.25);
  EXPECT_EQ(**gguf->Bool("e"), true);
  EXPECT_EQ(**gguf->Strings("f"), (std::vector<std::string>{"x", "", "yz"}));
  EXPECT_EQ(*gguf->Integer("z", 0, 9), std::nullopt);
  EXPECT_STATUS(StatusCode::kCorrupt, "'a' is not a string", gguf->String("a"));
  EXPECT_STATUS(StatusCode::kUnsupported, "a value per layer", gguf->Integer("f", 0, 9));
}

TEST_F(GgufTest, HeaderDamage) {
  GgufBuilder builder;
  EXPECT_OK(Parse(builder));
  EXPECT_STATUS(StatusCode::kCorrupt, "does not begin with 'GGUF'", loader::GgufFile::Parse(InMemory({})));
  EXPECT_STATUS(StatusCode::kCorrupt, "does not begin with 'GGUF'", loader::GgufFile::Parse(InMemory(Bytes(64))));
  builder.version = 1;
  EXPECT_STATUS(StatusCode::kUnsupported, "GGUF version 1; supported: 2, 3", Parse(builder));
  builder.version = 0x03000000;
  EXPECT_STATUS(StatusCode::kUnsupported, "big-endian", Parse(builder));
  builder.version = 3;
  builder.claimed_tensors = 1000;
  EXPECT_STATUS(StatusCode::kCorrupt, "claims 1000 tensors, more than its", Parse(builder));
  builder.claimed_tensors = UINT64_MAX;
  EXPECT_STATUS(StatusCode::kCorrupt, "claims 18446744073709551615 tensors, the limit", Parse(builder));
  builder.claimed_tensors.reset();
  builder.claimed_metadata = UINT64_MAX;
  EXPECT_STATUS(StatusCode::kCorrupt, "metadata entries, the limit", Parse(builder));
}

// Every prefix of a whole file is refused, without a byte read past its end (the sanitizers watch).
TEST_F(GgufTest, EveryTruncationIsRefused) {
  GgufBuilder builder;
  builder.String("general.architecture", "llama").Strings("s", {"ab", "c"}).U32("n", 3);
  builder.Tensor(Floats("t", {2, 2}, {1, 2, 3, 4}));
  const Bytes whole = builder.Build();
  ASSERT_OK(loader::GgufFile::Parse(InMemory(whole)));
  for (size_t size = 0; size < whole.size(); ++size) {
    const auto parsed = loader::GgufFile::Parse(InMemory({whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size)}));
    ASSERT_EQ(parsed.status().code(), StatusCode::kCorrupt) << size;
  }
}

TEST_F(GgufTest, MetadataDamage) {
  EXPECT_STATUS(StatusCode::kCorrupt, "'a' appears twice", Parse(GgufBuilder().U32("a", 1).U32("a", 1)));
  EXPECT_STATUS(StatusCode::kCorrupt, "key of 0 bytes", Parse(GgufBuilder().U32("", 1)));
  EXPECT_STATUS(StatusCode::kCorrupt, "unknown type 13", Parse(GgufBuilder().Metadata("a", 13, Bytes(8))));
  Bytes nested;
  Append(&nested, uint32_t{9});
  Append(&nested, uint64_t{1});
  EXPECT_STATUS(StatusCode::kCorrupt, "array of arrays", Parse(GgufBuilder().Metadata("a", 9, nested)));
  Bytes huge;
  Append(&huge, uint32_t{5});
  Append(&huge, uint64_t{1} << 62);
  EXPECT_STATUS(StatusCode::kCorrupt, "ends within the metadata 'a'", Parse(GgufBuilder().Metadata("a", 9, huge)));
  Bytes strings;
  Append(&strings, uint32_t{8});
  Append(&strings, UINT64_MAX);
  EXPECT_STATUS(StatusCode::kCorrupt, "ends within the metadata 'a'", Parse(GgufBuilder().Metadata("a", 9, strings)));
  for (const uint32_t alignment : {0u, 4u, 24u, 1u << 30}) {
    EXPECT_STATUS(StatusCode::kCorrupt, "alignment", Parse(GgufBuilder().U32("general.alignment", alignment)));
  }
  // Bytes of a name do not reach the terminal as they are.
  EXPECT_STATUS(StatusCode::kCorrupt, "'a?[31m' appears twice", Parse(GgufBuilder().U32("a\x1b[31m", 1).U32("a\x1b[31m", 1)));
}

TEST_F(GgufTest, TensorDamage) {
  const auto tensor = [](std::vector<int64_t> shape, uint32_t type, size_t bytes) {
    return Parse(GgufBuilder().Tensor("t", type, shape, Bytes(bytes)));
  };
  EXPECT_OK(tensor({2, 32}, 3, 40));
  EXPECT_STATUS(StatusCode::kCorrupt, "0 dimensions", tensor({}, 0, 4));
  EXPECT_STATUS(StatusCode::kCorrupt, "5 dimensions", tensor({1, 1, 1, 1, 1}, 0, 4));
  EXPECT_STATUS(StatusCode::kCorrupt, "dimension of 0", tensor({0, 4}, 0, 4));
  EXPECT_STATUS(StatusCode::kCorrupt, "dimension of 18446744073709551615", tensor({-1, 4}, 0, 4));
  EXPECT_STATUS(StatusCode::kCorrupt, "more elements", tensor({INT64_MAX, INT64_MAX, 1}, 0, 4));
  EXPECT_STATUS(StatusCode::kCorrupt, "more bytes", tensor({INT64_MAX, 32}, 3, 4));
  EXPECT_STATUS(StatusCode::kCorrupt, "whole number of Q4_1 blocks", tensor({2, 33}, 3, 40));
  EXPECT_STATUS(StatusCode::kCorrupt, "truncated", tensor({3, 32}, 3, 40));
  const auto twice = GgufBuilder().Tensor("t", 0, {1}, Bytes(4)).Tensor("t", 0, {1}, Bytes(4));
  EXPECT_STATUS(StatusCode::kCorrupt, "tensor 't' appears twice", Parse(twice));
  GgufBuilder moved;
  moved.Tensor("t", 0, {1}, Bytes(4));
  moved.claimed_offset = [](uint64_t) { return 4; };
  EXPECT_STATUS(StatusCode::kCorrupt, "not a multiple of the alignment", Parse(moved));
  moved.claimed_offset = [](uint64_t) { return UINT64_MAX - 31; };
  EXPECT_STATUS(StatusCode::kCorrupt, "truncated", Parse(moved));
}

TEST_F(GgufTest, WhatIsNotSupportedIsNamedWithWhatIs) {
  const auto refused = [&](std::string_view text, const GgufBuilder& builder) {
    EXPECT_STATUS(StatusCode::kUnsupported, text, Load(builder));
  };
  refused("'mamba'; supported: llama (also Mistral), qwen2, qwen3", GgufBuilder().String("general.architecture", "mamba"));
  refused("experts; supported: dense", tiny_.Gguf().U32("llama.expert_count", 8));
  refused("RoPE over 4 of 8", tiny_.Gguf().U32("llama.rope.dimension_count", 4));
  refused("'su'; supported: none, linear, yarn", tiny_.Gguf().String("llama.rope.scaling.type", "su"));
  refused("'blk.0.attn_sinks' [4] has no place", tiny_.Gguf().Tensor("blk.0.attn_sinks", 0, {4}, Bytes(16)));
  refused("tokenizer model 'bert'; supported: gpt2, llama", tiny_.Gguf().String("tokenizer.ggml.model", "bert"));
  refused("pre-tokenizer 'falcon'; supported",
          tiny_.Gguf().String("tokenizer.ggml.model", "gpt2").String("tokenizer.ggml.pre", "falcon"));
  tiny_.tensors.erase(tiny_.tensors.begin());
  refused("type Q2_K; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K",
          tiny_.Gguf().Tensor("token_embd.weight", 10, {40, 32}, {}));
}

TEST_F(GgufTest, WhatIsWrongIsNamed) {
  const auto corrupt = [](std::string_view text, const GgufBuilder& builder) {
    EXPECT_STATUS(StatusCode::kCorrupt, text, Load(builder));
  };
  corrupt("'general.architecture' is missing", GgufBuilder());
  corrupt("'llama.block_count' is missing", GgufBuilder().String("general.architecture", "llama"));
  corrupt("'llama.vocab_size' is 41, tensor 'token_embd.weight' has 40 rows", tiny_.Gguf().U32("llama.vocab_size", 41));
  corrupt("the tokenizer has 3 tokens, the embedding 40 rows",
          tiny_.Gguf().String("tokenizer.ggml.model", "gpt2").Strings("tokenizer.ggml.tokens", {"a", "b", "c"})
              .Strings("tokenizer.ggml.merges", {}));
  corrupt("merge 0 'ab' is not two parts",
          tiny_.Gguf().String("tokenizer.ggml.model", "gpt2").Strings("tokenizer.ggml.tokens", {"a"})
              .Strings("tokenizer.ggml.merges", {"ab"}));
  corrupt("'tokenizer.ggml.eos_token_id' is 9, the vocabulary has 1",
          tiny_.Gguf().String("tokenizer.ggml.model", "gpt2").Strings("tokenizer.ggml.tokens", {"a"})
              .Strings("tokenizer.ggml.merges", {}).U32("tokenizer.ggml.eos_token_id", 9));
  *tiny_.Find("model.layers.1.input_layernorm.weight") =
      Floats("model.layers.1.input_layernorm.weight", {32}, std::vector<float>(32, NAN));
  corrupt("'blk.1.attn_norm.weight' is not finite at index 0", tiny_.Gguf());
  tiny_.tensors.pop_back();
  *tiny_.Find("model.layers.1.input_layernorm.weight") =
      Floats("model.layers.1.input_layernorm.weight", {32}, std::vector<float>(32, 1));
  corrupt("'blk.1.ffn_down.weight' is missing; expected [32, 48]", tiny_.Gguf());
}

TEST_F(GgufTest, ConfigurationsOutOfRange) {
  tiny_.kv_heads = 3;
  EXPECT_STATUS(StatusCode::kInvalid, "4 heads are not a multiple of 3 KV heads", Load(tiny_.Gguf()));
  tiny_.kv_heads = 2;
  tiny_.layers = 1 << 20;
  EXPECT_STATUS(StatusCode::kInvalid, "number of layers is 1048576, expected 1 to", Load(tiny_.Gguf()));
}

}  // namespace
}  // namespace prehoc::reference
