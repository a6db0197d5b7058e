#include "kernels/cuda/inst/alone.cuh"

namespace prehoc::cuda {
PREHOC_INSTANTIATE_ALONE(256);
}
