// The vector backends; internal to kernels/. Null where this CPU or build has none.
#pragma once
#include "kernels/function_table.h"

namespace prehoc {

const KernelTable* Avx2Kernels();    // AVX2, FMA, F16C
const KernelTable* Avx512Kernels();  // AVX-512 F, BW, DQ, VL, VNNI

}  // namespace prehoc
