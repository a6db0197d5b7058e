// The k largest keys of a list without sorting it, and sorting where an order is needed.
#pragma once
#include <cstdint>

#include "kernels/cpu/scratch.h"
#include "kernels/cpu/vector_ops.h"

namespace prehoc::cpu {

// Keys and where they are in the list they came from, in the order of that list.
struct KeptKeys {
  int32_t* key = nullptr;
  int32_t* where = nullptr;
  int64_t count = 0;
};

class TopKeys {
 public:
  // The `k` largest of keys[n] (all but kNoCandidate if there are fewer), ties to the lower index; in order of index,
  // `where` is index + base. n is a multiple of 16. The result is valid until the next call. A few vector passes over
  // the keys: counts narrow an interval of keys from both sides until it holds the k-th largest alone.
  KeptKeys Select(const VectorOps& ops, const int32_t* keys, int64_t n, int64_t k, int32_t base);

  // Orders by (key descending, where ascending); requires `where` ascending on entry.
  void Sort(KeptKeys& keys);

 private:
  Scratch<int32_t> narrowed_, result_, sort_;
};

}  // namespace prehoc::cpu
