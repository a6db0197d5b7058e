// Weight types: exact agreement with the gguf package (scripts/make_loader_golden.py), row sizes, odd addresses.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "integrations/reference/model.h"
#include "tests/integrations/loader/model_files.h"
#include "tests/support/source_paths.h"
#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

Bytes FromHex(const std::string& hex) {
  Bytes bytes(hex.size() / 2);
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  }
  return bytes;
}

constexpr WeightType kAll[] = {WeightType::kF32,  WeightType::kF16,  WeightType::kBF16, WeightType::kQ8_0,
                               WeightType::kQ4_0, WeightType::kQ4_1, WeightType::kQ4_K, WeightType::kQ6_K};

TEST(DequantizeTest, AgreesWithTheGgufPackage) {
  const auto golden = nlohmann::json::parse(std::ifstream(GoldenPath("/loader/dequantize.json")));
  int compared = 0;
  for (const WeightType type : kAll) {
    const std::string name(WeightTypeName(type));
    if (type == WeightType::kF32) continue;  // its bytes are its values
    ASSERT_TRUE(golden.contains(name));
    const Bytes bytes = FromHex(golden[name]["bytes"]), want = FromHex(golden[name]["floats"]);
    ASSERT_EQ(want.size(), 512 * sizeof(float));
    ASSERT_OK(WeightRowBytes(type, 512));
    ASSERT_EQ(bytes.size(), *WeightRowBytes(type, 512)) << name;
    Bytes shifted(1);  // rows may lie at any address
    shifted.insert(shifted.end(), bytes.begin(), bytes.end());
    for (const std::byte* at : {bytes.data(), std::as_const(shifted).data() + 1}) {
      std::vector<float> got(512, -1);
      DequantizeRow(type, at, 512, got.data());
      EXPECT_EQ(BytesOf(got), want) << name;
    }
    ++compared;
  }
  EXPECT_EQ(compared, 7);
}

TEST(DequantizeTest, RowsAreWholeBlocks) {
  for (const WeightType type : kAll) {
    const bool quantised = type >= WeightType::kQ8_0;
    EXPECT_OK(WeightRowBytes(type, 256));
    EXPECT_EQ(WeightRowBytes(type, 255).ok(), !quantised) << WeightTypeName(type);
    EXPECT_STATUS(StatusCode::kInvalid, "whole number", WeightRowBytes(type, 0));
    EXPECT_STATUS(StatusCode::kInvalid, "whole number", WeightRowBytes(type, -256));
  }
  EXPECT_STATUS(StatusCode::kInvalid, "Q4_1 blocks (32 elements)", WeightRowBytes(WeightType::kQ4_1, 33));
  EXPECT_STATUS(StatusCode::kInvalid, "too large", WeightRowBytes(WeightType::kF32, INT64_MAX));
}

}  // namespace
}  // namespace prehoc::reference
