// encode and scan: code blocks are independent of each other.
#include <algorithm>
#include <array>
#include <cmath>

#include "base/units.h"
#include "kernels/code_block.h"
#include "kernels/cpu/drivers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/split.h"
#include "kernels/validate.h"

namespace prehoc::cpu {
namespace {
constexpr size_t kMostGroupTokens = 64;

ScanShape ShapeOf(const CodeFormat& format, int32_t group, int32_t head_dim) {
  const CodeBlockLayout layout = LayoutOf(format, head_dim);
  return {.bits = format.bits, .group_tokens = format.group_tokens, .group = group, .head_dim = head_dim,
          .error_norms = format.error_norms, .dither = format.dither, .step = layout.step, .norm = layout.norm, .pages = layout.pages,
          .page_bytes = layout.page_bytes, .block_bytes = layout.bytes};
}

// |x| rounded up: the sum in fp64, and a margin for it and the way to fp32.
float NormUp(const float* x, int64_t n) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(std::sqrt(squares) * (1 + 1e-6));
}

}  // namespace

Status Encode(const VectorOps& ops, const EncodeParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const ScanShape shape = ShapeOf(params.format, 1, params.head_dim);
  const auto count = static_cast<int64_t>(params.tasks.size());
  ForParts(launch, count * shape.group_tokens >= kRowsWorthAThread, count, [&](int64_t i) {
    EncodeTask task = params.tasks[static_cast<size_t>(i)];
    if (params.rows != RowFormat::kF16) {
      static thread_local Scratch<Half> scratch;
      const auto tokens = static_cast<size_t>(shape.group_tokens), halves = size_t{2} * static_cast<size_t>(params.head_dim);
      Half* const rows = scratch.Get(tokens * halves);
      std::array<RowCopy, kMostGroupTokens> copies;
      for (size_t t = 0; t < tokens; ++t) {
        const std::byte* const from = static_cast<const std::byte*>(task.rows) + t * RowBytes(params.rows, params.head_dim);
        copies[t] = {from, rows + t * halves};
      }
      ops.copy_rows(copies.data(), shape.group_tokens, params.rows, params.head_dim);
      task.rows = rows;
    }
    ops.encode(task, shape);
  });
  return {};
}

Status Scan(const VectorOps& ops, const ScanParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  const ScanShape shape = ShapeOf(params.format, params.group, params.head_dim);
  const int64_t q_floats = int64_t{params.group} * params.head_dim, count = static_cast<int64_t>(params.tasks.size());
  static thread_local Scratch<float> scratch;
  float* scaled = scratch.Get(static_cast<size_t>(count * (q_floats + params.group)));
  float* norms = scaled + count * q_floats;
  const float scale = 1 / std::sqrt(static_cast<float>(params.head_dim));
  int64_t most = 0, groups = 0;
  for (int64_t i = 0; i < count; ++i) {
    const ScanTask& task = params.tasks[static_cast<size_t>(i)];
    if (task.groups == 0) continue;
    most = std::max<int64_t>(most, task.groups);
    groups += task.groups;
    ScaleTo(task.q, scale, q_floats, scaled + i * q_floats);
    for (int64_t h = 0; task.err != nullptr && h < params.group; ++h) {
      norms[i * params.group + h] = NormUp(scaled + i * q_floats + h * params.head_dim, params.head_dim);
    }
  }
  const int64_t part_groups = 1024 / shape.group_tokens;
  const int64_t parts = CeilDiv(most, part_groups);
  ForParts(launch, groups >= 2 * part_groups, count * parts, [&](int64_t i) {
    const int64_t t = i / parts, first = i % parts * part_groups;
    const ScanTask& task = params.tasks[static_cast<size_t>(t)];
    const int64_t n = std::min<int64_t>(part_groups, task.groups - first);
    if (n <= 0) return;
    const int64_t at = first * shape.group_tokens;
    uint64_t seeds[1024 / 16];
    for (int64_t g = 0; shape.dither && g < n; ++g) seeds[g] = CodeBlockSeed(task.seed, first + g);
    ops.scan({.q = scaled + t * q_floats, .q_norm = norms + t * params.group,
              .blocks = task.blocks + static_cast<size_t>(first) * shape.block_bytes, .groups = static_cast<int32_t>(n),
              .z = task.z + at, .err = task.err != nullptr ? task.err + at : nullptr, .z_stride = task.z_stride,
              .seeds = seeds, .variance = task.variance != nullptr ? task.variance + first : nullptr,
              .bias = task.bias != nullptr ? task.bias + first : nullptr, .variance_stride = task.groups},
             shape);
  });
  return {};
}

}  // namespace prehoc::cpu
