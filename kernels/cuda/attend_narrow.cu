#include "kernels/cuda/attend_narrow.h"

namespace prehoc::cuda {

template <int D, int H>
Status AttendNarrow(const AttendArgs& args, const Shape& shape, cudaStream_t stream) {
  return LaunchKernel(AttendKernel<RowType::kF16, D, H, true>, "attend", args, shape, stream);
}

template Status AttendNarrow<64, 4>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<64, 8>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<96, 4>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<96, 8>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<128, 4>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<128, 8>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<256, 4>(const AttendArgs&, const Shape&, cudaStream_t);
template Status AttendNarrow<256, 8>(const AttendArgs&, const Shape&, cudaStream_t);

}  // namespace prehoc::cuda
