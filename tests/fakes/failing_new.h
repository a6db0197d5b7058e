// operator new of the whole program, which fails when it is told to. Link failing_new.cc to have it.
#pragma once
#include <cstdint>

namespace prehoc {

// Of the calling thread, and only where an AllocationsMayFail is alive: counting begins at 0, and allocations first .. last get no
// memory; none if first < 0.
void FailAllocations(int64_t first, int64_t last);
void SpareAllocations();      // none fails any more; counting goes on
int64_t CountAllocations();   // since FailAllocations()

class AllocationsMayFail {
 public:
  AllocationsMayFail();
  ~AllocationsMayFail();
  AllocationsMayFail(const AllocationsMayFail&) = delete;
  AllocationsMayFail& operator=(const AllocationsMayFail&) = delete;
};

}  // namespace prehoc
