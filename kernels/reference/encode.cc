// encode. Why |k - (lo + code * step)| <= step / 2 holds for the stored lo and step, in real arithmetic:
// lo is the minimum, itself an fp16 number; step is the range / levels rounded to fp16, and widened where the largest key would
// lie more than step / 2 above the last code (only among subnormals; a range of up to 2 * 65504 over at least 3 levels never
// overflows). k - lo is exact in fp64 (both are multiples of 2^-24 below 2^17), and its fp64 quotient by step cannot fall on
// the wrong side of a half: the exact quotient is a half or at least 2^-40 away from one.
// Dithered, the sum of quotient and shift may fall on the wrong side, by its rounding of 2^-44: an error of that many steps
// more than a half, which scan's allowance for arithmetic holds.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/for_tasks.h"
#include "kernels/reference/code_access.h"
#include "kernels/reference/half_rows.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {
namespace {
constexpr Half kInfinity = 0x7c00, kMinusInfinity = 0xfc00;

bool IsFinite(Half h) { return (h & 0x7c00u) != 0x7c00u; }

struct Range {
  float lo = std::numeric_limits<float>::infinity(), hi = -std::numeric_limits<float>::infinity();
  bool nan = false;
  bool finite = true;
};

// Of K channel `c` over `tokens` rows.
Range RangeOf(const Half* rows, int64_t tokens, int64_t c, int64_t d) {
  Range range;
  for (int64_t t = 0; t < tokens; ++t) {
    const Half h = rows[2 * t * d + c];
    const float k = HalfToFloat(h);
    range.nan = range.nan || std::isnan(k);
    range.finite = range.finite && IsFinite(h);
    range.lo = std::min(range.lo, k);
    range.hi = std::max(range.hi, k);
  }
  return range;
}

// The fp16 number itself; -0 becomes 0.
Half ToHalf(float exact) { return FloatToHalf(exact + 0.0f); }

// `reach`: how many steps above lo the largest key may lie.
Half StepOf(const Range& range, int32_t levels, double reach) {
  const double width = static_cast<double>(range.hi) - range.lo;
  Half step = FloatToHalf(static_cast<float>(width / levels));
  while (width > reach * HalfToFloat(step)) ++step;
  return step;
}

uint32_t CodeOf(double above_lo, double step, double shift, int32_t levels) {
  if (step == 0) return 0;
  return static_cast<uint32_t>(std::clamp<double>(std::nearbyint(above_lo / step + shift), 0, levels));
}

// The smallest fp16 that is not below `value`.
Half RoundUp(double value) {
  auto f = static_cast<float>(value);
  if (f < value) f = std::nextafter(f, std::numeric_limits<float>::infinity());
  return FloatToHalfUp(f);
}

void EncodeGroup(const EncodeTask& task, const Half* rows, const CodeFormat& format, int32_t d) {
  const CodeBlockLayout layout = LayoutOf(format, d);
  const int32_t tokens = format.group_tokens, levels = (1 << format.bits) - 1;
  std::memset(task.block, 0, layout.bytes);
  auto* lo = reinterpret_cast<Half*>(task.block);
  auto* step = reinterpret_cast<Half*>(task.block + layout.step);
  double squares[64] = {};  // |k[t] - decoded[t]|^2
  bool finite = true;
  for (int32_t c = 0; c < d; ++c) {
    const Range range = RangeOf(rows, tokens, c, d);
    finite = finite && range.finite;
    lo[c] = range.finite ? ToHalf(range.lo) : Half{0};
    step[c] = range.finite ? StepOf(range, levels, format.dither ? levels : levels + 0.5) : kInfinity;
    if (!range.finite) continue;
    const double shift = format.dither ? CodeShift(task.seed, c) : 0;
    const double low = HalfToFloat(lo[c]), width = HalfToFloat(step[c]);
    for (int32_t t = 0; t < tokens; ++t) {
      const double above = HalfToFloat(rows[int64_t{2} * t * d + c]) - low;
      const uint32_t code = CodeOf(above, width, shift, levels);
      const double error = above - (code - shift) * width;
      squares[t] += error * error;
      std::byte* page = task.block + layout.pages + layout.page_bytes * static_cast<size_t>(t / kCodePageTokens);
      WriteCode(page, t % kCodePageTokens, c, format.bits, d, code);
    }
  }
  if (!format.error_norms) return;
  auto* norm = reinterpret_cast<Half*>(task.block + layout.norm);
  for (int32_t t = 0; t < tokens; ++t) {
    // 1e-12: more than all fp64 rounding of the sum and the root.
    norm[t] = finite ? RoundUp(std::sqrt(squares[t]) * (1 + 1e-12)) : kInfinity;
  }
}

void PageBounds(const EncodeTask& task, const Half* rows, int32_t tokens, int64_t d) {
  for (int64_t p = 0; p < tokens / kCodePageTokens; ++p, rows += kCodePageTokens * 2 * d) {
    for (int64_t c = 0; c < d; ++c) {
      const Range range = RangeOf(rows, kCodePageTokens, c, d);
      task.page_lo[p * d + c] = range.nan ? kMinusInfinity : ToHalf(range.lo);
      task.page_hi[p * d + c] = range.nan ? kInfinity : ToHalf(range.hi);
    }
  }
}
}  // namespace

size_t CodeBlockBytes(const CodeFormat& format, int32_t head_dim) {
  return IsCodeFormat(format, head_dim) ? LayoutOf(format, head_dim).bytes : 0;
}

Status Encode(const EncodeParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const EncodeTask& task = params.tasks[static_cast<size_t>(index)];
    const RowRun run[] = {{task.rows, params.format.group_tokens, params.rows}};
    const HalfRows rows(run, params.head_dim);  // one after another: of one run
    EncodeGroup(task, rows.rows().front(), params.format, params.head_dim);
    if (task.page_lo != nullptr) PageBounds(task, rows.rows().front(), params.format.group_tokens, params.head_dim);
  });
  return {};
}

}  // namespace prehoc::reference
