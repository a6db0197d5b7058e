// MultiplyMatrix() of device_ops.h on compute capability 9.0. Internal to integrations/reference/cuda.
#pragma once
#include "integrations/reference/cuda/device_ops.h"

namespace prehoc::reference::sm90 {

// As there, for tokens, rows and a workspace that are not nothing. Shapes were checked.
Status MultiplyMatrix(const MatrixProduct& params, cudaStream_t stream);

}  // namespace prehoc::reference::sm90
