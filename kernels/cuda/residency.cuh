// Where rows are: of a position in host memory, and of chosen positions (resolve), for kernels of any number of threads.
#pragma once
#include "kernels/cuda/common.cuh"

namespace prehoc::cuda {

// -1: its chunk is not there.
__device__ inline int32_t HostRowOf(const HostRows& host, int32_t p) {
  int64_t row = int64_t{host.head_row} + p;
  if (host.chunk_row != nullptr) {
    if (host.chunk_tokens <= 0 || p / host.chunk_tokens >= host.num_chunks) return -1;
    const int32_t chunk = host.chunk_row[p / host.chunk_tokens];
    if (chunk < 0) return -1;
    row = int64_t{chunk} + host.head_row + p % host.chunk_tokens;
  }
  return row >= 0 && row < 0x7fffffff ? static_cast<int32_t>(row) : -1;
}

__device__ inline bool IsKnown(const ResolveTask& task, int32_t count) { return count >= 0 && count <= task.room; }

__device__ inline int SlotOf(const ResidencyState& at, int64_t p) { return at.slot_of != nullptr ? at.slot_of[p] : -1; }

// Spare slots for the lanes that are `missed` (position p), of a whole warp: few are, so that one addition a warp is enough. -1: none is left.
__device__ inline int16_t TakeSpare(const SpareSlots& spare, bool missed, int32_t p) {
  const unsigned votes = __ballot_sync(kAllLanes, missed), lane = threadIdx.x % kWarp;
  int32_t taken = 0;
  if (lane == 0) taken = atomicAdd(&spare.state->taken, __popc(votes));
  taken = __shfl_sync(kAllLanes, taken, 0) + __popc(votes & ((1u << lane) - 1));
  if (!missed || taken >= spare.state->free) return -1;
  spare.position[taken] = p;
  return spare.slot[taken];
}

// What attend reads of the chosen positions [from, to), by all threads of a block.
__device__ inline void ResolveRows(const ResolveTask& task, int32_t n, int32_t from, int32_t to) {
  constexpr int kAtOnce = 4;  // so that loads do not wait for each other
  const int32_t* const chosen = task.chosen;
  int32_t* const refs = task.refs;
  int16_t* const keep = task.keep;
  const int16_t* const slot_of = task.at.slot_of;
  uint8_t* const used = task.at.spare.state != nullptr ? task.at.spare.used : nullptr;
  const int32_t threads = static_cast<int32_t>(blockDim.x), end = min(n, task.at.max_n);
  const int32_t slot_row = task.slot_row, ring_row = task.ring_row, ring_rows = task.ring_rows;
  const int64_t ring_begin = int64_t{n} - ring_rows;
  uint32_t missed = 0, far = 0;
  for (int32_t first = from; first < to; first += kAtOnce * threads) {
    const int32_t base = first + static_cast<int32_t>(threadIdx.x);
    int32_t p[kAtOnce], slot[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) p[i] = base + i * threads < to ? chosen[base + i * threads] : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) slot[i] = p[i] >= 0 && p[i] < end && p[i] < ring_begin && slot_of != nullptr ? slot_of[p[i]] : -1;
    uint32_t on_host = 0;  // which of this thread's
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (base + i * threads >= to) break;
      int32_t ref = 0x7fffffff;  // a row that does not exist
      if (slot[i] >= 0) {
        ref = slot_row + slot[i];
        if (used != nullptr) used[slot[i]] = 1;
      } else if (p[i] >= 0 && p[i] < end && p[i] >= ring_begin) {
        ref = ring_row + p[i] % ring_rows;
      } else if (p[i] >= 0 && p[i] < end) {
        const int32_t row = HostRowOf(task.host, p[i]);
        if (row >= 0) ref = ~row, on_host |= 1u << i;
        ++(row >= 0 ? missed : far);
      }
      refs[base + i * threads] = ref;
    }
    if (keep == nullptr || !__any_sync(kAllLanes, on_host != 0)) continue;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool mine = (on_host >> i & 1) != 0;
      if (!__any_sync(kAllLanes, mine)) continue;
      const int16_t kept = TakeSpare(task.at.spare, mine, p[i]);
      if (mine) keep[base + i * threads] = kept;
    }
  }
  // Few are missed: one addition a warp, and mostly none.
  missed = __reduce_add_sync(kAllLanes, missed), far = __reduce_add_sync(kAllLanes, far);
  if (threadIdx.x % kWarp != 0) return;
  if (missed != 0 && task.misses != nullptr) atomicAdd(reinterpret_cast<unsigned long long*>(task.misses), static_cast<unsigned long long>(missed));
  if (far != 0 && task.far != nullptr) atomicAdd(task.far, static_cast<int32_t>(far));
}

// All else that resolve does, by one block of more than a warp, when nobody reads the bits of residents any more.
__device__ inline void EndResolve(const ResolveTask& task, int32_t n, int32_t count, int32_t query_floats) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const bool anew = task.hold == nullptr || *task.hold == 0;
  for (int32_t i = thread; task.q != nullptr && i < query_floats; i += static_cast<int32_t>(blockDim.x)) {
    const float x = task.q[i];
    if (anew) task.anchor[i] = x;
  }
  if (thread == 0) {
    if (task.num_refs != nullptr) *task.num_refs = IsKnown(task, count) ? count : -1;
    if (task.age != nullptr) *task.age = anew ? 0 : *task.age + 1;
  }
  if (thread != kWarp || task.ring_rows <= 0 || task.at.resident == nullptr) return;
  // Additions to memory that nobody waits for; those of one thread to one word are done in order.
  const auto mark = [&](int64_t p, bool resident) {
    if (p < 0 || p >= task.at.max_n) return;
    uint32_t* const word = reinterpret_cast<uint32_t*>(task.at.resident) + p / 32;
    const uint32_t bit = 1u << (p % 32);
    resident ? atomicOr(word, bit) : atomicAnd(word, ~bit);
  };
  const int64_t leaves = int64_t{n} - task.ring_rows;
  mark(int64_t{n} - 1, true);
  mark(leaves, leaves >= 0 && leaves < task.at.max_n && SlotOf(task.at, leaves) >= 0);
}

// A whole task: what stands in its memory.
__device__ inline void ResolveWhole(const ResolveTask& task, int32_t query_floats) {
  const int32_t n = *task.n, count = *task.count;
  if (IsKnown(task, count) && task.refs != nullptr) ResolveRows(task, n, 0, count);
  EndResolve(task, n, count, query_floats);
}

}  // namespace prehoc::cuda
