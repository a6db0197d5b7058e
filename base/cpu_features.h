// What vector code this CPU runs. Both checks cover whether the operating system saves the registers.
#pragma once

namespace prehoc {

bool CpuHasAvx2();    // AVX2, FMA, F16C
bool CpuHasAvx512();  // the same, and AVX-512 F, BW, DQ, VL, VNNI

}  // namespace prehoc
