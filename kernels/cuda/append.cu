// append + encode: rows, and the code block of each group that they complete. The bytes are those of kernels/code_block.h,
// by the same fp64 arithmetic as kernels/reference/encode.cc.
#include "base/units.h"
#include "kernels/code_block.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/gate.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/residency.cuh"
#include "kernels/cuda/run_kernels.h"
#include "kernels/cuda/stored_rows.cuh"

namespace prehoc::cuda {
namespace {

constexpr int kThreads = 256;

struct AppendArgs {
  const AppendTask* tasks;
  CodeFormat format;
  CodeBlockLayout layout;
  int32_t max_count;
  int32_t head_dim;
  int32_t num_tasks;
  GateArgs gate;
  RowShape host;
};

struct Channel {
  double lo, step;  // step 0 where every code is 0, bounded or not
};

// The fp16 of a stored key: itself, or rounded from bf16.
template <RowType R>
__device__ inline __half KeyOf(uint16_t bits) {
  return R == RowType::kF16 ? __ushort_as_half(bits) : __float2half_rn(Number<R>::Value(bits));
}

__device__ inline bool IsFinite(__half h) { return (__half_as_ushort(h) & 0x7c00) != 0x7c00; }

struct Range {
  float lo, hi;
  bool nan, finite;
};
__device__ inline Range RangeOf(const __half* keys, int tokens, int d, int c) {
  Range range{Infinity(), -Infinity(), false, true};
  for (int t = 0; t < tokens; ++t) {
    const __half h = keys[t * d + c];
    const float k = __half2float(h);
    range.nan = range.nan || isnan(k);
    range.finite = range.finite && IsFinite(h);
    range.lo = fminf(range.lo, k);
    range.hi = fmaxf(range.hi, k);
  }
  return range;
}
// -0 becomes 0.
__device__ inline __half Stored(float x) { return __float2half_rn(x + 0.0f); }

__device__ inline uint32_t CodeOf(double above_lo, double step, int levels) {
  if (step == 0) return 0;
  const double code = rint(above_lo / step);
  return static_cast<uint32_t>(code < levels ? code : levels);
}
__device__ inline uint32_t CodeAt(const __half* keys, const Channel* channels, int levels, int d, int t, int c) {
  const Channel channel = channels[c];
  return CodeOf(static_cast<double>(__half2float(keys[t * d + c])) - channel.lo, channel.step, levels);
}

// One 32-bit word of planes of `width` bits from bit `from` of the codes on: four neighbouring channels of several quads.
__device__ inline uint32_t PlaneWord(const __half* keys, const Channel* channels, int levels, int d, int t, int plane, int width,
                                     int from) {
  uint32_t word = 0;
  const int quads = 8 / width;
  for (int quad = 0; quad < quads; ++quad) {
    for (int j = 0; j < 4; ++j) {
      const int c = (plane * quads + quad) * 4 + j;
      if (c >= d) break;
      const uint32_t field = (CodeAt(keys, channels, levels, d, t, c) >> from) & ((1u << width) - 1);
      word |= field << (8 * j + quad * width);
    }
  }
  return word;
}

__device__ void EncodeGroup(const AppendArgs& args, const __half* keys, Channel* channels, bool* bounded, std::byte* block) {
  const int d = args.head_dim, tokens = args.format.group_tokens, bits = args.format.bits, levels = (1 << bits) - 1;
  if (threadIdx.x == 0) *bounded = true;
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += kThreads) {
    const Range range = RangeOf(keys, tokens, d, c);
    __half lo = __ushort_as_half(0), step = __ushort_as_half(0x7c00);
    if (range.finite) {
      const double width = static_cast<double>(range.hi) - range.lo;
      uint16_t bits_of_step = __half_as_ushort(__float2half_rn(static_cast<float>(width / levels)));
      while (width > (levels + 0.5) * static_cast<double>(__half2float(__ushort_as_half(bits_of_step)))) ++bits_of_step;
      lo = Stored(range.lo);
      step = __ushort_as_half(bits_of_step);
    } else {
      *bounded = false;
    }
    channels[c] = {static_cast<double>(__half2float(lo)), range.finite ? static_cast<double>(__half2float(step)) : 0.0};
    reinterpret_cast<__half*>(block)[c] = lo;
    reinterpret_cast<__half*>(block + args.layout.step)[c] = step;
  }
  __syncthreads();
  // Codes of 3 and 5 bits lie as two or four bits, then one.
  const int low_width = bits == 3 || bits == 5 ? bits - 1 : bits;
  const int low_planes = d * low_width / 32, high_planes = low_width != bits ? (d + 31) / 32 : 0;
  const int words = (low_planes + high_planes) * kCodePageTokens;
  for (int i = threadIdx.x; i < words * (tokens / kCodePageTokens); i += kThreads) {
    const int page = i / words, plane = i % words / kCodePageTokens, t = i % kCodePageTokens;
    const bool high = plane >= low_planes;
    const uint32_t word = PlaneWord(keys, channels, levels, d, page * kCodePageTokens + t, high ? plane - low_planes : plane,
                                    high ? 1 : low_width, high ? low_width : 0);
    std::byte* const at = block + args.layout.pages + args.layout.page_bytes * page;
    reinterpret_cast<uint32_t*>(at)[plane * kCodePageTokens + t] = word;
  }
  if (!args.format.error_norms) return;
  for (int t = threadIdx.x; t < tokens; t += kThreads) {
    double squares = 0;  // in the order of the reference, so that the bytes agree
    for (int c = 0; c < d; ++c) {
      const Channel channel = channels[c];
      if (channel.step == 0 && !*bounded) continue;
      const double above = static_cast<double>(__half2float(keys[t * d + c])) - channel.lo;
      const double error = above - CodeOf(above, channel.step, levels) * channel.step;
      squares = __dadd_rn(squares, __dmul_rn(error, error));
    }
    const double norm = sqrt(squares) * (1 + 1e-12);
    __half up = __ushort_as_half(0x7c00);
    if (*bounded) up = __float2half_ru(__double2float_ru(norm));
    reinterpret_cast<__half*>(block + args.layout.norm)[t] = up;
  }
}

__device__ void BoundPages(const AppendArgs& args, const __half* keys, Half* page_lo, Half* page_hi) {
  const int d = args.head_dim, pages = args.format.group_tokens / kCodePageTokens;
  for (int i = threadIdx.x; i < pages * d; i += kThreads) {
    const int page = i / d, c = i % d;
    const Range range = RangeOf(keys + page * kCodePageTokens * d, kCodePageTokens, d, c);
    page_lo[i] = range.nan ? Half{0xfc00} : __half_as_ushort(Stored(range.lo));
    page_hi[i] = range.nan ? Half{0x7c00} : __half_as_ushort(Stored(range.hi));
  }
}

struct EncodeArgs {
  const RunEncodeTask* tasks;
  AppendArgs append;  // format, layout, head_dim; host: the rows
};

// A block takes one group of rows that lie together, on the device or in pinned memory.
template <bool kNarrow>
__global__ void __launch_bounds__(kThreads) EncodeKernel(const __grid_constant__ EncodeArgs args) {
  extern __shared__ __align__(16) __half keys[];  // as AppendKernel
  __shared__ bool bounded;
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const RunEncodeTask task = args.tasks[blockIdx.x];
  const int d = args.append.head_dim, tokens = args.append.format.group_tokens, words = d / 8;
  for (int i = threadIdx.x; i < tokens * words; i += kThreads) {
    if constexpr (kNarrow) {
      const RowShape& shape = args.append.host;
      reinterpret_cast<uint4*>(keys)[i] = Widened(LoadNarrow(static_cast<const std::byte*>(task.rows) + int64_t{i / words} * shape.bytes, shape, i % words), shape);
    } else {
      reinterpret_cast<uint4*>(keys)[i] = static_cast<const uint4*>(task.rows)[i / words * 2 * words + i % words];
    }
  }
  __syncthreads();
  Channel* const channels = reinterpret_cast<Channel*>(keys + tokens * d);
  EncodeGroup(args.append, keys, channels, &bounded, task.block);
  if (task.page_lo != nullptr && task.page_hi != nullptr) BoundPages(args.append, keys, task.page_lo, task.page_hi);
}

// A block takes one group of positions of one task: those of its tokens that are new, and the encoding if it becomes complete. Those behind the
// tasks take a gate each. kNarrow: rows in host memory are of 8 bits, and those of the ring what they stand for.
template <RowType R, bool kNarrow>
__global__ void __launch_bounds__(kThreads) AppendKernel(const __grid_constant__ AppendArgs args) {
  extern __shared__ __align__(16) __half keys[];  // [group_tokens, head_dim], then Channel [head_dim]
  __shared__ bool bounded;
  const int gate = static_cast<int>(blockIdx.y) - args.num_tasks;
  if (gate >= 0) {
    const GateTask task = args.gate.tasks[gate];
    WaitForEarlierWork();
    LetLaterWorkLaunch();
    if (blockIdx.x == 0) RunGate<kThreads>(task, args.gate);
    return;
  }
  const AppendTask task = args.tasks[blockIdx.y];
  WaitForEarlierWork();
  LetLaterWorkLaunch();
  const int d = args.head_dim, tokens = args.format.group_tokens;
  const int64_t first = *task.first;
  if (task.count <= 0 || task.count > args.max_count || first < 0) return;
  const int64_t group = first / tokens + blockIdx.x, begin = group * tokens, end = begin + tokens;
  const int64_t from = max(first, begin), to = min(first + task.count, end);
  if (from >= to) return;
  uint16_t* const rows = static_cast<uint16_t*>(task.rows);
  const auto row_of = [&](int64_t position) { return rows + position % task.ring_rows * (2 * d); };
  const int new_tokens = static_cast<int>(to - from);
  if constexpr (kNarrow) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, parts = d / kWarp;  // of K, and of V
    for (int i = static_cast<int>(threadIdx.x) / kWarp; i < new_tokens * 2 * parts; i += kThreads / kWarp) {
      const int t = i / (2 * parts), half = i % (2 * parts) / parts, c = i % parts * kWarp;
      const int64_t position = from + t;
      const float x = (half == 0 ? task.k : task.v)[(position - first) * task.stride + c + lane];
      const int32_t row = task.host_rows != nullptr ? HostRowOf(task.host, static_cast<int32_t>(position)) : -1;
      std::byte* const stored = row >= 0 && row < task.host_limit ? static_cast<std::byte*>(task.host_rows) + int64_t{row} * args.host.bytes : nullptr;
      NarrowChannels(__float2half_rn(x), args.host, half, c, lane, stored, row_of(position));
    }
  } else {
    for (int i = threadIdx.x; i < new_tokens * d; i += kThreads) {
      const int t = i / d, c = i % d;
      const int64_t at = (from + t - first) * task.stride + c;
      uint16_t* const row = row_of(from + t);
      row[c] = Number<R>::Bits(task.k[at]);
      row[d + c] = Number<R>::Bits(task.v[at]);
    }
  }
  if (!kNarrow && task.host_rows != nullptr) {
    __syncthreads();
    const int words = d / 4;  // of 16 bytes in a row: what crosses the link comes in large pieces
    for (int i = threadIdx.x; i < new_tokens * words; i += kThreads) {
      const int64_t position = from + i / words;
      const int32_t row = HostRowOf(task.host, static_cast<int32_t>(position));
      if (row < 0 || row >= task.host_limit) continue;
      static_cast<uint4*>(task.host_rows)[int64_t{row} * words + i % words] = reinterpret_cast<const uint4*>(row_of(position))[i % words];
    }
  }
  if (to < end || task.blocks == nullptr) return;
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * d; i += kThreads) keys[i] = KeyOf<R>(row_of(begin + i / d)[i % d]);
  __syncthreads();
  Channel* const channels = reinterpret_cast<Channel*>(keys + tokens * d);
  EncodeGroup(args, keys, channels, &bounded, task.blocks + args.layout.bytes * group);
  if (task.page_lo == nullptr || task.page_hi == nullptr) return;
  const int64_t page = group * (tokens / kCodePageTokens) * d;
  BoundPages(args, keys, task.page_lo + page, task.page_hi + page);
}
}  // namespace

Status EncodeRuns(const RunEncodeTask* tasks, int32_t num_tasks, const CodeFormat& format, int32_t head_dim, cudaStream_t stream, RowFormat rows) {
  PREHOC_RETURN_IF_ERROR(Check("encode").Tasks(tasks, num_tasks).HeadDim(head_dim).Rows("rows", rows)
                             .That(!format.dither, "dither", format.dither, "use codes without dither on a device", StatusCode::kUnsupported)
                             .That(IsCodeFormat(format, head_dim), "bits", format.bits, "is no code format").Take());
  if (num_tasks == 0) return {};
  const EncodeArgs args{tasks, {nullptr, format, LayoutOf(format, head_dim), 0, head_dim, 0, {}, RowShapeOf(rows, head_dim)}};
  const auto d = static_cast<size_t>(head_dim);
  const Shape shape{.grid = dim3(static_cast<unsigned>(num_tasks)), .threads = kThreads,
                    .shared_bytes = d * (static_cast<size_t>(format.group_tokens) * sizeof(__half) + sizeof(Channel))};
  return rows == RowFormat::kF16 ? LaunchKernel(EncodeKernel<false>, "encode", args, shape, stream)
                                 : LaunchKernel(EncodeKernel<true>, "encode", args, shape, stream);
}

Status Append(const AppendParams& params, cudaStream_t stream) {
  const CodeFormat& format = params.format;
  PREHOC_RETURN_IF_ERROR(
      Check("append").Tasks(params.tasks, params.num_tasks).HeadDim(params.head_dim).Type(params.type)
          .That(params.max_count >= 0, "max_count", params.max_count, "use 0 or more").RowsOfType("host_format", params.host_format, params.type)
          .That(IsCodeFormat({.bits = format.bits, .group_tokens = 64}, 64), "bits", format.bits, "use 2, 3, 4, 5 or 8",
                StatusCode::kUnsupported)
          .That(!format.dither, "dither", format.dither, "use codes without dither on a device", StatusCode::kUnsupported)
          .That(IsCodeFormat(format, 64), "group_tokens", format.group_tokens, "use 16 or 64", StatusCode::kUnsupported)
          .Take());
  const GateParams& gate = params.gate;
  if (gate.num_tasks != 0) {
    PREHOC_RETURN_IF_ERROR(Check("append: gate").Tasks(gate.tasks, gate.num_tasks).HeadDim(gate.head_dim).Group(gate.group)
                               .That(int64_t{gate.num_tasks} + params.num_tasks <= 65535, "num_tasks", gate.num_tasks,
                                     "are too many beside those of append").Take());
  }
  const int32_t num_tasks = params.max_count > 0 ? params.num_tasks : 0, blocks = num_tasks + gate.num_tasks;
  if (blocks == 0) return {};
  const AppendArgs args{params.tasks, format, LayoutOf(format, params.head_dim), params.max_count, params.head_dim, num_tasks,
                        GateArgsOf(gate), RowShapeOf(params.host_format, params.head_dim)};
  const auto groups = num_tasks > 0 ? CeilDiv(params.max_count - 1, format.group_tokens) + 1 : 1;  // wherever the first one starts
  const auto d = static_cast<size_t>(params.head_dim);
  const Shape shape{.grid = dim3(static_cast<unsigned>(groups), static_cast<unsigned>(blocks)), .threads = kThreads,
                    .shared_bytes = d * (static_cast<size_t>(format.group_tokens) * sizeof(__half) + sizeof(Channel))};
  if (params.host_format != RowFormat::kF16) return LaunchKernel(AppendKernel<RowType::kF16, true>, "append", args, shape, stream);
  return params.type == RowType::kF16 ? LaunchKernel(AppendKernel<RowType::kF16, false>, "append", args, shape, stream)
                                      : LaunchKernel(AppendKernel<RowType::kBF16, false>, "append", args, shape, stream);
}

}  // namespace prehoc::cuda
