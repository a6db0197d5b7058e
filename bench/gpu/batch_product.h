// Products of up to 8 vectors with one matrix, bound by the bytes of the weights: what decode needs from batch 2 on.
// integrations/reference/cuda has products of one vector and of matrices with tiles of 64 tokens; both are far from the weights' bytes here.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/status.h"

namespace prehoc {

// y[t] (+)= W x[t]; with `gated` W is [2 rows, cols], gates then ups, and y = silu(gate) * up. Inputs in fp16 (fp32 ones are rounded to
// it), sums in fp32. rows and cols are multiples of 32. Enqueues and returns at once; kInvalid (shapes) or kCuda (launch).
struct BatchProduct {
  const uint16_t* weights = nullptr;  // fp16
  const uint16_t* x = nullptr;        // [tokens, cols] fp16; or null,
  const float* x_float = nullptr;     // and then this
  float* y = nullptr;                 // [tokens, rows]; or null,
  uint16_t* y_half = nullptr;         // and then this
  bool add = false, gated = false;
  int32_t tokens = 0, rows = 0, cols = 0;
};
Status MultiplyBatch(const BatchProduct& params, cudaStream_t stream);

// y[t] = RMSNorm(x[t]) * weight in fp16; x [tokens, cols].
Status NormBatch(const float* x, const float* weight, float eps, uint16_t* y, int32_t tokens, int32_t cols, cudaStream_t stream);

}  // namespace prehoc
