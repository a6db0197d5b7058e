// gate, gather, copies: small kernels without variants.
#include <algorithm>
#include <type_traits>

#include "base/units.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gate.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/run_kernels.h"
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

// What is loaded of a piece, and what it becomes: a word of 16 bytes of any piece, or eight channels of a row of 8 bits.
struct Words {
  using Loaded = uint4;
  int32_t count;  // of a piece
  // Each byte is read once: it need not stay in the caches.
  __device__ Loaded Load(const std::byte* from, int64_t piece, int64_t word) const { return __ldcs(reinterpret_cast<const uint4*>(from) + piece * count + word); }
  __device__ uint4 Written(const Loaded& loaded) const { return loaded; }
};
struct NarrowPieces {
  using Loaded = NarrowPiece;
  int32_t count;
  RowShape shape;
  __device__ Loaded Load(const std::byte* from, int64_t row, int64_t piece) const { return LoadNarrow(from + row * shape.bytes, shape, static_cast<int>(piece)); }
  __device__ uint4 Written(const Loaded& loaded) const { return Widened(loaded, shape); }
};

template <class Parts>
struct GatherArgs {
  const GatherTask* tasks;
  int32_t num_tasks;
  Parts parts;
};

// All warps of all blocks share the parts of all pieces, task after task: neighbouring lanes read neighbouring parts, and each lane
// has kInFlight loads on their way.
template <class Parts>
__global__ void __launch_bounds__(kGatherThreads) GatherKernel(const __grid_constant__ GatherArgs<Parts> args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int64_t threads = int64_t{gridDim.x} * kGatherThreads, me = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x;
  for (int t = 0; t < args.num_tasks; ++t) {
    const GatherTask& task = args.tasks[t];
    const int64_t all = int64_t{max(0, *task.count)} * args.parts.count;
    for (int64_t base = me; base < all; base += threads * kInFlight) {
      typename Parts::Loaded loaded[kInFlight];
      int64_t to[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t at = base + i * threads;
        to[i] = -1;
        if (at >= all) continue;
        const int64_t piece = at / args.parts.count, part = at % args.parts.count;
        const int64_t from = task.from_piece[piece], into = task.to_piece[piece];
        if (from < 0 || from >= task.from_limit || into < 0 || into >= task.to_limit) {
          if (part == 0 && task.refused != nullptr) atomicAdd(task.refused, 1);
          continue;
        }
        to[i] = into * args.parts.count + part;
        loaded[i] = args.parts.Load(task.from, from, part);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (to[i] >= 0) reinterpret_cast<uint4*>(task.to)[to[i]] = args.parts.Written(loaded[i]);
      }
    }
  }
}

constexpr int kCopyThreads = 256;
constexpr int kCopyWords = 8;         // of a thread, on their way at once
constexpr int kMostCopies = 64;       // of a launch: they travel with its arguments
struct CopyArgs {
  EvenPieces pieces[kMostCopies];
};
static_assert(sizeof(CopyArgs) <= 4096, "what a launch takes");
// Blocks: parts of a piece, pieces of an entry, entries.
__global__ void __launch_bounds__(kCopyThreads) CopyKernel(const __grid_constant__ CopyArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const EvenPieces& even = args.pieces[blockIdx.z];
  if (static_cast<int>(blockIdx.y) >= even.height) return;
  const auto* const from = reinterpret_cast<const uint4*>(even.from + blockIdx.y * even.from_pitch);
  auto* const to = reinterpret_cast<uint4*>(even.to + blockIdx.y * even.to_pitch);
  const int64_t words = even.width / 16, first = int64_t{blockIdx.x} * (kCopyThreads * kCopyWords) + threadIdx.x;
  uint4 word[kCopyWords];
#pragma unroll
  for (int i = 0; i < kCopyWords; ++i) {
    if (first + i * kCopyThreads < words) word[i] = from[first + i * kCopyThreads];
  }
#pragma unroll
  for (int i = 0; i < kCopyWords; ++i) {
    if (first + i * kCopyThreads < words) to[first + i * kCopyThreads] = word[i];
  }
}
}  // namespace

// All kernels of the library are compiled alike: one speaks for them, but for those that are for one architecture alone.
Result<int> CodeOfKernels() {
  cudaFuncAttributes attributes{};
  PREHOC_CUDA_TRY(cudaFuncGetAttributes(&attributes, GateKernel));
  return attributes.ptxVersion / 10;
}

Status CopyPieces(std::span<const EvenPieces> pieces, cudaStream_t stream) {
  for (size_t at = 0; at < pieces.size(); at += kMostCopies) {
    const auto part = pieces.subspan(at, std::min<size_t>(kMostCopies, pieces.size() - at));
    CopyArgs args{};
    int64_t width = 0;
    int32_t height = 0;
    for (size_t i = 0; i < part.size(); ++i) {
      const EvenPieces& p = part[i];
      PREHOC_RETURN_IF_ERROR(Check("copy").That(p.width >= 0 && p.width % 16 == 0, "width", p.width, "use a multiple of 16")
                                 .That(p.height >= 0 && p.height <= 65535, "height", p.height, "use 0 to 65535").Take());
      args.pieces[i] = p;
      width = std::max(width, p.width), height = std::max(height, p.height);
    }
    if (width == 0 || height == 0) continue;
    const dim3 grid(static_cast<unsigned>(CeilDiv(width / 16, int64_t{kCopyThreads} * kCopyWords)), static_cast<unsigned>(height),
                    static_cast<unsigned>(part.size()));
    PREHOC_RETURN_IF_ERROR(LaunchKernel(CopyKernel, "copy", args, {.grid = grid, .threads = kCopyThreads}, stream));
  }
  return {};
}

Status CheckGate(const GateParams& params) {
  return Check("gate").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group).Take();
}

Status Gate(const GateParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(CheckGate(params));
  if (params.num_tasks == 0) return {};
  const GateArgs args = GateArgsOf(params);
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
  const Shape shape{.grid = dim3(static_cast<unsigned>(params.max_blocks)), .threads = kGatherThreads};
  const auto launch = [&](const auto& parts) {
    const GatherArgs<std::decay_t<decltype(parts)>> args{params.tasks, params.num_tasks, parts};
    return LaunchKernel(GatherKernel<std::decay_t<decltype(parts)>>, "gather", args, shape, stream);
  };
  return widens ? launch(NarrowPieces{params.head_dim / 4, RowShapeOf(params.rows, params.head_dim)}) : launch(Words{params.piece_bytes / 16});
}

}  // namespace prehoc::cuda
