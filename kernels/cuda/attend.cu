#include "kernels/cuda/attend.cuh"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/units.h"
#include "kernels/cuda/launch.h"

namespace prehoc::cuda {
namespace {

constexpr int kWarps = 4;

struct Plan {
  int heads = 0;       // of a tile
  int head_tiles = 0;
  int splits = 1;
  bool cluster = false;
  size_t counter_bytes = 0, bytes = 0;
};

// The most blocks in a cluster; 0 if there are none.
int MostInCluster() {
  static ClusterPlaces places;
  const Shape shape{.threads = kWarps * kWarp, .shared_bytes = AttendShape<128, 4>::SharedBytes(kWarps)};
  for (int log = ClusterPlaces::kMostLog; log > 0; --log) {
    if (places.Of(reinterpret_cast<const void*>(AttendKernel<RowType::kF16, 128, 4>), shape, log) > 0) return 1 << log;
  }
  return 0;
}

// As few parts as keep the multiprocessors busy: each part costs a merge, which clusters do in a fraction of the time.
void ChooseSplits(int64_t blocks, int64_t most, const DeviceLimits& limits, Plan* plan) {
  const int64_t wanted = std::min(most, CeilDiv(int64_t{limits.multiprocessors} * 9 / 10, blocks));
  plan->splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, 256));
  if (plan->splits == 1 || !limits.clusters()) return;
  const int cluster = static_cast<int>(std::bit_ceil(static_cast<unsigned>(plan->splits)));
  if (cluster <= MostInCluster()) plan->splits = cluster, plan->cluster = true;
}

Result<Plan> PlanOf(const AttendParams& params) {
  PREHOC_RETURN_IF_ERROR(Check("attend").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Group(params.group)
                             .Type(params.type).That(params.max_rows >= 0, "max_rows", params.max_rows, "use 0 or more").Take());
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  Plan plan;
  plan.heads = params.group <= 4 ? 4 : 8;
  plan.head_tiles = static_cast<int>(CeilDiv(params.group, plan.heads));
  const int64_t most = std::max<int64_t>(1, CeilDiv(params.max_rows, kWarps * kKeyTile));
  const int64_t blocks = int64_t{std::max(params.num_tasks, 1)} * plan.head_tiles;
  ChooseSplits(blocks, most, limits, &plan);
  plan.counter_bytes = RoundUp(static_cast<size_t>(blocks) * sizeof(uint32_t), 256);
  if (plan.splits > 1 && !plan.cluster) {
    plan.bytes = plan.counter_bytes + static_cast<size_t>(blocks) * static_cast<size_t>(plan.splits) * static_cast<size_t>(plan.heads) *
                                          static_cast<size_t>(params.head_dim + 8) * sizeof(float);
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
    return Dispatch<4, 8>(plan.heads, [&](auto heads) {
      const Shape shape{.grid = grid, .threads = kWarps * kWarp, .shared_bytes = AttendShape<d(), heads()>::SharedBytes(kWarps), .cluster = plan.cluster ? plan.splits : 1};
      return params.type == RowType::kF16 ? LaunchKernel(AttendKernel<RowType::kF16, d(), heads()>, "attend", args, shape, stream)
                                          : LaunchKernel(AttendKernel<RowType::kBF16, d(), heads()>, "attend", args, shape, stream);
    });
  });
}

}  // namespace prehoc::cuda
