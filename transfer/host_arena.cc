#include "transfer/host_arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/mutex.h"
#include "base/test_point.h"
#include "base/units.h"

namespace prehoc {
namespace {
constexpr uint64_t kPage = 4096;
constexpr uint64_t kHugePage = 2 * kMiB;

uint64_t StrideOf(const HostArena::Options& options) {
  const uint64_t unit = std::max<uint64_t>(options.unit_bytes, 1);
  return RoundUp(options.block_bytes, std::lcm(kPage, unit));
}

// Writes one byte of each page. Plain stores: the memory is ours alone until its blocks are handed out.
void TouchPages(std::byte* data, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; i += kPage) *static_cast<volatile std::byte*>(data + i) = std::byte{0};
}
}  // namespace

Status HostArena::Options::Validate() const {
  if (block_bytes == 0) return {StatusCode::kInvalid, "host arena: block_bytes=0; give the bytes of one block"};
  if (block_bytes > (uint64_t{1} << 46)) {
    return {StatusCode::kInvalid, "host arena: block_bytes=" + std::to_string(block_bytes) + " is over 64 TiB"};
  }
  if (budget > (uint64_t{1} << 46)) {
    return {StatusCode::kInvalid, "host arena: budget=" + std::to_string(budget) + " is over 64 TiB"};
  }
  if (unit_bytes > kMiB || (unit_bytes > 0 && block_bytes % unit_bytes != 0)) {
    return {StatusCode::kInvalid, "host arena: unit_bytes=" + std::to_string(unit_bytes) + "; use up to 1MiB, of which a block of " +
                                      std::to_string(block_bytes) + " bytes is a multiple, or 0"};
  }
  if (budget != 0 && budget < StrideOf(*this)) {
    return {StatusCode::kInvalid, "host arena: budget=" + std::to_string(budget) + " holds no block of " +
                                      std::to_string(StrideOf(*this)) + " bytes; raise it or use 0"};
  }
  if (extent_bytes == 0) return {StatusCode::kInvalid, "host arena: extent_bytes=0; use 1MiB or more"};
  return {};
}

// The address range of the whole budget is reserved without memory; extents of it become usable one after the other:
//   reserved --(Claim: growing = true)--> being touched --(Publish)--> ready: its blocks are free
// One extent is touched at a time, by whoever set `growing`: a background job, or an Allocate() that found no free
// block. A posted job that comes late finds enough free blocks, or nothing left, and does nothing.
struct HostArena::Impl {
  Options options;
  Executor* executor = nullptr;
  uint64_t stride = 0;  // [bytes] of a block in memory
  int64_t capacity = 0;
  int64_t extent_blocks = 0;
  std::byte* reservation = nullptr;
  uint64_t reservation_bytes = 0;
  std::byte* base = nullptr;  // within the reservation, aligned to a huge page

  mutable Mutex mutex;
  CondVar grown;
  bool growing PREHOC_GUARDED_BY(mutex) = false;
  bool posted PREHOC_GUARDED_BY(mutex) = false;
  bool closed PREHOC_GUARDED_BY(mutex) = false;
  int64_t ready PREHOC_GUARDED_BY(mutex) = 0;    // blocks 0 .. ready - 1 are touched
  int64_t mapped PREHOC_GUARDED_BY(mutex) = 0;   // blocks with memory, those being touched included
  int64_t used PREHOC_GUARDED_BY(mutex) = 0;
  std::vector<int64_t> free PREHOC_GUARDED_BY(mutex);  // touched and not in use; the last is handed out first
  std::vector<bool> in_use PREHOC_GUARDED_BY(mutex);   // [ready]
  uint64_t peak_bytes PREHOC_GUARDED_BY(mutex) = 0;
  uint64_t huge_bytes PREHOC_GUARDED_BY(mutex) = 0;
  uint64_t lock_failures PREHOC_GUARDED_BY(mutex) = 0;
  uint64_t pinned_bytes PREHOC_GUARDED_BY(mutex) = 0;
  std::vector<std::byte*> registered;  // extents; touched only by the thread that set `growing`

  ~Impl() {
    for (std::byte* const extent : registered) options.registrar->Unregister(extent);
    if (reservation != nullptr) ::munmap(reservation, reservation_bytes);
  }

  Status Reserve() {
    if (capacity == 0) return {};
    reservation_bytes = static_cast<uint64_t>(capacity) * stride + kHugePage;
    void* address = ::mmap(nullptr, reservation_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) {
      return {StatusCode::kOutOfSpace, "host arena: no address range of " +
                                           FormatBytes(static_cast<double>(reservation_bytes)) + ": " +
                                           std::strerror(errno)};
    }
    reservation = static_cast<std::byte*>(address);
    base = reinterpret_cast<std::byte*>(RoundUp(reinterpret_cast<uintptr_t>(reservation), kHugePage));
    return {};
  }

  int64_t NextExtentLocked() const PREHOC_REQUIRES(mutex) { return std::min(extent_blocks, capacity - ready); }

  // So that neither publishing blocks nor Free() allocates.
  Status MakeListRoom(int64_t blocks) {
    return WithinMemory([&]() -> Status {
      MutexLock lock(mutex);
      free.reserve(static_cast<size_t>(blocks));
      in_use.reserve(static_cast<size_t>(blocks));
      registered.reserve(registered.size() + 1);
      return {};
    });
  }

  // Maps, touches and publishes the next extent. Requires that this thread set `growing`; clears it.
  Status Grow(bool parallel) {
    int64_t first = 0, count = 0;
    {
      MutexLock lock(mutex);
      first = ready;
      count = NextExtentLocked();
      mapped = ready + count;
      peak_bytes = std::max(peak_bytes, static_cast<uint64_t>(mapped) * stride);
    }
    if (Status room = MakeListRoom(first + count); !room.ok()) {
      MutexLock lock(mutex);
      growing = false;
      mapped = first;
      grown.NotifyAll();
      return room;
    }
    std::byte* const data = base + static_cast<uint64_t>(first) * stride;
    const uint64_t bytes = static_cast<uint64_t>(count) * stride;
    PREHOC_TEST_POINT("host_arena.grow");
    bool huge = false, locked = true;
    Status status;
    if (::mprotect(data, bytes, PROT_READ | PROT_WRITE) != 0) {
      status = {StatusCode::kOutOfSpace, "host arena: the system has no " + FormatBytes(static_cast<double>(bytes)) +
                                             ": " + std::strerror(errno) + "; lower the host budget"};
    } else {
      // Before the first touch, or the kernel hands out small pages.
      huge = options.huge_pages && ::madvise(data, bytes, MADV_HUGEPAGE) == 0;
      const int64_t pieces = parallel ? CeilDiv(static_cast<int64_t>(bytes), static_cast<int64_t>(kHugePage)) : 1;
      const uint64_t piece = parallel ? kHugePage : bytes;
      const auto touch = [&](int64_t i) {
        const uint64_t offset = static_cast<uint64_t>(i) * piece;
        TouchPages(data + offset, std::min(piece, bytes - offset));
      };
      if (parallel) {
        executor->ParallelFor(pieces, touch);
      } else {
        touch(0);
      }
      locked = !options.lock_memory || ::mlock(data, bytes) == 0;
      if (options.registrar != nullptr) {
        status = options.registrar->Register(data, bytes);
        if (status.ok()) registered.push_back(data);
        if (!status.ok()) ::madvise(data, bytes, MADV_DONTNEED);  // not held: it is in no figure
      }
    }
    MutexLock lock(mutex);
    growing = false;
    if (status.ok()) {
      ready = first + count;
      in_use.resize(static_cast<size_t>(ready), false);
      // Lowest block last, so that it is handed out first.
      for (int64_t block = ready - 1; block >= first; --block) free.push_back(block);
      if (huge) huge_bytes += bytes;
      if (!locked) ++lock_failures;
      if (options.registrar != nullptr) pinned_bytes += bytes;
    } else {
      mapped = first;
    }
    grown.NotifyAll();
    return status;
  }

  // For a device the CPU's loops have little else to do, and one thread touches memory more slowly than it is pinned; without one they keep
  // their threads.
  bool TouchesInParallel() const { return options.registrar != nullptr; }

  bool WantsMoreLocked() const PREHOC_REQUIRES(mutex) {
    return !closed && ready < capacity && static_cast<int64_t>(free.size()) * 2 < extent_blocks;
  }
};

HostArena::HostArena(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

HostArena::~HostArena() {
  MutexLock lock(impl_->mutex);
  impl_->closed = true;
}

Result<std::unique_ptr<HostArena>> HostArena::Create(const Options& options, Executor* executor) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  PREHOC_CHECK(executor != nullptr);
  auto impl = std::make_shared<Impl>();
  impl->options = options;
  impl->executor = executor;
  impl->stride = StrideOf(options);
  impl->capacity = static_cast<int64_t>(options.budget / impl->stride);
  impl->extent_blocks =
      std::clamp<int64_t>(static_cast<int64_t>(std::min<uint64_t>(options.extent_bytes, 1ull << 46) / impl->stride), 1,
                          std::max<int64_t>(impl->capacity, 1));
  PREHOC_RETURN_IF_ERROR(impl->Reserve());
  if (impl->capacity > 0) {
    {
      MutexLock lock(impl->mutex);
      impl->growing = true;
    }
    PREHOC_RETURN_IF_ERROR(impl->Grow(/*parallel=*/true));
  }
  return std::unique_ptr<HostArena>(new HostArena(std::move(impl)));
}

Result<BlockId> HostArena::Allocate() {
  Impl& impl = *impl_;
  int64_t block = -1;
  bool post = false;
  while (block < 0) {
    {
      MutexLock lock(impl.mutex);
      while (impl.free.empty() && impl.growing) impl.grown.Wait(impl.mutex);
      if (!impl.free.empty()) {
        block = impl.free.back();
        impl.free.pop_back();
        impl.in_use[static_cast<size_t>(block)] = true;
        ++impl.used;
        post = impl.WantsMoreLocked() && !impl.growing && !impl.posted;
        if (post) impl.posted = true;
        break;
      }
      if (impl.ready == impl.capacity) {
        return {StatusCode::kOutOfSpace, "host arena: all " + std::to_string(impl.capacity) + " blocks of " +
                                             FormatBytes(static_cast<double>(impl.stride)) + " are in use"};
      }
      impl.growing = true;
    }
    // The background did not keep up.
    PREHOC_RETURN_IF_ERROR(impl.Grow(impl.TouchesInParallel()));
  }
  if (post) {
    const Status taken = impl.executor->Post([shared = impl_] {
      {
        MutexLock lock(shared->mutex);
        shared->posted = false;
        if (shared->growing || !shared->WantsMoreLocked()) return;
        shared->growing = true;
      }
      // A failure shows again, and is returned, in the Allocate() that needs the blocks.
      shared->Grow(shared->TouchesInParallel()).IgnoreError();
    });
    if (!taken.ok()) {
      MutexLock lock(impl.mutex);
      impl.posted = false;  // a later Allocate() asks again, or touches the extent itself
    }
  }
  return BlockId(static_cast<BlockId::Value>(block));
}

void HostArena::Free(BlockId block) {
  MutexLock lock(impl_->mutex);
  const auto index = static_cast<size_t>(block.value());
  PREHOC_CHECK(block.valid() && index < impl_->in_use.size() && impl_->in_use[index]);
  impl_->in_use[index] = false;
  --impl_->used;
  impl_->free.push_back(block.value());
}

std::span<std::byte> HostArena::range() const { return {impl_->base, static_cast<size_t>(impl_->capacity) * impl_->stride}; }

std::span<std::byte> HostArena::block(BlockId block) const {
  PREHOC_DCHECK(block.valid() && block.value() < impl_->capacity);
  return {impl_->base + static_cast<uint64_t>(block.value()) * impl_->stride, impl_->options.block_bytes};
}

size_t HostArena::block_stride() const { return impl_->stride; }
int64_t HostArena::capacity_blocks() const { return impl_->capacity; }

int64_t HostArena::used_blocks() const {
  MutexLock lock(impl_->mutex);
  return impl_->used;
}

uint64_t HostArena::used_bytes() const { return static_cast<uint64_t>(used_blocks()) * impl_->stride; }

uint64_t HostArena::mapped_bytes() const {
  MutexLock lock(impl_->mutex);
  return static_cast<uint64_t>(impl_->mapped) * impl_->stride;
}

uint64_t HostArena::peak_bytes() const {
  MutexLock lock(impl_->mutex);
  return impl_->peak_bytes;
}

void HostArena::VisitCounters(const CounterVisitor& visit) const {
  uint64_t used = 0, mapped = 0, peak = 0, huge = 0, lock_failures = 0, pinned = 0;
  {
    MutexLock lock(impl_->mutex);
    used = static_cast<uint64_t>(impl_->used) * impl_->stride;
    mapped = static_cast<uint64_t>(impl_->mapped) * impl_->stride;
    peak = impl_->peak_bytes;
    huge = impl_->huge_bytes;
    lock_failures = impl_->lock_failures;
    pinned = impl_->pinned_bytes;
  }
  const auto show = [&](const char* name, uint64_t value) { visit(name, static_cast<double>(value)); };
  show("host.capacity_bytes", static_cast<uint64_t>(impl_->capacity) * impl_->stride);
  show("host.used_bytes", used);
  show("host.mapped_bytes", mapped);
  show("host.peak_bytes", peak);
  show("host.huge_page_bytes", huge);
  show("host.lock_failures", lock_failures);
  if (impl_->options.registrar != nullptr) show("host.pinned_bytes", pinned);
}

Status HostArena::CheckInvariants() const {
  const Impl& impl = *impl_;
  MutexLock lock(impl.mutex);
  const auto bad = [](const std::string& what) { return Status(StatusCode::kCorrupt, "host arena: " + what); };
  if (impl.in_use.size() != static_cast<size_t>(impl.ready)) return bad("in_use has the wrong length");
  if (impl.ready > impl.mapped || impl.mapped > impl.capacity) return bad("more blocks ready than mapped or allowed");
  if (!impl.growing && impl.mapped != impl.ready) return bad("memory mapped and not ready");
  if (impl.peak_bytes > impl.options.budget) return bad("the budget was exceeded");
  const int64_t marked = std::count(impl.in_use.begin(), impl.in_use.end(), true);
  if (marked != impl.used) {
    return bad("used is " + std::to_string(impl.used) + ", marked are " + std::to_string(marked));
  }
  if (impl.used + static_cast<int64_t>(impl.free.size()) != impl.ready) return bad("blocks were lost or doubled");
  std::vector<bool> seen(static_cast<size_t>(impl.ready), false);
  for (const int64_t block : impl.free) {
    const auto index = static_cast<size_t>(block);
    if (index >= seen.size() || seen[index] || impl.in_use[index]) {
      return bad("block " + std::to_string(block) + " is free twice or in use");
    }
    seen[index] = true;
  }
  return {};
}

}  // namespace prehoc
