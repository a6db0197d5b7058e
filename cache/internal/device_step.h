// Whole decode steps on the device: what one sequence keeps there for them, and where. The stage itself is device_step.cc.
//
//   host:    now --one write--> device: the step (append, gate, select, resolve, attend of every layer; the slow clock's turn) --one read--> results
//
// While `active`, choices, anchors and what is in which slot are the device's; Unit and HeadResidency know nothing of them until LeaveStep().
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/units.h"
#include "cache/host_tier.h"
#include "cache/kv_cache.h"
#include "kernels/step_kernels.h"
#include "selector/selector.h"

namespace prehoc {

// What its arrays are sized by. A task is a KV head of a layer, a unit one of all layers; lists are of the units that turn in one step.
struct StepShape {
  int32_t layers = 0, kv_heads = 0, group = 0, head_dim = 0;
  int32_t max_tokens = 0, chunk_tokens = 0;
  int32_t most = 0;      // middle positions of one choice; 0 = nothing is chosen
  int32_t turns = 0;     // units that turn in one step, at most; 0 = no slow clock
  size_t select_space = 0, attend_space = 0, choose_space = 0;  // [bytes] of workspace
  int32_t units() const { return layers * kv_heads; }
  int32_t chunks() const { return (max_tokens + chunk_tokens - 1) / chunk_tokens; }
  int32_t words() const { return (max_tokens + 63) / 64; }  // of a head's bitmap of residents
};

// Pointers into the sequence's device memory. Tasks name them, so they stay where they are.
struct StepArrays {
  static constexpr int32_t kMostSlots = 32767;
  // Of so many slots of a head, those that are free for rows that a step reads from the host. Fewer cannot keep all of them, and more hold too little:
  // bench/results/residency-clock.txt.
  static constexpr int32_t SpareRoom(int32_t slots) { return static_cast<int32_t>(std::min<int64_t>(CeilDiv(slots, 16), 512)); }

  // Written before every step, in one piece.
  std::byte* now = nullptr;
  size_t now_bytes = 0;
  int32_t *n = nullptr, *first = nullptr, *zero = nullptr;  // visible positions; those before this step; 0
  step::SelectTask* select = nullptr;   // [units]
  step::ChooseTask* want = nullptr;     // [turns]
  step::RefreshTask* refresh = nullptr; // [turns] of this step
  step::RefreshTask* land = nullptr;    // [turns] of the step before
  step::GatherTask* gather = nullptr;   // [turns] of the step before
  // Written when it has changed, in one piece.
  std::byte* fixed = nullptr;
  size_t fixed_bytes = 0;
  step::AppendTask* append = nullptr;   // [units]
  step::GateTask* gate = nullptr;
  step::ResolveTask* resolve = nullptr;
  step::AttendTask* attend = nullptr;
  step::AdoptTask* adopt = nullptr;     // [units] if there are slots
  int32_t* chunk_row = nullptr;         // [layers, chunks]
  // Read after every step, in one piece.
  std::byte* results = nullptr;
  size_t results_bytes = 0;
  int32_t* count = nullptr;             // [units]
  uint8_t* hold = nullptr;              // [units]
  int64_t* misses = nullptr;            // [units] since the state was entered
  int32_t* far = nullptr;               // [1] likewise
  float *lse_all = nullptr, *lse_out = nullptr, *lse = nullptr;  // [units, group]; lse: of what was attended to
  int32_t* fetched = nullptr;           // [2, turns]
  // The device's own.
  int32_t *chosen = nullptr, *refs = nullptr;  // [units, most], refs 4 more for each
  int16_t* keep = nullptr;              // [units, most]
  int32_t *num_refs = nullptr, *age = nullptr; // [units]
  float* anchor = nullptr;              // [units, group, head_dim]
  int16_t* slot_of = nullptr;           // [units, max_tokens]
  int32_t* owner = nullptr;             // [units, slots]
  step::SpareSlots::State* spare = nullptr;  // [units]
  int16_t* spare_slot = nullptr;        // [units, SpareRoom(slots)]
  int32_t* spare_position = nullptr;    // likewise
  uint8_t* used = nullptr;              // [units, slots]
  uint64_t* resident = nullptr;         // [units, words]
  int32_t *wanted = nullptr, *position = nullptr, *sources = nullptr, *targets = nullptr;  // [2, turns, slots]
  int32_t* wanted_count = nullptr;      // [2, turns]
  float* unused = nullptr;              // [turns]
  std::byte *select_space = nullptr, *attend_space = nullptr, *choose_space = nullptr;

  // For a sequence with so many slots a head; `bytes` is what that takes from `base` on. A null base measures only.
  static StepArrays Carve(std::byte* base, const StepShape& shape, int32_t slots, size_t* bytes);
};

struct DeviceStep {
  enum class Way : uint8_t { kNone, kEverything, kChoose };

  StepShape shape;
  StepArrays at;
  bool active = false;   // the state of choices and slots is the device's
  bool planned = false;  // the open call is a step of it
  bool pause = false;    // ... with a look at every layer
  uint64_t id = 0;       // of what is enqueued
  Way way = Way::kNone;  // what `id` is of, with max_rows and io
  int32_t max_rows = 0;
  LayerInput io;
  StepRule rule;         // of the open call, for all layers
  int64_t look_again = 0;  // step at which to ask anew whether all rows are in host memory
  std::vector<std::byte> now, fixed, results;  // on the host
  bool fixed_changed = true;
  std::vector<std::vector<BlockPin>> pins;  // [layers] of sealed chunks, from the first on; only where rows are read from the host
  std::vector<int64_t> misses;              // [units] as last read
  std::vector<uint8_t> pooled;              // [units] whether this step's scan pools
  std::vector<int32_t> turning[2];          // units in the lists of even and odd steps

  // Where what lies at `device`, in `now`, `fixed` or `results`, lies on the host.
  template <class T>
  T* Here(T* device) {
    auto* const byte = reinterpret_cast<std::byte*>(device);
    for (const auto& [begin, copy] : {std::pair{at.now, &now}, std::pair{at.fixed, &fixed}, std::pair{at.results, &results}}) {
      if (byte >= begin && byte < begin + copy->size()) return reinterpret_cast<T*>(copy->data() + (byte - begin));
    }
    return nullptr;
  }
};

}  // namespace prehoc
