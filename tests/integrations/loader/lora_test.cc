// LoRA adapters merged at load: agreement with PEFT and numpy (scripts/make_loader_golden.py), row order, refusals.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "integrations/reference/loader/gguf_model.h"
#include "integrations/reference/loader/lora.h"
#include "integrations/reference/loader/lora_config.h"
#include "integrations/reference/loader/lora_merge.h"
#include "integrations/reference/model.h"
#include "tests/integrations/loader/model_files.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/source_paths.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"

namespace prehoc::reference {
namespace {

const std::string kGolden = GoldenPath("/loader/");

std::vector<float> Row(const WeightMatrix& m, int64_t row) {
  std::vector<float> out(static_cast<size_t>(m.cols));
  DequantizeRow(m.type, m.row(row), m.cols, out.data());
  return out;
}

std::vector<WeightMatrix> MatricesOf(const Model& model) {
  std::vector<WeightMatrix> all;
  for (const LayerWeights& w : model.layers) {
    for (const auto* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) all.push_back(*m);
  }
  return all;
}

double WorstDifference(const Model& a, const Model& b) {
  const auto left = MatricesOf(a), right = MatricesOf(b);
  EXPECT_EQ(left.size(), right.size());
  double worst = 0;
  for (size_t i = 0; i < left.size(); ++i) {
    for (int64_t r = 0; r < left[i].rows; ++r) {
      const auto x = Row(left[i], r), y = Row(right[i], r);
      for (size_t c = 0; c < x.size(); ++c) worst = std::max(worst, std::fabs(static_cast<double>(x[c]) - y[c]));
    }
  }
  return worst;
}

class PeftTest : public testing::TestWithParam<std::string> {};

TEST_P(PeftTest, MergesAsPeftDoes) {
  const auto merged = LoadModel({.path = kGolden + "base", .lora = kGolden + GetParam()});
  const auto want = LoadModel({.path = kGolden + GetParam() + "-merged"});
  const auto base = LoadModel({.path = kGolden + "base"});
  ASSERT_OK(merged);
  ASSERT_OK(want);
  ASSERT_OK(base);
  EXPECT_GT(WorstDifference(**base, **want), 0.1);  // the adapter does something
  EXPECT_LT(WorstDifference(**merged, **want), 2e-7);
  EXPECT_EQ((*merged)->layers[0].q.type, WeightType::kF32);
  EXPECT_EQ((*merged)->config.name, "base + " + GetParam());
  EXPECT_NE((*merged)->fingerprint, (*base)->fingerprint);
  const auto again = LoadModel({.path = kGolden + "base", .lora = kGolden + GetParam()});
  ASSERT_OK(again);
  EXPECT_EQ((*merged)->fingerprint, (*again)->fingerprint);
}

INSTANTIATE_TEST_SUITE_P(Adapters, PeftTest, testing::Values("lora", "rslora"), [](const auto& p) { return p.param; });

TEST(LoraGoldenTest, DefaultModelAtLongContext) {
  const char* path = std::getenv("PREHOC_TEST_MODEL");
  if (path == nullptr || !std::filesystem::exists(path)) GTEST_SKIP() << "PREHOC_TEST_MODEL names no SmolLM2-135M GGUF file";
  const auto model = LoadModel({.path = path, .lora = SourcePath("/bench/models/smollm2-135m-128k")});
  ASSERT_OK(model);
  EXPECT_EQ((*model)->config.rope_theta, 1e7);
  EXPECT_EQ((*model)->config.max_positions, 196608);
  const auto golden = nlohmann::json::parse(std::ifstream(kGolden + "smollm2_128k_rows.json"));
  ASSERT_EQ(golden.size(), 21u);
  for (const auto& item : golden) {
    const LayerWeights& w = (*model)->layers[item["layer"].get<size_t>()];
    const WeightMatrix* const matrices[] = {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down};
    const auto* name = std::ranges::find(loader::kLoraModuleNames, item["module"].get<std::string>());
    const WeightMatrix& m = *matrices[name - loader::kLoraModuleNames];
    EXPECT_EQ(m.type, WeightType::kF16);
    const auto got = Row(m, item["row"].get<int64_t>());
    const auto want = item["values"].get<std::vector<double>>();
    ASSERT_EQ(got.size(), want.size());
    for (size_t c = 0; c < got.size(); ++c) {
      // Half a step of F16, and of its subnormals.
      ASSERT_NEAR(got[c], want[c], std::fabs(want[c]) * 0x1p-11 + 0x1p-25) << item["module"] << " row " << item["row"] << ", " << c;
    }
  }
}

class LoraTest : public testing::Test {
 protected:
  LoraTest() : tiny_(&rng_) {
    for (const char* part : {"self_attn.q_proj", "self_attn.k_proj"}) {
      for (int layer = 0; layer < tiny_.layers; ++layer) AddFactors(layer, part);
    }
    WriteFile(base_.path() + "/config.json", tiny_.ConfigJson());
    WriteFile(base_.path() + "/model.safetensors", Safetensors(tiny_.tensors));
  }

  void AddFactors(int layer, const std::string& part) {
    const std::string name = "base_model.model.model.layers." + std::to_string(layer) + "." + part;
    const TestTensor& w = *tiny_.Find("model.layers." + std::to_string(layer) + "." + part + ".weight");
    factors_.push_back(RandomFloats(name + ".lora_A.weight", {4, w.shape[1]}, &rng_));
    factors_.push_back(RandomFloats(name + ".lora_B.weight", {w.shape[0], 4}, &rng_));
  }

  void WriteAdapter(std::string_view config = R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]})") {
    WriteFile(adapter_.path() + "/adapter_config.json", config);
    WriteFile(adapter_.path() + "/adapter_model.safetensors", Safetensors(factors_));
  }
  auto Load() { return LoadModel({.path = base_.path(), .lora = adapter_.path()}); }

  SeededRng rng_;
  TinyModel tiny_;
  std::vector<TestTensor> factors_;
  TempDir base_, adapter_;
};

// W + scale * B A, term by term, in double.
TEST_F(LoraTest, MergesByDefinition) {
  WriteAdapter();
  const auto base = LoadModel({.path = base_.path()}), merged = Load();
  ASSERT_OK(base);
  ASSERT_OK(merged);
  const auto at = [](const TestTensor& t, int64_t row, int64_t col) {
    float value;
    std::memcpy(&value, &t.bytes[static_cast<size_t>(row * t.shape[1] + col) * 4], 4);
    return static_cast<double>(value);
  };
  const TestTensor &a = factors_[0], &b = factors_[1];
  for (int64_t r = 0; r < 32; ++r) {
    const auto was = Row((*base)->layers[0].q, r), got = Row((*merged)->layers[0].q, r);
    for (int64_t c = 0; c < 32; ++c) {
      double want = was[static_cast<size_t>(c)];
      for (int64_t k = 0; k < 4; ++k) want += 8.0 / 4 * at(b, r, k) * at(a, k, c);
      ASSERT_NEAR(got[static_cast<size_t>(c)], want, 1e-6) << r << ", " << c;
    }
  }
  // What the adapter does not name stays where it was.
  EXPECT_EQ(Row((*base)->layers[0].v, 3), Row((*merged)->layers[0].v, 3));
  EXPECT_NE(Row((*base)->layers[1].k, 3), Row((*merged)->layers[1].k, 3));
}

// A GGUF file of the llama architecture has the rows of Q and K in another order; the adapter has not.
TEST_F(LoraTest, InterleavedRowsMeetTheirOwnChanges) {
  WriteAdapter();
  WriteFile(base_.path() + "/tiny.gguf", tiny_.Gguf().Build());
  const auto plain = Load(), interleaved = LoadModel({.path = base_.path() + "/tiny.gguf", .lora = adapter_.path()});
  ASSERT_OK(plain);
  ASSERT_OK(interleaved);
  ASSERT_EQ((*interleaved)->config.rope_layout, RopeLayout::kInterleaved);
  int moved = 0;
  for (int64_t row = 0; row < 32; ++row) {
    const int64_t from = loader::HuggingFaceRowOfInterleaved(row, 8);
    moved += from != row;
    EXPECT_EQ(Row((*interleaved)->layers[1].o, row), Row((*plain)->layers[1].o, row)) << row;
    EXPECT_EQ(Row((*interleaved)->layers[1].q, row), Row((*plain)->layers[1].q, from)) << row;
    if (row >= 16) continue;
    EXPECT_EQ(Row((*interleaved)->layers[1].k, row), Row((*plain)->layers[1].k, from)) << row;
  }
  EXPECT_EQ(moved, 24);  // the ends of each head stay
}

TEST_F(LoraTest, OverridesAndProgress) {
  WriteAdapter();
  WriteFile(adapter_.path() + "/config_overrides.json", R"({"rope_theta": 12345, "max_position_embeddings": 999})");
  std::vector<double> seen;
  const auto model = LoadModel({.path = base_.path(), .lora = adapter_.path(), .progress = [&](double f) { seen.push_back(f); }});
  ASSERT_OK(model);
  EXPECT_EQ((*model)->config.rope_theta, 12345);
  EXPECT_EQ((*model)->config.max_positions, 999);
  EXPECT_TRUE(std::ranges::is_sorted(seen));
  EXPECT_EQ(seen.front(), 0);
  EXPECT_EQ(seen.back(), 1);
}

TEST_F(LoraTest, TheResultDoesNotDependOnTheExecutor) {
  WriteAdapter();
  ManualExecutor one;
  const auto pool = ThreadPool::Create({.loop_threads = 3, .spin_iterations = 0});
  ASSERT_OK(pool);
  std::vector<std::shared_ptr<Model>> models;
  for (Executor* executor : {static_cast<Executor*>(&one), static_cast<Executor*>(pool->get())}) {
    auto model = loader::LoadGguf(InMemory(tiny_.Gguf().Build()));
    ASSERT_OK(model);
    ASSERT_OK(loader::MergeLora(adapter_.path(), *executor, {}, model->get()));
    models.push_back(*model);
  }
  EXPECT_EQ(WorstDifference(*models[0], *models[1]), 0);
}

TEST_F(LoraTest, HalvesForEverythingButF32) {
  EXPECT_EQ(loader::MergedType(WeightType::kF32), WeightType::kF32);
  for (const auto type : {WeightType::kF16, WeightType::kBF16, WeightType::kQ8_0, WeightType::kQ4_1, WeightType::kQ6_K}) {
    EXPECT_EQ(loader::MergedType(type), WeightType::kF16);
  }
  const Bytes base = HalvesOf({1, 2});
  const WeightMatrix m{WeightType::kF16, 1, 2, base.data(), 4};
  Bytes out(4);
  const loader::LoraFactors small{.rank = 1, .scale = 0.5f, .a = {1, -2}, .b = {3}};
  ASSERT_TRUE(loader::MergeRows(m, small, 0, 1, out.data()));
  EXPECT_EQ(out, HalvesOf({2.5f, -1}));
  const loader::LoraFactors large{.rank = 1, .scale = 1, .a = {70000, 0}, .b = {1}};
  EXPECT_FALSE(loader::MergeRows(m, large, 0, 1, out.data()));
  const loader::LoraFactors nan{.rank = 1, .scale = 1, .a = {NAN, 0}, .b = {1}};
  EXPECT_FALSE(loader::MergeRows(m, nan, 0, 1, out.data()));
}

TEST_F(LoraTest, DamagedAdapters) {
  EXPECT_STATUS(StatusCode::kNotFound, "adapter_config.json", Load());
  WriteAdapter();
  std::filesystem::remove(adapter_.path() + "/adapter_model.safetensors");
  EXPECT_STATUS(StatusCode::kNotFound, "adapter_model.safetensors", Load());
  WriteAdapter(R"({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]})");
  EXPECT_STATUS(StatusCode::kCorrupt, "lora_A.weight' has shape [4, 32], expected [8, 32]", Load());
  WriteAdapter(R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]})");
  EXPECT_STATUS(StatusCode::kCorrupt, "self_attn.v_proj.lora_A.weight' is missing", Load());
  WriteAdapter(R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})");
  EXPECT_STATUS(StatusCode::kUnsupported, "self_attn.k_proj.lora_A.weight' [4, 32] has no place", Load());
  const TestTensor whole = factors_.back();
  factors_.pop_back();
  WriteAdapter();
  EXPECT_STATUS(StatusCode::kCorrupt, "layers.1.self_attn.k_proj.lora_B.weight' is missing", Load());
  factors_.push_back(Floats(whole.name, whole.shape, std::vector<float>(64, INFINITY)));
  WriteAdapter();
  EXPECT_STATUS(StatusCode::kCorrupt, "layers.1.self_attn.k_proj' gives values that are not finite as F32", Load());
  factors_.back() = whole;
  WriteAdapter();
  WriteFile(adapter_.path() + "/config_overrides.json", R"({"rope_theta": "x"})");
  EXPECT_STATUS(StatusCode::kInvalid, "config_overrides.json: 'rope_theta'", Load());
  WriteFile(adapter_.path() + "/config_overrides.json", "{");
  EXPECT_STATUS(StatusCode::kCorrupt, "config_overrides.json", Load());
}

TEST(LoraConfigTest, ScaleAndModules) {
  const auto read = [](std::string_view more) {
    return loader::ReadLoraConfig(R"({"peft_type": "LORA", "r": 16, "lora_alpha": 32)" + std::string(more) + "}", "c");
  };
  const auto plain = read(R"(, "target_modules": ["down_proj", "self_attn.q_proj", "q_proj"])");
  ASSERT_OK(plain);
  EXPECT_EQ(plain->scale, 2);
  EXPECT_EQ(plain->modules, (std::vector{loader::LoraModule::kQ, loader::LoraModule::kDown}));
  const auto rs = read(R"(, "use_rslora": true, "target_modules": "all-linear", "bias": "none", "rank_pattern": {},
    "use_dora": false, "modules_to_save": null, "init_lora_weights": "gaussian", "lora_dropout": 0.1)");
  ASSERT_OK(rs);
  EXPECT_EQ(rs->scale, 8);
  EXPECT_EQ(rs->modules.size(), 7u);
  for (const char* refused : {R"("bias": "all")", R"("modules_to_save": ["lm_head"])", R"("use_dora": true)", R"("rank_pattern": {"q_proj": 8})",
                              R"("alpha_pattern": {"q_proj": 8})", R"("fan_in_fan_out": true)", R"("layers_to_transform": [1])",
                              R"("layer_replication": [[0, 4]])", R"("init_lora_weights": "pissa")", R"("something_new": 1)",
                              R"("trainable_token_indices": [1])", R"("lora_bias": true)"}) {
    const auto config = read(R"(, "target_modules": ["q_proj"], )" + std::string(refused));
    EXPECT_STATUS(StatusCode::kUnsupported, "c: '", config) << refused;
    EXPECT_STATUS(StatusCode::kUnsupported, "; supported: ", config) << refused;
  }
}

TEST(LoraConfigTest, Refusals) {
  const auto read = [](std::string_view text) { return loader::ReadLoraConfig(text, "c"); };
  EXPECT_STATUS(StatusCode::kInvalid, "'peft_type' is missing", read("{}"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'IA3'; supported: LORA", read(R"({"peft_type": "IA3"})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'r' is missing", read(R"({"peft_type": "LORA", "lora_alpha": 2})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'lora_alpha' is missing", read(R"({"peft_type": "LORA", "r": 2})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'r' is 0", read(R"({"peft_type": "LORA", "r": 0, "lora_alpha": 2})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'target_modules' is missing", read(R"({"peft_type": "LORA", "r": 2, "lora_alpha": 2})"));
  EXPECT_STATUS(StatusCode::kUnsupported, "'embed_tokens'; supported: q_proj",
                read(R"({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'target_modules' is not a list",
                read(R"({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ".*"})"));
}

}  // namespace
}  // namespace prehoc::reference
