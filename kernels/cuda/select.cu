// scan, choose and select: checks, plans, and the kernel that chooses from logits in memory.
#include "kernels/cuda/select.cuh"
#include "kernels/cuda/select_bars.cuh"

#include <algorithm>

#include "base/units.h"
#include "kernels/cuda/inst/alone.cuh"
#include "kernels/cuda/select_launch.h"

namespace prehoc::cuda {
namespace {

constexpr size_t kDeclaredBytes = 4096;        // of shared memory: at least what the kernels declare themselves
constexpr int32_t kMostPositions = 1 << 30;  // so that sums of positions and chunks fit into 32 bits

struct Plan {
  SelectArgs args{};
  int blocks = 0;
  size_t bytes = 0;
};

Status CheckFormat(const char* kernel, const CodeFormat& format) {
  return Check(kernel)
      .That(format.bits == 2 || format.bits == 4 || format.bits == 8, "bits", format.bits, "use 2, 4 or 8", StatusCode::kUnsupported)
      .That(!format.dither, "dither", format.dither, "use codes without dither on a device", StatusCode::kUnsupported)
      .That(format.group_tokens == 16 || format.group_tokens == 64, "group_tokens", format.group_tokens, "use 16 or 64",
            StatusCode::kUnsupported).Take();
}
Check CheckPositions(const char* kernel, int32_t max_n) {
  Check check(kernel);
  check.That(max_n >= 0 && max_n <= kMostPositions, "max_n", max_n, "use 0 to 2^30");
  return check;
}

// Blocks that run at once in clusters of 2^log, with all the shared memory that there is; 0 if there are no such clusters.
int PlacesOf(int log, const DeviceLimits& limits) {
  static ClusterPlaces places;
  return places.Of(reinterpret_cast<const void*>(SelectKernel<Selector<0, 0>>),
                   {.threads = kSelectThreads, .shared_bytes = static_cast<size_t>(limits.block_shared_bytes) - kDeclaredBytes}, log);
}

bool CanRegroup(int32_t num_tasks) { return num_tasks <= kSelectThreads; }  // a thread looks at a task

// A task is split over as many blocks as there are multiprocessors for it, but for short ones: waiting costs more than they do. Clusters
// wait for each other faster than other teams, but have 2^i blocks, at most 16: worth it unless they leave much more idle.
void MakeTeams(int tasks, int32_t max_n, const DeviceLimits& limits, Plan* plan) {
  SelectArgs& args = plan->args;
  const int64_t useful = std::max<int64_t>(1, CeilDiv(max_n, 512));
  args.team_blocks = static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(limits.multiprocessors / tasks, useful), 1, kMaxTeam));
  args.cluster = false;
  int teams = std::min(tasks, limits.multiprocessors / args.team_blocks);
  for (int log = ClusterPlaces::kMostLog; log > 0 && limits.clusters() && args.team_blocks > 1 && !args.regroup; --log) {
    const int blocks = 1 << log;
    if (blocks >= 2 * useful || blocks * 4 < args.team_blocks * 3 || PlacesOf(log, limits) < tasks * blocks) continue;
    args.team_blocks = blocks;
    args.cluster = true;
    teams = tasks;
    break;
  }
  plan->blocks = teams * args.team_blocks;
}

void SetChunk(int32_t max_n, int team_blocks, SelectArgs* args) {
  args->chunk = static_cast<int32_t>(std::max<int64_t>(1, CeilDiv(max_n, int64_t{64} * team_blocks)) * 64);
  args->z_stride = args->chunk + 8;  // heads 32 bytes apart: a warp's stores of one piece meet no bank twice
}

// More tasks than multiprocessors, and short ones: blocks that wait for memory, or for their own threads, let others work beside them.
bool MakeAlone(int32_t num_tasks, int32_t max_n, bool scans, size_t scan_bytes, const DeviceLimits& limits, Plan* plan) {
  SelectArgs& args = plan->args;
  if (num_tasks <= limits.multiprocessors || (scans && args.format.group_tokens != 64)) return false;
  SetChunk(max_n, 1, &args);
  const size_t logits = ((scans ? static_cast<size_t>(args.group) * static_cast<size_t>(args.z_stride) : 0) + static_cast<size_t>(args.chunk)) * 4;
  if ((scan_bytes + CommonBytes(args) + logits + kDeclaredBytes) * (kAloneBlocks - 1) > static_cast<size_t>(limits.block_shared_bytes)) return false;
  args.alone = true;
  args.regroup = false;
  args.team_blocks = 1;
  plan->blocks = num_tasks;
  return true;
}

// Of a block's shared memory, with codes of 8 bits: the most.
struct ScanBytes {
  size_t team = 0, alone = 0;
};

// Each block keeps what fits in its shared memory.
Status MakePlan(int32_t num_tasks, int32_t max_n, bool scans, const ScanBytes& scan, SelectBy by, std::byte* workspace, Plan* plan) {
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  SelectArgs& args = plan->args;
  if (by == SelectBy::kBars || !MakeAlone(num_tasks, max_n, scans, scan.alone, limits, plan)) {
    MakeTeams(std::max(num_tasks, 1), max_n, limits, plan);
  }
  const int teams = plan->blocks / args.team_blocks;
  args.num_tasks = num_tasks;
  args.max_n = max_n;
  SetChunk(max_n, args.team_blocks, &args);
  const auto chunk = static_cast<size_t>(args.chunk), group = static_cast<size_t>(args.group);
  const size_t fixed = (args.alone ? scan.alone : scan.team) + CommonBytes(args) + kDeclaredBytes;
  const size_t z_bytes = scans ? group * static_cast<size_t>(args.z_stride) * 4 : 0;
  const auto room = static_cast<size_t>(limits.block_shared_bytes);
  args.z_in_shared = scans && fixed + z_bytes <= room;
  args.keep_keys = fixed + (args.z_in_shared ? z_bytes : 0) + chunk * 4 <= room;
  PREHOC_RETURN_IF_ERROR(Check("choose").That(fixed <= room, "max_n", max_n, "positions are too many for one launch; give fewer tasks",
                                              StatusCode::kUnsupported).Take());

  const auto team_count = static_cast<size_t>(teams), blocks = static_cast<size_t>(plan->blocks);
  size_t at = 0;
  const auto part = [&](size_t bytes) {
    std::byte* const here = workspace != nullptr ? workspace + at : nullptr;
    at += RoundUp(bytes, 256);
    return here;
  };
  args.teams = reinterpret_cast<Team*>(part(args.alone ? 0 : team_count * sizeof(Team)));
  args.bitmaps = reinterpret_cast<uint32_t*>(part(args.dilate ? team_count * static_cast<size_t>(CeilDiv(max_n, 32)) * 4 : 0));
  const size_t masses = team_count * (args.alone ? 1 : kMaxTeam) * group;
  args.parts = reinterpret_cast<Mass*>(part(masses * sizeof(Mass)));
  args.outside = reinterpret_cast<Mass*>(part(masses * sizeof(Mass)));
  args.z = reinterpret_cast<float*>(part(args.z_in_shared ? 0 : blocks * z_bytes));
  const bool leaves_cache = !args.z_in_shared && blocks * z_bytes > static_cast<size_t>(limits.l2_bytes);
  if (scans && (by == SelectBy::kBars || (by == SelectBy::kAny && leaves_cache))) {
    using Bars = BarSelector<256, 8>;  // which needs the most
    args.most_samples = static_cast<int32_t>(std::clamp<int64_t>(CeilDiv(args.chunk, 8 * kSelectWarps * Bars::kTokens), 1, Bars::kMostSamples));
    args.list_room = std::min(args.chunk, kMostListed);
    args.bars = args.group <= kScanHeads && args.rule != GroupRule::kMeanWeight && !args.dilate && args.format.group_tokens == Bars::kTokens &&
                Bars::SharedBytes(args) + kDeclaredBytes <= room;
  }
  const size_t listed = args.bars ? blocks * static_cast<size_t>(args.list_room) : 0;
  args.list_z = reinterpret_cast<float*>(part(listed * kScanHeads * sizeof(float)));
  args.list_at = reinterpret_cast<uint32_t*>(part(listed * sizeof(uint32_t)));
  args.again = reinterpret_cast<uint8_t*>(part(args.bars ? static_cast<size_t>(num_tasks) : 0));
  if (!args.bars) args.again = nullptr;
  plan->bytes = at;
  return {};
}

Result<Plan> PlanOf(const ChooseParams& params) {
  PREHOC_RETURN_IF_ERROR(CheckPositions("choose", params.max_n).Count(params.num_tasks).Group(params.group)
                             .That(params.rule <= GroupRule::kMaxLogit, "rule", static_cast<int64_t>(params.rule), "use 0, 1 or 2").Take());
  Plan plan;
  plan.args.choose = params.tasks;
  plan.args.group = params.group;
  plan.args.rule = params.rule;
  plan.args.dilate = params.dilate;
  PREHOC_RETURN_IF_ERROR(MakePlan(params.num_tasks, params.max_n, false, {}, SelectBy::kLogits, params.workspace, &plan));
  return plan;
}
Result<Plan> PlanOf(const SelectParams& params) {
  PREHOC_RETURN_IF_ERROR(CheckPositions("select", params.max_n).Count(params.num_tasks).HeadDim(params.head_dim)
                             .Group(params.group).Type(params.type)
                             .That(params.rule <= GroupRule::kMaxLogit, "rule", static_cast<int64_t>(params.rule), "use 0, 1 or 2").Take());
  PREHOC_RETURN_IF_ERROR(CheckFormat("select", params.format));
  PREHOC_RETURN_IF_ERROR(Check("select").That(params.by <= SelectBy::kBars, "by", static_cast<int64_t>(params.by), "use kAny, kLogits or kBars")
                             .That(params.gate.num_tasks == 0 || params.gate.num_tasks == params.num_tasks, "gate.num_tasks", params.gate.num_tasks,
                                   "use num_tasks, or 0").Take());
  Plan plan;
  plan.args.select = params.tasks;
  plan.args.format = params.format;
  plan.args.layout = LayoutOf(params.format, params.head_dim);
  plan.args.type = params.type;
  plan.args.group = params.group;
  plan.args.rule = params.rule;
  plan.args.dilate = params.dilate;
  plan.args.restarts = params.restarts;
  plan.args.resolves = params.resolves;
  plan.args.query_floats = params.group * params.head_dim;
  if (params.gate.num_tasks > 0) plan.args.gate = GateArgsOf(params.gate);
  plan.args.regroup = params.gated && params.num_tasks > 1 && CanRegroup(params.num_tasks);
  ScanBytes scan;
  PREHOC_RETURN_IF_ERROR(DispatchHeadDim(params.head_dim, [&](auto d) {
    scan = {ScanMemory<d(), 8>::kBytes, ScanMemory<d(), 8, kAloneThreads>::kBytes};
    return Status{};
  }));
  PREHOC_RETURN_IF_ERROR(MakePlan(params.num_tasks, params.max_n, true, scan, params.by, params.workspace, &plan));
  return plan;
}

Status CheckMemory(const char* kernel, const void* tasks, const std::byte* workspace, size_t given, size_t needed) {
  return Check(kernel).Given(tasks, "tasks")
      .That(given >= needed, "workspace_bytes", static_cast<int64_t>(given), "is too little; ask for the bytes of these params")
      .Given(workspace, "workspace").Take();
}
}  // namespace

Result<size_t> ChooseWorkspaceBytes(const ChooseParams& params) {
  PREHOC_ASSIGN_OR_RETURN(const Plan plan, PlanOf(params));
  return plan.bytes;
}
Result<size_t> SelectWorkspaceBytes(const SelectParams& params) {
  PREHOC_ASSIGN_OR_RETURN(const Plan plan, PlanOf(params));
  return plan.bytes;
}

Status Choose(const ChooseParams& params, cudaStream_t stream) {
  PREHOC_ASSIGN_OR_RETURN(const Plan plan, PlanOf(params));
  if (params.num_tasks == 0) return {};
  PREHOC_RETURN_IF_ERROR(CheckMemory("choose", params.tasks, params.workspace, params.workspace_bytes, plan.bytes));
  if (plan.args.alone) return LaunchAloneAs<Selector<0, 0, kAloneThreads>>("choose", plan.args, stream);
  return LaunchWay<Selector<0, 0>>("choose", plan.args, plan.blocks, stream);
}

Status Select(const SelectParams& params, cudaStream_t stream) {
  PREHOC_ASSIGN_OR_RETURN(const Plan plan, PlanOf(params));
  if (params.num_tasks == 0) return {};
  PREHOC_RETURN_IF_ERROR(CheckMemory("select", params.tasks, params.workspace, params.workspace_bytes, plan.bytes));
  if (params.gate.num_tasks > 0) {
    PREHOC_RETURN_IF_ERROR(CheckGate(params.gate));
    if (!plan.args.alone) PREHOC_RETURN_IF_ERROR(Gate(params.gate, stream));
  }
  return DispatchHeadDim(params.head_dim, [&](auto d) {
    if (plan.args.alone) return LaunchAlone<d()>(params.format.bits, plan.args, stream);
    if (!plan.args.bars) return LaunchSelect<d()>(params.format.bits, plan.args, plan.blocks, stream);
    // What the first launch cannot choose, the second does, with all blocks for the few tasks that there are; mostly there is none.
    PREHOC_RETURN_IF_ERROR(LaunchBars<d()>(params.format.bits, plan.args, plan.blocks, stream));
    SelectArgs rest = plan.args;
    if (CanRegroup(params.num_tasks)) rest.regroup = true, rest.cluster = false;
    return LaunchSelect<d()>(params.format.bits, rest, plan.blocks, stream);
  });
}

Status Scan(const ScanParams& params, cudaStream_t stream) {
  PREHOC_RETURN_IF_ERROR(CheckPositions("scan", params.max_n).Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim)
                             .Group(params.group).Type(params.type).Take());
  PREHOC_RETURN_IF_ERROR(CheckFormat("scan", params.format));
  if (params.num_tasks == 0) return {};
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  const ScanArgs args{params.tasks, params.max_n, params.format, LayoutOf(params.format, params.head_dim), params.type, params.group};
  const int64_t head_tiles = CeilDiv(params.group, kScanHeads), columns = head_tiles * params.num_tasks;
  const int64_t useful = std::max<int64_t>(1, CeilDiv(params.max_n, int64_t{params.format.group_tokens} * (kScanThreads / kWarp)));
  const int64_t blocks = std::clamp<int64_t>(CeilDiv(2 * limits.multiprocessors, columns), 1, useful);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.num_tasks), static_cast<unsigned>(head_tiles));
  return DispatchHeadDim(params.head_dim, [&](auto d) { return LaunchScan<d()>(params.format.bits, args, grid, stream); });
}

}  // namespace prehoc::cuda
