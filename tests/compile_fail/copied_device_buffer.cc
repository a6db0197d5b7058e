// Two owners of one allocation.
#include "base/device_memory.h"

void Take(prehoc::DeviceBuffer buffer) { buffer.Reset(); }

void Use(prehoc::DeviceBuffer& buffer) {
#ifdef PREHOC_MUST_NOT_COMPILE
  Take(buffer);
#else
  Take(std::move(buffer));
#endif
}
