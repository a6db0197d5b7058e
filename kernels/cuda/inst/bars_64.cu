#include "kernels/cuda/inst/bars.cuh"

namespace prehoc::cuda {
PREHOC_INSTANTIATE_BARS(64);
}
