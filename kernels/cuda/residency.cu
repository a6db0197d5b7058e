// resolve, refresh, land, adopt: which rows are in slots. One block a head, but for land.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/residency.cuh"

namespace prehoc::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kAtOnce = 8;      // of a thread's positions or slots, so that loads do not wait for each other
constexpr int kLandBlocks = 8;  // of a head
constexpr int32_t kMostSlots = 32767;

struct ResolveArgs {
  const ResolveTask* tasks;
  int32_t group, head_dim;
};
__global__ void __launch_bounds__(kThreads) ResolveKernel(const __grid_constant__ ResolveArgs args) {
  const ResolveTask task = args.tasks[blockIdx.x];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  ResolveWhole(task, args.group * args.head_dim);
}

// Position p has no slot from now on; the ring of the next position has [n + 1 - ring_rows, n].
__device__ void LoseSlot(const ResidencyState& at, int32_t p, int32_t n, int32_t ring_rows) {
  at.slot_of[p] = -1;
  const bool in_ring = p <= n && p > n - ring_rows;
  if (!in_ring) atomicAnd(reinterpret_cast<uint32_t*>(at.resident) + p / 32, ~(1u << (p % 32)));
}

struct RefreshArgs {
  const RefreshTask* tasks;
  int32_t words;  // 32-bit words of the bitmap of what is wanted
};
__global__ void __launch_bounds__(kThreads) RefreshKernel(const __grid_constant__ RefreshArgs args) {
  extern __shared__ uint32_t wanted[];  // [words], then spare slots, free ones first: int16 [slots]
  __shared__ int num_free, num_spare, num_missing;
  const RefreshTask task = args.tasks[blockIdx.x];
  const ResidencyState at = task.at;
  int16_t* const spare = reinterpret_cast<int16_t*>(wanted + args.words);
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  for (int i = threadIdx.x; i < args.words; i += kThreads) wanted[i] = 0;
  if (threadIdx.x == 0) num_free = num_spare = num_missing = 0;
  __syncthreads();
  const int32_t given = *task.wanted_count, count = given >= 0 && given <= at.slots ? given : 0;
  const auto row_of = [&](int32_t p) { return p >= 0 && p < at.max_n ? HostRowOf(task.host, p) : -1; };
  for (int base = threadIdx.x; base < count; base += kAtOnce * kThreads) {
    int32_t p[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) p[j] = base + j * kThreads < count ? task.wanted[base + j * kThreads] : -1;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (row_of(p[j]) >= 0) atomicOr(&wanted[p[j] / 32], 1u << (p[j] % 32));
    }
  }
  const int32_t n = task.n != nullptr ? *task.n : 0, ring_rows = task.n != nullptr ? task.ring_rows : 0;
  __syncthreads();
  const auto for_slots = [&](auto&& take) {  // take(slot, owner)
    for (int base = threadIdx.x; base < at.slots; base += kAtOnce * kThreads) {
      int32_t owner[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) owner[j] = base + j * kThreads < at.slots ? at.owner[base + j * kThreads] : -2;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) take(base + j * kThreads, owner[j]);
    }
  };
  for_slots([&](int slot, int32_t owner) {
    if (owner == -1) spare[atomicAdd(&num_free, 1)] = static_cast<int16_t>(slot);
  });
  __syncthreads();
  if (threadIdx.x == 0) num_spare = num_free;
  __syncthreads();
  for_slots([&](int slot, int32_t owner) {
    if (owner >= 0 && (wanted[owner / 32] >> (owner % 32) & 1) == 0) spare[atomicAdd(&num_spare, 1)] = static_cast<int16_t>(slot);
  });
  __syncthreads();
  // Neighbours stay neighbours: addresses that rise read faster. So places are given out warp by warp, in order.
  for (int base = 0; base < count; base += kAtOnce * kThreads) {
    int32_t p[kAtOnce], row[kAtOnce];
    bool missing[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * kThreads + threadIdx.x;
      p[j] = i < count ? task.wanted[i] : -1;
      missing[j] = i < count && (i == 0 || task.wanted[i - 1] != p[j]);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      row[j] = row_of(p[j]);
      missing[j] = missing[j] && row[j] >= 0 && at.slot_of[p[j]] < 0;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const unsigned votes = __ballot_sync(kAllLanes, missing[j]);
      int first = 0;
      if (threadIdx.x % kWarp == 0 && votes != 0) first = atomicAdd(&num_missing, __popc(votes));
      first = __shfl_sync(kAllLanes, first, 0);
      const int place = first + __popc(votes & ((1u << (threadIdx.x % kWarp)) - 1));
      if (!missing[j] || place >= num_spare) continue;
      const int slot = spare[place];
      const int32_t old = at.owner[slot];
      if (old >= 0) LoseSlot(at, old, n, ring_rows);
      at.owner[slot] = -2;
      task.position[place] = p[j];
      task.from_piece[place] = row[j];
      task.to_piece[place] = slot;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) *task.count = min(num_missing, num_spare);
}

__global__ void __launch_bounds__(kThreads) LandKernel(const __grid_constant__ RefreshArgs args) {
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RefreshTask task = args.tasks[blockIdx.x];
  const int32_t count = *task.count;
  const int me = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x), all = static_cast<int>(gridDim.y) * kThreads;
  for (int i = me; i < count; i += all) {
    const int32_t p = task.position[i], slot = task.to_piece[i];
    task.at.owner[slot] = p;
    task.at.slot_of[p] = static_cast<int16_t>(slot);
    atomicOr(reinterpret_cast<uint32_t*>(task.at.resident) + p / 32, 1u << (p % 32));
  }
  for (int i = me; task.pooled != nullptr && i < task.at.max_n; i += all) task.pooled[i] = -Infinity();
}

struct AdoptArgs {
  const AdoptTask* tasks;
};
__global__ void __launch_bounds__(kThreads) AdoptKernel(const __grid_constant__ AdoptArgs args) {
  __shared__ int found_by[kThreads / kWarp], last;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const AdoptTask task = args.tasks[blockIdx.x];
  const ResidencyState at = task.at;
  const SpareSlots spare = at.spare;
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  if (spare.state == nullptr) return;
  const SpareSlots::State state = *spare.state;
  const int32_t kept = min(state.taken, state.free), n = task.n != nullptr ? *task.n : 0, ring_rows = task.n != nullptr ? task.ring_rows : 0;
  for (int32_t i = thread; i < kept; i += kThreads) {
    const int32_t p = spare.position[i], slot = spare.slot[i];
    const bool landed = at.slot_of[p] >= 0;
    at.owner[slot] = landed ? -1 : p;
    if (landed) continue;
    at.slot_of[p] = static_cast<int16_t>(slot);
    atomicOr(reinterpret_cast<uint32_t*>(at.resident) + p / 32, 1u << (p % 32));
  }
  // Those that are left come first. Places that are read before are written behind the barrier, so in turn.
  int32_t free = state.free - kept;
  for (int32_t first = 0; kept > 0 && first < free; first += kThreads) {
    const bool moves = first + thread < free;
    const int16_t slot = moves ? spare.slot[kept + first + thread] : 0;
    __syncthreads();
    if (moves) spare.slot[first + thread] = slot;
    __syncthreads();
  }
  __syncthreads();  // owners, for the hand
  int32_t hand = state.hand;
  for (int32_t looked = 0; looked < at.slots && free < spare.room;) {
    const int32_t here = min(kThreads, at.slots - looked), slot = (hand + thread) % at.slots;
    const int32_t owner = thread < here ? at.owner[slot] : -2;
    const bool used = owner >= 0 && spare.used[slot] != 0, goes = owner >= -1 && !used;
    const unsigned votes = __ballot_sync(kAllLanes, goes);
    if (lane == 0) found_by[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), all = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      if (w < warp) before += found_by[w];
      all += found_by[w];
    }
    const int32_t missing = spare.room - free;
    if (goes && before < missing) {
      if (owner >= 0) LoseSlot(at, owner, n, ring_rows);
      at.owner[slot] = -3;
      spare.slot[free + before] = static_cast<int16_t>(slot);
    }
    if (used && before < missing) spare.used[slot] = 0;
    if (goes && before + 1 == missing) last = thread + 1;  // behind it the hand stops
    __syncthreads();
    const int32_t passed = all < missing ? here : last;
    free += min(all, missing);
    hand = (hand + passed) % at.slots;
    looked += passed;
  }
  if (thread == 0) *spare.state = {.free = free, .taken = 0, .hand = hand};
}

Status CheckTurn(const char* kernel, const RefreshParams& params) {
  return Check(kernel).Tasks(params.tasks, params.num_tasks).That(params.max_n >= 0, "max_n", params.max_n, "use 0 or more").Take();
}
}  // namespace

Status Resolve(const ResolveParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("resolve").Tasks(params.tasks, params.num_tasks).Group(params.group).HeadDim(params.head_dim).Take());
  if (params.num_tasks == 0) return {};
  return LaunchKernel(ResolveKernel, "resolve", ResolveArgs{params.tasks, params.group, params.head_dim},
                      {.grid = dim3(static_cast<unsigned>(params.num_tasks)), .threads = kThreads}, stream);
}

Status Refresh(const RefreshParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(CheckTurn("refresh", params));
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  const int32_t words = params.max_n / 32 + (params.max_n % 32 != 0 ? 1 : 0);
  const size_t shared = static_cast<size_t>(words) * 4 + kMostSlots * sizeof(int16_t);
  PREHOC_RETURN_IF_ERROR(Check("refresh").That(shared + 1024 <= static_cast<size_t>(limits.block_shared_bytes), "max_n", params.max_n,
                                               "is more than a block's bitmap holds", StatusCode::kUnsupported).Take());
  if (params.num_tasks == 0) return {};
  return LaunchKernel(RefreshKernel, "refresh", RefreshArgs{params.tasks, words},
                      {.grid = dim3(static_cast<unsigned>(params.num_tasks)), .threads = kThreads, .shared_bytes = shared}, stream);
}

Status Land(const RefreshParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(CheckTurn("land", params));
  if (params.num_tasks == 0) return {};
  return LaunchKernel(LandKernel, "land", RefreshArgs{params.tasks, 0},
                      {.grid = dim3(static_cast<unsigned>(params.num_tasks), kLandBlocks), .threads = kThreads}, stream);
}

Status Adopt(const AdoptParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(Check("adopt").Tasks(params.tasks, params.num_tasks).Take());
  if (params.num_tasks == 0) return {};
  return LaunchKernel(AdoptKernel, "adopt", AdoptArgs{params.tasks}, {.grid = dim3(static_cast<unsigned>(params.num_tasks)), .threads = kThreads}, stream);
}

}  // namespace prehoc::cuda
