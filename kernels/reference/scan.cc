// scan. The bound of one (head, token), all in fp64 until the last line:
//   |z_exact - z|  <=  quantisation:  SUM_c |q_c| step_c / 2 / sqrt(d), or |q| |e_i| / sqrt(d) if that is smaller
//                   +  fp64 arithmetic:  2048 * 2^-53 * SUM_c |q_c| (|lo_c| + levels * step_c) / sqrt(d)
//                      (gamma_n with n = 2 d + 8 <= 520 operations: sums of d products twice, the factor and the root)
//                   +  the rounding of z to fp32:  2^-24 |z| + 2^-150
// and a factor 1 + 1e-9 for the fp64 arithmetic of the bound itself, then rounded up to fp32.
//
// The variance: quantisation errors are independent and uniform on the 2^23 places of a shift, each within 2^-24 steps of
// where a continuous shift would put it. Their spread is sqrt(SUM_c q_c^2 step_c^2 / 12); what is not random is added to it
// in full, which covers it at any l >= 1.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/for_tasks.h"
#include "kernels/reference/code_access.h"
#include "kernels/reference/reference.h"
#include "kernels/validate.h"

namespace prehoc::reference {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one query makes of one block, before any token.
struct BlockTerms {
  double base = 0;          // SUM q_c lo_c
  double slope[256];        // q_c step_c
  double quantisation = 0;  // SUM |q_c| step_c / 2
  double magnitude = 0;     // SUM |q_c| (|lo_c| + levels step_c)
  double squares = 0;       // SUM q_c^2 step_c^2
  double q_norm = 0;        // |q|
  bool bounded = true;      // false: a channel with step +inf was left out
};

void Prepare(const float* q, const std::byte* block, uint64_t seed, const CodeFormat& format, int32_t d, BlockTerms* terms) {
  const CodeBlockLayout layout = LayoutOf(format, d);
  const auto* lo = reinterpret_cast<const Half*>(block);
  const auto* step = reinterpret_cast<const Half*>(block + layout.step);
  const double levels = (1 << format.bits) - 1;
  double base = 0, quantisation = 0, magnitude = 0, squares = 0;
  for (int32_t c = 0; c < d; ++c) {
    const double q_c = q[c], low = HalfToFloat(lo[c]);
    double width = HalfToFloat(step[c]);
    if (std::isinf(width)) {
      terms->bounded = false;
      width = 0;
    }
    base += q_c * low;
    if (format.dither) base -= q_c * width * CodeShift(seed, c);
    terms->slope[c] = q_c * width;
    terms->squares += terms->slope[c] * terms->slope[c];
    quantisation += std::abs(q_c) * width / 2;
    magnitude += std::abs(q_c) * (std::abs(low) + levels * width);
    squares += q_c * q_c;
  }
  terms->base = base;
  terms->quantisation = quantisation;
  terms->magnitude = magnitude;
  terms->q_norm = std::sqrt(squares);
}

float ErrorBound(const BlockTerms& terms, const Half* norm, double root, float z) {
  if (!terms.bounded || !std::isfinite(z)) return kInfinity;
  double quantisation = terms.quantisation;
  if (norm != nullptr && std::isfinite(HalfToFloat(*norm))) {
    quantisation = std::min(quantisation, terms.q_norm * HalfToFloat(*norm));
  }
  const double arithmetic = 2048 * 0x1p-53 * terms.magnitude;
  const double bound = (quantisation + arithmetic) / root + 0x1p-24 * std::abs(static_cast<double>(z)) + 0x1p-150;
  const double raised = bound * (1 + 1e-9);
  auto rounded = static_cast<float>(raised);
  if (rounded < raised) rounded = std::nextafter(rounded, kInfinity);
  return std::isnan(rounded) ? kInfinity : rounded;
}

float RoundUp(double value) {
  auto rounded = static_cast<float>(value);
  if (rounded < value) rounded = std::nextafter(rounded, kInfinity);
  return std::isnan(rounded) ? kInfinity : rounded;
}

// Of the error, what is not random, over sqrt(head_dim).
double Bias(const BlockTerms& terms, double root) {
  if (!terms.bounded || !std::isfinite(static_cast<float>(terms.magnitude / root))) return kInfinity;
  const double fixed = 2048 * 0x1p-53 * terms.magnitude + 0x1p-23 * terms.quantisation +  // arithmetic, places of a shift
                       0x1p-24 * (terms.magnitude + 0x1p-120);                            // rounding of z to fp32
  return fixed * (1 + 1e-9) / root;
}

double Variance(const BlockTerms& terms, double root) {
  const double spread = std::sqrt(terms.squares / 12) * (1 + 1e-9) / root + Bias(terms, root);
  return spread * spread;
}

void ScanBlock(const ScanParams& params, const ScanTask& task, int64_t h, int64_t g) {
  const int32_t d = params.head_dim, tokens = params.format.group_tokens;
  const CodeBlockLayout layout = LayoutOf(params.format, d);
  const std::byte* block = task.blocks + layout.bytes * static_cast<size_t>(g);
  const double root = std::sqrt(static_cast<double>(d));
  BlockTerms terms;
  Prepare(task.q + h * d, block, CodeBlockSeed(task.seed, g), params.format, d, &terms);
  if (task.variance != nullptr) task.variance[h * task.groups + g] = RoundUp(Variance(terms, root));
  if (task.bias != nullptr) task.bias[h * task.groups + g] = RoundUp(Bias(terms, root));
  const auto* norm = params.format.error_norms ? reinterpret_cast<const Half*>(block + layout.norm) : nullptr;
  const int64_t at = h * task.z_stride + g * tokens;
  for (int32_t t = 0; t < tokens; ++t) {
    const std::byte* page = block + layout.pages + layout.page_bytes * static_cast<size_t>(t / kCodePageTokens);
    double sum = terms.base;
    for (int32_t c = 0; c < d; ++c) {
      sum += terms.slope[c] * ReadCode(page, t % kCodePageTokens, c, params.format.bits, d);
    }
    const auto z = static_cast<float>(sum / root);
    task.z[at + t] = z;
    if (task.err != nullptr) task.err[at + t] = ErrorBound(terms, norm != nullptr ? norm + t : nullptr, root, z);
  }
}
}  // namespace

Status Scan(const ScanParams& params, const Launch& launch) {
  PREHOC_RETURN_IF_ERROR(Validate(params));
  ForTasks(launch, static_cast<int64_t>(params.tasks.size()), [&](int64_t index) {
    const ScanTask& task = params.tasks[static_cast<size_t>(index)];
    for (int64_t h = 0; h < params.group; ++h) {
      for (int64_t g = 0; g < task.groups; ++g) ScanBlock(params, task, h, g);
    }
  });
  return {};
}

}  // namespace prehoc::reference
