// What a layer of a Llama-family model computes on the device besides attention. Weights are fp16 or bf16 [rows, cols], row-major, in
// device memory; activations are fp32 and enter a product unrounded (a vector) or as PromptPrecision says, in the weights' type (a matrix):
// errors of some 2^-21 (fp16) or 2^-16 (bf16) of SUM |w x| where they are split. Sums are fp32, in an order that does not depend on the other rows.
//
// Every entry enqueues on `stream` and returns at once; can be captured in a CUDA graph; returns kInvalid (shapes, naming the field) or
// kCuda (launch). Pointers are to device or pinned memory, aligned to 16 bytes; cols is a multiple of 8.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/precision.h"
#include "base/status.h"

namespace prehoc::reference {

enum class DeviceNumber : uint8_t { kF16 = 0, kBF16 = 1 };

// --- one token: products of a vector, bound by the bytes of the weights -------------------------------------------------------------
// With `norm`, x is normalised first: x * norm / sqrt(mean(x^2) + eps) (RMSNorm). Reads rows * cols * 2 bytes of weights.
struct VectorProduct {
  const void* weights = nullptr;   // [rows, cols]; with `gated`, [2 rows, cols]: gates, then ups
  const float* x = nullptr;        // [cols]
  const float* norm = nullptr;     // [cols] or null
  float eps = 0;
  const float* bias = nullptr;     // [rows] or null
  float* y = nullptr;              // [rows]
  bool add = false;                // y += instead
  bool gated = false;              // y = silu(gate) * up
  int32_t rows = 0, cols = 0;
  DeviceNumber type = DeviceNumber::kF16;
};
Status MultiplyVector(const VectorProduct& params, cudaStream_t stream);

// --- many tokens ---------------------------------------------------------------------------------------------------------------------
// y[t] (+)= W x[t] + bias. With a workspace faster where compute capability 9.0 has a kernel of its own; a given set of weights is always
// multiplied with one or always without: the two sum in another order.
struct MatrixProduct {
  const void* weights = nullptr;  // [rows, cols]
  const float* x = nullptr;       // [tokens, cols]
  const float* bias = nullptr;    // [rows] or null
  float* y = nullptr;             // [tokens, rows]
  bool add = false;
  void* workspace = nullptr;      // [tokens, cols] floats, aligned to 128 bytes, apart from x and y; or null
  int32_t tokens = 0, rows = 0, cols = 0;
  DeviceNumber type = DeviceNumber::kF16;
  PromptPrecision precision = PromptPrecision::kSplit;
};
Status MultiplyMatrix(const MatrixProduct& params, cudaStream_t stream);

// y[t] = RMSNorm(x[t]) * weight; x and y [tokens, cols], y may be x.
Status NormRows(const float* x, const float* weight, float eps, float* y, int32_t tokens, int32_t cols, cudaStream_t stream);

// qkv [tokens, (heads + 2 kv_heads) * head_dim]: q, k, v of a token. Optional norm of each q and k head, then RoPE; written apart.
struct RotateParams {
  const float* qkv = nullptr;
  const float *q_norm = nullptr, *k_norm = nullptr;  // [head_dim] or null
  float eps = 0;
  const float *cos = nullptr, *sin = nullptr;        // [tokens, head_dim / 2]
  bool interleaved = false;                          // pairs (2i, 2i + 1) instead of (i, i + head_dim / 2)
  float* q = nullptr;          // [tokens, heads, head_dim]
  float* q_before = nullptr;   // as q, before RoPE; or null
  float* k = nullptr;          // [tokens, kv_heads, head_dim]
  float* v = nullptr;          // as k
  int32_t tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
};
Status RotateHeads(const RotateParams& params, cudaStream_t stream);

// RotateHeads(rotation) of MultiplyVector(product) by one launch, for the q, k and v of a decode step: `y` and `qkv` are not used. v has the
// bits of the two, q and k differ by a rounding at most. Requires one token, heads without norms (no block has all of a head), neither `add`
// nor `gated`, and rows = (heads + 2 kv_heads) * head_dim.
Status MultiplyRotated(const VectorProduct& product, const RotateParams& rotation, cudaStream_t stream);

// y[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i]; gate_up [tokens, 2 width], y [tokens, width].
Status GateRows(const float* gate_up, float* y, int32_t tokens, int32_t width, cudaStream_t stream);

// y[t] = row tokens[t] of `embedding` [vocab, cols] as fp32; tokens are in device or pinned memory and within the vocabulary.
Status EmbedTokens(const void* embedding, DeviceNumber type, const int32_t* tokens, float* y, int32_t count, int32_t cols, cudaStream_t stream);

}  // namespace prehoc::reference
