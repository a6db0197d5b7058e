// The weights of a model in device memory: fp16, or bf16 where the model stores that; products that share an input lie together.
#pragma once
#include <memory>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/executor.h"
#include "base/result.h"
#include "integrations/reference/cuda/device_ops.h"
#include "integrations/reference/model.h"

namespace prehoc::reference {

struct DeviceLayer {
  const void* qkv = nullptr;      // [(heads + 2 kv_heads) * head_dim, hidden]
  const void* o = nullptr;        // [hidden, heads * head_dim]
  const void* gate_up = nullptr;  // [2 intermediate, hidden]
  const void* down = nullptr;     // [hidden, intermediate]
  const float *attention_norm = nullptr, *ffn_norm = nullptr;
  const float *qkv_bias = nullptr, *o_bias = nullptr;  // or null
  const float *q_norm = nullptr, *k_norm = nullptr;    // or null
};

// Quantised and fp32 weights are rounded to fp16: to within 2^-11 of each, beside which a weight of 4 or 8 bits is coarse.
class DeviceModel {
 public:
  // Expands on `executor`, then copies. Returns kOutOfSpace or kCuda; kUnsupported for a weight beyond the range of fp16.
  static Result<std::unique_ptr<DeviceModel>> Create(const Model& model, Executor& executor);

  const DeviceLayer& layer(int32_t index) const { return layers_[static_cast<size_t>(index)]; }
  const void* embedding() const { return embedding_; }
  const void* output() const { return output_; }
  const float* output_norm() const { return output_norm_; }
  DeviceNumber type() const { return type_; }
  size_t bytes() const { return bytes_; }

 private:
  DeviceModel() = default;
  Result<const void*> Add(std::initializer_list<const WeightMatrix*> matrices, Executor& executor);
  Result<const float*> Add(std::initializer_list<const std::vector<float>*> vectors);

  DeviceNumber type_ = DeviceNumber::kF16;
  std::vector<DeviceLayer> layers_;
  const void *embedding_ = nullptr, *output_ = nullptr;
  const float* output_norm_ = nullptr;
  std::vector<CudaBytes> parts_;
  size_t bytes_ = 0;
};

}  // namespace prehoc::reference
