// Safetensors files: a JSON header, then the tensors one after another, used in place.
#pragma once
#include <memory>
#include <string>

#include "base/result.h"
#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/loader/tensor_table.h"

namespace prehoc::reference::loader {

// Adds every tensor of `file` to `tensors`, whose views last as long as the file. As the format asks, the tensors
// fill the rest of the file without gap or overlap, and the header is at most 16 MiB of JSON.
// Returns kCorrupt, naming the tensor and both numbers. Types other than F32, F16 and BF16 are entered without a
// weight type, so that only their use is an error.
Status AddSafetensors(const std::shared_ptr<const MappedFile>& file, TensorTable* tensors);

// The tensors of a model directory: model.safetensors, or the shards that model.safetensors.index.json lists.
struct SafetensorsFiles {
  TensorTable tensors;
  std::vector<std::shared_ptr<const MappedFile>> files;
};
// Returns kNotFound if there is neither, kCorrupt for an index that names files outside `directory` or disagrees
// with the shards.
Result<SafetensorsFiles> OpenSafetensors(const std::string& directory);

}  // namespace prehoc::reference::loader
