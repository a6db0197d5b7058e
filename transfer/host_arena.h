// The host tier's memory: equal blocks under one hard byte budget, in huge pages where the system gives them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/counters.h"
#include "base/executor.h"
#include "base/host_registrar.h"
#include "base/ids.h"
#include "base/result.h"

namespace prehoc {

// Owns at most budget / block_bytes blocks. Memory is mapped in extents; each is touched in parallel before it is
// used, and the next one is prepared in the background while blocks of the last are handed out, so that no
// caller pays for page faults. Never holds a byte more than the budget. Safe from any thread.
class HostArena {
 public:
  struct Options {
    size_t block_bytes = 0;            // required; rounded up to 4096 in memory
    size_t unit_bytes = 0;             // of which a block is a whole number: then all blocks lie whole units apart, too. 0 = need not
    uint64_t budget = 0;               // [bytes], hard; at least one block unless 0 (an arena without blocks)
    uint64_t extent_bytes = 64u << 20; // how much is mapped and touched at a time
    bool huge_pages = true;            // asks for transparent huge pages; falls back without
    bool lock_memory = false;          // mlock; falls back without, and counts it
    HostRegistrar* registrar = nullptr;  // pins each extent for a device, once it is touched; or null. Outlives the executor's jobs
    Status Validate() const;
  };
  // `executor` runs the touching; it outlives the arena. The first extent is touched here, in parallel.
  static Result<std::unique_ptr<HostArena>> Create(const Options& options, Executor* executor);
  ~HostArena();

  // Takes a block; its bytes are unspecified. Returns kOutOfSpace when all blocks are in use. Waits only for the
  // extent being touched, if every touched block is taken.
  Result<BlockId> Allocate();
  void Free(BlockId block);
  std::span<std::byte> block(BlockId block) const;  // [block_bytes], 4096-aligned; stays where it is until freed

  // The addresses among which all blocks lie, wherever memory is mapped yet; constant.
  std::span<std::byte> range() const;

  size_t block_stride() const;    // [bytes] that a block takes: whole pages of memory
  int64_t capacity_blocks() const;  // budget / block size in memory
  int64_t used_blocks() const;
  uint64_t used_bytes() const;      // blocks in use
  uint64_t mapped_bytes() const;    // memory really held; never above the budget
  uint64_t peak_bytes() const;      // the most mapped_bytes() ever was
  // host.{capacity_bytes,used_bytes,mapped_bytes,peak_bytes,huge_page_bytes,lock_failures}, and host.pinned_bytes with a registrar
  void VisitCounters(const CounterVisitor& visit) const;
  Status CheckInvariants() const;

 private:
  struct Impl;  // shared with the background job that touches the next extent: it may run after the arena died
  explicit HostArena(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace prehoc
