// Logits of Hugging Face transformers on prompts of 512 tokens (scripts/make_engine_golden.py).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "integrations/reference/engine/rope.h"
#include "tests/integrations/engine/engine_fixture.h"
#include "tests/support/source_paths.h"

namespace prehoc::reference {
namespace {

// The promise is 2e-3, as max |difference| / max |logit| of a position. The engine does far better, and should.
constexpr double kTinyTolerance = 2e-5, kDefaultTolerance = 2e-4;

struct Golden {
  std::vector<int32_t> tokens;
  std::vector<size_t> positions, ids;
  std::vector<double> largest;                // [positions]
  std::vector<std::vector<double>> logits;    // [positions][ids]
};
Golden ReadGolden(const std::string& path) {
  std::ifstream file(path);
  const nlohmann::json json = nlohmann::json::parse(file, nullptr, false);
  EXPECT_FALSE(json.is_discarded()) << path;
  Golden g;
  if (json.is_discarded()) return g;
  json.at("tokens").get_to(g.tokens);
  json.at("positions").get_to(g.positions);
  json.at("ids").get_to(g.ids);
  json.at("largest").get_to(g.largest);
  json.at("logits").get_to(g.logits);
  return g;
}
std::string GoldenDir() { return GoldenPath("/engine/"); }

// The worst relative error over the positions in [begin, end) of logits [.., vocab] that start at position `begin`.
double WorstError(const Golden& g, const std::vector<float>& logits, size_t begin, size_t end, int64_t vocab) {
  double worst = -1;
  for (size_t p = 0; p < g.positions.size(); ++p) {
    if (g.positions[p] < begin || g.positions[p] >= end) continue;
    const auto row = RowOf(logits, g.positions[p] - begin, vocab);
    for (size_t i = 0; i < g.ids.size(); ++i) {
      const double error = std::abs(static_cast<double>(row[g.ids[i]]) - g.logits[p][i]) / g.largest[p];
      worst = std::max(worst, std::isfinite(error) ? error : 1e9);
    }
  }
  EXPECT_GE(worst, 0) << "no golden position in this range";
  return worst;
}

// Prefill of everything, and prefill of 500 followed by decode of the rest.
void ExpectGolden(const std::shared_ptr<const Model>& model, const Golden& g, SimdLevel level, double tolerance,
                  Executor& executor) {
  const auto engine = Engine::Create(model, {.executor = &executor, .max_batch_tokens = 256, .simd = level}).value();
  const int64_t vocab = model->config.vocab;
  const auto length = static_cast<int64_t>(g.tokens.size());
  DenseBackend whole = DenseFor(model->config, &executor);
  const double prefill = WorstError(g, AllLogits(*engine, whole, g.tokens, length), 0, g.tokens.size(), vocab);
  EXPECT_LT(prefill, tolerance) << "prefill, " << SimdLevelName(level);
  testing::Test::RecordProperty("prefill_error_e9_" + std::string(SimdLevelName(level)), static_cast<int>(prefill * 1e9));
  // Frequencies that follow the length differ between the steps and the one call that the truth was made with.
  if (engine->RopeVariant(length) != engine->RopeVariant(500)) return;

  const size_t split = 500;
  DenseBackend stepped = DenseFor(model->config, &executor);
  ASSERT_OK(engine->Forward(stepped, std::span(g.tokens).first(split), length, {}));
  std::vector<float> logits;
  for (size_t t = split; t < g.tokens.size(); ++t) {
    std::vector<float> step(static_cast<size_t>(vocab));
    ASSERT_OK(engine->Forward(stepped, std::span(g.tokens).subspan(t, 1), 0, step));
    logits.insert(logits.end(), step.begin(), step.end());
  }
  const double decode = WorstError(g, logits, split, g.tokens.size(), vocab);
  EXPECT_LT(decode, tolerance) << "decode, " << SimdLevelName(level);
  testing::Test::RecordProperty("decode_error_e9_" + std::string(SimdLevelName(level)), static_cast<int>(decode * 1e9));
}

// The settings of a case of rope.json, as the loader would read them.
ModelConfig RopeConfig(const nlohmann::json& json) {
  using Type = RopeScaling::Type;
  const std::map<std::string, Type> types = {{"default", Type::kNone}, {"linear", Type::kLinear},
                                             {"dynamic", Type::kDynamic}, {"yarn", Type::kYarn},
                                             {"llama3", Type::kLlama3}, {"longrope", Type::kLongRope}};
  ModelConfig c;
  c.head_dim = json.at("head_dim");
  c.max_positions = json.at("max_positions");
  c.rope_theta = json.at("rope_theta");
  RopeScaling& s = c.rope_scaling;
  s.type = types.at(json.at("rope_type"));
  s.factor = json.value("factor", 1.0);
  s.low_freq_factor = json.value("low_freq_factor", 1.0);
  s.high_freq_factor = json.value("high_freq_factor", 4.0);
  s.original_max_positions = json.value("original_max_position_embeddings", c.max_positions);
  s.beta_fast = json.value("beta_fast", 32.0);
  s.beta_slow = json.value("beta_slow", 1.0);
  if (json.contains("attention_factor")) s.attention_factor = json.at("attention_factor").get<double>();
  s.mscale = json.value("mscale", 0.0);
  s.mscale_all_dim = json.value("mscale_all_dim", 0.0);
  s.truncate = json.value("truncate", true);
  s.short_factor = json.value("short_factor", std::vector<double>());
  s.long_factor = json.value("long_factor", std::vector<double>());
  return c;
}

TEST(RopeGoldenTest, FrequenciesAndMagnitudesAreThoseOfTransformers) {
  std::ifstream file(GoldenDir() + "rope.json");
  const nlohmann::json cases = nlohmann::json::parse(file, nullptr, false);
  ASSERT_TRUE(cases.is_array() && cases.size() >= 15);
  for (const nlohmann::json& json : cases) {
    SCOPED_TRACE(json.dump().substr(0, 200));
    const RopeFrequencies got = MakeRopeFrequencies(RopeConfig(json), json.at("length"));
    const auto want = json.at("inverse").get<std::vector<double>>();
    ASSERT_EQ(got.inverse.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got.inverse[i], want[i], 1e-6 * want[i]) << "pair " << i;
    EXPECT_NEAR(got.magnitude, json.at("magnitude").get<double>(), 1e-6);
  }
}

class TinyModelTest : public testing::TestWithParam<const char*> {};

TEST_P(TinyModelTest, AgreesWithTransformers) {
  const std::string directory = GoldenDir() + GetParam();
  const auto model = LoadModel({.path = directory});
  ASSERT_OK(model);
  const Golden golden = ReadGolden(directory + "/golden.json");
  ASSERT_EQ(golden.tokens.size(), 512u);
  ManualExecutor executor;
  for (const SimdLevel level : AvailableLevels()) ExpectGolden(*model, golden, level, kTinyTolerance, executor);
}

// Where element i of a head lies in the other layout: GGUF writers permute the rows of q and k like this.
int64_t InterleavedIndex(int64_t i, int64_t head_dim) { return 2 * (i % (head_dim / 2)) + i / (head_dim / 2); }

std::vector<std::byte> InterleavedRows(const WeightMatrix& w, int64_t head_dim) {
  std::vector<std::byte> bytes(w.row_bytes * static_cast<size_t>(w.rows));
  for (int64_t r = 0; r < w.rows; ++r) {
    const int64_t to = r / head_dim * head_dim + InterleavedIndex(r % head_dim, head_dim);
    std::copy_n(w.row(r), w.row_bytes, bytes.begin() + to * static_cast<int64_t>(w.row_bytes));
  }
  return bytes;
}
std::vector<float> InterleavedHeads(const std::vector<float>& values, int64_t head_dim) {
  std::vector<float> out(values.size());
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    out[static_cast<size_t>(i / head_dim * head_dim + InterleavedIndex(i % head_dim, head_dim))] =
        values[static_cast<size_t>(i)];
  }
  return out;
}

TEST_P(TinyModelTest, AgreesWithTransformersInTheOtherRopeLayout) {
  const std::string directory = GoldenDir() + GetParam();
  const auto loaded = LoadModel({.path = directory});
  ASSERT_OK(loaded);
  const Golden golden = ReadGolden(directory + "/golden.json");
  auto model = std::make_shared<Model>(**loaded);
  ASSERT_EQ(model->config.rope_layout, RopeLayout::kHalf);
  model->config.rope_layout = RopeLayout::kInterleaved;
  const int64_t d = model->config.head_dim;
  for (LayerWeights& w : model->layers) {
    for (WeightMatrix* matrix : {&w.q, &w.k}) {
      auto bytes = std::make_shared<std::vector<std::byte>>(InterleavedRows(*matrix, d));
      matrix->data = bytes->data();
      model->owners.push_back(std::move(bytes));
    }
    for (std::vector<float>* vector : {&w.q_bias, &w.k_bias, &w.q_norm, &w.k_norm}) {
      *vector = InterleavedHeads(*vector, d);
    }
  }
  ManualExecutor executor;
  ExpectGolden(model, golden, BestSimdLevel(), kTinyTolerance, executor);
}

INSTANTIATE_TEST_SUITE_P(All, TinyModelTest,
                         testing::Values("mha", "gqa", "mistral", "qwen2-bias", "qwen3-qk-norm", "linear", "llama3",
                                         "yarn", "yarn-mscale", "dynamic", "longrope"),
                         [](const auto& param) {
                           std::string name = param.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(DefaultModelTest, AgreesWithTransformers) {
  const char* path = std::getenv("PREHOC_TEST_MODEL");
  if (path == nullptr || !std::filesystem::exists(path)) {
    GTEST_SKIP() << "PREHOC_TEST_MODEL names no SmolLM2-135M GGUF file; scripts/test.sh sets it";
  }
  const auto model = LoadModel({.path = path});
  ASSERT_OK(model);
  ASSERT_EQ((*model)->config.vocab, 49152) << path << " is not SmolLM2-135M";
  const Golden golden = ReadGolden(GoldenDir() + "smollm2-135m-q4_1.json");
  const auto executor = ThreadPool::Create({.spin_iterations = 100}).value();
  for (const SimdLevel level : AvailableLevels()) {
    if (level == SimdLevel::kPlain && BestSimdLevel() != SimdLevel::kPlain) continue;  // minutes, and tiny models cover it
    ExpectGolden(*model, golden, level, kDefaultTolerance, *executor);
  }
}

}  // namespace
}  // namespace prehoc::reference
