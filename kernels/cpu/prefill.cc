// prefill: tiles of queries, the longest first so that the last ones to finish are short.
#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "kernels/cpu/drivers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/for_tasks.h"
#include "kernels/validate.h"

namespace prehoc::cpu {
namespace {

PrefillRoom RoomFor(int64_t vectors, int64_t d) {
  PrefillRoom room;
  room.panels = static_cast<int32_t>(CeilDiv(vectors, kPrefillPanel));
  const auto width = static_cast<size_t>(d), lanes = static_cast<size_t>(room.panels) * kPrefillPanel;
  room.k = 0;
  room.v = room.k + kPrefillKeys * width;
  room.weights = room.v + kPrefillKeys * width;
  room.q = room.weights + size_t{kPrefillKeys} * kPrefillPanel;
  room.acc = room.q + lanes * width;
  room.state = room.acc + lanes * width;
  room.floats = room.state + 5 * lanes;
  return room;
}

// Queries of a tile. Large tiles share the conversion of a key block among more queries; small ones balance threads and
// keep short chunks from being one piece of work per head.
int32_t QueriesPerTile(int32_t queries, int32_t group, size_t tasks) {
  const int64_t panels = CeilDiv(int64_t{queries} * group, kPrefillPanel) * static_cast<int64_t>(tasks);
  const int64_t per_tile = std::clamp<int64_t>(panels / 16, 1, 4);
  return static_cast<int32_t>(std::max<int64_t>(1, per_tile * kPrefillPanel / group));
}

}  // namespace

Status Prefill(const VectorOps& ops, const PrefillParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  if (params.queries == 0 || params.tasks.empty()) return {};
  const int32_t per_tile = QueriesPerTile(params.queries, params.group, params.tasks.size());
  const int64_t tiles = CeilDiv(params.queries, per_tile), tasks = static_cast<int64_t>(params.tasks.size());
  const float scale = 1.44269504088896341f / std::sqrt(static_cast<float>(params.head_dim));
  ForTasks(launch, tiles * tasks, [&](int64_t i) {
    static thread_local Scratch<float> scratch;
    const PrefillTask& task = params.tasks[static_cast<size_t>(i % tasks)];
    const int64_t first = (tiles - 1 - i / tasks) * per_tile;
    PrefillTile tile;
    tile.queries = static_cast<int32_t>(std::min<int64_t>(per_tile, params.queries - first));
    tile.runs = task.runs.data();
    tile.q = task.q + first * task.q_stride;
    tile.q_stride = task.q_stride;
    tile.scale = scale;
    tile.out = task.out + first * task.out_stride;
    tile.out_stride = task.out_stride;
    tile.start = task.start != nullptr ? task.start + first : nullptr;
    tile.first = static_cast<int32_t>(params.first + first);
    tile.sinks = params.sinks;
    tile.group = params.group;
    tile.head_dim = params.head_dim;
    tile.room = RoomFor(int64_t{tile.queries} * params.group, params.head_dim);
    tile.scratch = scratch.Get(tile.room.floats);
    ops.prefill(tile);
  });
  return {};
}

}  // namespace prehoc::cpu
