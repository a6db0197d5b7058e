#include "cache/host_tier.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/test_point.h"
#include "cache/internal/host_tier_impl.h"

namespace prehoc {

Status HostTier::Options::Validate() const {
  if (block_bytes == 0) return {StatusCode::kInvalid, "host tier: block_bytes=0; give the bytes of one block"};
  if (max_queued_writes < 0) {
    return {StatusCode::kInvalid, "host tier: max_queued_writes=" + std::to_string(max_queued_writes) +
                                      "; use 0 (no write-behind) or more"};
  }
  if (read_deadline_nanos < 0 || (read_deadline_nanos > 0 && reader == nullptr)) {
    return {StatusCode::kInvalid, "host tier: read_deadline_nanos=" + std::to_string(read_deadline_nanos) +
                                      "; use 0 (none), or more with a reader"};
  }
  if (write_deadline_nanos < 0 || (write_deadline_nanos > 0 && reader == nullptr)) {
    return {StatusCode::kInvalid, "host tier: write_deadline_nanos=" + std::to_string(write_deadline_nanos) +
                                      "; use 0 (none), or more with a reader"};
  }
  return {};
}

// ---- pins ----

BlockPin::BlockPin(BlockPin&& other) noexcept
    : tier_(std::exchange(other.tier_, nullptr)),
      block_(std::move(other.block_)),
      bytes_(std::exchange(other.bytes_, {})),
      use_(other.use_),
      loaded_(std::exchange(other.loaded_, false)) {}

BlockPin& BlockPin::operator=(BlockPin&& other) noexcept {
  BlockPin taken(std::move(other));
  std::swap(tier_, taken.tier_);
  std::swap(block_, taken.block_);
  std::swap(bytes_, taken.bytes_);
  std::swap(use_, taken.use_);
  std::swap(loaded_, taken.loaded_);
  return *this;
}

BlockPin::~BlockPin() {
  if (tier_ != nullptr) tier_->Unpin(this);
}

BlockPin HostTier::MakePin(const BlockRef& block, std::span<std::byte> bytes, BlockUse use, bool loaded) {
  BlockPin pin;
  pin.tier_ = this;
  pin.block_ = block;
  pin.bytes_ = bytes;
  pin.use_ = use;
  pin.loaded_ = loaded;
  return pin;
}

void HostTier::Unpin(BlockPin* pin) { impl_->Unpin(pin->block_.get(), pin->use_); }

// ---- the tier ----

HostTier::HostTier(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<HostTier>> HostTier::Create(const Options& options, Executor* executor, Executor* background,
                                                   ChunkStore* store) {
  PREHOC_RETURN_IF_ERROR(options.Validate());
  PREHOC_CHECK(executor != nullptr);
  if (store != nullptr && store->chunk_bytes() != options.block_bytes) {
    return Status(StatusCode::kInvalid, "host tier: block_bytes=" + std::to_string(options.block_bytes) +
                                            ", the store's chunks have " + std::to_string(store->chunk_bytes()) +
                                            " bytes; open the store with the same geometry");
  }
  auto impl = std::make_shared<Impl>();
  impl->options = options;
  impl->background = background != nullptr ? background : executor;
  impl->store = store;
  impl->clock = options.clock != nullptr ? options.clock : &SteadyClock::Get();
  HostArena::Options arena;
  arena.block_bytes = options.block_bytes;
  arena.unit_bytes = options.row_bytes;
  arena.budget = options.budget;
  arena.huge_pages = options.huge_pages;
  arena.registrar = options.registrar;
  PREHOC_ASSIGN_OR_RETURN(impl->arena, HostArena::Create(arena, executor));
  return std::unique_ptr<HostTier>(new HostTier(std::move(impl)));
}

HostTier::~HostTier() {
  {
    MutexLock lock(impl_->mutex);
    impl_->closed = true;
  }
  PREHOC_TEST_POINT("host_tier.close");
  MutexLock lock(impl_->mutex);
  while (impl_->running > 0) impl_->changed.Wait(impl_->mutex);
}

Result<BlockRef> HostTier::NewTail() {
  BlockRef ref;
  {
    auto block = std::make_unique<Block>();
    MutexLock lock(impl_->mutex);
    ref = impl_->RefLocked(block.get());
    block.release();
  }
  PREHOC_ASSIGN_OR_RETURN(const BlockId memory, impl_->TakeMemory(/*demand=*/true));
  const std::span<std::byte> bytes = impl_->BytesOf(memory);
  std::memset(bytes.data(), 0, bytes.size());
  MutexLock lock(impl_->mutex);
  impl_->In(ref.get()).memory = memory;
  ++impl_->tails;
  return ref;
}

BlockRef HostTier::Seal(BlockRef tail, const ChunkKey& key, const ChunkOrigin& origin) {
  PREHOC_CHECK(tail != nullptr);
  bool post = false;
  BlockRef result;
  std::span<const std::byte> bytes;
  ChunkSeal seal;
  {
    MutexLock lock(impl_->mutex);
    bytes = impl_->BytesOfTailLocked(tail.get());
    seal.seed = impl_->SeedLocked(key);
  }
  seal.hash = Hash128(bytes, seal.seed);
  {
    MutexLock lock(impl_->mutex);
    post = impl_->SealLocked(tail.get(), key, origin, seal, &result);
  }
  if (post) impl_->PostWriteBehind(result.get());
  return result;
}

Result<BlockPin> HostTier::Pin(const BlockRef& block, BlockUse use, PinCheck check) {
  PREHOC_CHECK(block != nullptr);
  bool loaded = false;
  Result<std::span<std::byte>> bytes = impl_->Hold(block.get(), check, &loaded);
  if (!bytes.ok()) return bytes.status();
  return MakePin(block, *bytes, use, loaded);
}

std::optional<BlockPin> HostTier::TryPin(const BlockRef& block, BlockUse use) {
  PREHOC_CHECK(block != nullptr);
  std::span<std::byte> bytes;
  {
    MutexLock lock(impl_->mutex);
    const BlockId memory = impl_->In(block.get()).memory;
    if (!memory.valid() || impl_->In(block.get()).damaged) return std::nullopt;
    ++impl_->counters.hits;
    impl_->PinLocked(block.get(), 1);
    bytes = impl_->BytesOf(memory);
  }
  return MakePin(block, bytes, use, /*loaded=*/false);
}

std::optional<BlockRef> HostTier::Find(const ChunkKey& key) {
  std::optional<BlockRef> ref;
  {
    MutexLock lock(impl_->mutex);
    if (impl_->FindKnownLocked(key, &ref)) return ref;
  }
  if (impl_->store == nullptr || (impl_->options.health != nullptr && !impl_->options.health->Available())) return std::nullopt;
  if (!impl_->store->Contains(key)) return std::nullopt;
  MutexLock lock(impl_->mutex);
  return impl_->FindStoredLocked(key);
}

void HostTier::Prefetch(std::span<const BlockRef> blocks) {
  if (impl_->store == nullptr) return;
  for (const BlockRef& block : blocks) {
    bool post = false;
    {
      MutexLock lock(impl_->mutex);
      post = impl_->QueuePrefetchLocked(block.get());
    }
    if (post && !impl_->PostPrefetch(block.get())) return;
  }
}

BlockState HostTier::state(const BlockRef& block) const {
  MutexLock lock(impl_->mutex);
  const BlockData& data = impl_->In(block.get());
  if (data.memory.valid()) return data.known ? BlockState::kHost : BlockState::kTail;
  return data.lost.ok() ? BlockState::kStoreOnly : BlockState::kLost;
}

Status HostTier::Flush() {
  if (impl_->store == nullptr) return {};
  Status first;
  const auto note = [&](const Status& status) {
    if (first.ok()) first = status;
  };
  TraceScope trace(impl_->options.tracer, "flush");
  std::vector<Block*> todo = impl_->TakeUnwritten();  // nothing below allocates: each has a job that must end
  trace.Say("blocks", static_cast<int64_t>(todo.size()));
  for (bool again = false;; again = true) {
    size_t busy = 0;  // of `todo`, moved to its front
    Status stall;
    for (Block* block : todo) {
      // After a deadline was missed nothing more is asked.
      const Status status = first.code() == StatusCode::kDeadline ? first : impl_->WriteNow(block);
      if (status.code() == StatusCode::kBusy) {
        stall = status;
        todo[busy++] = block;
        continue;
      }
      note(status);
      MutexLock lock(impl_->mutex);
      impl_->EndJobLocked(block);
    }
    if (first.code() != StatusCode::kDeadline) note(impl_->FlushStore());
    const bool helped = !again || busy < todo.size();
    todo.resize(busy);
    if (!todo.empty() && helped) continue;
    if (!todo.empty()) note(stall);
    break;
  }
  MutexLock lock(impl_->mutex);
  for (Block* block : todo) impl_->EndJobLocked(block);
  return first;
}

bool HostTier::FlipIdleBitForTest(uint64_t pick, uint64_t bit) {
  MutexLock lock(impl_->mutex);
  const int64_t unpinned = impl_->idle.size() + impl_->held.size();
  if (unpinned == 0) return false;
  auto left = static_cast<int64_t>(pick % static_cast<uint64_t>(unpinned));
  Block* block = nullptr;
  for (const BlockList* list : {&impl_->idle.streamed, &impl_->idle.kept, &impl_->held.streamed, &impl_->held.kept}) {
    for (block = list->front(); block != nullptr && left > 0; --left) block = impl_->In(block).after;
    if (block != nullptr) break;
  }
  const BlockData& data = impl_->In(block);
  if (data.writing || data.damaged) return false;
  const std::span<std::byte> bytes = impl_->BytesOf(data.memory);
  bytes[bit / 8 % bytes.size()] ^= std::byte{1} << (bit % 8);
  return true;
}

size_t HostTier::block_bytes() const { return impl_->options.block_bytes; }
std::span<std::byte> HostTier::range() const { return impl_->arena->range(); }
size_t HostTier::block_stride() const { return impl_->arena->block_stride(); }
int64_t HostTier::capacity_blocks() const { return impl_->arena->capacity_blocks(); }
int64_t HostTier::used_blocks() const { return impl_->arena->used_blocks(); }

void HostTier::VisitCounters(const CounterVisitor& visit) const {
  impl_->arena->VisitCounters(visit);
  Impl::Counters c;
  int64_t resident = 0, tails = 0, pinned = 0, waiting = 0, queued = 0;
  {
    MutexLock lock(impl_->mutex);
    c = impl_->counters;
    resident = impl_->resident;
    tails = impl_->tails;
    pinned = resident - impl_->idle.size() - impl_->held.size();
    waiting = impl_->sharers + impl_->reclaimers;
    queued = impl_->queued_writes;
  }
  const auto show = [&](const char* name, auto value) { visit(name, static_cast<double>(value)); };
  show("host.blocks", resident + tails);
  show("host.pinned", pinned);
  show("host.tails", tails);
  show("host.waiting", waiting);
  show("host.hits", c.hits);
  show("host.loads", c.loads);
  show("host.shared_loads", c.shared_loads);
  show("host.load_errors", c.load_errors);
  show("host.load_bytes", c.loads * block_bytes());
  show("host.load_nanos", c.load_nanos);
  show("host.evicted", c.evicted);
  show("host.forgotten", c.forgotten);
  show("host.lost", c.lost);
  show("host.healed", c.healed);
  show("host.duplicates", c.duplicates);
  show("host.prefetches", c.prefetches);
  show("host.prefetches_refused", c.prefetches_refused);
  show("host.verified_bytes", c.verified * block_bytes());
  show("host.corrupt", c.corrupt);
  show("host.late", c.late);
  show("write_behind.queued", queued);
  show("write_behind.written", c.written);
  show("write_behind.bytes", c.written * block_bytes());
  show("write_behind.replaced", c.replaced);
  show("write_behind.dropped", c.dropped);
  show("write_behind.failed", c.failed);
  show("write_behind.shed", c.shed);
}

// ---- invariants ----

Status HostTier::Impl::CheckBlockLocked(const ChunkKey& key, Block* block) const {
  const BlockData& data = In(block);
  const auto bad = [&](const char* what) {
    return Status(StatusCode::kCorrupt, "host tier: chunk " + key.ToString() + " " + what);
  };
  if (!data.known || data.key != key) return bad("is under a key that is not its own");
  if (data.pins < 0 || data.handles < 0 || data.jobs < 0) return bad("has a count below zero");
  if (data.pins > 0 && !data.memory.valid()) return bad("is pinned and not in memory");
  if (data.writing && !data.memory.valid()) return bad("is being written and not in memory");
  if ((data.list != nullptr) != (data.memory.valid() && data.pins == 0)) return bad("is in a list, or not, wrongly");
  const Unpinned& lists = data.handles == 0 ? idle : held;
  if (data.list != nullptr && data.list != &lists.streamed && data.list != &lists.kept) return bad("is in the list of others");
  if (data.memory.valid() && !data.sealed) return bad("is in memory and was never sealed");
  if (data.damaged && !data.memory.valid()) return bad("is damaged and not in memory");
  if (!data.lost.ok() && data.memory.valid()) return bad("is lost and in memory");
  if (data.handles == 0 && data.jobs == 0 && data.load == nullptr && !data.memory.valid()) return bad("has no use");
  return {};
}

Status HostTier::Impl::CheckLocked() const {
  int64_t in_memory = 0, unpinned = 0;
  int32_t writing = 0, write_queued = 0;
  for (const auto& [key, block] : map) {
    PREHOC_RETURN_IF_ERROR(CheckBlockLocked(key, block.get()));
    const BlockData& data = In(block.get());
    in_memory += data.memory.valid();
    unpinned += data.list != nullptr;
    writing += data.writing;
    write_queued += data.write_queued;
  }
  const auto bad = [](const char* what) { return Status(StatusCode::kCorrupt, std::string("host tier: ") + what); };
  if (in_memory != resident) return bad("`resident` does not count the blocks in memory");
  if (unpinned != idle.size() + held.size()) return bad("the lists have lost or doubled a block");
  if (writing > transit) return bad("more blocks are being written than are on their way");
  if (write_queued > queued_writes) return bad("more writes are queued than counted");
  const int64_t used = arena->used_blocks();
  if (resident + tails > used || used > arena->capacity_blocks()) return bad("blocks and arena do not add up");
  return {};
}

Status HostTier::CheckInvariants() const {
  PREHOC_RETURN_IF_ERROR(impl_->arena->CheckInvariants());
  MutexLock lock(impl_->mutex);
  return impl_->CheckLocked();
}

}  // namespace prehoc
