// Which backend this CPU runs, and the tables.
#include "base/cpu_features.h"
#include "kernels/code_block.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/drivers.h"

namespace prehoc {
namespace {

size_t BlockBytes(const CodeFormat& format, int32_t head_dim) {
  return IsCodeFormat(format, head_dim) ? LayoutOf(format, head_dim).bytes : 0;
}

// Table entries are plain functions: binds the inner loops at compile time.
template <const VectorOps& kOps, auto kDriver, class Params>
Status Entry(const Params& params, const Launch& launch) {
  return kDriver(kOps, params, launch);
}

template <const VectorOps& kOps>
constexpr KernelTable TableOf(std::string_view name) {
  return {
      .name = name,
      .code_block_bytes = BlockBytes,
      .append = Entry<kOps, cpu::Append, AppendParams>,
      .encode = Entry<kOps, cpu::Encode, EncodeParams>,
      .gate = Entry<kOps, cpu::Gate, GateParams>,
      .scan = Entry<kOps, cpu::Scan, ScanParams>,
      .score = Entry<kOps, cpu::Score, ScoreParams>,
      .score_pages = Entry<kOps, cpu::ScorePages, ScorePagesParams>,
      .choose = Entry<kOps, cpu::Choose, ChooseParams>,
      .top_k = Entry<kOps, cpu::TopK, TopKParams>,
      .gather = Entry<kOps, cpu::Gather, GatherParams>,
      .attend = Entry<kOps, cpu::Attend, AttendParams>,
      .prefill = Entry<kOps, cpu::Prefill, PrefillParams>,
  };
}

}  // namespace

const KernelTable* Avx2Kernels() {
  static constexpr KernelTable kTable = TableOf<kAvx2Ops>("avx2");
  static const bool runs_here = CpuHasAvx2();
  return runs_here ? &kTable : nullptr;
}

const KernelTable* Avx512Kernels() {
  static constexpr KernelTable kTable = TableOf<kAvx512Ops>("avx512");
  static const bool runs_here = CpuHasAvx512();
  return runs_here ? &kTable : nullptr;
}

}  // namespace prehoc
