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

// What attend reads of the chosen positions [from, to), by all threads of a block.
__device__ inline void ResolveRows(const ResolveTask& task, int32_t n, int32_t from, int32_t to) {
  const int64_t ring_begin = int64_t{n} - task.ring_rows;
  uint32_t missed = 0, far = 0;
  for (int32_t i = from + static_cast<int32_t>(threadIdx.x); i < to; i += static_cast<int32_t>(blockDim.x)) {
    const int32_t p = task.chosen[i];
    int32_t ref = 0x7fffffff;  // a row that does not exist
    if (p >= 0 && p < n && p < task.at.max_n) {
      const int slot = p >= ring_begin ? -1 : SlotOf(task.at, p);
      if (p >= ring_begin) {
        ref = task.ring_row + p % task.ring_rows;
      } else if (slot >= 0) {
        ref = task.slot_row + slot;
      } else {
        const int32_t row = HostRowOf(task.host, p);
        if (row >= 0) ref = ~row;
        ++(row >= 0 ? missed : far);
      }
    }
    task.refs[i] = ref;
  }
  // Few are missed: one addition a warp, and mostly none.
  missed = __reduce_add_sync(kAllLanes, missed), far = __reduce_add_sync(kAllLanes, far);
  if (threadIdx.x % kWarp != 0) return;
  if (missed != 0 && task.misses != nullptr) atomicAdd(reinterpret_cast<unsigned long long*>(task.misses), static_cast<unsigned long long>(missed));
  if (far != 0 && task.far != nullptr) atomicAdd(task.far, static_cast<int32_t>(far));
}

// All else that resolve does, by one block, when nobody reads the bits of residents any more.
__device__ inline void EndResolve(const ResolveTask& task, int32_t n, int32_t count, int32_t query_floats) {
  const bool anew = task.hold == nullptr || *task.hold == 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); anew && task.q != nullptr && i < query_floats; i += static_cast<int32_t>(blockDim.x)) {
    task.anchor[i] = task.q[i];
  }
  if (threadIdx.x != 0) return;
  *task.num_refs = IsKnown(task, count) ? count : -1;
  if (task.age != nullptr) *task.age = anew ? 0 : *task.age + 1;
  if (task.ring_rows <= 0 || task.at.resident == nullptr) return;
  const auto mark = [&](int64_t p, bool resident) {
    if (p < 0 || p >= task.at.max_n) return;
    uint64_t* const word = task.at.resident + p / 64;
    const uint64_t bit = uint64_t{1} << (p % 64);
    *word = resident ? *word | bit : *word & ~bit;
  };
  const int64_t leaves = int64_t{n} - task.ring_rows;
  mark(int64_t{n} - 1, true);
  mark(leaves, leaves >= 0 && leaves < task.at.max_n && task.at.slot_of[leaves] >= 0);
}

}  // namespace prehoc::cuda
