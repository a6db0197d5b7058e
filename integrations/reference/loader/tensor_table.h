// The tensors of a model's files by name, with the checks that turn one into a weight.
#pragma once
#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "integrations/reference/model.h"

namespace prehoc::reference::loader {

struct Tensor {
  std::string name;
  std::string type_name;           // as the format calls it
  std::optional<WeightType> type;  // empty: a type that no weight may have
  std::vector<int64_t> shape;      // outermost first; at least 1 each
  std::span<const std::byte> data; // exactly the tensor
  std::string file;                // for messages
};

class TensorTable {
 public:
  explicit TensorTable(std::string file) : file_(std::move(file)) {}

  // Returns kCorrupt if the name is taken.
  Status Add(Tensor tensor);
  bool Has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  const Tensor* Find(std::string_view name) const;
  size_t size() const { return tensors_.size(); }
  std::vector<std::string> Names() const;  // sorted
  const std::string& file() const { return file_; }

  // The tensor as a weight [rows, cols], in place; copied only where its address would not suit its type.
  // Returns kCorrupt (absent, or of another shape: says got and expected) or kUnsupported (type).
  Result<WeightMatrix> Matrix(std::string_view name, int64_t rows, int64_t cols);
  // As fp32 [n]; from F32, F16 or BF16. Also kCorrupt for values that are not finite.
  Result<std::vector<float>> Vector(std::string_view name, int64_t n);

  // A tensor that is known to be of no use.
  void Ignore(std::string_view name);
  template <class Predicate>
  void IgnoreIf(Predicate&& predicate) {
    for (auto& [name, entry] : tensors_) entry.used |= predicate(std::string_view(name));
  }
  // kUnsupported, naming a tensor that nothing asked for: a model with parts we do not know would answer wrongly.
  Status CheckAllUsed() const;

  // Copies made by Matrix(); they must live as long as its results.
  std::vector<std::shared_ptr<const void>> TakeOwners() { return std::move(owners_); }

 private:
  struct Entry {
    Tensor tensor;
    bool used = false;
  };
  Result<const Tensor*> Use(std::string_view name, std::span<const int64_t> shape);

  std::string file_;
  std::map<std::string, Entry, std::less<>> tensors_;
  std::vector<std::shared_ptr<const void>> owners_;
};

}  // namespace prehoc::reference::loader
