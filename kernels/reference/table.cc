#include "kernels/reference/reference.h"

namespace prehoc {

const KernelTable& ReferenceKernels() {
  static constexpr KernelTable kTable{
      .name = "reference",
      .code_block_bytes = reference::CodeBlockBytes,
      .append = reference::Append,
      .encode = reference::Encode,
      .gate = reference::Gate,
      .scan = reference::Scan,
      .score = reference::Score,
      .score_pages = reference::ScorePages,
      .choose = reference::Choose,
      .top_k = reference::TopK,
      .gather = reference::Gather,
      .attend = reference::Attend,
      .prefill = reference::Prefill,
  };
  return kTable;
}

}  // namespace prehoc
