// The inner loops for AVX2, FMA and F16C. Everything is in an unnamed namespace: see vector_ops.h.
#include "kernels/cpu/vector_ops.h"

#include <immintrin.h>

#define PREHOC_OP [[maybe_unused]] static inline __attribute__((always_inline))

namespace prehoc {
namespace {
#include "kernels/cpu/simd_avx2.inc"
#include "kernels/cpu/kernels.inc"
}  // namespace

extern const VectorOps kAvx2Ops = kOps;
}  // namespace prehoc
