// How one sequence divides its share of the device budget. Per (layer, KV head): sinks, a ring of the last rows, slots for
// rows chosen from the middle, and the index (codes, page bounds) of every position.
#pragma once
#include <cstdint>
#include <string>

#include "base/geometry.h"
#include "base/half.h"
#include "base/result.h"
#include "cache/internal/device_step.h"

namespace prehoc {

struct DeviceRequest {
  KvGeometry geometry;
  int64_t max_tokens = 0;
  uint64_t bytes = 0;           // what may be used
  int32_t sinks = 0;
  int32_t ring_min = 0;         // rows that must be found in the ring: local window, uncoded tail, what a refresh may need
  int32_t slots_min = 0;        // one choice; 0 = the method chooses nothing
  int32_t slots_max = 0;        // even if more would fit; 0 = no such limit; below slots_min = slots_min
  int32_t units = 0;            // (layer): heads or groups of heads that choose on their own
  size_t code_block_bytes = 0;  // 0 = no codes
  int32_t code_group = 64;
  size_t label_bytes = 0;       // of one position; 0 = no labels
  bool pages = false;
  int32_t page_tokens = 16;     // of one page's bounds; divides code_group
  int32_t pool_layers = 0;      // pooled scores for a slow clock: of each layer, or 1 = of the one whose rows are about to come, or none
  bool scores = false;          // logits of all positions
  bool errors = false;          // ... and their error bounds
  const StepShape* steps = nullptr;  // whole steps on the device: their arrays too, and no more slots than they take; or null
};

// Offsets are in bytes from the start of the sequence's buffer; every part is aligned to 64.
struct DeviceLayout {
  int32_t ring = 0;        // [rows], a multiple of 64; at least max_tokens = everything is resident, always
  int32_t slots = 0;       // [rows]
  int64_t groups = 0;      // code groups
  int64_t stride = 0;      // [floats] of one row of logits, and of pooled scores
  size_t sinks_at = 0, ring_at = 0, slots_at = 0, codes_at = 0, lo_at = 0, hi_at = 0, labels_at = 0, slotted_at = 0, resident_at = 0;
  size_t head_bytes = 0;   // of one (layer, KV head)
  size_t pool_at = 0;      // [pool_layers, units, stride]
  int32_t pool_layers = 0;
  size_t z_at = 0, err_at = 0;  // [heads, stride], shared by all layers
  size_t steps_at = 0, step_bytes = 0;  // of whole steps on the device; 0 bytes = there are none
  size_t bytes = 0;        // in all
  bool complete(int64_t max_tokens) const { return ring >= max_tokens; }

  // Everything resident if that fits, else as many slots as fit (as long a ring, if nothing chooses).
  // kOutOfSpace names the parts and what would be enough.
  static Result<DeviceLayout> Fit(const DeviceRequest& request);
};

}  // namespace prehoc
