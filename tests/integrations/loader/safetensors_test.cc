// Safetensors: files as written by others, and what each kind of damage is called.
#include "integrations/reference/loader/safetensors.h"

#include <gtest/gtest.h>

#include "tests/integrations/loader/model_files.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temp_dir.h"

namespace prehoc::reference {
namespace {

using loader::TensorTable;

// A table with the file that its tensors lie in.
struct Opened {
  std::shared_ptr<const loader::MappedFile> file;
  TensorTable table{"test"};
  Status status;

  explicit Opened(Bytes bytes) : file(InMemory(std::move(bytes))), status(loader::AddSafetensors(file, &table)) {}
};
Status DamageOf(Bytes bytes) { return Opened(std::move(bytes)).status; }
Status AddHeader(std::string_view header, size_t data_bytes) {
  return DamageOf(SafetensorsWithHeader(header, Bytes(data_bytes)));
}

TEST(SafetensorsTest, TensorsLieInPlace) {
  const auto file = InMemory(Safetensors({Floats("b", {2, 3}, {1, 2, 3, 4, 5, 6}),
                                          {"a", "F16", {2}, HalvesOf({0.5f, -2})}, {"c", "I64", {}, Bytes(8)}}));
  TensorTable table("test");
  ASSERT_OK(loader::AddSafetensors(file, &table));
  EXPECT_EQ(table.size(), 3u);
  const auto matrix = table.Matrix("b", 2, 3);
  ASSERT_OK(matrix);
  EXPECT_EQ(matrix->type, WeightType::kF32);
  EXPECT_GE(matrix->data, file->bytes().data());
  EXPECT_LT(matrix->data, file->bytes().data() + file->bytes().size());
  std::vector<float> row(3);
  DequantizeRow(matrix->type, matrix->row(1), 3, row.data());
  EXPECT_EQ(row, (std::vector<float>{4, 5, 6}));
  const auto vector = table.Vector("a", 2);
  ASSERT_OK(vector);
  EXPECT_EQ(*vector, (std::vector<float>{0.5f, -2}));
  EXPECT_STATUS(StatusCode::kUnsupported, "'c'", table.CheckAllUsed());
  EXPECT_STATUS(StatusCode::kCorrupt, "shape [2, 3], expected [3, 2]", table.Matrix("b", 3, 2));
}

TEST(SafetensorsTest, OddAddressesAreCopied) {
  // 3 bytes in front leave the F32 tensor at an odd address.
  Opened open(Safetensors({{"a", "U8", {3}, Bytes(3)}, Floats("b", {1, 2}, {7, 8})}));
  ASSERT_OK(open.status);
  const auto matrix = open.table.Matrix("b", 1, 2);
  ASSERT_OK(matrix);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(matrix->data) % 4, 0u);
  EXPECT_EQ(Bytes(matrix->data, matrix->data + 8), BytesOf({7, 8}));
  EXPECT_EQ(open.table.TakeOwners().size(), 1u);
}

TEST(SafetensorsTest, UnknownTypesAreOnlyRefusedWhenUsed) {
  Opened open(Safetensors({{"a", "F6_E9M9", {4}, Bytes(3)}}));
  ASSERT_OK(open.status);
  EXPECT_STATUS(StatusCode::kUnsupported, "'a' has type F6_E9M9; supported: F32, F16, BF16", open.table.Vector("a", 4));
}

TEST(SafetensorsTest, HeaderDamage) {
  EXPECT_STATUS(StatusCode::kCorrupt, "not a safetensors file", DamageOf(Bytes()));
  EXPECT_STATUS(StatusCode::kCorrupt, "not a safetensors file", DamageOf(Bytes(9)));
  Bytes huge;
  Append(&huge, UINT64_MAX);
  AppendText(&huge, "{}");
  EXPECT_STATUS(StatusCode::kCorrupt, "header of 18446744073709551615 bytes", DamageOf(huge));
  Bytes longer;
  Append(&longer, uint64_t{100});
  AppendText(&longer, "{}");
  EXPECT_STATUS(StatusCode::kCorrupt, "truncated", DamageOf(longer));
  EXPECT_STATUS(StatusCode::kCorrupt, "not a JSON object", AddHeader("{\"a\": ", 0));
  EXPECT_STATUS(StatusCode::kCorrupt, "expected JSON", AddHeader("[]", 0));
  EXPECT_STATUS(StatusCode::kCorrupt, "nests deeper", AddHeader("{\"a\":" + std::string(100000, '['), 0));
  const std::string one = R"("a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]})";
  EXPECT_OK(AddHeader("{" + one + "}", 1));
  EXPECT_STATUS(StatusCode::kCorrupt, "'a' appears twice", AddHeader("{" + one + "," + one + "}", 1));
}

TEST(SafetensorsTest, EntryDamage) {
  const auto entry = [](std::string_view text) { return AddHeader("{\"a\":" + std::string(text) + "}", 8); };
  EXPECT_OK(entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "no object", entry("3"));
  EXPECT_STATUS(StatusCode::kCorrupt, "no dtype", entry(R"({"shape": [2], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kInvalid, "'a.dtype'", entry(R"({"dtype": 4, "shape": [2], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "no shape", entry(R"({"dtype": "F32", "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "dimension", entry(R"({"dtype": "F32", "shape": [0], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "dimension", entry(R"({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "dimension", entry(R"({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "more elements",
                entry(R"({"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "does not take",
                entry(R"({"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "does not take the 8 bytes",
                entry(R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "data_offsets", entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [0]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "data_offsets", entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "truncated", entry(R"({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]})"));
  EXPECT_STATUS(StatusCode::kCorrupt, "lies at 8 to 0", entry(R"({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]})"));
}

TEST(SafetensorsTest, TensorsTileTheFile) {
  const auto two = [](int begin, int end, size_t data) {
    return AddHeader(R"({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [4],)"
                     R"( "data_offsets": [)" + std::to_string(begin) + "," + std::to_string(end) + "]}}", data);
  };
  EXPECT_OK(two(4, 8, 8));
  EXPECT_STATUS(StatusCode::kCorrupt, "'b' begins at byte 2 of the data, the one before ends at 4: they overlap", two(2, 6, 8));
  EXPECT_STATUS(StatusCode::kCorrupt, "gap", two(5, 9, 9));
  EXPECT_STATUS(StatusCode::kCorrupt, "has 1 bytes after its last tensor", two(4, 8, 9));
}

TEST(SafetensorsTest, ValuesThatAreNotFinite) {
  Opened open(Safetensors({Floats("a", {3}, {1, 2, NAN}), Floats("b", {1}, {INFINITY})}));
  ASSERT_OK(open.status);
  EXPECT_STATUS(StatusCode::kCorrupt, "'a' is not finite at index 2", open.table.Vector("a", 3));
  EXPECT_STATUS(StatusCode::kCorrupt, "'b' is not finite at index 0", open.table.Vector("b", 1));
}

class ShardsTest : public testing::Test {
 protected:
  void Write(const std::string& name, const std::vector<TestTensor>& tensors) {
    WriteFile(dir_.path() + "/" + name, Safetensors(tensors));
  }
  void Index(std::string_view map) {
    WriteFile(dir_.path() + "/model.safetensors.index.json", R"({"metadata": {}, "weight_map": {)" + std::string(map) + "}}");
  }
  Result<loader::SafetensorsFiles> Open() { return loader::OpenSafetensors(dir_.path()); }
  TempDir dir_;
};

TEST_F(ShardsTest, AreReadTogether) {
  Write("s1.safetensors", {Floats("a", {1}, {1})});
  Write("s2.safetensors", {Floats("b", {1}, {2})});
  Index(R"("a": "s1.safetensors", "b": "s2.safetensors")");
  auto open = Open();
  ASSERT_OK(open);
  EXPECT_EQ(open->files.size(), 2u);
  EXPECT_EQ(*open->tensors.Vector("b", 1), std::vector<float>{2});
}

TEST_F(ShardsTest, Damage) {
  EXPECT_STATUS(StatusCode::kNotFound, "has neither model.safetensors nor", Open());
  Write("s1.safetensors", {Floats("a", {1}, {1})});
  Write("s2.safetensors", {Floats("a", {1}, {2})});
  WriteFile(dir_.path() + "/model.safetensors.index.json", R"({"metadata": {}})");
  EXPECT_STATUS(StatusCode::kCorrupt, "no 'weight_map'", Open());
  Index(R"("a": "s1.safetensors", "c": "s1.safetensors")");
  EXPECT_STATUS(StatusCode::kCorrupt, "'c' is not in 's1.safetensors'", Open());
  Index(R"("a": "s3.safetensors")");
  EXPECT_STATUS(StatusCode::kNotFound, "s3.safetensors", Open());
  Index(R"("a": "s1.safetensors", "b": "s2.safetensors")");
  EXPECT_STATUS(StatusCode::kCorrupt, "'a' appears twice", Open());
  Index(R"("a": 7)");
  EXPECT_STATUS(StatusCode::kCorrupt, "expected the name of a .safetensors file", Open());
}

TEST_F(ShardsTest, StayInTheirDirectory) {
  TempDir outside;
  WriteFile(outside.path() + "/x.safetensors", Safetensors({Floats("a", {1}, {1})}));
  for (const std::string name : {"../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ".safetensors", "",
                                  "..\\\\x.safetensors", "x\\u0000/.safetensors", "x.bin"}) {
    Index("\"a\": \"" + name + "\"");
    EXPECT_STATUS(StatusCode::kCorrupt, "in the same directory", Open()) << name;
  }
  Index("\"a\": \"" + outside.path() + "/x.safetensors\"");
  EXPECT_STATUS(StatusCode::kCorrupt, "in the same directory", Open());
}

}  // namespace
}  // namespace prehoc::reference
