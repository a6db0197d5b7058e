#include "integrations/reference/loader/random_model.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/half.h"
#include "integrations/reference/tokenizer/tokenizer.h"
#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

std::vector<float> Values(const WeightMatrix& m) {
  std::vector<float> values(static_cast<size_t>(m.rows * m.cols));
  for (int64_t r = 0; r < m.rows; ++r) DequantizeRow(m.type, m.row(r), m.cols, values.data() + r * m.cols);
  return values;
}

TEST(RandomModelTest, WeightsAreNormalAndTheSameEveryTime) {
  const auto made = MakeRandomModel({.shape = "tiny"}), again = MakeRandomModel({.shape = "tiny"}), other = MakeRandomModel({.shape = "tiny", .seed = 2});
  ASSERT_OK(made);
  ASSERT_OK(again);
  ASSERT_OK(other);
  const Model& model = **made;
  size_t bytes = 0;
  for (const LayerWeights& w : model.layers) {
    for (const WeightMatrix* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) {
      EXPECT_EQ(m->type, WeightType::kF16);
      bytes += static_cast<size_t>(m->rows) * m->row_bytes;
      const std::vector<float> values = Values(*m);
      const double n = static_cast<double>(values.size());
      double sum = 0, square = 0, fourth = 0;
      for (const float x : values) {
        const double z = x * std::sqrt(static_cast<double>(m->cols));
        sum += z, square += z * z, fourth += z * z * z * z;
      }
      EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
      EXPECT_NEAR(square / n, 1, 8 / std::sqrt(n));
      EXPECT_NEAR(fourth / n, 3, 50 / std::sqrt(n)) << "the tails of a normal distribution";
    }
    for (const float x : w.ffn_norm) EXPECT_NEAR(x, 1, 0.6);
  }
  EXPECT_EQ(model.weight_bytes, bytes + 2 * static_cast<size_t>(model.embedding.rows) * model.embedding.row_bytes) << "one copy, two bytes a weight";
  EXPECT_EQ(Values(model.layers[1].down), Values((*again)->layers[1].down));
  EXPECT_NE(Values(model.layers[1].down), Values((*other)->layers[1].down));
  EXPECT_NE(Values(model.layers[0].gate), Values(model.layers[0].up));
  EXPECT_EQ(model.fingerprint, (*again)->fingerprint);
  EXPECT_NE(model.fingerprint, (*other)->fingerprint);
}

TEST(RandomModelTest, TextComesThroughItsTokenizer) {
  const auto made = MakeRandomModel({.shape = "tiny"});
  ASSERT_OK(made);
  const auto tokenizer = Tokenizer::Create((*made)->tokenizer);
  ASSERT_OK(tokenizer);
  const std::string text = "Cain \xc3\xa9\n\xe2\x82\xac <|end|>";
  const auto ids = (*tokenizer)->Encode(text, {.add_special = true, .parse_special = false});
  ASSERT_OK(ids);
  EXPECT_EQ(ids->size(), text.size()) << "a token a byte";
  EXPECT_EQ((*tokenizer)->Decode(*ids, true), text);
  EXPECT_EQ((*tokenizer)->vocab_size(), (*made)->config.vocab);
  EXPECT_TRUE((*tokenizer)->IsEndOfGeneration(256));
}

TEST(RandomModelTest, AnUnknownShapeIsRefusedWithTheKnownOnes) {
  const Status refused = MakeRandomModel({.shape = "llama-4"}).status();
  EXPECT_EQ(refused.code(), StatusCode::kInvalid);
  for (const std::string_view name : RandomModelShapes()) EXPECT_NE(refused.message().find(name), std::string::npos) << refused;
  EXPECT_NE(refused.message().find("\"llama-4\""), std::string::npos) << refused;
}

}  // namespace
}  // namespace prehoc::reference
