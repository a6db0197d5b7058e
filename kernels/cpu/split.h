// How calls become parts for threads.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/cpu/vector_ops.h"
#include "kernels/for_tasks.h"

namespace prehoc::cpu {

// Below about this many rows of work a call is over before another thread has begun.
inline constexpr int64_t kRowsWorthAThread = 256;

// On the executor if it is worth it, else one after another.
template <class Body>
void ForParts(const Launch& launch, bool worth_it, int64_t count, const Body& body) {
  if (worth_it) {
    ForTasks(launch, count, body);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

inline void ScaleTo(const float* from, float scale, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale;
}

// A range of the rows of one task.
struct RowPart {
  int32_t task = 0;
  RowPlace from;
  int64_t first = 0;  // rows of the task before it
  int64_t count = 0;
};

// Cuts the rows of all tasks into parts of nearly equal size, whole blocks of 64 where possible: at most about 16 in all,
// none under kRowsWorthAThread rows unless the task is smaller. Tasks without rows have no part.
template <class Tasks>
void SplitRows(const Tasks& tasks, int64_t total_rows, std::vector<RowPart>& parts) {
  parts.clear();
  int64_t target = (total_rows / 16 + 63) / 64 * 64;
  if (target < kRowsWorthAThread) target = kRowsWorthAThread;
  for (size_t t = 0; t < tasks.size(); ++t) {
    int64_t rows = 0;
    for (const RowRun& run : tasks[t].runs) rows += run.count;
    if (rows == 0) continue;
    const int64_t count = (rows + target - 1) / target;
    const int64_t size = ((rows + count - 1) / count + 63) / 64 * 64;
    RowPlace at{tasks[t].runs.data(), 0};
    for (int64_t first = 0; first < rows; first += size) {
      const int64_t take = rows - first < size ? rows - first : size;
      parts.push_back({static_cast<int32_t>(t), at, first, take});
      for (int64_t left = take; left > 0;) {
        const int64_t in_run = at.run->count - at.skip;
        if (in_run > left) {
          at.skip += static_cast<int32_t>(left);
          break;
        }
        left -= in_run;
        ++at.run;
        at.skip = 0;
      }
    }
  }
}

}  // namespace prehoc::cpu
