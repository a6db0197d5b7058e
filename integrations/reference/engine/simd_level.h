// Which vector instructions the engine's kernels use: decided at run time, lower levels by request.
#pragma once
#include <cstdint>
#include <string_view>

namespace prehoc::reference {

enum class SimdLevel : uint8_t {
  kPlain,   // C++ for any x86-64, and the truth for the others
  kAvx2,    // AVX2, FMA, F16C
  kAvx512,  // AVX-512 F, BW, DQ, VL, VNNI
};

std::string_view SimdLevelName(SimdLevel level);  // "plain", "avx2", "avx512"
bool SimdLevelAvailable(SimdLevel level);         // on this CPU, in this build
SimdLevel BestSimdLevel();                        // the highest one available

}  // namespace prehoc::reference
