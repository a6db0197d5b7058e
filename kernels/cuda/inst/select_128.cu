#include "kernels/cuda/select_launch.cuh"

namespace prehoc::cuda {
PREHOC_INSTANTIATE_SELECT(128);
}
