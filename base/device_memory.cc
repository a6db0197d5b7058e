#include "base/device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "base/units.h"

namespace prehoc {

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  if (this != &other) {
    Reset();
    memory_ = std::exchange(other.memory_, nullptr);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

void DeviceBuffer::Reset() {
  if (memory_ != nullptr) memory_->Free(data_, size_);
  memory_ = nullptr;
  data_ = nullptr;
  size_ = 0;
}

Result<DeviceBuffer> DeviceMemory::Allocate(size_t size, std::string_view tag) {
  const bool absurd = size > SIZE_MAX - 255;  // rounding it up would wrap around
  const size_t rounded = absurd ? size : RoundUp(std::max<size_t>(size, 1), 256);
  {
    MutexLock lock(mutex_);
    if (absurd || rounded > budget_ - used_) {
      return {StatusCode::kOutOfSpace, "device budget: " + std::string(tag) + " needs " +
                                           FormatBytes(static_cast<double>(rounded)) + ", " +
                                           FormatBytes(static_cast<double>(budget_ - used_)) + " of " +
                                           FormatBytes(static_cast<double>(budget_)) +
                                           " are left; raise the device budget"};
    }
    used_ += rounded;
    peak_ = std::max(peak_, used_);
  }
  Result<std::byte*> data = DoAllocate(rounded);
  if (!data.ok()) {
    MutexLock lock(mutex_);
    used_ -= rounded;
    return data.status().WithContext(tag);
  }
  return DeviceBuffer(this, *data, rounded);
}

size_t DeviceMemory::used() const {
  MutexLock lock(mutex_);
  return used_;
}

size_t DeviceMemory::peak() const {
  MutexLock lock(mutex_);
  return peak_;
}

Status DeviceMemory::Read(const void* from, size_t size, void* to) const {
  if (size > 0) std::memcpy(to, from, size);
  return {};
}

Status DeviceMemory::Write(const void* from, size_t size, void* to) const {
  if (size > 0) std::memcpy(to, from, size);
  return {};
}

void DeviceMemory::Free(std::byte* data, size_t size) {
  DoFree(data, size);
  MutexLock lock(mutex_);
  used_ -= size;
}

Result<std::byte*> HostDeviceMemory::DoAllocate(size_t size) {
  // Fresh mappings are zero without being written to, and huge pages make their first use cheap.
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return {StatusCode::kOutOfSpace, "the system has no " + FormatBytes(static_cast<double>(size)) + " left"};
  }
  // Advice: where the system gives none, small pages do.
  static_cast<void>(madvise(data, size, MADV_HUGEPAGE));
  return static_cast<std::byte*>(data);
}

void HostDeviceMemory::DoFree(std::byte* data, size_t size) { munmap(data, size); }

}  // namespace prehoc
