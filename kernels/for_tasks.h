// Runs body(0) .. body(count - 1) as `launch` says: on its executor, or on the calling thread alone.
#pragma once
#include "kernels/function_table.h"

namespace prehoc {

inline void ForTasks(const Launch& launch, int64_t count, LoopBody body) {
  if (launch.executor != nullptr) {
    launch.executor->ParallelFor(count, body);
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

}  // namespace prehoc
