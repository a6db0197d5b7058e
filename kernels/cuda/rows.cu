// gate and gather: small kernels without variants.
#include <algorithm>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gate.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/stored_rows.cuh"

namespace prehoc::cuda {
namespace {

constexpr int kGateThreads = 256;
constexpr int kGatherThreads = 512;
constexpr int kInFlight = 8;  // 16-byte loads of a lane: what it takes to fill the link from a few blocks

__global__ void __launch_bounds__(kGateThreads) GateKernel(const __grid_constant__ GateArgs args) {
  const GateTask task = args.tasks[blockIdx.x];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  RunGate<kGateThreads>(task, args);
}

struct GatherArgs {
  const GatherTask* tasks;
  int32_t num_tasks;
  int32_t vectors;  // 16-byte words of a piece
};

// All warps of all blocks share the words of all pieces, task after task: neighbouring lanes read neighbouring words, and each lane
// has kInFlight loads on their way.
__global__ void __launch_bounds__(kGatherThreads) GatherKernel(const __grid_constant__ GatherArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int64_t threads = int64_t{gridDim.x} * kGatherThreads, me = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x;
  for (int t = 0; t < args.num_tasks; ++t) {
    const GatherTask& task = args.tasks[t];
    const int64_t words = int64_t{max(0, *task.count)} * args.vectors;
    for (int64_t base = me; base < words; base += threads * kInFlight) {
      uint4 word[kInFlight];
      int64_t to[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t at = base + i * threads;
        to[i] = -1;
        if (at >= words) continue;
        const int64_t piece = at / args.vectors, vector = at % args.vectors;
        const int64_t from = task.from_piece[piece], into = task.to_piece[piece];
        if (from < 0 || from >= task.from_limit || into < 0 || into >= task.to_limit) {
          if (vector == 0 && task.refused != nullptr) atomicAdd(task.refused, 1);
          continue;
        }
        to[i] = into * args.vectors + vector;
        // Each byte is read once: it need not stay in the caches.
        word[i] = __ldcs(reinterpret_cast<const uint4*>(task.from) + from * args.vectors + vector);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (to[i] >= 0) reinterpret_cast<uint4*>(task.to)[to[i]] = word[i];
      }
    }
  }
}

struct GatherRowsArgs {
  const GatherTask* tasks;
  int32_t num_tasks;
  RowShape from;
};

// The same with rows of 8 bits, which become fp16 rows.
__global__ void __launch_bounds__(kGatherThreads) GatherRowsKernel(const __grid_constant__ GatherRowsArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int pieces = args.from.head_dim / 4;
  const int64_t threads = int64_t{gridDim.x} * kGatherThreads, me = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x;
  for (int t = 0; t < args.num_tasks; ++t) {
    const GatherTask& task = args.tasks[t];
    const int64_t all = int64_t{max(0, *task.count)} * pieces;
    for (int64_t base = me; base < all; base += threads * kInFlight) {
      NarrowPiece piece[kInFlight];
      int64_t to[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t at = base + i * threads;
        to[i] = -1;
        if (at >= all) continue;
        const int64_t row = at / pieces;
        const int p = static_cast<int>(at % pieces);
        const int64_t from = task.from_piece[row], into = task.to_piece[row];
        if (from < 0 || from >= task.from_limit || into < 0 || into >= task.to_limit) {
          if (p == 0 && task.refused != nullptr) atomicAdd(task.refused, 1);
          continue;
        }
        to[i] = into * pieces + p;
        piece[i] = LoadNarrow(task.from + from * args.from.bytes, args.from, p);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (to[i] >= 0) reinterpret_cast<uint4*>(task.to)[to[i]] = Widened(piece[i], args.from);
      }
    }
  }
}
}  // namespace

Status Gate(const GateParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("gate").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group).Take());
  if (params.num_tasks == 0) return {};
  const GateArgs args{params.tasks, params.group, params.head_dim, params.tau, params.max_age};
  const Shape shape{.grid = dim3(static_cast<unsigned>(params.num_tasks)), .threads = kGateThreads};
  return LaunchKernel(GateKernel, "gate", args, shape, stream);
}

Status Gather(const GatherParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(
      Check("gather").Tasks(params.tasks, params.num_tasks)
          .That(params.piece_bytes > 0 && params.piece_bytes % 16 == 0, "piece_bytes", params.piece_bytes, "use a multiple of 16")
          .That(params.max_blocks > 0, "max_blocks", params.max_blocks, "use 1 or more").Rows("rows", params.rows).Take());
  const bool widens = params.rows != RowFormat::kF16;
  if (widens) {
    PREHOC_RETURN_IF_ERROR(Check("gather").HeadDim(params.head_dim)
                               .That(params.piece_bytes == static_cast<int64_t>(RowBytes(params.rows, params.head_dim)), "piece_bytes",
                                     params.piece_bytes, "use the bytes of a row").Take());
  }
  if (params.num_tasks == 0) return {};
  const GatherArgs args{params.tasks, params.num_tasks, params.piece_bytes / 16};
  const Shape shape{.grid = dim3(static_cast<unsigned>(params.max_blocks)), .threads = kGatherThreads};
  if (widens) return LaunchKernel(GatherRowsKernel, "gather", GatherRowsArgs{params.tasks, params.num_tasks, RowShapeOf(params.rows, params.head_dim)}, shape, stream);
  return LaunchKernel(GatherKernel, "gather", args, shape, stream);
}

}  // namespace prehoc::cuda
