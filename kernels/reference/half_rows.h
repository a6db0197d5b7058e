// The fp16 rows of runs of any format. Internal to kernels/reference/.
#pragma once
#include <deque>
#include <span>
#include <vector>

#include "kernels/function_table.h"
#include "kernels/row_codec.h"

namespace prehoc::reference {

// A pointer to each row [2, head_dim]; those that do not lie in memory as such are widened into memory of this object.
class HalfRows {
 public:
  HalfRows(std::span<const RowRun> runs, int32_t head_dim) {
    const size_t halves = size_t{2} * static_cast<size_t>(head_dim);
    for (const RowRun& run : runs) {
      const auto* stored = static_cast<const std::byte*>(run.rows);
      std::vector<Half>& widened = widened_.emplace_back(run.format == RowFormat::kF16 ? 0 : halves * static_cast<size_t>(run.count));
      for (size_t i = 0; i < static_cast<size_t>(run.count); ++i, stored += RowBytes(run.format, head_dim)) {
        if (run.format == RowFormat::kF16) {
          rows_.push_back(reinterpret_cast<const Half*>(stored));
        } else {
          WidenRow(stored, run.format, head_dim, widened.data() + i * halves);
          rows_.push_back(widened.data() + i * halves);
        }
      }
    }
  }
  const std::vector<const Half*>& rows() const { return rows_; }

 private:
  std::vector<const Half*> rows_;
  std::deque<std::vector<Half>> widened_;
};

}  // namespace prehoc::reference
