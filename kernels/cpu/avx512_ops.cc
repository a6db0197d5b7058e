// The inner loops for AVX-512 (F, BW, DQ, VL, VNNI). Everything is in an unnamed namespace: see vector_ops.h.
#include "kernels/cpu/vector_ops.h"

#include <immintrin.h>

#define PREHOC_OP [[maybe_unused]] static inline __attribute__((always_inline))

namespace prehoc {
namespace {
#include "kernels/cpu/simd_avx512.inc"
#include "kernels/cpu/kernels.inc"
}  // namespace

extern const VectorOps kAvx512Ops = kOps;
}  // namespace prehoc
