#include "integrations/reference/cuda/device_model.h"

#include <atomic>
#include <cmath>
#include <string>

#include "base/cuda/error.h"
#include "base/half.h"

namespace prehoc::reference {

Result<const void*> DeviceModel::Add(std::initializer_list<const WeightMatrix*> matrices, Executor& executor) {
  size_t elements = 0;
  for (const WeightMatrix* m : matrices) elements += static_cast<size_t>(m->rows) * static_cast<size_t>(m->cols);
  PREHOC_ASSIGN_OR_RETURN(CudaBytes bytes, CudaBytes::Create(CudaPlace::kDevice, elements * sizeof(uint16_t)));
  std::atomic<bool> beyond{false};
  std::byte* to = bytes.data();
  for (const WeightMatrix* m : matrices) {
    const auto cols = static_cast<size_t>(m->cols), size = static_cast<size_t>(m->rows) * cols * sizeof(uint16_t);
    std::vector<uint16_t> numbers;
    if (m->type != (type_ == DeviceNumber::kF16 ? WeightType::kF16 : WeightType::kBF16)) {
      numbers.resize(size / sizeof(uint16_t));
      executor.ParallelFor(m->rows, [&](int64_t r) {
        uint16_t* const row = numbers.data() + static_cast<size_t>(r) * cols;
        std::vector<float> values(cols);
        DequantizeRow(m->type, m->row(r), m->cols, values.data());
        for (size_t c = 0; c < cols; ++c) {
          row[c] = type_ == DeviceNumber::kF16 ? FloatToHalf(values[c]) : FloatToBFloat16(values[c]);
          if (std::isfinite(values[c]) && type_ == DeviceNumber::kF16 && (row[c] & 0x7fff) == 0x7c00) beyond = true;
        }
      });
    }
    if (beyond) return {StatusCode::kUnsupported, "a weight is beyond the range of fp16, in which the device keeps this model"};
    // What is stored as the device wants it goes there as it is.
    PREHOC_CUDA_TRY(cudaMemcpy(to, numbers.empty() ? static_cast<const void*>(m->data) : numbers.data(), size, cudaMemcpyHostToDevice));
    to += size;
  }
  bytes_ += bytes.size();
  parts_.push_back(std::move(bytes));
  return static_cast<const void*>(parts_.back().data());
}

Result<const float*> DeviceModel::Add(std::initializer_list<const std::vector<float>*> vectors) {
  std::vector<float> all;
  for (const auto* v : vectors) all.insert(all.end(), v->begin(), v->end());
  if (all.empty()) return static_cast<const float*>(nullptr);
  PREHOC_ASSIGN_OR_RETURN(CudaBytes bytes, CudaBytes::Create(CudaPlace::kDevice, all.size() * sizeof(float)));
  PREHOC_CUDA_TRY(cudaMemcpy(bytes.data(), all.data(), all.size() * sizeof(float), cudaMemcpyHostToDevice));
  bytes_ += bytes.size();
  parts_.push_back(std::move(bytes));
  return reinterpret_cast<const float*>(parts_.back().data());
}

Result<std::unique_ptr<DeviceModel>> DeviceModel::Create(const Model& model, Executor& executor) {
  std::unique_ptr<DeviceModel> made(new DeviceModel());
  DeviceModel& to = *made;
  to.type_ = model.layers.empty() || model.layers.front().q.type != WeightType::kBF16 ? DeviceNumber::kF16 : DeviceNumber::kBF16;
  PREHOC_ASSIGN_OR_RETURN(to.embedding_, to.Add({&model.embedding}, executor));
  to.output_ = to.embedding_;
  if (model.output.data != model.embedding.data) {
    PREHOC_ASSIGN_OR_RETURN(to.output_, to.Add({&model.output}, executor));
  }
  PREHOC_ASSIGN_OR_RETURN(to.output_norm_, to.Add({&model.output_norm}));
  for (const LayerWeights& w : model.layers) {
    DeviceLayer layer;
    PREHOC_ASSIGN_OR_RETURN(layer.qkv, to.Add({&w.q, &w.k, &w.v}, executor));
    PREHOC_ASSIGN_OR_RETURN(layer.o, to.Add({&w.o}, executor));
    PREHOC_ASSIGN_OR_RETURN(layer.gate_up, to.Add({&w.gate, &w.up}, executor));
    PREHOC_ASSIGN_OR_RETURN(layer.down, to.Add({&w.down}, executor));
    PREHOC_ASSIGN_OR_RETURN(layer.attention_norm, to.Add({&w.attention_norm}));
    PREHOC_ASSIGN_OR_RETURN(layer.ffn_norm, to.Add({&w.ffn_norm}));
    const bool some = !w.q_bias.empty() || !w.k_bias.empty() || !w.v_bias.empty();
    if (some) {
      const auto whole = [](const std::vector<float>& bias, int64_t rows) {
        return bias.empty() ? std::vector<float>(static_cast<size_t>(rows), 0.0f) : bias;
      };
      const std::vector<float> q = whole(w.q_bias, w.q.rows), k = whole(w.k_bias, w.k.rows), v = whole(w.v_bias, w.v.rows);
      PREHOC_ASSIGN_OR_RETURN(layer.qkv_bias, to.Add({&q, &k, &v}));
    }
    PREHOC_ASSIGN_OR_RETURN(layer.o_bias, to.Add({&w.o_bias}));
    PREHOC_ASSIGN_OR_RETURN(layer.q_norm, to.Add({&w.q_norm}));
    PREHOC_ASSIGN_OR_RETURN(layer.k_norm, to.Add({&w.k_norm}));
    to.layers_.push_back(layer);
  }
  // Copies of pageable memory may return before their last bytes are there, and streams do not wait for them.
  PREHOC_CUDA_TRY(cudaDeviceSynchronize());
  return made;
}

}  // namespace prehoc::reference
