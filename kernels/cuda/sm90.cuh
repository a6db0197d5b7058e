// What kernels of sm_90a share: barriers that copies of the copy engine (TMA) count on, those copies, and operands of warp groups' products.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "base/cuda/error.h"
#include "base/status.h"

namespace prehoc::cuda::sm90 {

__device__ inline void Init(uint32_t barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count)); }
__device__ inline void Arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ inline void Expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void Await(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(barrier),
      "r"(parity) : "memory");
}
__device__ inline void InitDone() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// A box of a map of two or three dimensions, to 1,024-byte aligned shared memory, in lines of 128 bytes whose 16-byte words are swizzled.
__device__ inline void Bring(uint32_t to, const CUtensorMap* map, int col, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(map), "r"(col), "r"(row), "r"(barrier) : "memory");
}
__device__ inline void Bring(uint32_t to, const CUtensorMap* map, int col, int row, int plane, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(map), "r"(col), "r"(row), "r"(plane), "r"(barrier) : "memory");
}
// An operand of a product: such lines, eight of them 1,024 bytes. `beyond`: bytes to the next 64 columns, where a line holds one column of the
// product's depth and all 64 are multiplied (a transposed operand); else not looked at.
__device__ inline uint64_t Matrix(uint32_t address, uint32_t beyond = 16) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{beyond >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
__device__ inline void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kBut groups of products are under way.
template <int kBut>
__device__ inline void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBut) : "memory");
}

// A map of `rank` dimensions of 16-bit numbers: sizes from the innermost, strides [bytes] of all but that, boxes as Bring() takes them; nothing
// of it is read beyond, zeros come instead. kUnsupported (driver), kInvalid.
inline Status MakeMap(CUtensorMapDataType type, int rank, const void* data, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      CUtensorMap* map) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (encode == nullptr) return {StatusCode::kUnsupported, "the driver has no cuTensorMapEncodeTiled; use one for CUDA 12 or newer"};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult made = encode(map, type, static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, strides, box, steps,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (made == CUDA_SUCCESS) return {};
  return {StatusCode::kInvalid, "cuTensorMapEncodeTiled gave error " + std::to_string(static_cast<int>(made)) + " for " + std::to_string(sizes[0]) +
                                    " columns and " + std::to_string(sizes[1]) + " rows"};
}

}  // namespace prehoc::cuda::sm90
