// Made-up weights, keys, values and queries of a decode step, made on the device.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/half.h"
#include "base/status.h"

namespace prehoc {

// fp16 normal numbers times `scale`.
Status FillNormal(uint16_t* to, int64_t count, float scale, uint64_t seed, cudaStream_t stream);
Status FillNormal(float* to, int64_t count, float mean, float scale, uint64_t seed, cudaStream_t stream);

// rows [count, 2, head_dim], those from `first` on of an endless stream: K normal times exp(0.5 normal) (one factor a row: heavy tails over
// positions), V normal.
Status MakeKeys(Half* rows, int64_t first, int64_t count, int32_t head_dim, uint64_t seed, cudaStream_t stream);

// q [steps, units, heads_per_unit, head_dim]: sqrt(s) m + sqrt(1 - s) a_t, times `scale`; m and a_t normal, a_t with correlation
// `memory` from step to step. The share s that stays is one per unit, uniform in [least, most]: so queries of a head keep a cosine of
// about s over long distances and s + (1 - s) memory from one step to the next.
struct QueryStatistics {
  float scale = 2, memory = 0.5f, least = 0.5f, most = 0.95f;
};
Status MakeQueries(float* q, int32_t steps, int32_t units, int32_t unit_floats, const QueryStatistics& statistics, uint64_t seed, cudaStream_t stream);

// The start of a step: `now` [floats] becomes the queries of step *step % steps, *n and *step grow by one.
Status Advance(const float* q, int32_t steps, int64_t floats, float* now, int32_t* step, int32_t* n, cudaStream_t stream);

}  // namespace prehoc
