#include "kernels/cuda/attend.cuh"

#include <algorithm>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/launch.h"

namespace prehoc::cuda {
namespace {

struct Plan {
  int head_tiles = 0;
  int splits = 1;
  bool cluster = false;
  size_t counter_bytes = 0, bytes = 0;
};

// How busy `at_once` places are with `blocks` blocks.
double BusyShare(int64_t blocks, int64_t at_once) {
  return static_cast<double>(blocks) / static_cast<double>(CeilDiv(blocks, at_once) * at_once);
}

// As few parts as keep the multiprocessors busy: each part costs a merge.
int SplitsOf(int64_t blocks, int64_t most, int multiprocessors) {
  double best = 0;
  int splits = 1;
  for (int64_t s = 1; s <= std::min<int64_t>(most, 256); ++s) {
    const double busy = BusyShare(blocks * s, multiprocessors);
    if (busy > best * 1.04) best = busy, splits = static_cast<int>(s);
    if (blocks * s > 4 * multiprocessors) break;
  }
  return splits;
}

// Blocks that run at once in clusters of 2^log; 0 if there are no such clusters.
int PlacesOf(int log) {
  static ClusterPlaces places;
  using S = AttendShape<128>;  // like all of them one block to a multiprocessor
  return places.Of(reinterpret_cast<const void*>(AttendKernel<RowType::kF16, 128>), {.threads = S::kThreads, .shared_bytes = S::kSharedBytes}, log);
}

// Clusters merge in a fraction of the time, but must be of 2^i blocks: worth it unless they leave much more idle.
void ChooseSplits(int64_t blocks, int64_t most, const DeviceLimits& limits, Plan* plan) {
  plan->splits = SplitsOf(blocks, most, limits.multiprocessors);
  if (plan->splits == 1 || !limits.clusters()) return;
  const double busy = BusyShare(blocks * plan->splits, limits.multiprocessors);
  double best = 0.85 * busy;
  for (int log = 1; log <= ClusterPlaces::kMostLog; ++log) {
    const int places = PlacesOf(log);
    if (places == 0 || (int64_t{1} << log) >= 2 * most) break;
    const double share = BusyShare(blocks << log, places) * places / limits.multiprocessors;
    if (share > best) best = share * 1.04, plan->splits = 1 << log, plan->cluster = true;
  }
}

Result<Plan> PlanOf(const AttendParams& params) {
  PREHOC_RETURN_IF_ERROR(Check("attend").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group)
                             .Type(params.type).That(params.max_rows >= 0, "max_rows", params.max_rows, "use 0 or more").Take());
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  Plan plan;
  plan.head_tiles = static_cast<int>(CeilDiv(params.group, kHeadTile));
  const int warps = params.head_dim == 256 ? 4 : 8;
  const int64_t most = std::max<int64_t>(1, CeilDiv(params.max_rows, warps * kKeyTile));
  const int64_t blocks = int64_t{std::max(params.num_tasks, 1)} * plan.head_tiles;
  ChooseSplits(blocks, most, limits, &plan);
  plan.counter_bytes = RoundUp(static_cast<size_t>(blocks) * sizeof(uint32_t), 256);
  if (plan.splits > 1 && !plan.cluster) {
    plan.bytes = plan.counter_bytes + static_cast<size_t>(blocks) * static_cast<size_t>(plan.splits) * kHeadTile *
                                          static_cast<size_t>(params.head_dim + 2) * sizeof(float);
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
  PREHOC_RETURN_IF_ERROR(Check("attend").That(params.workspace_bytes >= plan.bytes, "workspace_bytes",
                                              static_cast<int64_t>(params.workspace_bytes), "use AttendWorkspaceBytes()").Take());
  AttendArgs args{};
  args.tasks = params.tasks;
  args.arrived = reinterpret_cast<uint32_t*>(params.workspace);
  args.parts = reinterpret_cast<float*>(params.workspace + (plan.bytes > 0 ? plan.counter_bytes : 0));
  args.cluster = plan.cluster;
  args.group = params.group;
  args.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(params.head_dim));
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(params.num_tasks), static_cast<unsigned>(plan.head_tiles));
  return DispatchHeadDim(params.head_dim, [&](auto d) {
    using S = AttendShape<d()>;
    const Shape shape{.grid = grid, .threads = S::kThreads, .shared_bytes = S::kSharedBytes,
                      .cluster = plan.cluster ? plan.splits : 1};
    return params.type == RowType::kF16 ? LaunchKernel(AttendKernel<RowType::kF16, d()>, "attend", args, shape, stream)
                                        : LaunchKernel(AttendKernel<RowType::kBF16, d()>, "attend", args, shape, stream);
  });
}

}  // namespace prehoc::cuda
