#include "kernels/cuda/attend.cuh"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/attend_narrow.h"

namespace prehoc::cuda {
namespace {

constexpr int64_t kShortTask = 1024;  // [rows]

struct Plan {
  int heads = 0;       // of a tile
  int head_tiles = 0;
  int warps = 0;       // of a block
  int splits = 1;
  bool cluster = false;
  size_t shared_bytes = 0, most_shared_bytes = 0;
  size_t counter_bytes = 0, bytes = 0;
};

// Shared memory of a block, by its warps.
struct SharedBytes {
  size_t (*of)(int warps);
  size_t room;
  bool wide() const { return of(8) <= room; }     // a block may have 8 warps
  bool two() const { return 2 * of(4) <= room; }  // or a multiprocessor two of 4,
  bool four() const { return 4 * of(2) <= room; }  // or four of 2
  size_t most() const { return of(wide() ? 8 : 4); }
};

// Blocks that run at once in clusters of 2^log, if one or two of them share a multiprocessor; 0 if there are no such clusters.
int PlacesOf(bool two, int log, size_t room) {
  static ClusterPlaces places[2];
  const SharedBytes bytes{AttendShape<128, 4>::SharedBytes, room};
  const int warps = two || !bytes.wide() ? 4 : 8;
  return places[two].Of(reinterpret_cast<const void*>(AttendKernel<RowType::kF16, 128, 4, false>),
                        {.threads = warps * kWarp, .shared_bytes = bytes.of(warps), .most_shared_bytes = bytes.most()}, log);
}

// Few tasks are split, so that each multiprocessor has a block of 8 warps. Many come in blocks of 4 warps, two to a multiprocessor (where its
// shared memory holds two): one begins or ends while the other works. More than so find a place, if they are short, in blocks of 2 warps, four to a
// multiprocessor: 512 tasks of 128 rows then take 11.8 us instead of 14.2, but of 4,096 rows 261 instead of 256.
void ChooseBlocks(int64_t tiles, int64_t rows, const SharedBytes& shared, const DeviceLimits& limits, Plan* plan) {
  int64_t splits = limits.multiprocessors / tiles;
  const bool wide = shared.wide() && splits * tiles >= limits.multiprocessors * 3 / 4, two = !wide && shared.two();
  if (two) splits = 2 * limits.multiprocessors / tiles;
  plan->warps = wide ? 8 : two && splits == 0 && rows <= kShortTask && shared.four() ? 2 : 4;
  plan->splits = static_cast<int>(std::clamp<int64_t>(std::min(splits, CeilDiv(rows, plan->warps * kKeyTile)), 1, 256));
  plan->shared_bytes = shared.of(plan->warps);
  plan->most_shared_bytes = shared.most();
  // Clusters merge faster, if all of them find a place at once; by so much that warps may have two tiles for it where they would have one.
  if (!limits.clusters()) return;
  const int fits = std::bit_width(static_cast<unsigned>(plan->splits - 1));
  for (int log = std::min(fits, ClusterPlaces::kMostLog); log > 0; --log) {
    if (log < fits && rows > int64_t{2 * kKeyTile} * plan->warps << log) return;
    if (tiles << log > PlacesOf(two, log, shared.room)) continue;
    plan->splits = 1 << log, plan->cluster = true;
    return;
  }
}

Result<Plan> PlanOf(const AttendParams& params) {
  PREHOC_RETURN_IF_ERROR(Check("attend").Count(params.num_tasks).HeadDim(params.head_dim).Group(params.group)
                             .Type(params.type).That(params.max_rows >= 0, "max_rows", params.max_rows, "use 0 or more")
                             .RowsOfType("host_format", params.host_format, params.type).Take());
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  Plan plan;
  plan.heads = params.group <= 4 ? 4 : 8;
  plan.head_tiles = static_cast<int>(CeilDiv(params.group, plan.heads));
  const int64_t tiles = int64_t{std::max(params.num_tasks, 1)} * plan.head_tiles;
  size_t part = 0;  // floats
  PREHOC_RETURN_IF_ERROR(DispatchHeadDim(params.head_dim, [&](auto d) {
    return Dispatch<4, 8>(plan.heads, [&](auto heads) -> Status {
      using S = AttendShape<d(), heads()>;
      part = S::kPart;
      ChooseBlocks(tiles, params.max_rows, {S::SharedBytes, static_cast<size_t>(limits.block_shared_bytes)}, limits, &plan);
      return {};
    });
  }));
  plan.counter_bytes = RoundUp(static_cast<size_t>(tiles) * sizeof(uint32_t), 256);
  if (plan.splits > 1 && !plan.cluster) {
    plan.bytes = plan.counter_bytes + static_cast<size_t>(tiles) * static_cast<size_t>(plan.splits) * part * sizeof(float);
  }
  return plan;
}
}  // namespace

Result<size_t> AttendWorkspaceBytes(const AttendParams& params) {
  PREHOC_ASSIGN_OR_RETURN(const Plan plan, PlanOf(params));
  return plan.bytes;
}

Status Attend(const AttendParams& params, cudaStream_t stream) {
  PREHOC_ASSIGN_OR_RETURN(const Plan plan, PlanOf(params));
  if (params.num_tasks == 0) return {};
  PREHOC_RETURN_IF_ERROR(Check("attend").Given(params.tasks, "tasks").That(params.workspace_bytes >= plan.bytes, "workspace_bytes",
                                              static_cast<int64_t>(params.workspace_bytes), "use AttendWorkspaceBytes()").Take());
  AttendArgs args{};
  args.tasks = params.tasks;
  args.arrived = reinterpret_cast<uint32_t*>(params.workspace);
  args.parts = reinterpret_cast<float*>(params.workspace + (plan.bytes > 0 ? plan.counter_bytes : 0));
  args.cluster = plan.cluster;
  args.group = params.group;
  args.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(params.head_dim));
  args.host = RowShapeOf(params.host_format, params.head_dim);
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(params.num_tasks), static_cast<unsigned>(plan.head_tiles));
  return DispatchHeadDim(params.head_dim, [&](auto d) {
    return Dispatch<4, 8>(plan.heads, [&](auto heads) {
      const Shape shape{.grid = grid, .threads = plan.warps * kWarp, .shared_bytes = plan.shared_bytes,
                        .most_shared_bytes = plan.most_shared_bytes, .cluster = plan.cluster ? plan.splits : 1};
      if (params.host_format != RowFormat::kF16) return AttendNarrow<d(), heads()>(args, shape, stream);
      return params.type == RowType::kF16 ? LaunchKernel(AttendKernel<RowType::kF16, d(), heads(), false>, "attend", args, shape, stream)
                                          : LaunchKernel(AttendKernel<RowType::kBF16, d(), heads(), false>, "attend", args, shape, stream);
    });
  });
}

}  // namespace prehoc::cuda
