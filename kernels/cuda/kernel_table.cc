#include "kernels/cuda/kernel_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/stream.h"
#include "base/mutex.h"
#include "base/units.h"
#include "kernels/code_block.h"
#include "kernels/cuda/device_kernels.h"
#include "kernels/cuda/prefill_rows.h"
#include "kernels/cuda/run_kernels.h"
#include "kernels/validate.h"

namespace prehoc::cuda {
namespace {

constexpr size_t kAlign = 64;

Status Unsupported(const char* kernel, const char* field, const char* instead) {
  return {StatusCode::kUnsupported, std::string(kernel) + " on CUDA: " + field + " is not offered; " + instead};
}
// The one format, beside fp16, of a call's rows.
class OneFormat {
 public:
  explicit OneFormat(const char* kernel) : kernel_(kernel) {}
  Status Add(RowFormat format) {
    if (format == RowFormat::kF16 || format == found_) return {};
    if (found_ != RowFormat::kF16) return Unsupported(kernel_, "rows of int8 and of e4m3 in one call", "split the call");
    found_ = format;
    return {};
  }
  Status Add(std::span<const RowRun> runs) {
    for (const RowRun& run : runs) PREHOC_RETURN_IF_ERROR(Add(run.format));
    return {};
  }
  RowFormat found() const { return found_; }

 private:
  const char* kernel_;
  RowFormat found_ = RowFormat::kF16;
};

// Where one part of a call lies on both sides.
template <class T>
struct Staged {
  T* host = nullptr;
  T* device = nullptr;
};

// Lengths are rounded up to it, so that the plan of a choice, and with it the use of its workspace, changes seldom.
constexpr int32_t kPlanStep = 4096;

// Device memory that grows, and is zero after it grew or when its use changes.
struct Workspace {
  std::optional<CudaBytes> bytes;
  std::string use;
};
}  // namespace

struct DeviceKernels::Impl {
  Impl(const CudaDeviceMemory* device_memory, const Options& with, CudaStream own_stream, CudaEvent own_event, PrefillRows prefill_rows)
      : memory(device_memory), options(with), stream(std::move(own_stream)), followed(std::move(own_event)), behind(std::move(prefill_rows)) {}

  const CudaDeviceMemory* const memory;
  const Options options;
  const CudaStream stream;
  const CudaEvent followed;  // of another stream
  Mutex mutex;
  PrefillRows behind PREHOC_GUARDED_BY(mutex);
  // Inputs are written to `in_host`, copied to the same place of `in_device`; results are written by kernels to `out` in pinned memory.
  // What a call has staged stays until the stream was waited for.
  std::optional<CudaBytes> in_host PREHOC_GUARDED_BY(mutex), in_device PREHOC_GUARDED_BY(mutex), out PREHOC_GUARDED_BY(mutex);
  size_t in_used PREHOC_GUARDED_BY(mutex) = 0, in_sent PREHOC_GUARDED_BY(mutex) = 0, out_used PREHOC_GUARDED_BY(mutex) = 0;
  Workspace choosing PREHOC_GUARDED_BY(mutex), ranking PREHOC_GUARDED_BY(mutex), attending PREHOC_GUARDED_BY(mutex);
  int64_t launches PREHOC_GUARDED_BY(mutex) = 0, waits PREHOC_GUARDED_BY(mutex) = 0, staged PREHOC_GUARDED_BY(mutex) = 0;

  Status Wait() PREHOC_REQUIRES(mutex) {
    ++waits;
    in_used = in_sent = out_used = 0;
    return stream.Synchronize();
  }

  static Status Grow(CudaPlace place, size_t size, std::optional<CudaBytes>* bytes) {
    if (bytes->has_value() && (*bytes)->size() >= size) return {};
    bytes->reset();
    PREHOC_ASSIGN_OR_RETURN(CudaBytes made, CudaBytes::Create(place, RoundUp(std::max<size_t>(size, size_t{1} << 20), size_t{1} << 20)));
    bytes->emplace(std::move(made));
    return {};
  }

  // Room for `in` and `results` bytes, alignment included.
  Status Begin(size_t in, size_t results) PREHOC_REQUIRES(mutex) {
    const bool fits = in_host && in_device && out && in_used + in <= in_host->size() && out_used + results <= out->size();
    if (fits) return {};
    PREHOC_RETURN_IF_ERROR(Wait());
    PREHOC_RETURN_IF_ERROR(Grow(CudaPlace::kPinned, in, &in_host));
    PREHOC_RETURN_IF_ERROR(Grow(CudaPlace::kDevice, in_host->size(), &in_device));
    return Grow(CudaPlace::kPinned, results, &out);
  }
  template <class T>
  static size_t Room(size_t count) { return RoundUp(count * sizeof(T), kAlign); }
  template <class T>
  Staged<T> In(size_t count) PREHOC_REQUIRES(mutex) {
    const size_t at = in_used;
    in_used += Room<T>(count);
    PREHOC_CHECK(in_used <= in_host->size());
    return {reinterpret_cast<T*>(in_host->data() + at), reinterpret_cast<T*>(in_device->data() + at)};
  }
  template <class T>
  const T* In(const T* from, size_t count) PREHOC_REQUIRES(mutex) {
    const Staged<T> staged_copy = In<T>(count);
    if (count > 0) std::memcpy(static_cast<void*>(staged_copy.host), from, count * sizeof(T));
    return staged_copy.device;
  }
  template <class T>
  T* Out(size_t count) PREHOC_REQUIRES(mutex) {
    const size_t at = out_used;
    out_used += Room<T>(count);
    PREHOC_CHECK(out_used <= out->size());
    return reinterpret_cast<T*>(out->data() + at);
  }
  // Everything staged since the last call.
  Status Send() PREHOC_REQUIRES(mutex) {
    const size_t bytes = in_used - in_sent;
    if (bytes == 0) return {};
    PREHOC_CUDA_TRY(cudaMemcpyAsync(in_device->data() + in_sent, in_host->data() + in_sent, bytes, cudaMemcpyHostToDevice, stream.get()));
    staged += static_cast<int64_t>(bytes);
    in_sent = in_used;
    return {};
  }
  // Room for `size` bytes. What is staged stays.
  Status Reserve(size_t size, Workspace* workspace) PREHOC_REQUIRES(mutex) {
    if (workspace->bytes && workspace->bytes->size() >= size) return {};
    PREHOC_RETURN_IF_ERROR(stream.Synchronize());
    workspace->use.clear();
    return Grow(CudaPlace::kDevice, size, &workspace->bytes);
  }
  // As Reserve(), and zero when `use` is another than the last time: the layout of a workspace follows from it.
  Status Prepare(size_t size, std::string use, Workspace* workspace) PREHOC_REQUIRES(mutex) {
    PREHOC_RETURN_IF_ERROR(Reserve(size, workspace));
    if (workspace->use == use) return {};
    workspace->use = std::move(use);
    PREHOC_CUDA_TRY(cudaMemsetAsync(workspace->bytes->data(), 0, size, stream.get()));
    return {};
  }
  Status Sent(Status launched) PREHOC_REQUIRES(mutex) {
    ++launches;
    return launched;
  }

  bool OnDevice(const void* at) const { return memory->Owns(at); }
  // Host memory that kernels may read.
  Status CheckPinned(const char* kernel, const void* at) const {
    cudaPointerAttributes attributes{};
    PREHOC_CUDA_TRY(cudaPointerGetAttributes(&attributes, at));
    if (attributes.type != cudaMemoryTypeUnregistered) return {};
    return {StatusCode::kInvalid, std::string(kernel) + " on CUDA: rows lie neither on the device nor in pinned memory"};
  }
  Status CheckOnDevice(const char* kernel, const char* field, const void* at) const {
    if (OnDevice(at)) return {};
    return {StatusCode::kInvalid, std::string(kernel) + " on CUDA: " + field + " is not in the device's memory"};
  }

  Status Append(const prehoc::AppendParams& params, const Launch& launch) PREHOC_REQUIRES(mutex);
  Status AppendHere(const prehoc::AppendParams& params) PREHOC_REQUIRES(mutex);
  Status Encode(const prehoc::EncodeParams& params) PREHOC_REQUIRES(mutex);
  Result<const std::byte*> RowsOnTheirWay(const std::byte* at, size_t bytes) PREHOC_REQUIRES(mutex);
  Status Scan(const prehoc::ScanParams& params) PREHOC_REQUIRES(mutex);
  Status Score(const prehoc::ScoreParams& params) PREHOC_REQUIRES(mutex);
  Status Choose(const prehoc::ChooseParams& params) PREHOC_REQUIRES(mutex);
  Status TopK(const prehoc::TopKParams& params, const Launch& launch) PREHOC_REQUIRES(mutex);
  Status Rank(const prehoc::TopKParams& params) PREHOC_REQUIRES(mutex);
  // Chooses for staged tasks of up to `longest` positions, waits, and checks how many were chosen.
  Status RunChoice(const char* kernel, const Staged<cuda::ChooseTask>& tasks, int32_t longest, cuda::ChooseParams call, Workspace* workspace)
      PREHOC_REQUIRES(mutex);
  Status Gather(const prehoc::GatherParams& params) PREHOC_REQUIRES(mutex);
  Status Attend(const prehoc::AttendParams& params) PREHOC_REQUIRES(mutex);
  Status Prefill(const prehoc::PrefillParams& params) PREHOC_REQUIRES(mutex);
  Status Follow(const FollowParams& params) PREHOC_REQUIRES(mutex);
  Status Settle(const SettleParams& params) PREHOC_REQUIRES(mutex);
  Status ReadAhead(const ReadAheadParams& params) PREHOC_REQUIRES(mutex);
  // The rows of `task` as row numbers from the lowest one of each kind of memory.
  Status NameRows(const prehoc::AttendTask& task, int32_t head_dim, RowFormat host_format, int32_t* refs, cuda::AttendTask* to) const;
};

Status DeviceKernels::Impl::Append(const prehoc::AppendParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  if (params.on_device) return AppendHere(params);
  std::vector<prehoc::AppendTask> of_host;
  std::vector<const prehoc::AppendTask*> of_device;
  size_t in = 0;
  for (const prehoc::AppendTask& task : params.tasks) {
    if (task.count == 0) continue;
    if (!OnDevice(task.rows)) {
      of_host.push_back(task);
      continue;
    }
    of_device.push_back(&task);
    in += 2 * Room<float>(static_cast<size_t>(task.count) * static_cast<size_t>(params.head_dim));
  }
  if (!of_host.empty()) {
    PREHOC_RETURN_IF_ERROR(BestCpuKernels().append({.tasks = of_host, .head_dim = params.head_dim, .format = params.format}, {.executor = launch.executor}));
  }
  if (of_device.empty()) return {};
  PREHOC_RETURN_IF_ERROR(Begin(in + Room<RunAppendTask>(of_device.size()), 0));
  const Staged<RunAppendTask> tasks = In<RunAppendTask>(of_device.size());
  const auto d = static_cast<size_t>(params.head_dim);
  int32_t most = 0;
  for (size_t i = 0; i < of_device.size(); ++i) {
    const prehoc::AppendTask& task = *of_device[i];
    const auto copy = [&](const float* from) {
      const Staged<float> vectors = In<float>(static_cast<size_t>(task.count) * d);
      for (int64_t t = 0; t < task.count; ++t) std::memcpy(vectors.host + static_cast<size_t>(t) * d, from + t * task.stride, d * sizeof(float));
      return vectors.device;
    };
    const float* const k = copy(task.k);
    tasks.host[i] = {k, copy(task.v), params.head_dim, task.rows, task.count, task.widened};
    most = std::max(most, task.count);
  }
  PREHOC_RETURN_IF_ERROR(Send());
  return Sent(AppendRuns(tasks.device, static_cast<int32_t>(of_device.size()), most, params.head_dim, stream.get(), params.format));
}

// K and V are on the device, and so are all rows at first: those of host memory follow from there.
Status DeviceKernels::Impl::AppendHere(const prehoc::AppendParams& params) {
  const size_t num = params.tasks.size();
  const auto row_of = [&](const prehoc::AppendTask& task) { return RowBytes(task.widened ? RowFormat::kF16 : params.format, params.head_dim); };
  size_t to_host = 0;
  for (const prehoc::AppendTask& task : params.tasks) {
    if (task.count > 0 && !OnDevice(task.rows)) to_host += static_cast<size_t>(task.count) * row_of(task);
  }
  if (num == 0) return {};
  PREHOC_RETURN_IF_ERROR(Begin(Room<RunAppendTask>(num), 0));
  PREHOC_RETURN_IF_ERROR(behind.BeginSet(to_host));
  const Staged<RunAppendTask> tasks = In<RunAppendTask>(num);
  int32_t used = 0, most = 0;
  const prehoc::AppendTask* last = nullptr;  // of those to host memory
  for (const prehoc::AppendTask& task : params.tasks) {
    if (task.count == 0) continue;
    void* to = task.rows;
    if (!OnDevice(to)) {
      // Another head of the same tokens: the heads of a host block lie together.
      const bool joins = last != nullptr && task.k > last->k && task.k < last->k + task.stride && task.count == last->count;
      to = behind.Add(static_cast<std::byte*>(to), static_cast<size_t>(task.count) * row_of(task), joins);
      last = &task;
    }
    tasks.host[used++] = {task.k, task.v, task.stride, to, task.count, task.widened};
    most = std::max(most, task.count);
  }
  PREHOC_RETURN_IF_ERROR(Send());
  PREHOC_RETURN_IF_ERROR(Sent(AppendRuns(tasks.device, used, most, params.head_dim, stream.get(), params.format)));
  return behind.Send();
}

Status DeviceKernels::Impl::Encode(const prehoc::EncodeParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  if (params.format.dither) return Unsupported("encode", "dither", "use codes without it");
  if (params.tasks.empty()) return {};
  constexpr size_t kAtOnce = 32768;
  const size_t group = static_cast<size_t>(params.format.group_tokens) * RowBytes(params.rows, params.head_dim);
  bool must_wait = false;
  for (size_t first = 0; first < params.tasks.size(); first += kAtOnce) {
    const auto part = params.tasks.subspan(first, std::min(kAtOnce, params.tasks.size() - first));
    PREHOC_RETURN_IF_ERROR(Begin(Room<RunEncodeTask>(part.size()), 0));
    const Staged<RunEncodeTask> tasks = In<RunEncodeTask>(part.size());
    bool checked = false;
    for (size_t i = 0; i < part.size(); ++i) {
      const auto* const rows = static_cast<const std::byte*>(part[i].rows);
      const std::byte* source = rows;
      if (!OnDevice(source)) {
        PREHOC_ASSIGN_OR_RETURN(source, RowsOnTheirWay(rows, group));
        if (source == rows) {
          must_wait = true;
          if (!std::exchange(checked, true)) PREHOC_RETURN_IF_ERROR(CheckPinned("encode", source));
        }
      } else {
        must_wait = true;
      }
      PREHOC_RETURN_IF_ERROR(CheckOnDevice("encode", "block", part[i].block));
      tasks.host[i] = {source, part[i].block, part[i].page_lo, part[i].page_hi};
    }
    PREHOC_RETURN_IF_ERROR(Send());
    PREHOC_RETURN_IF_ERROR(Sent(EncodeRuns(tasks.device, static_cast<int32_t>(part.size()), params.format, params.head_dim, stream.get(), params.rows)));
    if (must_wait) PREHOC_RETURN_IF_ERROR(Wait());
  }
  return {};
}

// The device's copy of rows that an append sends to host memory; `rows` themselves where they have arrived.
Result<const std::byte*> DeviceKernels::Impl::RowsOnTheirWay(const std::byte* at, size_t bytes) {
  size_t size = bytes;
  const std::byte* const copy = behind.Find(at, &size);
  if (size == bytes) return copy != nullptr ? copy : at;
  PREHOC_RETURN_IF_ERROR(behind.Arrive(0));  // partly here, partly there: rare, a piece of a prompt ends within
  return at;
}

Status DeviceKernels::Impl::Scan(const prehoc::ScanParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const auto queries = static_cast<size_t>(params.group) * static_cast<size_t>(params.head_dim);
  const size_t num = params.tasks.size();
  if (num == 0) return {};
  PREHOC_RETURN_IF_ERROR(Begin(Room<cuda::ScanTask>(num) + num * (Room<float>(queries) + Room<int32_t>(1)), 0));
  const Staged<cuda::ScanTask> tasks = In<cuda::ScanTask>(num);
  int32_t most = 0;
  for (size_t i = 0; i < num; ++i) {
    const prehoc::ScanTask& task = params.tasks[i];
    if (task.variance != nullptr) return Unsupported("scan", "variance", "use codes without dither");
    PREHOC_RETURN_IF_ERROR(CheckOnDevice("scan", "z", task.z));
    if (task.err != nullptr) PREHOC_RETURN_IF_ERROR(CheckOnDevice("scan", "err", task.err));
    const int32_t n = task.groups * params.format.group_tokens;
    most = std::max(most, n);
    // All of them have codes: the ring is never read.
    tasks.host[i] = {.source = {.q = In(task.q, queries), .blocks = task.blocks, .rows = task.blocks,
                                .ring_rows = params.format.group_tokens, .n = In(&n, 1)},
                     .z = task.z, .err = task.err, .z_stride = task.z_stride};
  }
  PREHOC_RETURN_IF_ERROR(Send());
  return Sent(cuda::Scan({.tasks = tasks.device, .num_tasks = static_cast<int32_t>(num), .max_n = most, .format = params.format,
                          .group = params.group, .head_dim = params.head_dim}, stream.get()));
}

Status DeviceKernels::Impl::Score(const prehoc::ScoreParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const auto group = static_cast<size_t>(params.group), queries = group * static_cast<size_t>(params.head_dim);
  const size_t num = params.tasks.size();
  size_t in = Room<RunScoreTask>(num), results = 0;
  OneFormat format("score");
  for (const prehoc::ScoreTask& task : params.tasks) {
    PREHOC_RETURN_IF_ERROR(format.Add(task.runs));
    in += Room<float>(queries) + Room<DeviceRun>(task.runs.size());
    if (!OnDevice(task.z)) results += Room<float>(group * static_cast<size_t>(RowCount(task.runs)));
  }
  PREHOC_RETURN_IF_ERROR(Begin(in, results));
  const Staged<RunScoreTask> tasks = In<RunScoreTask>(num);
  int32_t most = 0;
  bool waits_for_z = false;
  for (size_t i = 0; i < num; ++i) {
    const prehoc::ScoreTask& task = params.tasks[i];
    const Staged<DeviceRun> runs = In<DeviceRun>(task.runs.size());
    int32_t total = 0;
    bool checked = false;
    for (size_t r = 0; r < task.runs.size(); ++r) {
      if (!checked && task.runs[r].count > 0 && !OnDevice(task.runs[r].rows)) {
        PREHOC_RETURN_IF_ERROR(CheckPinned("score", task.runs[r].rows));
        checked = true;
      }
      runs.host[r] = {task.runs[r].rows, total, task.runs[r].count, task.runs[r].format != RowFormat::kF16};
      total += task.runs[r].count;
    }
    const bool here = OnDevice(task.z);
    waits_for_z = waits_for_z || !here;
    tasks.host[i] = {In(task.q, queries), runs.device, static_cast<int32_t>(task.runs.size()), total,
                     here ? task.z : Out<float>(group * static_cast<size_t>(total)), here ? task.z_stride : total};
    most = std::max(most, total);
  }
  PREHOC_RETURN_IF_ERROR(Send());
  PREHOC_RETURN_IF_ERROR(Sent(ScoreRuns(tasks.device, static_cast<int32_t>(num), most, params.group, params.head_dim, stream.get(), format.found())));
  if (!waits_for_z) return {};
  const RunScoreTask* const sent = tasks.host;  // stays as it is until something else is staged
  PREHOC_RETURN_IF_ERROR(Wait());
  for (size_t i = 0; i < num; ++i) {
    if (OnDevice(params.tasks[i].z)) continue;
    for (size_t h = 0; h < group; ++h) {
      std::copy_n(sent[i].z + static_cast<int64_t>(h) * sent[i].z_stride, sent[i].total,
                  params.tasks[i].z + static_cast<int64_t>(h) * params.tasks[i].z_stride);
    }
  }
  return {};
}

Status DeviceKernels::Impl::Choose(const prehoc::ChooseParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const size_t num = params.tasks.size(), group = static_cast<size_t>(params.group);
  if (num == 0) return {};
  size_t in = Room<cuda::ChooseTask>(num), results = num * (Room<int32_t>(1) + 2 * Room<float>(group));
  int32_t most = 0;
  bool dilates = false;
  for (const prehoc::ChooseTask& task : params.tasks) {
    if (task.target_drop >= 0) return Unsupported("choose", "target_drop (a mass budget or max_dropped_mass)", "use a fixed budget");
    if (task.exact_budget) return Unsupported("choose", "exact_budget (cis.budget=cis*)", "use cis.budget=cis");
    if (task.lse_out_bound != nullptr || task.err != nullptr) return Unsupported("choose", "a bound", "use bound=none");
    if (task.rule != params.tasks.front().rule) return Unsupported("choose", "rules that differ in one call", "split the call");
    PREHOC_RETURN_IF_ERROR(CheckOnDevice("choose", "z", task.z));
    if (task.pooled != nullptr) PREHOC_RETURN_IF_ERROR(CheckOnDevice("choose", "pooled", task.pooled));
    in += Room<int32_t>(1) + (task.resident != nullptr ? Room<uint64_t>(static_cast<size_t>(CeilDiv(task.n, 64))) : 0);
    results += Room<int32_t>(static_cast<size_t>(task.max_chosen()));
    most = std::max(most, task.n);
    dilates = dilates || (task.dilate_m > 0 && task.dilate_r > 0);
  }
  PREHOC_RETURN_IF_ERROR(Begin(in, results));
  const Staged<cuda::ChooseTask> tasks = In<cuda::ChooseTask>(num);
  for (size_t i = 0; i < num; ++i) {
    const prehoc::ChooseTask& task = params.tasks[i];
    cuda::ChooseTask& to = tasks.host[i] = {.z = task.z, .z_stride = task.z_stride, .n = In(&task.n, 1)};
    to.rule.sinks = task.sinks;
    to.rule.local = task.n - task.hi;
    if (task.lo > task.sinks) to.rule.window = task.n - task.lo;
    to.rule.k = task.k;
    to.rule.dilate_m = task.dilate_m, to.rule.dilate_r = task.dilate_r;
    if (task.resident != nullptr) to.rule.resident = In(task.resident, static_cast<size_t>(CeilDiv(task.n, 64)));
    to.rule.log_theta = task.log_theta;
    to.rule.pooled = task.pooled;
    to.rule.pool_reset = task.pool_reset;
    to.rule.room = task.max_chosen();
    to.rule.chosen = Out<int32_t>(static_cast<size_t>(to.rule.room));
    to.rule.count = Out<int32_t>(1);
    to.rule.lse_all = Out<float>(group);
    to.rule.lse_out = Out<float>(group);
  }
  PREHOC_RETURN_IF_ERROR(RunChoice("choose", tasks, most, {.num_tasks = static_cast<int32_t>(num), .group = params.group,
                                                          .rule = params.tasks.front().rule, .dilate = dilates}, &choosing));
  for (size_t i = 0; i < num; ++i) {
    const prehoc::ChooseTask& task = params.tasks[i];
    const ChooseRule& from = tasks.host[i].rule;
    *task.count = *from.count;
    std::copy_n(from.chosen, *from.count, task.chosen);
    std::copy_n(from.lse_all, group, task.lse_all);
    std::copy_n(from.lse_out, group, task.lse_out);
    const bool finite = std::none_of(from.lse_all, from.lse_all + group, [](float x) { return std::isnan(x); });
    if (task.met != nullptr) *task.met = finite ? 1 : 0;
  }
  return {};
}

Status DeviceKernels::Impl::RunChoice(const char* kernel, const Staged<cuda::ChooseTask>& tasks, int32_t longest, cuda::ChooseParams call,
                                      Workspace* workspace) {
  call.tasks = tasks.device;
  call.max_n = static_cast<int32_t>(CeilDiv(longest, kPlanStep)) * kPlanStep;
  PREHOC_ASSIGN_OR_RETURN(const size_t bytes, ChooseWorkspaceBytes(call));
  const std::string use = std::to_string(call.num_tasks) + "," + std::to_string(call.max_n) + "," + std::to_string(call.group) + "," +
                          std::to_string(call.dilate);
  PREHOC_RETURN_IF_ERROR(Prepare(bytes, use, workspace));
  call.workspace = workspace->bytes->data();
  call.workspace_bytes = workspace->bytes->size();
  PREHOC_RETURN_IF_ERROR(Send());
  PREHOC_RETURN_IF_ERROR(Sent(cuda::Choose(call, stream.get())));
  PREHOC_RETURN_IF_ERROR(Wait());
  for (int32_t i = 0; i < call.num_tasks; ++i) {
    const ChooseRule& rule = tasks.host[i].rule;
    if (*rule.count < 0 || *rule.count > rule.room) {
      return {StatusCode::kCuda, std::string(kernel) + " on CUDA: task " + std::to_string(i) + " reports " + std::to_string(*rule.count) + " of at most " +
                                     std::to_string(rule.room) + " positions"};
    }
  }
  return {};
}

Status DeviceKernels::Impl::TopK(const prehoc::TopKParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  if (std::all_of(params.tasks.begin(), params.tasks.end(), [&](const prehoc::TopKTask& task) { return OnDevice(task.score); })) {
    return Rank(params);
  }
  std::vector<prehoc::TopKTask> tasks(params.tasks.begin(), params.tasks.end());
  std::vector<std::vector<float>> scores(tasks.size());
  PREHOC_RETURN_IF_ERROR(Wait());  // what wrote the scores
  for (size_t i = 0; i < tasks.size(); ++i) {
    prehoc::TopKTask& task = tasks[i];
    if (task.hi <= task.lo || !OnDevice(task.score)) continue;
    scores[i].resize(static_cast<size_t>(task.hi));
    PREHOC_RETURN_IF_ERROR(memory->Read(task.score + task.lo, static_cast<size_t>(task.hi - task.lo) * sizeof(float), scores[i].data() + task.lo));
    task.score = scores[i].data();
  }
  return BestCpuKernels().top_k({.tasks = tasks}, {.executor = launch.executor});
}

// The largest scores are those of the largest logits of one head.
Status DeviceKernels::Impl::Rank(const prehoc::TopKParams& params) {
  const size_t num = params.tasks.size();
  if (num == 0) return {};
  const auto most_of = [](const prehoc::TopKTask& task) { return std::max(0, std::min(task.k, task.hi - task.lo)); };
  size_t results = num * (Room<int32_t>(1) + Room<float>(1));
  int32_t most = 0;
  for (const prehoc::TopKTask& task : params.tasks) {
    results += Room<int32_t>(static_cast<size_t>(most_of(task)));
    most = std::max({most, task.lo, task.hi});
  }
  PREHOC_RETURN_IF_ERROR(Begin(Room<cuda::ChooseTask>(num) + num * Room<int32_t>(1), results));
  const Staged<cuda::ChooseTask> tasks = In<cuda::ChooseTask>(num);
  for (size_t i = 0; i < num; ++i) {
    const prehoc::TopKTask& task = params.tasks[i];
    const int32_t end = std::max(task.lo, task.hi), room = most_of(task);
    cuda::ChooseTask& to = tasks.host[i] = {.z = task.score, .z_stride = end, .n = In(&end, 1)};
    to.rule.window = end - task.lo;
    to.rule.k = to.rule.room = room;
    to.rule.chosen = Out<int32_t>(static_cast<size_t>(room));
    to.rule.count = Out<int32_t>(1);
    to.rule.lse_all = Out<float>(1);
  }
  PREHOC_RETURN_IF_ERROR(RunChoice("top_k", tasks, most, {.num_tasks = static_cast<int32_t>(num), .group = 1, .rule = GroupRule::kMaxLogit}, &ranking));
  for (size_t i = 0; i < num; ++i) {
    const ChooseRule& from = tasks.host[i].rule;
    *params.tasks[i].count = *from.count;
    std::copy_n(from.chosen, *from.count, params.tasks[i].chosen);
  }
  return {};
}

Status DeviceKernels::Impl::Gather(const prehoc::GatherParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  if (params.rows.empty()) return {};
  constexpr size_t kAtOnce = size_t{1} << 18;
  for (size_t first = 0; first < params.rows.size(); first += kAtOnce) {
    const auto part = params.rows.subspan(first, std::min(kAtOnce, params.rows.size() - first));
    PREHOC_RETURN_IF_ERROR(Begin(Room<RowMove>(part.size()), 0));
    const Staged<RowMove> moves = In<RowMove>(part.size());
    for (size_t i = 0; i < part.size(); ++i) {
      if (i == 0) {
        PREHOC_RETURN_IF_ERROR(CheckOnDevice("gather", "to", part[i].to));
        if (!OnDevice(part[i].from)) PREHOC_RETURN_IF_ERROR(CheckPinned("gather", part[i].from));
      }
      moves.host[i] = {part[i].from, part[i].to};
    }
    PREHOC_RETURN_IF_ERROR(Send());
    PREHOC_RETURN_IF_ERROR(Sent(MoveRows(moves.device, static_cast<int32_t>(part.size()), params.head_dim, stream.get(), params.format)));
    PREHOC_RETURN_IF_ERROR(Wait());
  }
  return {};
}

Status DeviceKernels::Impl::NameRows(const prehoc::AttendTask& task, int32_t head_dim, RowFormat host_format, int32_t* refs, cuda::AttendTask* to) const {
  // Of device and host memory.
  const RowFormat formats[2] = {RowFormat::kF16, host_format};
  const int64_t bytes[2] = {static_cast<int64_t>(RowBytes(formats[0], head_dim)), static_cast<int64_t>(RowBytes(formats[1], head_dim))};
  const std::byte *low[2] = {nullptr, nullptr}, *high[2] = {nullptr, nullptr};
  std::vector<bool> here(task.runs.size());
  CudaDeviceMemory::Range last;  // rows of a task lie in one buffer: few look-ups, however many runs
  for (size_t r = 0; r < task.runs.size(); ++r) {
    const RowRun& run = task.runs[r];
    if (run.count == 0) continue;
    if (!last.Has(run.rows)) last = memory->RangeOf(run.rows);
    here[r] = last.size > 0;
    const int kind = here[r] ? 0 : 1;
    if (run.format != formats[kind]) return Unsupported("attend", "rows of several formats in one memory", "keep fp16 rows on the device");
    const auto* const begin = static_cast<const std::byte*>(run.rows);
    const std::byte* const end = begin + run.count * bytes[kind];
    if (low[kind] == nullptr || begin < low[kind]) low[kind] = begin;
    if (high[kind] == nullptr || end > high[kind]) high[kind] = end;
  }
  if (low[1] != nullptr) PREHOC_RETURN_IF_ERROR(CheckPinned("attend", low[1]));
  for (const int kind : {0, 1}) {
    if (low[kind] != nullptr && (high[kind] - low[kind]) / bytes[kind] > std::numeric_limits<int32_t>::max()) {
      return {StatusCode::kUnsupported, "attend on CUDA: the rows of a task lie more than 2^31 rows apart"};
    }
  }
  for (size_t r = 0; r < task.runs.size(); ++r) {
    const RowRun& run = task.runs[r];
    if (run.count == 0) continue;
    const int kind = here[r] ? 0 : 1;
    const int64_t at = static_cast<const std::byte*>(run.rows) - low[kind];
    if (at % bytes[kind] != 0) return {StatusCode::kInvalid, "attend on CUDA: rows do not lie whole rows apart"};
    const auto first = static_cast<int32_t>(at / bytes[kind]);
    for (int32_t i = 0; i < run.count; ++i) *refs++ = kind == 0 ? first + i : ~(first + i);
  }
  to->rows = low[0];
  to->row_limit = low[0] == nullptr ? 0 : (high[0] - low[0]) / bytes[0];
  to->host_rows = low[1];
  to->host_limit = low[1] == nullptr ? 0 : (high[1] - low[1]) / bytes[1];
  return {};
}

Status DeviceKernels::Impl::Attend(const prehoc::AttendParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const size_t num = params.tasks.size(), group = static_cast<size_t>(params.group), queries = group * static_cast<size_t>(params.head_dim);
  cuda::AttendParams call{.num_tasks = static_cast<int32_t>(num), .group = params.group, .head_dim = params.head_dim};
  size_t in = Room<cuda::AttendTask>(num) + num * (Room<float>(queries) + 2 * Room<int32_t>(1));
  OneFormat format("attend");
  for (const prehoc::AttendTask& task : params.tasks) {
    PREHOC_RETURN_IF_ERROR(format.Add(task.runs));
    const int64_t rows = RowCount(task.runs);
    call.max_rows = std::max(call.max_rows, static_cast<int32_t>(rows));
    in += Room<int32_t>(static_cast<size_t>(rows) + 4);
  }
  call.host_format = format.found();
  // The plan splits keys by this: rounded up, it and the use of the workspace change seldom.
  constexpr int32_t kStep = 256;
  call.max_rows = static_cast<int32_t>(CeilDiv(call.max_rows, kStep)) * kStep;
  if (num == 0) return AttendWorkspaceBytes(call).status();  // the shapes are checked all the same
  PREHOC_RETURN_IF_ERROR(Begin(in, num * (Room<float>(queries) + Room<float>(group))));
  const Staged<cuda::AttendTask> tasks = In<cuda::AttendTask>(num);
  const int32_t none = 0;
  for (size_t i = 0; i < num; ++i) {
    const prehoc::AttendTask& task = params.tasks[i];
    const auto rows = static_cast<int32_t>(RowCount(task.runs));
    cuda::AttendTask& to = tasks.host[i] = {.q = In(task.q, queries), .out = Out<float>(queries), .lse = Out<float>(group)};
    const Staged<int32_t> refs = In<int32_t>(static_cast<size_t>(rows) + 4);
    std::fill_n(refs.host + rows, 4, 0);
    PREHOC_RETURN_IF_ERROR(NameRows(task, params.head_dim, call.host_format, refs.host, &to));
    to.refs = refs.device;
    to.num_refs = In(&rows, 1);
    to.refs_room = rows;
    to.ring_rows = 1;
    to.n = In(&none, 1);
  }
  call.tasks = tasks.device;
  PREHOC_ASSIGN_OR_RETURN(const size_t bytes, AttendWorkspaceBytes(call));
  if (bytes > 0) {
    const std::string use = std::to_string(num) + "," + std::to_string(call.max_rows) + "," + std::to_string(params.group);
    PREHOC_RETURN_IF_ERROR(Prepare(bytes, use, &attending));
    call.workspace = attending.bytes->data();
    call.workspace_bytes = attending.bytes->size();
  }
  PREHOC_RETURN_IF_ERROR(Send());
  PREHOC_RETURN_IF_ERROR(Sent(cuda::Attend(call, stream.get())));
  PREHOC_RETURN_IF_ERROR(Wait());
  for (size_t i = 0; i < num; ++i) {
    std::copy_n(tasks.host[i].out, queries, params.tasks[i].out);
    std::copy_n(tasks.host[i].lse, group, params.tasks[i].lse);
  }
  return {};
}

Status DeviceKernels::Impl::Prefill(const prehoc::PrefillParams& params) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const size_t num = params.tasks.size();
  if (num == 0 || params.queries == 0) return {};
  OneFormat format("prefill");
  for (const prehoc::PrefillTask& task : params.tasks) PREHOC_RETURN_IF_ERROR(format.Add(task.runs));
  const auto width = static_cast<size_t>(params.group) * static_cast<size_t>(params.head_dim);
  const auto queries = static_cast<size_t>(params.queries);
  const int64_t keys = int64_t{params.first} + params.queries;
  const size_t row = RowBytes(format.found(), params.head_dim);
  const size_t vectors = params.on_device ? 0 : num * Room<float>(queries * width);
  PREHOC_RETURN_IF_ERROR(Begin(Room<RunPrefillTask>(num) + vectors + num * Room<int32_t>(queries), vectors));
  // Rows of a task that lie together on the device, each task's as far from the last one's, are read there.
  const auto rows_of = [&](size_t i) { return static_cast<const Half*>(params.tasks[i].runs.front().rows); };
  const std::ptrdiff_t gap = num > 1 ? rows_of(1) - rows_of(0) : 0;
  bool together = num == 1 || gap >= keys * params.head_dim * 2;  // apart, and in order
  for (size_t i = 0; i < num; ++i) {
    const RowRun& run = params.tasks[i].runs.front();
    const bool here = run.count >= keys && run.format == RowFormat::kF16 && OnDevice(rows_of(i));
    together = together && here && rows_of(i) - rows_of(0) == static_cast<std::ptrdiff_t>(i) * gap;
  }
  PrefillRows::Rows gathered;
  if (!together) {
    std::vector<std::span<const RowRun>> runs;
    for (const prehoc::PrefillTask& task : params.tasks) {
      for (const RowRun& run : task.runs) {
        if (run.count > 0 && run.format != format.found()) return Unsupported("prefill", "rows of several formats", "give all in one");
      }
      runs.push_back(task.runs);
    }
    PREHOC_ASSIGN_OR_RETURN(gathered, behind.Gather(runs, keys, row));
    if (format.found() != RowFormat::kF16) {
      PREHOC_ASSIGN_OR_RETURN(gathered, behind.Widen(gathered, num, keys, params.head_dim, format.found()));
    }
  }
  const Staged<RunPrefillTask> tasks = In<RunPrefillTask>(num);
  for (size_t i = 0; i < num; ++i) {
    const prehoc::PrefillTask& task = params.tasks[i];
    RunPrefillTask& to = tasks.host[i];
    to.rows = together ? rows_of(i) : reinterpret_cast<const Half*>(gathered.data + i * gathered.pitch);
    to.start = task.start != nullptr ? In(task.start, queries) : nullptr;
    if (params.on_device) {
      to.q = task.q, to.q_stride = task.q_stride, to.out = task.out, to.out_stride = task.out_stride;
      continue;
    }
    const Staged<float> q = In<float>(queries * width);
    for (size_t t = 0; t < queries; ++t) std::memcpy(q.host + t * width, task.q + static_cast<int64_t>(t) * task.q_stride, width * sizeof(float));
    to.q = q.device, to.q_stride = static_cast<int64_t>(width);
    to.out = Out<float>(queries * width), to.out_stride = static_cast<int64_t>(width);
  }
  PREHOC_RETURN_IF_ERROR(Send());
  PREHOC_RETURN_IF_ERROR(Sent(PrefillRuns({.tasks = tasks.device, .num_tasks = static_cast<int32_t>(num), .queries = params.queries,
                                           .first = params.first, .sinks = params.sinks, .group = params.group,
                                           .head_dim = params.head_dim, .rows = together ? rows_of(0) : reinterpret_cast<const Half*>(gathered.data),
                                           .pitch = together ? gap : static_cast<int64_t>(gathered.pitch / sizeof(Half)),
                                           .precision = options.prompt_precision}, stream.get())));
  if (!together) PREHOC_RETURN_IF_ERROR(behind.Used());
  if (params.on_device) return {};
  PREHOC_RETURN_IF_ERROR(Wait());
  for (size_t i = 0; i < num; ++i) {
    const prehoc::PrefillTask& task = params.tasks[i];
    for (size_t t = 0; t < queries; ++t) {
      std::memcpy(task.out + static_cast<int64_t>(t) * task.out_stride, tasks.host[i].out + t * width, width * sizeof(float));
    }
  }
  return {};
}

Status DeviceKernels::Impl::Follow(const FollowParams& params) {
  PREHOC_RETURN_IF_ERROR(followed.Record(static_cast<cudaStream_t>(params.stream)));
  return followed.Before(stream.get());
}

Status DeviceKernels::Impl::Settle(const SettleParams& params) {
  const Status results = params.results ? Wait() : Status();
  const Status arrived = params.rows_but > 0 || !params.ahead ? behind.Arrive(params.rows_but) : behind.Stop();
  const Status& first = results.ok() ? arrived : results;
  if (!first.ok()) behind.Stop().IgnoreError();  // the first error is told
  if (params.release) behind.Release();
  return first;
}

Status DeviceKernels::Impl::ReadAhead(const ReadAheadParams& params) {
  OneFormat format("read_ahead");
  if (params.head_dim <= 0 || params.rows < 0 || params.total < params.rows) {
    return {StatusCode::kInvalid, "read_ahead: " + std::to_string(params.rows) + " rows of " + std::to_string(params.total) + ", head_dim " +
                                      std::to_string(params.head_dim)};
  }
  for (const auto& runs : params.tasks) {
    PREHOC_RETURN_IF_ERROR(format.Add(runs));
    if (RowCount(runs) < params.rows) {
      return {StatusCode::kInvalid, "read_ahead: " + std::to_string(RowCount(runs)) + " rows of all runs, " + std::to_string(params.rows) +
                                        " are wanted"};
    }
  }
  if (params.tasks.empty() || params.rows == 0) return {};
  return behind.ReadAhead(params.tasks, params.rows, params.total, RowBytes(format.found(), params.head_dim));
}

namespace {
size_t BlockBytes(const CodeFormat& format, int32_t head_dim) {
  const bool offered = IsCodeFormat(format, head_dim) && (format.bits == 2 || format.bits == 4 || format.bits == 8) && !format.dither;
  return offered ? LayoutOf(format, head_dim).bytes : 0;
}

// fn(Impl&) under its lock.
template <class Fn>
Status WithImpl(const Launch& launch, const Fn& fn) {
  if (launch.stream == nullptr) return {StatusCode::kInvalid, "the CUDA kernels need Launch::stream = DeviceKernels::launch_stream()"};
  auto& impl = *static_cast<DeviceKernels::Impl*>(launch.stream);
  MutexLock lock(impl.mutex);
  return fn(impl);
}
template <auto kMember, class Params>
Status Entry(const Params& params, const Launch& launch) {
  return WithImpl(launch, [&](DeviceKernels::Impl& impl) PREHOC_NO_TSA { return (impl.*kMember)(params); });
}
template <auto kMember, class Params>
Status EntryWithExecutor(const Params& params, const Launch& launch) {
  return WithImpl(launch, [&](DeviceKernels::Impl& impl) PREHOC_NO_TSA { return (impl.*kMember)(params, launch); });
}
Status Gate(const prehoc::GateParams& params, const Launch& launch) { return BestCpuKernels().gate(params, {.executor = launch.executor}); }
Status ScorePages(const prehoc::ScorePagesParams&, const Launch&) {
  return Unsupported("score_pages", "scoring by page bounds", "score by codes");
}
}  // namespace

DeviceKernels::DeviceKernels(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DeviceKernels::~DeviceKernels() {
  if (!impl_) return;
  MutexLock lock(impl_->mutex);
  impl_->stream.Synchronize().IgnoreError();  // nothing runs into memory that goes away
  impl_->behind.Stop().IgnoreError();
}

Result<std::unique_ptr<DeviceKernels>> DeviceKernels::Create(const CudaDeviceMemory* memory, const Options& options) {
  PREHOC_RETURN_IF_ERROR(CurrentCudaDevice().status());
  PREHOC_ASSIGN_OR_RETURN(CudaStream stream, CudaStream::Create());
  PREHOC_ASSIGN_OR_RETURN(CudaEvent followed, CudaEvent::Create());
  PREHOC_ASSIGN_OR_RETURN(PrefillRows rows, PrefillRows::Create(memory, stream.get()));
  return std::unique_ptr<DeviceKernels>(new DeviceKernels(std::make_unique<Impl>(memory, options, std::move(stream), std::move(followed), std::move(rows))));
}

const KernelTable& DeviceKernels::Table() {
  static constexpr KernelTable kTable{
      .name = "cuda",
      .code_block_bytes = BlockBytes,
      .append = EntryWithExecutor<&Impl::Append, prehoc::AppendParams>,
      .encode = Entry<&Impl::Encode, prehoc::EncodeParams>,
      .gate = Gate,
      .scan = Entry<&Impl::Scan, prehoc::ScanParams>,
      .score = Entry<&Impl::Score, prehoc::ScoreParams>,
      .score_pages = ScorePages,
      .choose = Entry<&Impl::Choose, prehoc::ChooseParams>,
      .top_k = EntryWithExecutor<&Impl::TopK, prehoc::TopKParams>,
      .gather = Entry<&Impl::Gather, prehoc::GatherParams>,
      .attend = Entry<&Impl::Attend, prehoc::AttendParams>,
      .prefill = Entry<&Impl::Prefill, prehoc::PrefillParams>,
      .follow = Entry<&Impl::Follow, FollowParams>,
      .settle = Entry<&Impl::Settle, SettleParams>,
      .read_ahead = Entry<&Impl::ReadAhead, ReadAheadParams>,
  };
  return kTable;
}

void* DeviceKernels::launch_stream() const { return impl_.get(); }

void DeviceKernels::VisitCounters(const CounterVisitor& visit) const {
  Impl& impl = *impl_;
  MutexLock lock(impl.mutex);
  size_t held = 0;
  held += impl.behind.held_bytes();
  for (const auto* bytes : {&impl.in_device, &impl.choosing.bytes, &impl.attending.bytes}) {
    if (bytes->has_value()) held += (*bytes)->size();
  }
  visit("kernels.launches", static_cast<double>(impl.launches));
  visit("kernels.waits", static_cast<double>(impl.waits));
  visit("kernels.copied_bytes", static_cast<double>(impl.behind.copied_bytes()));
  visit("kernels.staged_bytes", static_cast<double>(impl.staged));
  visit("kernels.scratch_bytes", static_cast<double>(held));
}

}  // namespace prehoc::cuda
