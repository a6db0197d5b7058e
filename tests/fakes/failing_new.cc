#include "tests/fakes/failing_new.h"

#include <cstdlib>
#include <new>

namespace prehoc {
namespace {
thread_local int64_t counted = 0;
thread_local bool watched = false;
thread_local int64_t fail_first = -1, fail_last = -1;

void* Allocate(size_t size) noexcept {
  if (watched) {
    const int64_t number = counted++;
    if (number >= fail_first && number <= fail_last) return nullptr;
  }
  return std::malloc(size > 0 ? size : 1);
}
}  // namespace

void FailAllocations(int64_t first, int64_t last) {
  counted = 0;
  fail_first = first;
  fail_last = first < 0 ? -1 : last;
}
void SpareAllocations() { fail_first = fail_last = -1; }
int64_t CountAllocations() { return counted; }
AllocationsMayFail::AllocationsMayFail() { watched = true; }
AllocationsMayFail::~AllocationsMayFail() { watched = false; }

}  // namespace prehoc

void* operator new(size_t size) {
  void* memory = prehoc::Allocate(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return prehoc::Allocate(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return prehoc::Allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
