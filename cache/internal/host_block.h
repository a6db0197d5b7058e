// What the host tier knows of one block, and the lists that say which goes next. Internal to host_tier*.cc.
#pragma once
#include <array>
#include <cstdint>
#include <memory>

#include "base/check.h"
#include "base/ids.h"
#include "base/mutex.h"
#include "base/status.h"
#include "cache/host_tier.h"
#include "transfer/chunk_store.h"

namespace prehoc {

class BlockList;

// A read of the store that is under way, shared by all who want the block.
struct BlockLoad {
  ChunkKey key;
  int32_t waiters = 0;      // Pin()s that will find the block pinned for them when it is done
  bool done = false;
  bool abandoned = false;   // a prefetch found no memory: whoever waits tries again on its own
  int64_t deadline_at = INT64_MAX;  // the store's read is given up after that, once it has begun
  CondVar ended;            // done, or late; a load has its own, so that its end wakes nobody else
  bool late = false;        // it was: whoever waits has been told, and what comes in the end is kept for others
  bool from_store = false;  // else Seal() brought the bytes meanwhile
  Status status;
};

// Guarded by the tier's mutex, all of it: HostTier::Impl::In() is the way here.
struct BlockData {
  ChunkKey key;              // set by Seal() or Find(), then constant
  ChunkOrigin origin;        // for the store; set by Seal()
  ChunkSeal seal;            // taken when the bytes were sealed, or what the store compared them with
  bool sealed = false;       // there is one
  bool store_sealed = false; // and the store has just these bytes: this tier wrote or read them
  bool checked = false;      // since the first of its pins, somebody compared its memory with the seal
  bool damaged = false;      // its memory is not what was sealed; goes when the last pin dies
  bool known = false;        // in the map, under `key`; else a tail, or a tail that turned out to be a duplicate
  BlockId memory;            // invalid: not in host memory
  int32_t pins = 0;
  int32_t handles = 0;       // BlockRefs with a common count: 0 = nobody outside holds the block
  int32_t jobs = 0;          // writes and prefetches, queued or under way, that will look at the block
  bool stored = false;       // the store took it, or said that it has it
  bool writing = false;      // its bytes are being read by a Put(): they stay where they are
  bool write_queued = false;
  bool prefetch_queued = false;
  bool awaited = false;      // prefetched and not pinned since
  BlockUse use = BlockUse::kKeep;
  Status lost;               // not OK: no tier has the bytes, and why
  uint64_t sealed_at = 0;    // ordinal of its Seal()
  uint64_t refused_in = 0;   // the latest turn of eviction in which the store refused it
  std::shared_ptr<BlockLoad> load;
  std::weak_ptr<Block> self;
  BlockList* list = nullptr;  // the list it is in: exactly while it is known, in memory and not pinned
  Block* before = nullptr;
  Block* after = nullptr;
};

class Block {
 public:
  BlockData data;
};

// Blocks in the order of their last use, most recent at the back. Links lie in the blocks: no call allocates.
class BlockList {
 public:
  Block* front() const { return front_; }
  Block* back() const { return back_; }
  int64_t size() const { return size_; }

  void PushBack(Block* block) {
    PREHOC_DCHECK(block->data.list == nullptr);
    block->data.list = this;
    block->data.before = back_;
    block->data.after = nullptr;
    (back_ != nullptr ? back_->data.after : front_) = block;
    back_ = block;
    ++size_;
  }
  void Remove(Block* block) {
    PREHOC_DCHECK(block->data.list == this);
    BlockData& data = block->data;
    (data.before != nullptr ? data.before->data.after : front_) = data.after;
    (data.after != nullptr ? data.after->data.before : back_) = data.before;
    data.list = nullptr;
    data.before = data.after = nullptr;
    --size_;
  }

 private:
  Block* front_ = nullptr;
  Block* back_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace prehoc
