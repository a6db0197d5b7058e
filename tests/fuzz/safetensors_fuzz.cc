// Safetensors files: every tensor that is entered is read.
#include "integrations/reference/loader/safetensors.h"
#include "tests/fuzz/fuzz_target.h"

using namespace prehoc;
using namespace prehoc::reference;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  const auto file = loader::MappedFile::FromBytes("fuzz", {bytes, bytes + size});
  loader::TensorTable tensors("fuzz");
  const Status status = loader::AddSafetensors(file, &tensors);
  fuzz::CheckStatus(status);
  if (!status.ok()) return 0;
  size_t total = 0;
  for (const std::string& name : tensors.Names()) {
    const loader::Tensor* tensor = tensors.Find(name);
    fuzz::Touch(tensor->data);
    total += tensor->data.size();
    if (tensor->shape.size() == 2) fuzz::CheckStatus(tensors.Matrix(name, tensor->shape[0], tensor->shape[1]).status());
    if (tensor->shape.size() == 1) fuzz::CheckStatus(tensors.Vector(name, tensor->shape[0]).status());
  }
  PREHOC_CHECK(total < size);  // tensors do not overlap
  return 0;
}
