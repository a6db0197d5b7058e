#include "integrations/reference/loader/tensor_table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

size_t AlignmentOf(WeightType type) { return type == WeightType::kF32 ? 4 : 2; }

}  // namespace

Status TensorTable::Add(Tensor tensor) {
  const auto [it, is_new] = tensors_.try_emplace(tensor.name);
  if (!is_new) return FileError(StatusCode::kCorrupt, tensor.file, "tensor ", Quoted(tensor.name), " appears twice");
  it->second.tensor = std::move(tensor);
  return {};
}

const Tensor* TensorTable::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second.tensor;
}

std::vector<std::string> TensorTable::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, entry] : tensors_) names.push_back(name);
  return names;
}

Result<const Tensor*> TensorTable::Use(std::string_view name, std::span<const int64_t> shape) {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return FileError(StatusCode::kCorrupt, file_, "tensor ", Quoted(name), " is missing; expected ", ShapeText(shape));
  }
  it->second.used = true;
  const Tensor& tensor = it->second.tensor;
  if (!std::ranges::equal(tensor.shape, shape)) {
    return FileError(StatusCode::kCorrupt, tensor.file, "tensor ", Quoted(name), " has shape ",
                     ShapeText(tensor.shape), ", expected ", ShapeText(shape));
  }
  if (!tensor.type) {
    return FileError(StatusCode::kUnsupported, tensor.file, "tensor ", Quoted(name), " has type ", tensor.type_name,
                     "; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K");
  }
  return &tensor;
}

Result<WeightMatrix> TensorTable::Matrix(std::string_view name, int64_t rows, int64_t cols) {
  PREHOC_ASSIGN_OR_RETURN(const Tensor* tensor, Use(name, std::array{rows, cols}));
  WeightMatrix matrix{.type = *tensor->type, .rows = rows, .cols = cols, .data = tensor->data.data()};
  PREHOC_ASSIGN_OR_RETURN(matrix.row_bytes, WeightRowBytes(matrix.type, cols));
  PREHOC_CHECK(matrix.row_bytes * static_cast<size_t>(rows) == tensor->data.size());
  if (reinterpret_cast<uintptr_t>(matrix.data) % AlignmentOf(matrix.type) != 0) {
    auto copy = std::make_shared<std::vector<std::byte>>(tensor->data.begin(), tensor->data.end());
    matrix.data = copy->data();
    owners_.push_back(std::move(copy));
  }
  return matrix;
}

Result<std::vector<float>> TensorTable::Vector(std::string_view name, int64_t n) {
  PREHOC_ASSIGN_OR_RETURN(const Tensor* tensor, Use(name, std::array{n}));
  const WeightType type = *tensor->type;
  if (type != WeightType::kF32 && type != WeightType::kF16 && type != WeightType::kBF16) {
    return FileError(StatusCode::kUnsupported, tensor->file, "tensor ", Quoted(name), " has type ",
                     tensor->type_name, "; a vector may be F32, F16 or BF16");
  }
  std::vector<float> values(static_cast<size_t>(n));
  DequantizeRow(type, tensor->data.data(), n, values.data());
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[static_cast<size_t>(i)])) {
      return FileError(StatusCode::kCorrupt, tensor->file, "tensor ", Quoted(name), " is not finite at index ", i);
    }
  }
  return values;
}

void TensorTable::Ignore(std::string_view name) {
  const auto it = tensors_.find(name);
  if (it != tensors_.end()) it->second.used = true;
}

Status TensorTable::CheckAllUsed() const {
  for (const auto& [name, entry] : tensors_) {
    if (entry.used) continue;
    return FileError(StatusCode::kUnsupported, entry.tensor.file, "tensor ", Quoted(name), " ",
                     ShapeText(entry.tensor.shape),
                     " has no place in this architecture as configured; leaving it out would change the answers");
  }
  return {};
}

}  // namespace prehoc::reference::loader
